"""What the examples share: options, model, data. Nothing here is about ReGATE but its schedule."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import regate
from examples.conversations import Conversations, Record, collate, read
from examples.demo import tiny

SCHEDULE = ("warmup", "cycle", "full_steps")
TINY = {"warmup": 1, "cycle": 4, "full_steps": 1}  # a run of a few steps must reach the sparse ones


def parser(doc: str | None, name: str, *, lr: float = 1e-5) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a Hugging Face id or local path; default: a tiny LLaVA, made here")
    made.add_argument("--data", help="JSON or JSON-lines of conversations; default: a few captions of drawings")
    made.add_argument("--steps", type=int, default=8, help="optimizer steps")
    made.add_argument("--batch-size", type=int, default=4, help="samples per step and process")
    made.add_argument("--lr", type=float, default=lr)
    made.add_argument("--out", type=Path, default=Path("runs") / name)
    for field in SCHEDULE:
        made.add_argument(f"--{field.replace('_', '-')}", type=int, help="default: the library's; tiny model: short")
    return made


def config(args: argparse.Namespace) -> regate.Config:
    """The library's schedule, or the tiny run's; an option given wins."""
    given = {field: value for field in SCHEDULE if (value := getattr(args, field)) is not None}
    return regate.Config(**({} if args.model else TINY) | given)


def load(args: argparse.Namespace, **options: Any) -> tuple[PreTrainedModel, Any, list[Record]]:
    """(model, processor, records); `options` go to the model's `from_pretrained`."""
    path, records = source(args)
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, **options)
    return model.train(), processor, records


def source(args: argparse.Namespace) -> tuple[str, list[Record]]:
    """(where the model is, records); the tiny model is made once. Call it before DeepSpeed's ZeRO-3 is heard of, which
    would make that one, too, in parts."""
    records = read(args.data) if args.data else drawings()
    if not args.model and not hasattr(args, "tiny"):
        args.tiny = _make_tiny(records)
    return args.model or args.tiny, records


def loader(records: list[Record], processor: Any, batch_size: int) -> DataLoader[dict[str, Any]]:
    """The same order in every run, so that a resumed one can find its place."""
    return DataLoader(
        Conversations(records, processor),
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=collator(processor),
    )


def collator(processor: Any) -> Any:
    return partial(collate, pad_id=processor.tokenizer.pad_token_id)


def endless(batches: DataLoader[dict[str, Any]], device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    while True:
        for batch in batches:
            yield {name: x.to(device) for name, x in batch.items()}


@functools.cache
def drawings() -> list[Record]:
    """A few captions of easy-VQA drawings."""
    from examples.demo import captions  # only here: your own data needs no easy-vqa

    return [caption.record() for caption in captions.load()["train"][:64]]


def _make_tiny(records: list[Record]) -> str:
    """The demo's LLaVA, smaller, saved as any model is: from here on the examples load it like one from the hub."""
    contents = [message["content"] for record in records for message in record["messages"]]
    processor = tiny.build_processor(part["text"] for c in contents for part in c if part["type"] == "text")
    path = _temporary().name
    tiny.build_model(processor, width=64, layers=2).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Deleted at exit: PEFT asks for the base model's config again when it saves."""
    return tempfile.TemporaryDirectory()
