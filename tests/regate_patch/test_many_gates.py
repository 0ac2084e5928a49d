"""Many decoders of one class in one process, as in a sweep."""

from __future__ import annotations

import pytest
import torch

import regate_patch
from regate_patch import capture
from tests.plain import Decoder, Style


def _gate_many(number: int, style: Style) -> None:
    torch._dynamo.reset()
    x, everywhere = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(number):
            decoder = Decoder(style, layers=2)
            expected = decoder(x)
            handle = regate_patch.patch(decoder, backend="eager", allow_graph_breaks=style == "broken")
            with regate_patch.active(everywhere):
                torch.testing.assert_close(decoder(x), expected)
            assert handle.statistics.recompiles == 0
            handle.remove()


def test_each_gate_is_captured_anew_and_none_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo counts what it compiled for one code, also for decoders that are gone."""
    monkeypatch.setitem(capture._DYNAMO, "recompile_limit", 4)
    _gate_many(6, "pre_norm")


@pytest.mark.matrix
def test_decoders_that_are_cut_at_layers_share_their_code() -> None:
    """Two entries a gate: the 32nd would be one too many for a limit of 64."""
    _gate_many(33, "broken")
