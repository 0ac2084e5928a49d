"""Looking at a decoder that has no weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import regate_patch
from tests.plain import Decoder
from tests.zoo.common import TEXT


def test_meta_model() -> None:
    with torch.device("meta"):
        decoder = LlamaModel(LlamaConfig(**{**TEXT, "hidden_size": 4096, "num_hidden_layers": 3}))
    embeds, mask = torch.empty(2, 64, 4096, device="meta"), torch.ones(2, 64, device="meta")
    found = regate_patch.inspect(decoder, inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    assert (found.attention, found.mlp, len(found.graphs)) == (3, 3, 1)
    weights = sum(p.numel() for layer in decoder.layers for p in layer.parameters() if p.dim() == 2)
    assert found.graphs[0].flops_linear == 2 * weights
    assert "forward" not in decoder.__dict__


def test_refuses_as_a_patched_decoder_does() -> None:
    with pytest.raises(regate_patch.UnsupportedGraphError, match="one graph"):
        regate_patch.inspect(Decoder("broken"), torch.randn(2, 6, 16))
    with pytest.raises(regate_patch.NoBlocksError):
        regate_patch.inspect(torch.nn.Linear(8, 8), torch.randn(2, 6, 8))


def test_a_patched_decoder_is_looked_at_as_it_was() -> None:
    decoder, x = Decoder(), torch.randn(2, 6, 16)
    expected = regate_patch.inspect(decoder, x)
    regate_patch.patch(decoder, backend="eager")
    assert regate_patch.inspect(decoder, x).flops(6) == expected.flops(6)
