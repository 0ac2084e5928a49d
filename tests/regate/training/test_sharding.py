"""Models split over ranks in ways that would hide the decoder from the gate."""

from __future__ import annotations

from collections.abc import Iterator

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import regate
from regate.errors import UnsupportedShardingError
from tests import oracle
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Identity):
        """Has the name of torch's."""

    model = CORE["llava"].build()
    regate.apply(model, SPARSE, teacher=None)
    model.model.language_model.layers[0].wrapper = FullyShardedDataParallel()
    with pytest.raises(UnsupportedShardingError, match="FSDP1"):
        model(**CORE["llava"].batch())


def test_data_parallel_is_refused() -> None:
    """Its copies of the model are marked so by torch."""
    model = CORE["llava"].build()
    regate.apply(model, SPARSE, teacher=None)
    model._is_replica = True
    with pytest.raises(UnsupportedShardingError, match="torchrun"):
        model(**CORE["llava"].batch())


def test_layers_on_several_devices_are_refused() -> None:
    """As `device_map="auto"` spreads them: accelerate hooks onto every layer."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = CORE["llava"].build()
    regate.apply(model, SPARSE, teacher=None)
    for layer in model.model.language_model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with pytest.raises(UnsupportedShardingError, match="device_map spreads the model over devices"):
        model(**CORE["llava"].batch())


def _refused(model: nn.Module, match: str) -> None:
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(UnsupportedShardingError, match=match):
        model(**CORE["llava"].batch())


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensor_parallel_is_refused(mesh: DeviceMesh) -> None:
    model = CORE["llava"].build()
    mlp = model.model.language_model.layers[0].mlp
    parallelize_module(mlp, mesh, {"gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
    _refused(model, "^tensor parallelism: .*FSDP2 or DeepSpeed ZeRO-3")


def test_tensor_parallel_of_transformers_is_refused() -> None:
    model = CORE["llava"].build()
    model._tp_size = 2
    _refused(model, "^tensor parallelism")


def test_tensor_parallel_under_fsdp2_is_refused(mesh: DeviceMesh) -> None:
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
    model = CORE["llava"].build()
    for layer in model.model.language_model.layers:
        parallelize_module(layer.mlp, both["tensor"], {"gate_proj": ColwiseParallel()})
        fully_shard(layer, mesh=both["shard"])
    _refused(fully_shard(model, mesh=both["shard"]), "^tensor parallelism")


@pytest.mark.parametrize("names", [("shard",), ("replicate", "shard")], ids=str)
def test_fsdp2_alone_and_hybrid_is_no_tensor_parallelism(names: tuple[str, ...], mesh: DeviceMesh) -> None:
    way = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    model = CORE["llava"].build()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=way)
    fully_shard(model, mesh=way)
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**CORE["llava"].batch())
    assert gate.report()["attention_blocks"] == 2


@pytest.mark.parametrize("around", ["nothing", "FSDP2", "offload"])
def test_fsdp2_inside_activation_checkpoints(around: str, mesh: DeviceMesh) -> None:
    """As accelerate wraps layers where its `activation_checkpointing` is asked for: checkpointed, and not refused."""

    def step(model: nn.Module) -> tuple[float, list[Tensor], int]:
        """Its loss, gradients, and how many values were kept for the backward pass."""
        kept: list[int] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        batch = oracle.double(CORE["llava"].batch("right"))
        gate = regate.apply(model, SPARSE, teacher=None)
        model(**batch)  # with a proof
        with saved_tensors_hooks(keep, lambda x: x):
            loss = model(**batch).loss
        loss.backward()
        assert gate.report()["attention_blocks"] == 2
        regate.remove(model)
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        return float(loss.detach()), [x for x in gradients if x is not None], sum(kept)

    plain, wrapped = CORE["llava"].build().double(), CORE["llava"].build().double()
    layers = wrapped.model.language_model.layers
    for i, layer in enumerate(list(layers)):
        checkpointed = checkpoint_wrapper(layer, preserve_rng_state=False)
        layers[i] = offload_wrapper(checkpointed) if around == "offload" else checkpointed
        fully_shard(layer, mesh=mesh)
        if around == "FSDP2":
            fully_shard(checkpointed, mesh=mesh)
    kinds = [(name, type(module)) for name, module in wrapped.named_modules()][1:]
    loss, gradients, kept = step(plain)
    same_loss, same_gradients, fewer = step(fully_shard(wrapped, mesh=mesh))
    assert same_loss == pytest.approx(loss, rel=1e-12)
    for one, other in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert fewer < 0.6 * kept
    assert [(name, type(module)) for name, module in wrapped.named_modules()][1:] == kinds
    assert not wrapped.is_gradient_checkpointing


def test_fsdp2_within_a_checkpointed_layer_is_refused(mesh: DeviceMesh) -> None:
    model = CORE["llava"].build()
    layers = model.model.language_model.layers
    for i, layer in enumerate(list(layers)):
        fully_shard(layer.mlp, mesh=mesh)
        layers[i] = checkpoint_wrapper(layer)
    _refused(fully_shard(model, mesh=mesh), "hooks outside")


def test_context_parallel_is_refused(mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    model = CORE["llava"].build()
    with context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1]):
        _refused(model, "^context parallelism")


_NO_SP = pytest.mark.skipif(accelerate.__version__ == "1.10.0", reason="accelerate 1.10.0 offers none")


@pytest.mark.parametrize(
    ("size", "kind"), [("tp", "tensor"), ("cp", "context"), pytest.param("sp", "sequence", marks=_NO_SP)]
)
def test_parallelism_asked_of_accelerate_is_refused(size: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import ParallelismConfig

    asked = ParallelismConfig(**{f"{size}_size": 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", asked)
    _refused(CORE["llava"].build(), f"^{kind} parallelism")


def test_ulysses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts a function of its own under the name of the attention that the model was told to use."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(*args: object, **kwargs: object) -> None:
        raise AssertionError("never called")

    attention.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    standing = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        _refused(CORE["llava"].build(), "^sequence parallelism")
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = standing


def test_qlora_under_fsdp2_is_refused(mesh: DeviceMesh) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = CORE["llava"].build()
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj = bnb.nn.Linear4bit(32, 48, bias=False, quant_storage=torch.float32)
        fully_shard(layer, mesh=mesh)
    _refused(fully_shard(model, mesh=mesh), "Linear4bit under FSDP2 .* QLoRA under DDP")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_moved_after_apply() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, SPARSE, backend="eager")
    model.cuda()
    model(**{k: v.cuda() for k, v in CORE["llava"].batch().items()}).loss.backward()
    assert gate.report()["teacher_samples"] == 2
