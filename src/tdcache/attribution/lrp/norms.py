"""Normalisation layers in a backward: their scale counts as a constant.

A norm divides by the size of its input, so its true gradient is orthogonal to that input and would carry (almost) no
relevance back; RelP and AttnLRP both hold the scale fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdcache.attribution.lrp.replaced_backward import ModuleCall, ReplacedBackward, install_replaced
from tdcache.attribution.modifiers import Installed
from tdcache.attribution.point import PointRows, wide
from tdcache.hooks import MultiHookHandle
from tdcache.named_places import Names
from tdcache.norms import NormForm, is_norm, refuse_no_norm
from tdcache.place_modules import sites_of
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["FreezeNorm", "FrozenNorm"]


class FrozenNorm:
    """A rule: the gradient of a norm's input where its standard deviation (or root mean square) counts as a constant.

    ``y = weight * xc / scale + bias`` is then linear in ``x``. See :class:`~tdcache.norms.NormForm`.
    """

    def __repr__(self) -> str:
        return "FrozenNorm()"

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the input.

        Raises:
            AttributionError: the module is no norm.
        """
        form = NormForm.of(call.module, call.path, x)
        inverse = form.inverse_scale(call.module, call.path, x, y)
        if torch.is_grad_enabled():  # differentiable: 1 / sqrt(mean(xc^2) + eps), eps being what is missing
            square = form.centre(wide(x)).square().mean(form.axes, keepdim=True)
            inverse = torch.rsqrt(square + (inverse**-2 - square).detach())
        return form.centre(wide(grad) * form.weight * inverse).to(x.dtype)


class FreezeNorm(Installed):
    """A modifier: the scale of the selected norms counts as a constant in the backward; the forward stays as it is.

    Args:
        selector: modules that compute ``weight * x / scale(x) + bias``, with or without the mean subtracted; by default
            all of them. What a module computes is found by probing it, whatever its name.
        names: the canonical names of the model, which the selector then means.
    """

    rowwise = True

    def __init__(self, selector: Selector | None = None, names: Names | None = None) -> None:
        super().__init__()
        self.names = names
        self.selector = selector

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Install :class:`FrozenNorm` in the backward of each norm selected."""
        every = self.selector is None
        sites = select(model, is_norm) if every else sites_of(model, self.selector or "", self.names)
        for path, module, _ in sites:
            if self.selector is not None:
                refuse_no_norm(path, module)
            install_replaced(module, ReplacedBackward(path, FrozenNorm(), rows), handle)
