"""Images and conversations into the keyword arguments of a model's forward, with any Hugging Face processor.

A record is {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...],
"images": [path or PIL image, ...]}. `read` also takes LLaVA's {"image": ..., "conversations": [{"from": "human",
"value": "<image>\n..."}, ...]}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Record = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def read(path: str | Path) -> list[Record]:
    """Records of a JSON list or JSON-lines file; image paths are taken relative to it."""
    path = Path(path)
    text = path.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    return [_record(row, path.parent) for row in rows]


def _record(row: Record, folder: Path) -> Record:
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    images = [folder / i if isinstance(i, str) else i for i in images]
    if "messages" in row:
        return {"messages": row["messages"], "images": images}
    messages = []
    for turn in row["conversations"]:
        parts = turn["value"].split("<image>")
        content: list[Record] = [{"type": "text", "text": parts[0].strip()}] if parts[0].strip() else []
        for part in parts[1:]:
            content.append({"type": "image"})
            if part.strip():
                content.append({"type": "text", "text": part.strip()})
        messages.append({"role": _ROLES[turn["from"]], "content": content})
    return {"messages": messages, "images": images}


class Conversations(Dataset[dict[str, Tensor]]):
    """Encoded records; each is encoded once and kept.

    Args:
        records: see the module's description.
        processor: a Hugging Face processor with a chat template.
    """

    def __init__(self, records: list[Record], processor: Any) -> None:
        self.records, self.processor = records, processor
        self._encoded: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i not in self._encoded:
            self._encoded[i] = encode(self.records[i], self.processor)
        return self._encoded[i]


def encode(record: Record, processor: Any) -> dict[str, Tensor]:
    """One record as tensors; labels on the assistant's turns only."""
    messages = record["messages"]
    images = [i if isinstance(i, Image.Image) else Image.open(i).convert("RGB") for i in record["images"]]
    encoded = _process(processor, messages, images)
    ids = encoded["input_ids"][0]
    labels = torch.full_like(ids, -100)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _process(processor, messages[:turn], images, add_generation_prompt=True)["input_ids"][0]
        is_last = turn == len(messages) - 1
        end = ids if is_last else _process(processor, messages[: turn + 1], images)["input_ids"][0]
        if not torch.equal(ids[: len(start)], start):
            raise ValueError("the chat template renders a conversation's beginning differently from the whole")
        labels[len(start) : len(end)] = ids[len(start) : len(end)]
    return dict(encoded) | {"labels": labels[None]}


def _process(processor: Any, messages: list[Record], images: list[Any], **options: Any) -> dict[str, Tensor]:
    text = processor.apply_chat_template(messages, **options)
    used = sum(part["type"] == "image" for m in messages for part in m["content"] if not isinstance(part, str))
    return processor(text=[text], images=images[:used] or None, return_tensors="pt")


def collate(rows: list[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Pad token tensors on the right, concatenate the others (pixels, grids) along their first axis."""
    length = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": pad_id, "labels": -100}
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if first.dim() == 2 and first.shape[1] == rows[0]["input_ids"].shape[1]:
            pad = fill.get(name, 0)
            values = [torch.nn.functional.pad(v, (0, length - v.shape[1]), value=pad) for v in values]
        batch[name] = torch.cat(values)
    return batch
