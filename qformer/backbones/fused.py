"""RMS norms and tanh GELUs of a frozen LLM, each by the one operation that torch has for it.

transformers writes out what they compute: six to eight operations each, and twice as many backwards, of which a GPU
launches every one and reads the whole tensor anew.  They are most of the kernels of a T5's block.  Which norms compute
just that is asked of them, by a trial, and not of a list of names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILONS = ("variance_epsilon", "eps")
"""What norms call the number that they add to the mean square."""
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How near a class comes to torch's operation, relative to it: rounding, which it does more often in bfloat16."""


class Fused:
    """Comes before the class of a module and computes what that does; `written` is the class as it was."""

    written: type[nn.Module]
    epsilon: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by the class as it was, since this one has no name to be found by."""
        return _new, (self.written, type(self).__mro__[1], self.epsilon), self.__dict__


class FusedRMSNorm(Fused):
    """x / √(mean(x²) + ε) · weight, over the last axis (Zhang and Sennrich 2019)."""

    weight: Tensor

    def forward(self, x: Tensor, *more: Any, **given: Any) -> Tensor:
        """(..., D) -> (..., D), summed in float32; as it is written where x is of another type than the weight, or not
        all that is given (a gate).
        """
        if more or given or x.dtype != self.weight.dtype:
            return self.written.forward(self, x, *more, **given)
        return rms_norm(x, self.weight, getattr(self, self.epsilon))


class FusedGELU(Fused):
    """The GELU by a hyperbolic tangent (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return F.gelu(x, approximate="tanh")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """(..., D), weight (D,) -> (..., D); on a GPU one kernel."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def fuse(model: nn.Module) -> None:
    """Have a model's RMS norms and tanh GELUs computed by one operation each; its tensors and their names stay."""
    from transformers.activations import FastGELUActivation, NewGELUActivation  # slow to import

    for module in model.modules():
        kind: Any = type(module)  # mypy does not take modules for hashable
        if kind in (NewGELUActivation, FastGELUActivation):
            module.__class__ = _before(kind, FusedGELU)
        elif (name := _epsilon(module)) is not None and _is_rms_norm(module, getattr(module, name)):
            module.__class__ = _before(kind, FusedRMSNorm, name)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """A while without: what is computed as it was before `fuse`."""
    changed = {module: type(module) for module in model.modules() if isinstance(module, Fused)}
    for module in changed:
        module.__class__ = module.written  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in changed.items():
            module.__class__ = kind


def _new(kind: Any, computes: Any, epsilon: str) -> Any:
    made = _before(kind, computes, epsilon)
    return made.__new__(made)


@cache
def _before(kind: Any, computes: Any, epsilon: str = "") -> Any:
    """A class by the same name, since transformers tells modules apart by names too."""
    return type(kind.__name__, (computes, kind), {"written": kind, "epsilon": epsilon})


def _epsilon(module: nn.Module) -> str | None:
    """The name of a norm's ε, where it may be an RMS norm: one weight, a number for each feature, and nothing else."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if isinstance(module, Fused) or not alone or weight is None or weight.ndim != 1:
        return None
    return next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)


@torch.no_grad()
def _is_rms_norm(module: nn.Module, epsilon: float) -> bool:
    """Whether a module, with another weight of its width, gives what torch's RMS norm does: of large rows and of one
    whose squares are of ε's size, in both types of number.
    """
    trial, width = copy.copy(module), len(module._parameters["weight"])  # type: ignore[arg-type]
    wide = torch.linspace(-2.0, 3.0, width, device="cpu")
    rows = torch.stack([wide, wide.flip(0) * 40, wide.square() * epsilon**0.5])
    for dtype, near in NEAR.items():
        x, weight = rows.to(dtype), torch.linspace(0.5, -1.5, width, device="cpu", dtype=dtype)
        wanted = rms_norm(x, weight, epsilon)
        trial._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        try:
            found = trial.forward(x)
            if found.dtype != dtype or not torch.allclose(found, wanted, rtol=near, atol=1e-6):
                return False
        except Exception:  # another kind of module, which asks for something else, in whatever way
            return False
    return True
