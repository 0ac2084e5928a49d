"""Mixtures of experts whose own code branches on data, so that no single graph can be captured of it.

While a gated forward runs, their blocks compute the same function by code that does not: which experts a token goes
to is still decided by the model's router, and every expert still sees its own tokens alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_adapters.base import ModelAdapter
from model_adapters.replaced import replaced


def _by_modality(
    self: Any, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ernie 4.5 VL: text tokens go to the text experts, visual ones to the others. [B, S, D] -> the same, scores."""
    if moe_mm_token_type_ids is None:
        output, scores = self.text_moe(hidden_states)
        output, scores = output.reshape(hidden_states.shape), scores.reshape(-1, self.num_experts)
    else:
        visual = moe_mm_token_type_ids.bool()
        output = torch.zeros_like(hidden_states)
        scores = hidden_states.new_zeros(*hidden_states.shape[:2], self.num_experts, dtype=torch.float)
        for chosen, experts in ((~visual, self.text_moe), (visual, self.vision_moe)):
            part, part_scores = experts(hidden_states[chosen])
            output[chosen] = part.reshape(-1, hidden_states.shape[-1])
            scores[chosen] = part_scores.reshape(-1, self.num_experts)
        scores = scores.reshape(-1, self.num_experts)
    if self.shared_experts is not None:
        output = output + self.shared_experts(hidden_states)
    return output, scores


def _every_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Step 3.7: each expert on its own tokens, also those experts that have none. [N, D] -> [N, D]."""
    output = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        token, place = torch.where(top_k_index == expert)
        hidden = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
        part = F.linear(hidden, self.down_proj[expert]) * top_k_weights[token, place, None]
        output = output.index_add(0, token, part.to(output.dtype))
    return output


def _replacing(class_name: str, forward: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    @contextlib.contextmanager
    def capturable(model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as scope:
            for kind in {type(m) for m in model.modules() if type(m).__name__ == class_name}:
                scope.enter_context(replaced(kind, forward=forward))
            yield

    return capturable


ERNIE = ModelAdapter(serves=("ernie4_5_vl_moe",), capturable=_replacing("Ernie4_5_VLMoeMoeBlock", _by_modality))
STEP = ModelAdapter(serves=("step3p7",), capturable=_replacing("Step3p7Experts", _every_expert))
