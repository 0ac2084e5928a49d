"""Passes: which kernels attention can run on.

An attention mask that says "causal, and nobody sees padding" becomes `is_causal=True`.

So does one that says "causal, within each sample" of rows that hold several, told apart by position ids that do not go
on by one: where the caller knows how long samples are, they are laid end to end (see `end_to_end.py`).

With padding elided and the order of positions kept, that is what such a mask says of active positions; and kernels that
are told so need no mask of [K, K], skip half of the work, and exist where others do not (flash attention).

Whether a mask says just that is proven by running its subgraph, which reads only sizes and the padding mask [B, S] or
position ids [B, S] or [n, B, S], on probes: several sizes, padding on either side and in the middle, samples of several
lengths. A window or a chunk of n positions shows as a
number n in the subgraph; one probe is longer than every such number. Where that one fails, a probe as long as the
smallest number may still pass: up to this length the window hides nothing. What cannot be proven stays as it is.

Where a decoder is captured in several graphs, one makes the mask that others read. The first tells what its results say
(`masks_made`), and whoever runs the graphs tells those that are given them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regate_patch import ops
from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import argument, erase_dead, expr, is_call, is_scalar, is_tensor, shape, value
from regate_patch.analysis.mixers import SDPA, sdpa_arguments
from regate_patch.analysis.tokens import Tokens
from regate_patch.transfer import made_on_host

_LONGEST = 8192  # of a probe: its mask has so many squared entries
_FEW = 16  # numbers up to this one are axes, ranks and the like; a window so small shows in any probe


@dataclass(frozen=True)
class Proven:
    """What a mask says of positions that are no padding.

    Attributes:
        up_to: the sequence length up to which it says "causal" and nothing else; 0 if it does not.
        samples: "within each sample", too?
    """

    up_to: float
    samples: bool = False


class _Probe(NamedTuple):
    """One case in which a mask's subgraph is run; tensors are [B, S]."""

    told: Tensor  # its padding mask or position ids
    seen: Tensor  # bool, which positions are no padding
    sample: Tensor  # whose they are

    @property
    def visible(self) -> Tensor:
        """What a mask should say, bool [B, 1, S, S]."""
        length = self.seen.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril() & self.seen[:, None, None, :]
        return causal & (self.sample[:, None, :, None] == self.sample[:, None, None, :])


def masks_made(gm: fx.GraphModule) -> dict[int, Proven]:
    """Of a graph's results, by their places, the masks [B, 1, S, S] that say no more than causal order."""
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    found = {}
    for place, node in enumerate(output.args[0]):
        if is_tensor(node) and value(node).dim() == 4 and node.op != "placeholder":
            batch, _, _, length = shape(node)
            if length.is_Symbol and (proven := _proven(gm, node, Tokens(batch, length), {})).up_to:
                found[place] = proven
    return found


