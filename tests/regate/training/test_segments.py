"""A sample is itself wherever it stands: in a row of its own, or with others in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from model_adapters import Layout
from regate.errors import PackedRowsError
from regate.training.segments import Segments, starts
from tests.packing import packed, rows_of
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
VISIBLE = replace(SPARSE, elided="visible", visual_keep=0.5)


def _learn(name: str, config: regate.Config | None, lay: Any, *, steps: int = 3, teacher: Any = "auto") -> Any:
    """Losses, gradients and choices of some steps, and the difficulties learnt in them."""
    torch._dynamo.reset()
    model = CORE[name].build().double()
    gate = regate.apply(model, config, teacher=teacher) if config else None
    found = []
    for step in range(steps):
        model.zero_grad(set_to_none=True)
        batch = rows_of(name, 3, step % 2)
        loss = model(**lay(model, batch), use_cache=False).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        kept = None if gate is None or gate.last is None else gate.last.labels_left[gate.last.kept].tolist()
        found.append((loss.detach(), grads, kept))
    if gate is None:
        return found, {}
    gate.flush()
    return found, {key: list(losses) for key, losses in gate.store.items("difficulty")}


def _own_rows(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _assert_same(got: Any, expected: Any) -> None:
    for (loss, grads, kept), (its_loss, its_grads, its_kept) in zip(got, expected, strict=True):
        torch.testing.assert_close(loss, its_loss, atol=2e-6, rtol=0)  # transformers' losses are float32
        assert kept == its_kept or its_kept is None
        for n, gradient in its_grads.items():
            torch.testing.assert_close(grads[n], gradient, atol=1e-8, rtol=0, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.few(2)
@pytest.mark.parametrize("config", [SPARSE, VISIBLE], ids=["hidden", "visible"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_packed_samples_are_those_of_rows_of_their_own(name: str, config: regate.Config) -> None:
    """Losses, gradients, choices and difficulties, the teacher's losses among what they are made of."""
    alone, difficulties = _learn(name, config, _own_rows)
    together, the_same = _learn(name, config, packed)
    _assert_same(together, alone)
    assert len(difficulties) == 6
    assert the_same.keys() == difficulties.keys()
    for key, losses in difficulties.items():
        assert the_same[key] == pytest.approx(losses, abs=2e-2)  # stored in 16 bits


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_full_steps_are_the_unpatched_packed_model(name: str) -> None:
    expected, _ = _learn(name, None, packed)
    got, _ = _learn(name, regate.Config(warmup=1000), packed, teacher=None)
    _assert_same(got, expected)


def test_padding_at_the_end_of_packed_rows() -> None:
    def padded(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        call = packed(model, batch, padding=4)
        ids = call["position_ids"]
        return call | {"position_ids": torch.cat([ids, torch.zeros_like(ids[:, :4])], 1)}

    expected, _ = _learn("llava", None, padded)
    got, _ = _learn("llava", regate.Config(warmup=1000), padded, teacher=None)
    _assert_same(got, expected)


@pytest.mark.parametrize("added", [False, True])
def test_samples_kept_apart_by_a_square_mask_alone(added: bool) -> None:
    """Its position ids go on from sample to sample; what is added to scores hides as False does."""

    def masked(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        call = packed(model, batch)
        mask = _square((call.pop("position_ids")[0] == 0).cumsum(0))
        return call | {"attention_mask": torch.where(mask, 0.0, -1e9).double() if added else mask}

    expected, _ = _learn("llava", None, masked)
    got, _ = _learn("llava", regate.Config(warmup=1000), masked, teacher=None)
    _assert_same(got, expected)
    _, difficulties = _learn("llava", SPARSE, masked)
    assert len(difficulties) == 6


def _with_gaps(model: Any, batch: dict[str, Any], *, gap: int = 3) -> dict[str, Any]:
    """Packed, each sample followed by padding, and by that of its row."""
    call = {name: x for name, x in batch.items() if name not in ("input_ids", "labels", "attention_mask")}
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, gap))
    numbers = mask * torch.arange(1, len(mask) + 1)[:, None]
    for name, fill in (("input_ids", 0), ("labels", -100)):
        call[name] = torch.nn.functional.pad(batch[name], (0, gap), value=fill).reshape(1, -1)
    return call | {
        "attention_mask": numbers.reshape(1, -1),
        "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0).reshape(1, -1),
    }


