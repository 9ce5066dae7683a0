"""Normalisation layers in a backward: their scale counts as a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdcache.attribution.asks import Rows
from tdcache.attribution.lrp.replaced import ReplacedBackward, install_replaced
from tdcache.attribution.modifiers import Installed
from tdcache.errors import AttributionError
from tdcache.hooks import MultiHookHandle
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["FreezeNorm", "FrozenNorm", "frozen_norm_gradient", "is_norm"]


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm or an RMSNorm, of torch or by its name."""
    name = type(module).__name__
    return isinstance(module, nn.LayerNorm) or name.endswith(("RMSNorm", "LayerNorm"))


def frozen_norm_gradient(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a norm's input where its standard deviation (or root mean square) counts as a constant.

    ``y = gamma * (x - mean(x)) / scale + beta`` is then linear in ``x``; an RMSNorm subtracts no mean.
    """
    weight = getattr(module, "weight", None)
    shape = getattr(module, "normalized_shape", None)
    axes = tuple(range(-len(shape), 0)) if isinstance(shape, tuple | torch.Size) else (-1,)
    epsilons = (getattr(module, name, None) for name in ("eps", "variance_epsilon"))
    eps: Any = next((each for each in epsilons if each is not None), torch.finfo(x.dtype).eps)
    weighted = grad if weight is None else grad * weight.detach()
    if "RMS" in type(module).__name__:
        return weighted * torch.rsqrt((x**2).mean(axes, keepdim=True) + eps)
    scale = torch.rsqrt(x.var(axes, keepdim=True, unbiased=False) + eps)
    scaled = weighted * scale
    return scaled - scaled.mean(axes, keepdim=True)


class FrozenNorm:
    """A rule: :func:`frozen_norm_gradient`."""

    def __repr__(self) -> str:
        return "FrozenNorm()"

    def gradient(self, module: nn.Module, x: Tensor, y: Tensor, grad: Tensor, norm: nn.Module | None) -> Tensor:
        """The gradient of the input."""
        return frozen_norm_gradient(module, x, grad)


class FreezeNorm(Installed):
    """A modifier: the scale of the selected norms counts as a constant in the backward.

    Args:
        selector: LayerNorms and RMSNorms; all of them by default.
    """

    rowwise = True

    def __init__(self, selector: Selector | None = None) -> None:
        super().__init__()
        self.selector = selector

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add the hooks."""
        for path, module, _ in select(model, _any_norm if self.selector is None else self.selector):
            if not is_norm(module):
                raise AttributionError(
                    f"{path!r} is a {type(module).__name__}, no LayerNorm or RMSNorm, so it has no scale to freeze"
                )
            install_replaced(module, ReplacedBackward(path, FrozenNorm(), rows), handle)


def _any_norm(path: str, module: nn.Module) -> bool:
    return is_norm(module)
