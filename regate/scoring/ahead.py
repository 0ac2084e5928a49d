"""Reference losses of a whole training set, before the first optimizer step.

own_part      the samples that are this rank's, in order, of the loader that will train on them
teach_all     goes through them; ranks in step with one another
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from model_adapters import Batch
from regate.errors import ConfigError
from regate.ranks import in_step, rank, ranks
from regate.scoring.scorer import Samples, Scorer

_EXCHANGED = 256  # batches, between which ranks tell one another what they have


def teach_all(
    scorer: Scorer,
    batches: Iterable[Batch],
    read: Callable[[Batch], Samples],
    *,
    steps: int,
    progress: bool,
    split: bool,
) -> None:
    """Reference losses for every sample of `batches`; each batch is stored as it is done.

    Args:
        scorer: has the teacher and the store.
        batches: of this rank.
        read: a batch's samples.
        steps: optimizer steps that the model has made.
        progress: show a progress bar.
        split: every rank calls this with batches of its own, and in the end has the losses of all.

    Raises:
        ConfigError: this rank has no batch, but others have.
    """
    size = len(batches) if isinstance(batches, Sized) else None
    shown = progress and (rank() == 0 or not split)
    samples = None
    parts: Iterable[Batch | None] = in_step(batches) if split else batches
    bar = tqdm(parts, desc="reference losses", unit="batch", total=size, disable=not shown)
    for done, batch in enumerate(bar, 1):
        if batch is not None:
            samples = read(batch)
        if samples is None:
            raise ConfigError("this rank has no batch to precompute, and others have: give each rank at least one")
        scorer.teach(samples, steps=steps)
        if split:
            scorer.pass_on(samples)
            if done % _EXCHANGED == 0:  # lest all of a large data set be held, and sent at once
                scorer.exchange.finish()
    if split:
        scorer.exchange.finish()


def has_length(dataloader: Any) -> bool:
    """Can its data set be gone through, from the first sample to a last one?"""
    dataset = getattr(dataloader, "dataset", None)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return sized and not isinstance(dataset, IterableDataset)


def own_part(dataloader: Any, batch_size: int) -> DataLoader[Any]:
    """Every so many-th sample for this rank, in order, each once; a training loader shuffles, and repeats some.

    Args:
        dataloader: of a data set that `has_length`, as torch or accelerate make it.
        batch_size: samples of a batch.
    """
    number, workers = len(dataloader.dataset), getattr(dataloader, "num_workers", 0)
    return DataLoader(
        dataloader.dataset,
        batch_size=None if dataloader.batch_sampler is None else batch_size,
        sampler=list(range(rank(), number, ranks())) or [rank() % number],
        collate_fn=dataloader.collate_fn,
        num_workers=workers,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context if workers else None,
        prefetch_factor=dataloader.prefetch_factor if workers else None,
    )
