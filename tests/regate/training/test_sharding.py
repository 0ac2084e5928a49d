"""Models split over ranks in ways that would hide the decoder from the gate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regate
from regate.errors import UnsupportedShardingError
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_moved_after_apply() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, SPARSE, backend="eager")
    model.cuda()
    model(**{k: v.cuda() for k, v in CORE["llava"].batch().items()}).loss.backward()
    assert gate.report()["teacher_samples"] == 2
