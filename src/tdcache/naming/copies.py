"""The copy of a model that forwards are run on, so that the model itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdcache.errors import TdcacheError

__all__ = ["WorkingCopy", "in_best_dtype", "working_copy"]

T = TypeVar("T")

FLOAT64_PARAMETERS = 300_000_000
"""Models with more parameters are run in their own dtype."""


NOISE = 0.3
"""The standard deviation of what is added to biases and the weights of norms, relative to their own."""
_BELOW_FLOAT32 = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class WorkingCopy:
    """A copy in evaluation mode.

    Attributes:
        model: the copy.
        dtype: that of its parameters.
    """

    model: nn.Module
    dtype: torch.dtype

    def shake(self) -> None:
        """Move parameters that may be constant: biases, the weights of norms, and what is all zeros or ones.

        A fresh model has weights of one and biases of zero, which would let a wrong name pass.

        All other weights are moved by less than float32 shows, so that a float64 value which float32 could hold as well
        was computed in float32, and is not merely a weight that was stored so.
        """
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in filter(torch.is_floating_point, self.model.parameters()):
                flat = parameter.flatten()[:1000]
                if parameter.dim() <= 1 or bool((flat == flat[:1]).all()):
                    size = torch.clamp(flat.double().std() if flat.numel() > 1 else flat.new_zeros(()), min=0.1)
                    draw = torch.randn(parameter.shape, generator=random, dtype=torch.float32)
                    parameter.add_(draw.to(parameter) * (NOISE * size).to(parameter))
                elif parameter.dtype is torch.float64:
                    parameter.mul_(1 + _BELOW_FLOAT32)

    def fitted(self, inputs: Any) -> Any:
        """Inputs on the model's device, floats in its dtype and with a graph."""
        if isinstance(inputs, Mapping):
            return {name: self.fitted(value) for name, value in inputs.items()}
        if isinstance(inputs, tuple | list):
            return type(inputs)(self.fitted(value) for value in inputs)
        if not isinstance(inputs, Tensor):
            return inputs
        device = next((each.device for each in self.model.parameters()), inputs.device)
        dtype = self.dtype if inputs.is_floating_point() else inputs.dtype
        own = inputs.detach().to(device, dtype, copy=True)  # one made in inference mode has no version
        return own.requires_grad_().clone() if own.is_floating_point() else own


def in_best_dtype(model: nn.Module, use: Callable[[WorkingCopy], T]) -> T:
    """What ``use`` makes of a copy in float64, or of one in the model's own dtype where it cannot run in float64.

    Some models make masks for float32, whatever their dtype; large ones are not copied to twice their size.
    """
    with torch.inference_mode(False):
        if sum(parameter.numel() for parameter in model.parameters()) <= FLOAT64_PARAMETERS:
            try:
                return use(working_copy(model, double=True))
            except TdcacheError:  # said of the model, whatever its dtype
                raise
            except (RuntimeError, TypeError, ValueError):
                return use(working_copy(model, double=False))
        return use(working_copy(model, double=False))


def working_copy(model: nn.Module, *, double: bool = True) -> WorkingCopy:
    """Copy ``model`` for forwards with a graph, in evaluation mode.

    Args:
        model: left alone; the copy shares nothing with it.
        double: whether the copy is one in float64.
    """
    twin = copy.deepcopy(model, _in_float64(model) if double else {}).eval().requires_grad_(True)
    config = getattr(twin, "config", None)
    if config is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # noqa: SLF001  # grouped products have no float64
    if double:
        twin.double()
    dtype = next((each.dtype for each in twin.parameters() if each.is_floating_point()), torch.get_default_dtype())
    return WorkingCopy(twin, dtype)


def _in_float64(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` in which parameters are converted already, so that none is copied twice."""
    return {
        id(each): nn.Parameter(each.detach().to(torch.float64, copy=True))
        for each in model.parameters()
        if type(each) is nn.Parameter and each.is_floating_point() and not vars(each)
    }
