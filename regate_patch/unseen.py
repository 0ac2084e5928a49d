"""What keeps Dynamo from looking: it is switched off, or what is active around the call, or a function, forbids it.

Said by name, with what to do.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import torch
import torch._dynamo
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from regate_patch.errors import NoBlocksError


class SwitchedOffError(NoBlocksError):
    """Nothing is captured in this call; in another it may be."""


_CAPTURES = ("default", "fail_on_recompile")  # stances of torch.compiler that run no code as it is
_SEEN = ("is_infra_mode", "ignore_compile_internals")  # the modes under which it does capture say so
_FORBIDS = re.compile(r"torch\.compiler\.disable\(\)`d function.*?<function (\S+) at 0x", re.DOTALL)


def switched_off_by() -> str | None:
    """What keeps `torch.compile` from capturing anything, and what to do about it; None if nothing does."""
    frames: Any = torch._dynamo.eval_frame
    stance = getattr(getattr(frames, "_stance", None), "stance", "default")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        cause = "the environment variable TORCHDYNAMO_DISABLE is 1"
    elif getattr(torch._dynamo.config, "disable", False):
        cause = "torch._dynamo.config.disable is True (as by the environment variable TORCH_COMPILE_DISABLE)"
    elif stance not in _CAPTURES:
        cause = f"the stance is {stance!r} (torch.compiler.set_stance)"
    elif torch._C._are_functorch_transforms_active():
        cause = (
            "a transform of torch.func, such as grad, is active around it (take gradients by backward() or "
            "torch.autograd.grad, of what torch.func.functional_call returns, too)"
        )
    elif (mode := active_mode()) is not None:
        cause = (
            f"{mode} is active around it, a TorchDispatchMode, under which it looks at nothing (FLOPs of gated steps "
            "are counted without one, in gate.report())"
        )
    else:
        return None
    return (
        f"torch.compile captures nothing, for {cause}; what it captures is what runs on active positions, with "
        "backend='eager', too. Undo that where the model is trained"
    )


def active_mode() -> str | None:
    """The mode that sees each operation, of a kind under which Dynamo captures nothing; None if there is none."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if not any(getattr(mode, of, bool)() for of in _SEEN)]
    return type(modes[-1]).__name__.strip("_") if modes else None


def forbidden_by(error: Exception) -> str:
    """Which function forbade Dynamo to look into it, whose it is, and what to do; "" if that is not the error.

    Packages of kernels do so by `torch.compiler.disable`. Models often have plain functions for where those are not
    installed, in the same order of arguments.
    """
    if (found := _FORBIDS.search(str(error))) is None:
        return ""
    name = found[1]
    packages = _packages_of(name)
    whose = f" of {' or '.join(packages)}" if packages else ""
    without = f"uninstall {' or '.join(packages)}, if the model does without, or " if packages else ""
    return (
        f"{name}{whose} forbids torch.compile to look into it: {without}let the model's code call a function of plain "
        "torch operations in its place, before regate.apply (the last line of user code below is where it is called). "
    )


def _packages_of(name: str) -> list[str]:
    """The packages that have functions of this name into which Dynamo must not look."""
    named = [vars(module).get(name) for module in list(sys.modules.values()) if module is not None]
    marked = [function for function in named if getattr(function, "_torchdynamo_disable", False)]
    return sorted({function.__module__.partition(".")[0] for function in marked if function.__module__})
