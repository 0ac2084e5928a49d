"""Print a two-layer decoder's graph before and after the passes, as it stands in docs/engine.md.

python docs/engine.py             # prints it
python docs/engine.py --write     # writes it into the page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import regate_patch
from regate_patch.passes.rewrite import PASSES

PAGE = Path(__file__).with_name("engine.md")
BEGIN, END = "<!-- printed by docs/engine.py -->", "<!-- end -->"


class Layer(nn.Module):
    """Pre-norm attention and MLP, four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, mask: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, 4, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q * cos, k * cos, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Two layers; makes positions and an explicit mask by itself, as models do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        s = hidden_states.shape[1]
        positions = torch.arange(s)
        cos = torch.cos(positions * 0.1)[None, None, :, None]
        causal = positions[None, :] <= positions[:, None]
        mask = causal[None, None] & attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, mask)
        return hidden_states


def graphs() -> dict[str, str]:
    """The printed graph after each pass, by name."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    found: dict[str, str] = {}
    decoder = Decoder()
    x, mask = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.int64)
    active = regate_patch.Active.from_mask(torch.rand(2, 12) < 0.6)
    read = torch.zeros(2, 12, dtype=torch.bool).scatter(1, active.index[:, -2:], True)
    handle = regate_patch.patch(
        decoder, backend="eager", padding_elided=True, observe=lambda name, gm: found.__setitem__(name, lines(gm))
    )
    with regate_patch.active(active.reading(read)):
        decoder(x, mask)
    handle.remove()
    return found


def lines(gm: fx.GraphModule) -> str:
    """A call a line: name = target(arguments), parameters by what they are."""
    stream = next(n for n in gm.graph.nodes if n.op == "placeholder" and "hidden_states" in n.name)
    sizes = dict(zip(map(str, stream.meta["example_value"].shape[:2]), "BS", strict=True))
    names: dict[fx.Node, str] = {}
    out = []
    for node in gm.graph.nodes:
        names[node] = sizes.get(node.name, short(node))
        if node.op == "output":
            (result,) = node.args[0]
            out.append(f"return {names[result]}")
        elif node.op != "placeholder":
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            values = [show(a, names) for a in node.args] + [f"{k}={show(v, names)}" for k, v in node.kwargs.items()]
            out.append(f"{names[node]} = {target}({', '.join(values)})")
    return "\n".join(out)


def short(node: fx.Node) -> str:
    """Dynamo's names of parameters, without the way to them."""
    found = re.match(r"l_self_modules_layers_modules_(\d)_modules_(\w+?)_parameters", node.name)
    return f"layer{found[1]}.{found[2].strip('_')}" if found else node.name.removeprefix("l_").strip("_")


def show(x: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(x, fx.Node):
        return names[x]
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(show(i, names) for i in x) + ")"
    if isinstance(x, slice):
        parts = [x.start, x.stop] if x.step is None else [x.start, x.stop, x.step]
        return ":".join("" if p is None else show(p, names) for p in parts)
    return str(x)


def printed() -> str:
    """The generated part of the page."""
    found = graphs()
    table = "\n".join(f"| `{p.name}` | {p.promise} | {p.does} |" for p in PASSES)
    return (
        f"| pass | | what it does |\n|---|---|---|\n{table}\n\n"
        f"Before, as Dynamo captured it:\n\n```\n{found['captured']}\n```\n\n"
        f"After:\n\n```\n{found['outline']}\n```\n"
    )


def page() -> str:
    """The page with what is generated in it."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{printed()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(printed())
