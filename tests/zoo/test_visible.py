"""Every type whose sparse steps are exact lets what they leave out stay visible, exactly, or refuses it by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import regate_patch
from model_adapters import find_adapter
from regate_patch import Active, UnsupportedGraphError, reference
from tests import oracle
from tests.zoo import of_any_release, releases
from tests.zoo.examine import difference, run
from tests.zoo.test_zoo import REFUSED

_NOT_FUSED, _RECURRENT = "do not meet in fused attention: .*softmax", "do not meet in fused attention: .*conv1d"
_CHOOSES, _MIXES = "an attention that chooses what it sees", "change what they read"
NOT_VISIBLE = {
    **dict.fromkeys(("blip", "git"), _NOT_FUSED),
    **dict.fromkeys(("dots3_note", "mistral_large4"), _CHOOSES),
    **dict.fromkeys(
        (
            "inkling2", "inkling_mm_model", "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
            "nemotron_h_omni", "qwen3_5", "qwen3_5_moe",
        ),
        _RECURRENT,
    ),
    "gemma3n": _MIXES,
}  # fmt: skip
IN_EVERY_RUN = {"gemma3n", "git", "granite4_vision", "idefics", "lfm2_vl", "llama4", "mistral_large4", "mllama"}


def _case(name: str) -> Any:
    return releases.case(name, *([] if name in IN_EVERY_RUN else [pytest.mark.zoo]))


def _layers(decoder: nn.Module) -> list[nn.Module]:
    return [*getattr(decoder, "gated_cross_attn_layers", []), *oracle.layers_of(decoder)]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [_case(name) for name in of_any_release() if name not in REFUSED])
def test_what_is_left_out_is_seen_as_it_stands(name: str) -> None:
    torch._dynamo.reset()
    specimen = of_any_release()[name]
    model, batch = specimen.double(), oracle.double(specimen.batch("right"))
    adapter = find_adapter(model)
    decoder, valid = adapter.decoder(model), adapter.layout(model, batch).valid
    active = valid & (torch.rand(valid.shape, generator=torch.Generator().manual_seed(0)) < 0.6)
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True)

    def engine() -> Any:
        chosen = replace(Active.from_mask(active), visible=valid)
        with adapter.followable(model, decoder), regate_patch.active(chosen):
            return run(model, decoder, [(batch, active)])

    if name in NOT_VISIBLE:
        with pytest.raises(UnsupportedGraphError, match=NOT_VISIBLE[name]):
            engine()
        return
    found = engine()
    handle.remove()
    with reference.masked(_layers(decoder), active, valid):
        expected = run(model, decoder, [(batch, active)])
    assert difference(found, expected) < 1e-5  # models compute norms in float32
