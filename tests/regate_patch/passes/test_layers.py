"""Equal layers are compiled once: counted, and held to the same decoder whose graph runs as one piece, uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import regate_patch
from regate_patch import capture, compiling
from regate_patch.analysis.graph import is_call
from tests.plain import Block, Decoder

WIDTH, HEADS = 16, 4
needs_autocast = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.11's compiler refuses graphs in which autocast is entered"
)
Made = list[fx.GraphModule]


class Narrow(Block):
    """Another kind of layer: its queries and keys are scaled."""

    def attend(self, x: Tensor) -> Tensor:
        return super().attend(x * 0.5)


class Adapted(nn.Linear):
    """A frozen linear layer with a low-rank part that learns."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.down, self.up = (nn.Parameter(torch.randn(2, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up


class Stated(Block):
    """Its norm is computed without autocast, a factor without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            normal = self.norm1(x)
        x = x + self.attend(normal)
        with torch.no_grad():
            factor = x.abs().amax(-1, keepdim=True)
        return x + self.mlp(self.norm2(x)) / factor


class Turned(Block):
    """What goes into its attention is multiplied by what the decoder learns for all layers."""

    def forward(self, x: Tensor, cos: Tensor, beside: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x) * cos)
        return x + self.mlp(self.norm2(x)) * beside


class Sharing(Decoder):
    """Values per position that all layers read, learned, and one per position and layer."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=layers, width=WIDTH, heads=HEADS)
        self.layers = nn.ModuleList(Turned(WIDTH, HEADS, "pre_norm") for _ in range(layers))
        self.rate, self.beside = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)[None, :, None]
        cos, beside = torch.cos(positions * self.rate), torch.sin(positions * self.beside)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, cos, beside[:, :, i : i + 1])
        return self.norm(hidden_states)


class Writing(Decoder):
    """Each layer adds to a value that was made in front of the first."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        total = hidden_states * 0.0
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            total.add_(hidden_states)
        return self.norm(hidden_states) + total


class Checkpointed(Decoder):
    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = checkpoint(layer, hidden_states, use_reentrant=False)
        return self.norm(hidden_states)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _stack(*kinds: type[Block]) -> Decoder:
    decoder = Decoder(layers=0, width=WIDTH, heads=HEADS)
    decoder.layers = nn.ModuleList(kind(WIDTH, HEADS, "pre_norm") for kind in kinds)
    return decoder


def _run(decoder: nn.Module, backend: Any, x: Tensor, active: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Output at active positions, then gradients of the input (if it has one) and of all that learns."""
    x = x.detach().requires_grad_(x.requires_grad)
    handle = regate_patch.patch(decoder, backend=backend, **options)
    with regate_patch.active(active):
        output = decoder(x) * active[..., None]
    handle.remove()
    learned = [p for p in (x, *decoder.parameters()) if p.requires_grad]
    objective = (output.sin() * torch.linspace(0.5, 1.5, output.shape[-1], dtype=output.dtype)).sum()
    return output.detach(), *torch.autograd.grad(objective, learned, allow_unused=True)


