"""Ways of splitting a model over ranks that the gate cannot see through are refused by name."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regate.errors import UnsupportedShardingError
from regate_patch import is_sharded


def refuse_opaque(model: nn.Module) -> None:
    """DDP and FSDP2 are fine; what hides parameters from a module's own forward is not.

    Raises:
        UnsupportedShardingError: DeepSpeed ZeRO-3, FSDP1, nn.DataParallel, or a device_map over several devices.
    """
    if getattr(model, "_is_replica", False):
        raise UnsupportedShardingError(
            "nn.DataParallel (Trainer's choice for one process that sees several GPUs) runs copies of the model in "
            "threads; start one process per GPU with torchrun or accelerate launch, or show it a single GPU"
        )
    if any(hasattr(part, "_hf_hook") for part in model.modules() if part is not model):
        raise UnsupportedShardingError(
            "device_map spreads the model over devices: accelerate's hooks move each layer's inputs, and a captured "
            "decoder would bypass them; keep the whole model on one device per process (device_map={'': device}), and "
            "where it does not fit, split it with FSDP2"
        )
    if False:
        kind = "DeepSpeed ZeRO-3"
    elif any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        kind = "FSDP1"
    else:
        return
    raise UnsupportedShardingError(
        f"{kind} gathers parameters in ways that a captured decoder would bypass; use FSDP2 (`fsdp_version: 2` in "
        "accelerate's config, or `torch.distributed.fsdp.fully_shard`) or DDP"
    )


def refuse_sharded(model: nn.Module) -> None:
    """A teacher is copied from whole parameters.

    Raises:
        UnsupportedShardingError: FSDP2 has split them already.
    """
    if is_sharded(model):
        raise UnsupportedShardingError(
            "the teacher cannot be copied from a model that FSDP2 has split: call regate.apply before fully_shard or "
            "accelerator.prepare, or pass teacher='precomputed' or None"
        )


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, unless FSDP2 or ZeRO-3 has split it."""
    part = getattr(parameter, "ds_tensor", None)
    if isinstance(part, Tensor):
        return part
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
