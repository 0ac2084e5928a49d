"""Many decoders of one class in one process, as in a sweep."""

from __future__ import annotations

import torch

import regate_patch
from tests.plain import Decoder


def test_each_gate_is_captured_anew_and_none_is_too_many() -> None:
    """Dynamo counts what it compiled for one code, also for decoders that are gone."""
    torch._dynamo.reset()
    x, everywhere = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(70):
            decoder = Decoder("pre_norm")
            expected = decoder(x)
            handle = regate_patch.patch(decoder, backend="eager")
            with regate_patch.active(everywhere):
                torch.testing.assert_close(decoder(x), expected)
            assert handle.statistics.recompiles == 0
            handle.remove()