def use_causal_kernels(
    gm: fx.GraphModule, span: Span, tokens: Tokens, *, any_length: bool, samples: bool, masks: Mapping[int, Proven]
) -> tuple[int, float, bool]:
    """Replace the masks that can be.

    Args:
        any_length: only those that say no more than "causal" however long the sequence is.
        samples: also those that keep samples apart, if all do.
        masks: of the graph's inputs, by their places, those that are known to be such masks.

    Returns:
        How many attentions lost theirs, up to which sequence length that is right, and whether samples must be kept
        apart by other means now.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    known = {inputs[place]: proof for place, proof in masks.items()}
    proven: dict[fx.Node, Proven] = {}
    cores: list[tuple[fx.Node, Proven]] = []
    for core in span.mixers:
        if not is_call(core, *SDPA):
            continue
        mask = argument(core, 3, "attn_mask")
        if not is_tensor(mask) or argument(core, 5, "is_causal", False) is not False:
            continue
        lengths = {shape(argument(core, 0, "query"))[-2], shape(argument(core, 1, "key"))[-2]}
        if lengths != {tokens.length}:
            continue
        if mask not in proven:
            proven[mask] = _proven(gm, mask, tokens, known)
        if proven[mask].up_to == inf or (proven[mask].up_to and not any_length):
            cores.append((core, proven[mask]))
    apart = samples and len(cores) == len(span.mixers) and all(found.samples for _, found in cores)
    cores = [(core, found) for core, found in cores if found.samples == apart]
    for core, _ in cores:
        core.args, core.kwargs = (), sdpa_arguments(core) | {"attn_mask": None, "is_causal": True}
    erase_dead(gm.graph)
    return len(cores), min([found.up_to for _, found in cores if not any_length], default=inf), apart


def repeat_shared_heads(gm: fx.GraphModule) -> None:
    """Where an attention has a mask, and heads of queries share keys, give each its own, on a GPU.

    No fused kernel of torch's takes both there: flash attention takes no mask, the memory-efficient one no shared
    heads, and what is left holds all scores at once.
    """
    for core in list(gm.graph.nodes):
        if not is_call(core, *SDPA):
            continue
        given = sdpa_arguments(core)
        if given.get("attn_mask") is None or not given.get("enable_gqa") or not _on_gpu(given["query"]):
            continue
        for name in ("key", "value"):
            with gm.graph.inserting_before(core):
                node = gm.graph.call_function(ops.repeat_heads, (given[name], given["query"]))
            node.meta |= {k: m for k, m in core.meta.items() if k in ("checkpoint", "stack_trace")}
            node.meta["example_value"] = value(given[name])
            given[name] = node
        core.args, core.kwargs = (), {k: v for k, v in given.items() if k != "enable_gqa"}


def _on_gpu(query: fx.Node) -> bool:
    return bool(value(query).device.type == "cuda")


def _proven(gm: fx.GraphModule, mask: fx.Node, tokens: Tokens, known: Mapping[fx.Node, Proven]) -> Proven:
    if value(mask).dim() != 4 or not all(map(tokens.is_length, value(mask).shape[-2:])):
        return Proven(0)
    subgraph = _subgraph(mask)
    given = [node for node in subgraph if node.op == "placeholder" and not _is_size(node, tokens)]
    if len(given) > 1 or any(node.op == "get_attr" for node in subgraph):
        return Proven(0)
    read = given[0] if given else None
    if read is not None and read in known:
        rows, _, *lengths = value(read).shape
        if not tokens.is_batch(rows) or not all(map(tokens.is_length, lengths)):
            return Proven(0)
        of_input = known[read]
        up_to = _causal_up_to(gm, subgraph, mask, read, tokens, samples=of_input.samples)
        return Proven(min(up_to, of_input.up_to), of_input.samples)
    if read is None or _is_padding_mask(read, tokens):
        if up_to := _causal_up_to(gm, subgraph, mask, read, tokens, samples=False):
            return Proven(up_to)
    if read is not None and _are_position_ids(read, tokens):
        return Proven(_causal_up_to(gm, subgraph, mask, read, tokens, samples=True), samples=True)
    return Proven(0)


@made_on_host()
def _causal_up_to(
    gm: fx.GraphModule, subgraph: list[fx.Node], mask: fx.Node, read: fx.Node | None, tokens: Tokens, *, samples: bool
) -> float:
    """Up to which sequence length; `samples`: what is read tells samples apart."""
    written = [abs(n) for n in _integers(subgraph) if _FEW < abs(n) < torch.iinfo(torch.int32).max]
    numbers = read is not None and value(read).dim() == 2 and value(read).dtype != torch.bool

    def passes(longest: int) -> bool:
        try:
            return longest <= _LONGEST and all(
                _is_causal(_run(gm, subgraph, mask, read, probe, tokens), probe)
                for probe in _probes(longest, tokens, padding=read is not None, samples=samples, numbers=numbers)
            )
        except Exception:  # a subgraph that cannot be run on its own proves nothing
            return False

    if passes(2 * max(written, default=_FEW) + 5):
        return inf
    smallest = min(written, default=0) - 1  # one less, for windows that are counted without the position itself
    return shorter if passes(shorter := min(smallest, _LONGEST)) else 0


def _subgraph(mask: fx.Node) -> list[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in mask.graph.nodes if node in found]


def _is_size(node: fx.Node, tokens: Tokens) -> bool:
    return is_scalar(node) and (tokens.is_length(value(node)) or tokens.is_batch(value(node)))


def _is_padding_mask(node: fx.Node, tokens: Tokens) -> bool:
    if not is_tensor(node) or value(node).is_floating_point():
        return False
    sizes = value(node).shape
    return len(sizes) == 2 and tokens.is_batch(sizes[0]) and tokens.is_length(sizes[1])


def _are_position_ids(node: fx.Node, tokens: Tokens) -> bool:
    """[B, S], or [n, B, S], several of them per token; one row may serve all."""
    if not is_tensor(node) or value(node).dtype not in (torch.int64, torch.int32) or value(node).dim() not in (2, 3):
        return False
    *several, rows, length = value(node).shape
    one_row = expr(rows) == 1 or tokens.is_batch(rows)
    return one_row and tokens.is_length(length) and all(expr(size).is_number for size in several)


def _integers(subgraph: list[fx.Node]) -> list[int]:
    """Numbers written in the calls."""
    found: list[int] = []

    def look(x: Any) -> None:
        if isinstance(x, (list, tuple)):
            for item in x:
                look(item)
        elif isinstance(x, dict):
            look(list(x.values()))
        elif isinstance(x, slice):
            look([x.start, x.stop, x.step])
        elif isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < float("inf"):
            found.append(int(x))

    for node in subgraph:
        look(node.args)
        look(node.kwargs)
    return found


def _probes(longest: int, tokens: Tokens, *, padding: bool, samples: bool, numbers: bool = False) -> Iterator[_Probe]:
    """One of them is this long. `padding`: a mask is read, whose entries may be `numbers`."""
    random = torch.Generator().manual_seed(0)
    rows = [1, 2, 3] if tokens.batch.is_Symbol else [int(tokens.batch)] * 3
    seen = [torch.ones(rows[0], longest, dtype=torch.bool), torch.ones(rows[1], 9, dtype=torch.bool)]
    if samples:
        seen.append(torch.ones(rows[2], 21, dtype=torch.bool))
        for mask in seen:
            ids = torch.arange(mask.shape[1]).repeat(len(mask), 1)
            yield _Probe(ids, mask, torch.zeros_like(ids))
            begins = torch.rand(mask.shape, generator=random) < 0.2
            begins[:, -2:] = True  # a sample of one position, twice
            first = torch.where(begins, ids, 0).cummax(1).values
            yield _Probe(ids - first, mask, begins.cumsum(1))
            yield _Probe(ids + 3 * begins.cumsum(1), mask, begins.cumsum(1))  # which do not begin again, but leap
        return
    if padding:
        right, left, holes = (torch.ones(rows[i], length, dtype=torch.bool) for i, length in enumerate((7, 12, 21)))
        right[-1, 5:] = False
        left[-1, :4] = False
        holes &= torch.rand(holes.shape, generator=random) < 0.7
        holes[:, 0] = True
        seen += [right, left, holes]
    for mask in seen:
        yield _Probe(mask, mask, torch.zeros(mask.shape))
    if numbers:  # of documents, which keep them apart where the input is no padding mask
        last = seen[-1]
        yield _Probe(torch.randint(1, 4, last.shape, generator=random) * last, last, torch.zeros(last.shape))


def _run(
    gm: fx.GraphModule, subgraph: list[fx.Node], mask: fx.Node, read: fx.Node | None, probe: _Probe, tokens: Tokens
) -> Tensor:
    """The mask that the subgraph makes of what it is told, on the CPU."""
    rows, length = probe.seen.shape
    known: dict[fx.Node, Any] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return known[x]
        return torch.device("cpu") if isinstance(x, torch.device) else x  # wherever the decoder is, or is not ("meta")

    def known_in(x: Any) -> Any:
        return fx.node.map_aggregate(x, leaf)

    for node in subgraph:
        if node is read:
            known[node] = _told(node, probe)
        elif node.op == "placeholder":
            known[node] = length if tokens.is_length(value(node)) else rows
        elif node.op == "call_function":
            known[node] = node.target(*known_in(node.args), **known_in(node.kwargs))  # type: ignore[operator]
        else:
            x, *others = known_in(node.args)
            known[node] = getattr(x, str(node.target))(*others, **known_in(node.kwargs))
    return known[mask]


def _told(read: fx.Node, probe: _Probe) -> Tensor:
    """In the form of this input: a mask, or a padding mask, or position ids."""
    form = value(read)
    if form.dim() == 4:
        if form.dtype == torch.bool:
            return probe.visible
        return torch.zeros(probe.visible.shape, dtype=form.dtype).masked_fill(
            ~probe.visible, torch.finfo(form.dtype).min
        )
    return probe.told.to(form.dtype).expand(*form.shape[:-2], *probe.told.shape)


def _is_causal(mask: Tensor, probe: _Probe) -> bool:
    """Is it, for queries that are no padding, True (or 0) at keys of the same sample that are none and not later, False
    (or -inf) else?"""
    rows, length = probe.seen.shape
    if mask.shape[-2:] != (length, length) or mask.shape[0] not in (1, rows):
        return False
    if mask.dtype == torch.bool:
        visible = mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            return False
        visible = ~hidden
    return bool(((visible == probe.visible) | ~probe.seen[:, None, :, None]).all())