def _compiled(decoder: nn.Module, made: Made, *, frozen_input: bool = False, **options: Any) -> None:
    """Compile forward and backward, note what the compiler was given, and compare with the whole graph, eager."""
    decoder = decoder.double()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, WIDTH, generator=random, dtype=torch.float64).requires_grad_(not frozen_input)
    active = torch.rand(2, 11, generator=random) < 0.6
    expected = _run(decoder, "eager", x, active)
    got = _run(decoder, _noting(made), x, active, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def _noting(made: Made) -> Callable[..., Any]:
    """A compiler in name: torch's, forward and backward, up to where code would be made."""
    ahead_of_time = torch._dynamo.lookup_backend("aot_eager")

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(gm)
        return ahead_of_time(gm, inputs)

    return backend


def _attentions(gm: fx.GraphModule) -> int:
    return sum(
        is_call(node, torch.ops.regate.attend_laid.default) or "attend" in getattr(node.target, "__name__", "")
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [Decoder, Checkpointed, Sharing])
@pytest.mark.parametrize("layers", [4, 7])
def test_compilations_do_not_grow_with_depth(kind: Callable[..., Decoder], layers: int) -> None:
    """What is in front, the layer, and the last one with its tail and what follows."""
    made: Made = []
    _compiled(kind(layers=layers), made)
    assert [_attentions(gm) for gm in made] == [0, 1, 1]


def test_one_piece_without_the_pass() -> None:
    made: Made = []
    _compiled(Decoder(layers=4), made, disable=("layers",))
    assert [_attentions(gm) for gm in made] == [4]


def test_checkpoints_stay() -> None:
    made: Made = []
    _compiled(Checkpointed(layers=4), made)
    again = [any("checkpoint" in str(node.target) for node in gm.graph.nodes) for gm in made]
    assert again == [False, True, True]


def test_layers_that_differ_are_kinds_of_their_own() -> None:
    made: Made = []
    _compiled(_stack(Block, Block, Narrow, Block, Block, Narrow, Block, Block), made)
    assert [_attentions(gm) for gm in made] == [0, 1, 1, 1]  # in front, the two kinds, the last with its tail


@needs_autocast
def test_layers_that_stand_alone_go_with_their_neighbours() -> None:
    made: Made = []
    _compiled(_stack(Block, Block, Narrow, Stated, Block, Block), made)
    assert [_attentions(gm) for gm in made] == [0, 1, 2, 1]


def test_layers_with_adapters_and_without() -> None:
    """All else is frozen, the embeddings too: what reaches the first adapter needs no gradient."""
    decoder = _stack(*[Block] * 7)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    for i in (1, 3, 5):
        decoder.layers[i].out = Adapted(decoder.layers[i].out)
        decoder.layers[i].out.weight.requires_grad_(False)
        decoder.layers[i].out.bias.requires_grad_(False)
    made: Made = []
    _compiled(decoder, made, frozen_input=True)
    # layer 0 in front, as nothing needs a gradient there, and so is 1, which reads that; 2 and 4 are one kind, 3 and 5
    # another; 6 has the tail
    assert [_attentions(gm) for gm in made] == [2, 1, 1, 1]


@needs_autocast
def test_autocast_and_no_grad_inside_a_layer() -> None:
    made: Made = []
    _compiled(_stack(*[Stated] * 4), made)
    assert [_attentions(gm) for gm in made] == [0, 1, 1]


def test_a_torch_that_cannot_compile_autocast_runs_what_holds_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it is, and says so: in front, the layer, and the last with its tail, of which two switch autocast."""
    monkeypatch.setattr(compiling, "_COMPILES_AUTOCAST", False)
    made: Made = []
    _compiled(_stack(*[Stated] * 4), made)
    assert [_attentions(gm) for gm in made] == [0]
    assert caplog.text.count("run uncompiled") == 2
    made.clear()
    _compiled(_stack(Block, Block, Block, Stated), made, disable=("layers",))
    assert not made, "in one piece it is all that runs"


def test_what_all_layers_write_keeps_them_together() -> None:
    made: Made = []
    _compiled(Writing(layers=4), made)
    assert [_attentions(gm) for gm in made] == [4]


def test_other_sizes_are_not_compiled_again() -> None:
    made: Made = []
    decoder = Decoder(layers=4).double()
    handle = regate_patch.patch(decoder, backend=_noting(made))
    for rows, length, share in ((2, 11, 0.5), (3, 11, 0.9), (4, 17, 0.3), (2, 29, 1.0)):
        active = torch.rand(rows, length) < share
        active[:, 0] = True
        with regate_patch.active(active):
            decoder(torch.randn(rows, length, WIDTH, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert len(handle.statistics.graphs) == 1
    assert len(made) == 3


def test_each_part_has_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parts of one decoder would use up Dynamo's limit of recompilations together."""
    monkeypatch.setitem(
        capture._DYNAMO, "recompile_limit", 2
    )  # the decoder is captured twice here; of parts there are 3
    made: Made = []
    _compiled(Decoder(layers=4), made)
    assert len(made) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
def test_inductor(dtype: torch.dtype, tolerance: float) -> None:
    """Through a real compiler, in parts and in one piece: both close to float64."""
    decoder = Decoder(layers=4, width=WIDTH, heads=HEADS).to(dtype)
    x = torch.randn(2, 11, WIDTH).to(dtype).requires_grad_()
    active = torch.rand(2, 11) < 0.6
    got = _run(decoder, "inductor", x, active)
    expected = _run(decoder.double(), "eager", x.detach().double().requires_grad_(), active)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)  # of what this decoder has and does not use
        assert a is None or float((a.double() - b).norm()) <= tolerance * max(1.0, float(b.norm()))
