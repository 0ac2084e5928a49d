"""Pass: an attention mask that says "causal, and nobody sees padding" becomes `is_causal=True`.

With padding elided and the order of positions kept, that is what such a mask says of active positions; and kernels that
are told so need no mask of [K, K], skip half of the work, and exist where others do not (flash attention).

Whether a mask says just that is proven by running its subgraph, which reads only sizes and the padding mask [B, S],
on probes: several sizes, padding on either side and in the middle. A window or a chunk of n positions shows as a
number n in the subgraph; one probe is longer than every such number. Where that one fails, a probe as long as the
smallest number may still pass: up to this length the window hides nothing. What cannot be proven stays as it is.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import argument, erase_dead, expr, is_call, is_scalar, is_tensor, shape, value
from regate_patch.analysis.mixers import SDPA
from regate_patch.analysis.tokens import Tokens

_LONGEST = 8192  # of a probe: its mask has so many squared entries
_SIGNATURE = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_FEW = 16  # numbers up to this one are axes, ranks and the like; a window so small shows in any probe


def use_causal_kernels(gm: fx.GraphModule, span: Span, tokens: Tokens, *, any_length: bool) -> tuple[int, float]:
    """Replace the masks that can be.

    Args:
        any_length: only those that say no more than "causal" however long the sequence is.

    Returns:
        How many attentions lost theirs, and up to which sequence length that is right.
    """
    proven: dict[fx.Node, float] = {}
    replaced = 0
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
            proven[mask] = _causal_up_to(gm, mask, tokens)
        if proven[mask] == inf or (proven[mask] and not any_length):
            given = {**dict(zip(_SIGNATURE, core.args, strict=False)), **core.kwargs}
            core.args = ()
            core.kwargs = {**given, "attn_mask": None, "is_causal": True}
            replaced += 1
    erase_dead(gm.graph)
    return replaced, min([up_to for up_to in proven.values() if up_to and not any_length], default=inf)


def _causal_up_to(gm: fx.GraphModule, mask: fx.Node, tokens: Tokens) -> float:
    """The length up to which the mask is proven to say only "causal, and nobody sees padding"; 0 if it is not."""
    if shape(mask)[-2:] != (tokens.length, tokens.length) or len(shape(mask)) != 4:
        return 0
    subgraph = _subgraph(mask)
    padding = None
    for node in subgraph:
        if node.op == "get_attr" or (node.op == "placeholder" and not _is_size(node, tokens)):
            if node.op == "get_attr" or padding is not None or not _is_padding_mask(node, tokens):
                return 0
            padding = node
    numbers = [abs(n) for n in _integers(subgraph) if _FEW < abs(n) < torch.iinfo(torch.int32).max]

    def passes(longest: int) -> bool:
        try:
            return longest <= _LONGEST and all(
                _is_causal(_run(gm, subgraph, mask, padding, seen, tokens), seen)
                for seen in _probes(longest, tokens, has_padding=padding is not None)
            )
        except Exception:  # a subgraph that cannot be run on its own proves nothing
            return False

    if passes(2 * max(numbers, default=_FEW) + 5):
        return inf
    smallest = min(numbers, default=0) - 1  # one less, for windows that are counted without the position itself
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
    return is_scalar(node) and (expr(value(node)) == tokens.length or tokens.is_batch(value(node)))


def _is_padding_mask(node: fx.Node, tokens: Tokens) -> bool:
    if not is_tensor(node) or value(node).is_floating_point():
        return False
    return value(node).dim() == 2 and tokens.is_batch(value(node).shape[0]) and shape(node)[1] == tokens.length


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


def _probes(longest: int, tokens: Tokens, *, has_padding: bool) -> list[Tensor]:
    """Padding masks [B, S] bool, one of them this long."""
    random = torch.Generator().manual_seed(0)
    rows = [1, 2, 3] if tokens.batch.is_Symbol else [int(tokens.batch)] * 3
    probes = [torch.ones(rows[0], longest, dtype=torch.bool), torch.ones(rows[1], 9, dtype=torch.bool)]
    if has_padding:
        right, left, holes = (torch.ones(rows[i], length, dtype=torch.bool) for i, length in enumerate((7, 12, 21)))
        right[-1, 5:] = False
        left[-1, :4] = False
        holes &= torch.rand(holes.shape, generator=random) < 0.7
        holes[:, 0] = True
        probes += [right, left, holes]
    return probes


def _run(
    gm: fx.GraphModule, subgraph: list[fx.Node], mask: fx.Node, padding: fx.Node | None, seen: Tensor, tokens: Tokens
) -> Tensor:
    """The mask that the subgraph makes for this padding mask, on the CPU."""
    rows, length = seen.shape
    known: dict[fx.Node, Any] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return known[x]
        return torch.device("cpu") if isinstance(x, torch.device) else x  # wherever the decoder is, or is not ("meta")

    def read(x: Any) -> Any:
        return fx.node.map_aggregate(x, leaf)

    for node in subgraph:
        if node is padding:
            known[node] = seen.to(value(node).dtype)
        elif node.op == "placeholder":
            known[node] = length if expr(value(node)) == tokens.length else rows
        elif node.op == "call_function":
            known[node] = node.target(*read(node.args), **read(node.kwargs))  # type: ignore[operator]
        else:
            x, *others = read(node.args)
            known[node] = getattr(x, str(node.target))(*others, **read(node.kwargs))
    return known[mask]


def _is_causal(mask: Tensor, seen: Tensor) -> bool:
    """Is it, for queries that are no padding, True (or 0) at keys that are none and not later, False (or -inf) else?"""
    rows, length = seen.shape
    if mask.shape[-2:] != (length, length) or mask.shape[0] not in (1, rows):
        return False
    expected = torch.ones(length, length, dtype=torch.bool).tril() & seen[:, None, None, :]
    if mask.dtype == torch.bool:
        visible = mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            return False
        visible = ~hidden
    return bool(((visible == expected) | ~seen[:, None, :, None]).all())
