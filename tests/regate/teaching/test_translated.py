"""Teachers with another tokenizer: losses meet in the characters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import regate
from model_adapters import find_adapter
from regate.errors import ConfigError, StoreMismatchError
from regate.teaching.teacher import Teacher
from regate.teaching.translated import Translated
from regate.teaching.written import spread, write
from tests.zoo import CORE
from tests.zoo.common import END, IMAGE, START, TEXT, VIDEO

ENGLISH = "The blue disc crosses, naïvely, from 日本 🎉 to the lower-right corner; it's 12:30."
NUMBERS = [" ".join(f"t{(i * k) % 90}" for i in range(40)) for k in range(1, 40)]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def _fast(tokenizer: Tokenizer, **special: str) -> Any:
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or SPECIAL))


def bytes_of(texts: Iterable[str], size: int, *, whole: bool = True) -> Any:
    """As GPT's and Qwen's: pairs of bytes; with `whole` any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole else []
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return _fast(tokenizer)


def pieces_of(texts: Iterable[str], size: int) -> Any:
    """As Llama's and Gemma's: pieces that begin with a mark for the blank."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=size, special_tokens=[*SPECIAL.values()], show_progress=False)
    )
    return _fast(tokenizer)


def words() -> Any:
    """The zoo's ids as words: 17 is "t17"."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>", START: "<start>", END: "<end>", IMAGE: "<image>", VIDEO: "<video>"}
    vocabulary = {special.get(i, f"t{i}"): i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    others = [special[i] for i in (START, END, IMAGE, VIDEO)]
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=others)


def llama(tokenizer: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = tf.LlamaConfig(**(TEXT | {"vocab_size": len(tokenizer)} | changes))
    return tf.LlamaForCausalLM(config).double()


@pytest.mark.parametrize("tokenizer", [bytes_of([ENGLISH], 280), pieces_of([ENGLISH], 60)], ids=["bytes", "pieces"])
def test_tokens_share_out_the_text(tokenizer: Any) -> None:
    ids = tokenizer(ENGLISH, add_special_tokens=False)["input_ids"]
    text = write(tokenizer, [1, *ids, 2, *ids], {2})
    plain = tokenizer.decode(ids)
    assert text.pieces == (plain, "\0", plain)
    assert text.spans[0].tolist() == [0, 0], "the beginning is no character"
    assert (text.spans[1:, 0] == text.spans[:-1, 1]).all(), "no gap, nothing twice"
    assert text.spans[-1, 1] == text.characters == 2 * len(plain) + 1
    found = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
    if found["input_ids"] == ids:  # then it says itself where they are, but for parts of characters
        told = np.asarray(found["offset_mapping"])
        alone = [not any(c > "\x7f" for c in plain[a:b]) and b > a for a, b in told]
        alone[0] = False  # a mark without a blank
        assert (text.spans[1 : 1 + len(ids)][alone] == told[alone]).all()
        assert sum(alone) > 10


def test_what_a_loss_is_spread_over() -> None:
    sums = spread(np.array([2.0, 0.5, 1.0]), np.array([[0, 4], [4, 4], [4, 6]]), 6)
    np.testing.assert_allclose(np.diff(sums), [0.5, 0.5, 0.5, 0.5, 1.0, 0.5])


def test_the_same_tokens_have_the_same_losses() -> None:
    """Through the characters and back, where the tokenizers agree; an end in between, and padding."""
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 12] = 1, 2  # as `Translated` begins
    labels, valid = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    labels[:, :6], valid[1, 20:] = -100, False
    labels[~valid] = -100
    layout = regate.Layout(ids, labels, valid, torch.zeros_like(valid))
    model = llama(words())
    given = regate.CrossTokenizerTeacher(model, words(), words())
    plain = Teacher(model, find_adapter(model), backend="eager", source="given")
    for got, want in zip(_read(given, layout), plain.losses({"input_ids": ids}, layout), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def _read(given: Any, layout: regate.Layout) -> list[torch.Tensor]:
    return Translated(given, find_adapter(given.model), {2}, backend="eager", on_unsupported="raise").losses({}, layout)


def _translated(given: Any, model: Any, batch: Any) -> list[torch.Tensor]:
    return _read(given, find_adapter(model).layout(model, batch))


def _by_hand(teacher: Any, tokenizer: Any, ids: list[int], asked: list[bool], begin: int = 1) -> list[float]:
    """Character by character, by the model as it is."""
    told, where, at = [], [], 0
    for i in ids:
        if i < 90:
            token = (" " if told and told[-1] != "\0" else "") + f"t{i}"
            told.append(token)
        else:
            token = ""
        where.append((at, at + len(token)))
        at += len(token)
    found = tokenizer("".join(told), add_special_tokens=False, return_offsets_mapping=True)
    own = torch.tensor([[begin, *found["input_ids"]]])
    with torch.no_grad():
        logits = teacher(input_ids=own).logits[0, :-1]
    losses = F.cross_entropy(logits, own[0, 1:], reduction="none").tolist()
    characters = [0.0] * at
    for loss, (a, b) in zip(losses, found["offset_mapping"], strict=True):
        for c in range(a, b):
            characters[c] += loss / (b - a)
    return [sum(characters[a:b]) for (a, b), wanted in zip(where, asked, strict=True) if wanted]


@pytest.mark.parametrize(
    "tokenizer", [bytes_of(NUMBERS, 70, whole=False), pieces_of(NUMBERS, 70)], ids=["bytes", "pieces"]
)
def test_losses_are_the_characters(tokenizer: Any) -> None:
    model, batch = CORE["llava"].double(), CORE["llava"].batch("left")
    teacher = llama(tokenizer)
    given = regate.CrossTokenizerTeacher(teacher, tokenizer, words())
    assert not given.agree
    got = _translated(given, model, batch)
    for row, losses in enumerate(got):
        seen = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][seen].tolist(), batch["labels"][row][seen]
        expected = _by_hand(teacher.eval(), tokenizer, ids, (labels != -100).tolist())
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_a_gate_trains_with_it_and_knows_it_again(tmp_path: Any) -> None:
    tokenizer = bytes_of(NUMBERS, 70, whole=False)
    given = regate.CrossTokenizerTeacher(llama(tokenizer), tokenizer, words())
    config = regate.Config(warmup=0, cycle=1, full_steps=0)
    model, batch = CORE["llava"].double(), CORE["llava"].batch()
    gate = regate.apply(model, config, teacher=given, store=str(tmp_path))
    model(**batch).loss.backward()
    assert gate.report()["teacher_samples"] == 2
    layout = find_adapter(model).layout(model, batch)
    losses = torch.cat(_translated(given, model, batch))
    kept = gate.last.kept[layout.labels != -100]  # type: ignore[union-attr]
    first = len(kept) - int((layout.labels[1] != -100).sum())
    for own, chosen in ((losses[:first], kept[:first]), (losses[first:], kept[first:])):
        assert own[chosen].min() >= own[~chosen].max(), "the hardest for the teacher are kept"
    regate.remove(model)
    other = bytes_of(NUMBERS, 66, whole=False)
    with pytest.raises(StoreMismatchError):
        regate.apply(
            model, config, teacher=regate.CrossTokenizerTeacher(llama(tokenizer), other, words()), store=str(tmp_path)
        )


