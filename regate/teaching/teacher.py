"""The reference loss: what a frozen text-only teacher makes of each label (paper, section 3.1).

The teacher is the student's own language model as it was before training. It sees the text with a placeholder at
every visual position. By default placeholders are masked out of its attention, so the engine leaves them out of its
compute too: the same numbers for a fraction of the work.

Whose weights answer is its source: a copy's, another model's, or the model's own. The model's own are the teacher's for
good where they are the frozen base of adapters, and else until the first optimizer step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import Batch, Layout, ModelAdapter
from model_adapters.conventional import has_planes, text_config
from model_adapters.flash import takes_one_row
from regate.errors import NonFiniteLossError, StoreMismatchError, UnsupportedShardingError
from regate.labels import IGNORED, predicted, predictors, up_to_last
from regate.output.loss import Places, label_losses
from regate.ranks import alone, any_rank
from regate.teaching.fingerprint import fingerprint_of
from regate.teaching.quantize import to_4bit, unpacked
from regate.teaching.rows import end_to_end
from regate.teaching.weights import (
    adapted,
    answering,
    carries_adapters,
    copied,
    halve_on_cuda,
    sampled,
    split_root,
    uses_peft,
)
from regate.training.hooks import run_inside
from regate.training.sharding import refuse_sharded
from regate_patch import is_sharded

log = logging.getLogger("regate")
Source = Literal["copy", "4bit", "live", "given", "named"]
NO_WEIGHTS = (
    "ranks have no weights of the teacher yet, or others than one another, and what it answers before training is what "
    "counts. Let every rank read them (fsdp_cpu_ram_efficient_loading: false in accelerate's config); or leave the "
    "teacher to teacher='auto', which waits for the model's own where accelerate launches with that setting; or, in a "
    "loop of your own, call regate.apply when ranks have them, with teacher='first'"
)
ON_META = (
    "{n} parameters of the language model are on the 'meta' device and have no values, and what it answers before "
    "training is what counts. Load the weights first, then call regate.apply. Where accelerate keeps them elsewhere "
    "(cpu_offload, disk_offload, or a device_map that did not fit), layers fetch them in hooks, which no gate can see "
    "through: place the whole model on a device, or split it over ranks with FSDP2"
)
NO_ADAPTERS = (
    "the adapters of this {name} were merged into the model that is gated, or unloaded from it: without them the base "
    "model, which gives the reference losses, cannot be told from what is trained. Call regate.apply anew, on the "
    "model that merge_and_unload returned and with another store; or merge after regate.remove(model)"
)
_STRANGE = 0.02  # the share of labels without an id in the teacher's vocabulary from which on it is doubted


class Teacher:
    """Text-only language model that gives reference losses.

    Args:
        model: the multimodal model it belongs to.
        adapter: how to find the language model and its inputs.
        backend: of the engine.
        source: "copy" takes a frozen copy of the language model now (in bfloat16 once it is on CUDA), "4bit" one
            whose linear layers are quantised. "live" uses the model's own,
            which the gate has patched, as it is at each call: before training starts, or with PEFT adapters, which
            are switched off for the call. "given" freezes and patches the language model of `model`, another one,
            which stays where it is; "named" is one that nobody else has, and follows what is trained.
        follows: its embeddings, on the device where this teacher is to be; None asks for those of `model`.

    Attributes:
        lasts: may it be asked after the first optimizer step? Else its weights are those that learn.
        waits: has nobody looked at its weights, since ranks lacked them? (`Scorer.meet_teacher` ends it.)
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        *,
        backend: regate_patch.Backend,
        source: Source,
        follows: Callable[[], nn.Module] | None = None,
        waits: bool = False,
        on_unsupported: regate_patch.OnUnsupported = "raise",
    ) -> None:
        self.model, self.adapter, self.source = model, adapter, source
        self._follows = follows or (lambda: adapter.embeddings(model))
        self.waits = waits and source == "live"
        self._values: dict[Any, Tensor] = {}  # of the parameters when they last answered, and marks of them
        self._marks: list[tuple[int, int, int]] = []
        self._doubted = False
        self._given: list[tuple[Any, str, bool]] = []  # modes of another model
        parts: Any = (adapter.embeddings(model), adapter.decoder(model), adapter.head(model))
        self.handle: regate_patch.Handle | None = None
        if not self.waits and (waits or any(p.is_meta for part in parts for p in part.parameters())):
            raise UnsupportedShardingError(_without_weights(parts))
        if self.is_copy:
            refuse_sharded(model)
            parts = copied(parts)
            halve_on_cuda(parts)
            if source == "4bit":
                to_4bit(parts[1])
        self.embeddings, self.decoder, self.head = parts
        self._by_peft = adapted(model) if source == "live" else []
        self.lasts = source != "live" or uses_peft(model, adapter)
        if source == "live":
            self.check()
        else:
            self.handle = regate_patch.patch(
                self.decoder, backend=backend, on_unsupported=on_unsupported, padding_elided=True
            )
            self._given = _modes(parts) if source == "given" else []
            for part in parts:
                part.requires_grad_(False).eval()

    @property
    def is_copy(self) -> bool:
        """Has it weights of its own that were the model's?"""
        return self.source in ("copy", "4bit")

    @property
    def is_another(self) -> bool:
        """Is it not the model's own language model, as it is or was?"""
        return self.source in ("given", "named")

    @property
    def together(self) -> bool:
        """Is the model split over ranks, so that they must compute at the same time?"""
        return self.source == "live" and is_sharded(self.model)

    def anyone(self, here: bool) -> bool:
        """Does this rank need it, or, where ranks compute together, any? Then every rank must ask."""
        return any_rank(here) if self.together else here

    def outside(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, which computes losses while no forward of the model is running.

        FSDP2 makes parameters whole in the forward of the module that it was given first, so the function runs there.
        """
        root = split_root(self.model, self.decoder) if self.together else None
        if root is None:
            return function()
        try:
            return run_inside(root, function)
        finally:
            root.reshard()

    def keep_pace(self, batch: Batch, layout: Layout) -> None:
        """Compute something because another rank must: a label after the first token, and its loss is not kept."""
        places = torch.arange(layout.labels.shape[1], device="cpu")
        one = places == 1
        labels = torch.where(one, 0, IGNORED)[None].repeat(len(layout.labels), 1)
        pair = (places < 2)[None].repeat(len(layout.labels), 1)
        self.losses(batch, replace(layout, labels=labels, valid=pair, visual=torch.zeros_like(pair)), [0])

    def _device(self) -> torch.device:
        """Where it computes; what nobody else has goes where the trained model is by now."""
        device = next(self.embeddings.parameters()).device
        if self.source in ("live", "given"):
            return device
        followed = next(self._follows().parameters()).device
        if followed != device:
            parts = [part.to(followed) for part in (self.embeddings, self.decoder, self.head)]
            if self.source != "4bit":
                halve_on_cuda(parts)
        return followed

    def _positions(self, batch: Batch) -> Tensor | None:
        """As the decoder takes them, [B, S] or [n, B, S]; None where it counts by itself."""
        positions = self.adapter.position_ids(self.model, batch)
        if self.is_another and positions is not None and positions.dim() > 2 and not has_planes(self.model):
            return None  # the student's, in time, height and width
        return positions

    @torch.no_grad()
    def losses(self, batch: Batch, layout: Layout, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Reference losses of the batch's rows (or of `rows`), each [n_labels] float32 on the CPU.

        Tokens that the model was given after the copy was made are placeholders to it; as labels, they are guessed
        evenly among those that it knows: log V.

        Args:
            batch: the arguments of the model's call.
            layout: of the batch, on the CPU.
            rows: which, all if None.

        Raises:
            NonFiniteLossError: the teacher's loss is NaN or infinite.
        """
        device = self._device()
        if self.source == "live":  # they may have been replaced, as by `resize_token_embeddings`
            self.embeddings, self.head = self.adapter.embeddings(self.model), self.adapter.head(self.model)
        chosen = torch.arange(len(layout.labels), device="cpu")
        chosen = chosen if rows is None else chosen[list(rows)]
        labels, valid = layout.labels[chosen], layout.valid[chosen]
        visual = layout.visual[chosen]
        wanted = predicted(labels)
        if not bool(wanted.any()):
            if self.together:
                self.keep_pace(batch, layout)
            return [torch.zeros(0, dtype=torch.float32, device="cpu") for _ in chosen]
        padding = self.adapter.padding
        known = layout.input_ids[chosen] < self._vocabulary()
        ids = torch.where(visual | ~known, self.placeholder(), layout.input_ids[chosen])
        positions = self._positions(batch)
        if positions is not None and positions.shape[-2] == len(layout.labels):
            positions = positions.index_select(-2, chosen.to(positions.device))
        seen = valid if padding.attend else valid & ~visual
        read = predictors(wanted)
        computed = seen & up_to_last(read)
        if takes_one_row(self.decoder, batch):
            ids, mask, positions, active = end_to_end(ids, positions, computed, read)
            positions = positions.to(device)
        else:
            mask, active = seen.long(), regate_patch.Active.from_mask(computed).reading(read)
        with self._switched(), unpacked(self.decoder):
            with regate_patch.active(active.to(device)), self.adapter.followable(self.model, self.decoder):
                text, mask = ids.to(device), mask.to(device)
                hidden = self.adapter.run_decoder(self.decoder, self.embeddings, text, mask, positions)
            hidden = hidden.view(*labels.shape, -1)
            answered = wanted & (labels < self._vocabulary())
            self._doubt(int(wanted.sum()), int(answered.sum()))
            losses = torch.full((int(wanted.sum()),), math.log(self._vocabulary()), dtype=torch.float32, device="cpu")
            losses[answered[wanted]] = label_losses(hidden, Places.of(labels, answered), head=self.head).cpu()
        if not bool(torch.isfinite(losses).all()):
            row = wanted.nonzero()[~torch.isfinite(losses)][0]
            raise NonFiniteLossError(
                f"the teacher's loss at row {int(row[0])}, position {int(row[1])} of this batch is not finite; "
                "check the model's weights and dtype (float16 overflows where bfloat16 does not)"
            )
        return list(losses.split(wanted.sum(1).tolist()))

    def _doubt(self, labels: int, answered: int) -> None:
        """A model that somebody gave may have another tokenizer, and its numbers no meaning."""
        if self.is_another and not self._doubted and labels - answered > _STRANGE * labels:
            self._doubted = True
            log.warning(
                "%d of %d answer tokens of this batch are none of the teacher's %d: where its tokenizer is not "
                "the student's, give teacher=regate.CrossTokenizerTeacher(model, tokenizer, student_tokenizer)",
                labels - answered, labels, self._vocabulary(),
            )  # fmt: skip

    def _vocabulary(self) -> int:
        """V, ids that the teacher knows."""
        size = getattr(self.embeddings, "num_embeddings", None)
        return size if isinstance(size, int) else 2**31

    def placeholder(self) -> int:
        """The id that stands at visual positions."""
        config = text_config(self.model)
        choices = (
            self.adapter.padding.token_id,
            getattr(config, "pad_token_id", None),
            getattr(config, "eos_token_id", None),
        )
        for choice in choices:
            if isinstance(choice, int) and 0 <= choice < self._vocabulary():
                return choice
        return 0

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        """The live model as a teacher: in eval mode, PEFT adapters off."""
        if self.source != "live":
            yield
            return
        parts = (self.embeddings, self.decoder, self.head)
        training = [m for part in parts for m in part.modules() if m.training]
        learning = [(p, p.requires_grad) for peft in self._by_peft for p in peft.parameters()]
        for part in parts:
            part.eval()
        try:
            with contextlib.ExitStack() as switched_off:
                for peft in self._by_peft:
                    switched_off.enter_context(peft.disable_adapter())
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, learns in learning:  # PEFT lets all of an adapter learn that it switches on again
                if parameter.requires_grad != learns:
                    parameter.requires_grad_(learns)

    def fingerprint(self) -> dict[str, str]:
        """What reference losses depend on; a store refuses losses made under another fingerprint.

        It is of the weights that answer: of a model with adapters, those that `disable_adapter` leaves in play, under
        the names that they have without PEFT and without checkpoints around layers.
        """
        parts = (self.embeddings, self.decoder, self.head)
        # A copy has adapters only where it keeps them on.
        parameters = (answering(part) if self.source == "live" else part.named_parameters() for part in parts)
        return fingerprint_of(
            parameters,
            text_config(self.model),
            architecture=type(self.decoder).__name__,
            padding={"token_id": self.placeholder(), "attend": self.adapter.padding.attend},
        )

    def check(self) -> None:
        """The model's own weights, where they are the teacher's, are still those of the references in the store.

        Raises:
            StoreMismatchError: they are others, such as after adapters were merged into them.
        """
        for peft in self._by_peft:
            if not carries_adapters(peft):
                raise StoreMismatchError(NO_ADAPTERS.format(name=type(peft).__name__))
        if self.source != "live" or self.waits or is_sharded(self.model):
            return
        parameters = [p for part in (self.embeddings, self.decoder, self.head) for _, p in answering(part)]
        marks = [(id(p), p._version, p.data_ptr()) for p in parameters]
        if marks == self._marks:
            return
        values = {(id(p), p.dtype, p.shape): sampled(p) for p in parameters}
        # A cast or a resized table makes others of them, which are as good; the same ones must have their values.
        if any(not torch.equal(sample, self._values.get(key, sample)) for key, sample in values.items()):
            raise StoreMismatchError(
                "the language model's own weights are the teacher's, and they changed since its first reference losses "
                "(adapters were merged, or base weights trained or loaded): new losses would not fit those in the "
                "store. Apply the gate anew with another store, or keep a copy: a plain model with teacher='auto'"
            )
        self._values, self._marks = values, marks

    def close(self) -> None:
        """Of another model, give back what was changed of it."""
        if self.handle is not None:
            self.handle.remove()
        for of, name, was in self._given:
            setattr(of, name, was)
        self._given = []


def _without_weights(parts: Sequence[nn.Module]) -> str:
    """What to do about it: one process lacks what nobody has read, a rank what another one may have."""
    missing = sum(p.is_meta for part in parts for p in part.parameters())
    return ON_META.format(n=missing) if missing and alone() else NO_WEIGHTS


def _modes(parts: Sequence[nn.Module]) -> list[tuple[Any, str, bool]]:
    """What is frozen in them, and what is in eval mode."""
    learning = [(p, "requires_grad", p.requires_grad) for part in parts for p in part.parameters()]
    return learning + [(m, "training", m.training) for part in parts for m in part.modules()]
