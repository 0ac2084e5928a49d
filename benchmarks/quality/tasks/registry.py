"""The tasks by name; each is made when it is asked for, for its data may not be installed."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.tasks import Task, captions, clips, photos

TASKS: dict[str, Callable[..., Task]] = {
    "captions": captions.task, "photos": photos.task, "clips": clips.task,
    "captions-large": captions.large, "photos-early": photos.early,
}  # fmt: skip