@pytest.mark.parametrize("told", ["numbers", "position_ids", "square"])
def test_samples_with_padding_between_them(told: str) -> None:
    """They are those of rows of their own, by whatever they are told apart."""

    def laid(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        call = _with_gaps(model, batch)
        numbers = call["attention_mask"]
        if told == "numbers":
            del call["position_ids"]
        if told == "position_ids":
            call["attention_mask"] = (numbers > 0).long()
        if told == "square":
            del call["position_ids"]
            call["attention_mask"] = _square(numbers[0]) & (numbers > 0)[:, None]
        return call

    expected, _ = _learn("llava", None, laid)
    got, _ = _learn("llava", regate.Config(warmup=1000), laid, teacher=None)
    _assert_same(got, expected)
    _, alone = _learn("llava", SPARSE, _own_rows, steps=2, teacher=None)
    _, difficulties = _learn("llava", SPARSE, laid, steps=2, teacher=None)
    assert difficulties.keys() == alone.keys()


def test_a_label_that_padding_between_samples_predicts() -> None:
    """It is no sample's, but full steps train on it as the model does."""

    def laid(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        call = _with_gaps(model, batch)
        begins = torch.nn.functional.pad(call["attention_mask"].diff() > 0, (1, 0))
        return call | {"labels": call["labels"].masked_fill(begins, 7)}

    expected, _ = _learn("llava", None, laid, steps=1)
    got, _ = _learn("llava", regate.Config(warmup=1000), laid, steps=1, teacher=None)
    _assert_same([(*got[0][:2], None)], expected)
    _, alone = _learn("llava", SPARSE, _own_rows, steps=1, teacher=None)
    _, difficulties = _learn("llava", SPARSE, laid, steps=1, teacher=None)
    assert difficulties.keys() == alone.keys()


def test_a_label_with_which_a_sample_begins_is_no_ones() -> None:
    """The last position of one sample must not learn to predict the first of the next."""
    torch._dynamo.reset()
    model = CORE["llava"].build().double()
    batch = packed(model, rows_of("llava", 2, 0))
    start = int((batch["position_ids"][0, 1:] == 0).nonzero()[0]) + 1
    expected = model(**batch, use_cache=False).loss.item()
    batch["labels"][0, start] = 7
    assert float(model(**batch, use_cache=False).loss) != pytest.approx(expected, abs=1e-4)
    gate = regate.apply(model, regate.Config(warmup=1000), teacher=None)
    assert float(model(**batch, use_cache=False).loss) == pytest.approx(expected, abs=1e-5)
    assert gate.last is not None
    assert not gate.last.kept[0, start]


# -- the signs of a sample's beginning ------------------------------------------------------------------


def _layout(rows: int, length: int, *, valid: Tensor | None = None, visual: Tensor | None = None) -> Layout:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    valid = torch.ones(rows, length, dtype=torch.bool) if valid is None else valid
    return Layout(zeros, zeros, valid, torch.zeros_like(valid) if visual is None else visual)


def _square(sample: Tensor) -> Tensor:
    """[1, 1, S, S] bool: causal order within each sample of a row [S]."""
    return (sample[:, None] == sample).tril()[None, None]


TEXT = torch.tensor([[0, 1, 2, 0, 0, 1]])  # three samples: of three tokens, of one, of two
# An image of one time step, in the three rows of M-RoPE.
IMAGE = torch.tensor([[[0, 1, 1, 1, 1, 2]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
# Text, a video of three frames of 2 x 3 patches, two seconds apart, text; after it a sample that begins with an image.
VIDEO = torch.tensor(
    [
        [[0, *[1] * 6, *[3] * 6, *[5] * 6, 6, 0, 0, 0, 0, 2]],
        [[0, *[1, 1, 1, 2, 2, 2] * 3, 6, 0, 0, 1, 1, 2]],
        [[0, *[1, 2, 3] * 6, 6, 0, 1, 0, 1, 2]],
    ]
)


@pytest.mark.parametrize(
    ("call", "begins"),
    [
        ({"position_ids": TEXT}, [3, 4]),
        ({"position_ids": TEXT.expand(3, 1, 6)}, [3, 4]),
        ({"position_ids": torch.stack([TEXT, TEXT * 0 + 5, TEXT * 0, TEXT])}, [3, 4]),
        ({"position_ids": IMAGE}, []),
        ({"position_ids": VIDEO}, [20]),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 4, 6])}, [3, 4]),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 6], dtype=torch.int32)}, [3, 4]),
        ({"cu_seqlens": torch.tensor([[0, 3, 4, 6]], dtype=torch.int32)}, [3, 4]),
        ({"attention_mask": torch.tensor([[0, 3, 4, 6]], dtype=torch.int32)}, [3, 4]),
        ({"attention_mask": torch.tensor([[0, 1, 2, 3, 4, 6]], dtype=torch.int32)}, [1, 2, 3, 4]),
        ({"cu_seqlens": [0, 3, 4, 6]}, [3, 4]),
        ({"cu_seqlens_q": torch.tensor([0, 3, 4, 6, 6, 6])}, [3, 4]),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 6, -1, -1])}, [3, 4]),
        ({"cu_seq_lens": torch.tensor([3, 4, 6])}, [3, 4]),
        ({"seqlens": torch.tensor([3, 1, 2])}, [3, 4]),
        ({"seq_lens": [[3, 1, 2]]}, [3, 4]),
        ({"seq_lens": [6], "seq_len": 6, "sequence_lengths": torch.tensor([6])}, []),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2]])}, [3, 4]),
        ({"seq_idx": torch.tensor([0, 0, 0, 1, 2, 2])}, [3, 4]),
        ({"sequence_id": [[0, 0, 0, 1, 2, 2]]}, [3, 4]),
        ({"segment_ids": torch.tensor([[0.0, 0, 0, 1, 2, 2]])}, [3, 4]),
        ({"document_id": torch.tensor([[5, 5, 5, 1, 2, 2]], dtype=torch.int8)}, [3, 4]),
        ({"doc_ids": torch.tensor([[0, 0, 0, 1, 2, 2]])}, [3, 4]),
        ({"document_id": torch.tensor([4]), "doc_id": 5, "doc_ids": ["a", "b"]}, []),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 3, 3]])}, [3, 4]),
        ({"attention_mask": torch.ones(1, 6, dtype=torch.int64)}, []),
        ({"attention_mask": _square(torch.tensor([1, 1, 1, 2, 3, 3]))}, [3, 4]),
        ({"attention_mask": {"full_attention": _square(torch.tensor([1, 1, 1, 2, 3, 3]))}}, [3, 4]),
        ({"attention_mask": _square(torch.ones(6))}, []),
        ({"position_ids": torch.arange(6)[None]}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_signs(call: dict[str, Any], begins: list[int]) -> None:
    length = call["position_ids"].shape[-1] if "position_ids" in call else 6
    found = starts(call, _layout(1, length))
    assert (found.flatten().nonzero().flatten().tolist() if found is not None else []) == begins


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_a_square_mask_hides(left: bool) -> None:
    """The sample is the one that it is alone."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), {k: v[:1] for k, v in CORE["llava"].batch("none", rows=1).items()}
    length, extra = batch["input_ids"].shape[1], (3, 0) if left else (0, 3)
    padded = {k: torch.nn.functional.pad(batch[k], extra, value=v) for k, v in (("input_ids", 0), ("labels", -100))}
    there = torch.nn.functional.pad(torch.ones(length, dtype=torch.bool), extra)
    mask = (there & torch.ones(length + 3, length + 3, dtype=torch.bool).tril())[None, None]
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch)
    model(**batch | padded | {"attention_mask": mask})
    gate.flush()
    assert gate.store.stats()["difficulty"] == 1
    assert gate.report()["positions_seen"] == 2 * length


def test_padding_begins_nothing() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = starts({"position_ids": ids, "attention_mask": mask}, _layout(2, 5, valid=mask.bool()))
    assert found is not None
    assert not found.any()


def test_an_image_at_a_samples_beginning_is_one_sample() -> None:
    """All its positions have the lowest id of any, 0."""
    ids = torch.stack(
        [torch.tensor([[0, 0, 0, 0, 2]]), torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[0, 1, 0, 1, 2]])]
    )
    visual = torch.tensor([[True, True, True, True, False]])
    found = starts({"position_ids": ids}, _layout(1, 5, visual=visual))
    assert found is not None
    assert not found.any()


@pytest.mark.parametrize(
    "call",
    [
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 2, 2]])},
        {"seq_idx": torch.tensor([[0, 0, 0, -1, -1, 1, 1]])},
        {"cu_seqlens": torch.tensor([0, 4, 7])},
        {"cu_seqlens": torch.tensor([0, 3, 5, 7])},
        {"seq_lens": [5, 2]},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 9, 9, 0, 1]]).expand(3, 1, 7)},
        {"attention_mask": _square(torch.tensor([1, 1, 1, 3, 3, 2, 2]))},
    ],
)
def test_signs_of_a_beginning_behind_padding(call: dict[str, Any]) -> None:
    valid = torch.tensor([[True, True, True, False, False, True, True]])
    found = starts({"attention_mask": valid.long(), **call}, _layout(1, 7, valid=valid))
    assert found is not None
    assert found.nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"seq_idx": torch.tensor([[4, 4, 4, 0, 0, 4, 4]])},
        {"cu_seqlens": torch.tensor([0, 7])},
        {"position_ids": torch.tensor([[0, 1, 2, 1, 1, 3, 4]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6]])},
    ],
)
def test_padding_within_a_sample(call: dict[str, Any]) -> None:
    """Tokens that a mask hides are no end."""
    valid = torch.tensor([[True, True, True, False, False, True, True]])
    found = starts({"attention_mask": valid.long(), **call}, _layout(1, 7, valid=valid))
    assert found is not None
    assert not found.any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"cu_seqlens": torch.tensor([[0, 3], [4, 6]])}, r"`cu_seqlens` \[2, 2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0, 12.0])}, r"`cu_seqlens` \[3\] torch.float32"),
        (
            {"cu_seqlens_q": [0, 6, 15]},
            r"`cu_seqlens_q` \[0, 6, 15\] does not lie on this batch \[2, 6\], 10 positions",
        ),
        ({"cu_seqlens": [0, 6, 3, 12]}, "must ascend from 0 to 12"),
        ({"cu_seqlens": [0, 4, 10]}, "be counted with padding"),
        ({"cu_seqlens": [0, 6, 10]}, "be counted with padding"),
        ({"cu_seqlens": [0, 4, 8, 12]}, "begin anew with each row"),
        ({"cu_seqlens": [[0, 6], [1]]}, "no tensor can be made of it"),
        ({"seq_lens": [3, 3, 9]}, r"`seq_lens`, added up, \[0, 3, 6, 15\]"),
        ({"seq_lens": [[3, 3], [4, 2]]}, r"`seq_lens`, added up, \[2, 3\]"),
        ({"segment_ids": torch.zeros(2, 5)}, r"`segment_ids` \[2, 5\] seems to tell packed samples apart"),
        ({"doc_ids": torch.zeros(6)}, r"decoder's positions \[2, 6\]"),
    ],
)
def test_boundaries_that_are_none(call: dict[str, Any], says: str) -> None:
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :2] = False
    with pytest.raises(PackedRowsError, match=says):
        starts(call, _layout(2, 6, valid=valid))


def test_one_number_for_each_row_begins_nothing() -> None:
    rows = {"seq_lens": [4, 6], "doc_id": torch.tensor([[1], [2]]), "document_ids": ["a", "b"]}
    assert starts(rows, _layout(2, 6)) is None


@pytest.mark.parametrize("seed", range(20))
def test_packing_undoes_unpacking(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(3, 17, generator=generator) < 0.3
    segments = Segments.of(begins, (3, 17))
    x = torch.randint(1, 99, (3, 17), generator=generator)
    apart = segments.unpack(x)
    assert len(apart) == len(segments) == int(begins[:, 1:].sum()) + 3
    assert torch.equal(segments.pack(apart), x)
    assert torch.equal(segments.unpack(torch.stack([x, x + 1]))[1][apart != 0], (apart + 1)[apart != 0])
    assert torch.equal(segments.owner.diff(dim=1) != 0, begins[:, 1:])
