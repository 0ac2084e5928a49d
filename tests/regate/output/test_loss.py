"""Losses per label: how many logits exist at once, and how often a head is called that ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regate.output import loss
from regate.output.loss import Places, label_losses


class Head(nn.Linear):
    """Notes how many rows it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return super().forward(hidden)


rows: list[int] = []


@pytest.fixture(autouse=True)
def _none_yet() -> None:
    rows.clear()


def _places(n: int) -> Places:
    labels = torch.arange(n + 1)[None] % 7
    return Places.of(labels, torch.arange(n + 1)[None] > 0)


@pytest.mark.parametrize("vocabulary", [32_000, 151_936, 262_208])
def test_logits_at_once_are_bounded_whatever_the_vocabulary(vocabulary: int) -> None:
    head = Head(8, vocabulary, device="meta")
    losses = label_losses(torch.empty(1, 9001, 8, device="meta"), _places(9000), head=head)
    assert (losses.shape, sum(rows)) == ((9000,), 9000)
    assert max(rows) * vocabulary <= 1.01 * loss.CHUNK
    assert max(rows) > 500  # and they are no more calls than that takes


@pytest.mark.parametrize("n", [0, 1, 20])
def test_losses_in_chunks_are_those_of_all_at_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_FIRST", 3)
    monkeypatch.setattr(loss, "CHUNK", 5 * 11)
    head, hidden, places = Head(8, 11), torch.randn(1, 21, 8), _places(n)
    logits = F.linear(hidden, head.weight, head.bias)
    expected = F.cross_entropy(logits[0, :n], places.label, reduction="none")
    torch.testing.assert_close(label_losses(hidden, places, head=head), expected)
    assert rows == {0: [], 1: [1], 20: [3, 5, 5, 5, 2]}[n]
    torch.testing.assert_close(label_losses(logits, places), expected)


@pytest.fixture
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("n", [0, 9000])
def test_ranks_call_a_split_head_once_however_many_labels_they_have(n: int) -> None:
    """Else one that has more labels would wait for one that has fewer."""
    torch.manual_seed(0)
    head, hidden, places = Head(8, 100_000), torch.randn(1, n + 1, 8), _places(n)
    expected = label_losses(hidden, places, head=head)
    fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    calls: list[int] = []
    head.register_forward_pre_hook(lambda module, args: calls.append(1))
    torch.testing.assert_close(label_losses(hidden, places, head=head), expected, atol=0, rtol=0)
    assert len(calls) == 1