def test_tokenizers_that_agree_need_no_translation() -> None:
    model, batch = CORE["llava"].double(), CORE["llava"].batch()
    teacher = llama(words())
    seen = []
    for choice in (teacher, regate.CrossTokenizerTeacher(teacher, words(), words())):
        gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), teacher=choice)
        gate.precompute([batch], progress=False)
        seen.append((type(gate._teacher), gate._teacher.fingerprint()))  # type: ignore[union-attr]
        regate.remove(model)
    assert seen[0] == seen[1]


def test_what_is_not_read_is_guessed_evenly() -> None:
    tokenizer = bytes_of(NUMBERS, 70, whole=False)
    model, batch = CORE["llava"].double(), CORE["llava"].batch("none")
    batch["labels"] = batch["input_ids"].clone()  # markers of images, too
    given = regate.CrossTokenizerTeacher(llama(tokenizer), tokenizer, words())
    whole = _translated(given, model, batch)[0]
    labels = find_adapter(model).layout(model, batch).labels[0, 1:]
    silent = labels[labels != -100] >= START
    assert silent.any()
    unread = math.log(len(tokenizer))
    assert (whole[silent] == torch.tensor(unread)).all()
    assert (whole[~silent] != unread).all()
    short = regate.CrossTokenizerTeacher(llama(tokenizer, max_position_embeddings=9), tokenizer, words())
    cut = _translated(short, model, batch)[0]
    assert cut[0] == torch.tensor(unread)
    assert cut[-1] != unread


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tokenizer": "Qwen/Qwen3-0.6B"}, "tokenizer must be a tokenizer, got str"),
        ({"model": "Qwen/Qwen3-0.6B"}, "model must be a model, got str"),
        ({"student_tokenizer": None}, "student_tokenizer must be a tokenizer, got NoneType"),
    ],
)
def test_wrong_parts_are_named(wrong: dict[str, Any], told: str) -> None:
    tokenizer = words()
    with pytest.raises(ConfigError, match=told):
        regate.CrossTokenizerTeacher(
            **({"model": llama(tokenizer), "tokenizer": tokenizer, "student_tokenizer": tokenizer} | wrong)
        )


def test_a_tokenizer_that_does_not_tell_where_is_refused() -> None:
    class Slow:
        is_fast, all_special_ids = False, ()
        decode = None

    with pytest.raises(ConfigError, match="must tell where"):
        regate.CrossTokenizerTeacher(llama(words()), Slow(), words())


def test_ids_that_the_teacher_does_not_have_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Once: it may have another tokenizer."""
    model, batch = CORE["llava"].double(), CORE["llava"].batch()
    layout = find_adapter(model).layout(model, batch)
    own = llama(words())
    teacher = Teacher(own, find_adapter(own), backend="eager", source="given")
    told = []
    for size in (100, 50, 50):
        own.resize_token_embeddings(size)
        teacher.losses(batch, layout)
        told = [r.message.split(":")[0] for r in caplog.records if "CrossTokenizerTeacher" in r.message]
        assert bool(told) == (size == 50)
    assert told == [
        f"{int((layout.labels >= 50).sum())} of {int((layout.labels != -100).sum())} answer tokens of this batch are "
        "none of the teacher's 50"
    ]
