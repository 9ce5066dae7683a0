"""What a normalisation layer computes, determined by probing it.

Class names are not reliable: ``GemmaRMSNorm`` multiplies by ``1 + weight``, ``T5LayerNorm`` subtracts no mean. A wrong
guess would silently falsify every score that freezes a norm, so a module that computes no norm is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tdcache.errors import AttributionError

__all__ = ["NormForm", "is_norm", "refuse_no_norm", "wide"]

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""By how much, relative to the output, a module may differ from a norm; norms compute in float32 inside of float64."""


class _NoNormError(Exception):
    """The result of a failed probe: why the module is not a norm."""


@dataclass(frozen=True, slots=True)
class NormForm:
    """``N(x) = weight * xc / scale(xc) + bias`` with ``xc = x - mean(x)`` where it is centred, and ``x`` otherwise.

    Args:
        weight: the effective weight, of the normalised axes and broadcastable to the input.
        bias: ``N(0)``, of the same shape.
        axes: the axes that are normalised, counted from the end.
        centred: whether the mean is subtracted.
    """

    weight: Tensor
    bias: Tensor
    axes: tuple[int, ...]
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, path: str, x: Tensor) -> NormForm:
        """Probe a module with inputs of the dtype, device and number of axes of ``x``.

        The class's forward is called on four rows, so that no hook sees them; the module is not changed.

        Raises:
            AttributionError: it is no norm.
        """
        tried = []
        for shape, axes in _layouts(module, x):
            try:
                return _probe(module, shape, axes, x)
            except _NoNormError as error:
                tried.append(f"over axes {axes}: {error}")
        raise _refused(module, path, "; ".join(tried) or f"no axis of its input {tuple(x.shape)} fits its parameters")

    def centre(self, x: Tensor) -> Tensor:
        """Return ``x`` minus its mean, where the norm subtracts one."""
        return x - x.mean(self.axes, keepdim=True) if self.centred else x

    @torch.no_grad()
    def inverse_scale(self, module: nn.Module, path: str, x: Tensor, y: Tensor) -> Tensor:
        """``1 / scale`` of every row, by least squares from what the module returned.

        Raises:
            AttributionError: ``y`` is no multiple of ``weight * xc``, plus the bias.
        """
        basis, moved = self.weight * self.centre(wide(x)), wide(y) - self.bias
        size = (basis**2).sum(self.axes, keepdim=True)
        found = (moved * basis).sum(self.axes, keepdim=True) / torch.where(size > 0, size, 1)
        tolerance = _tolerance(x, y)
        allowed = (moved**2).sum(self.axes, keepdim=True) + (self.bias**2).sum()
        off = ((moved - found * basis) ** 2).sum(self.axes, keepdim=True) - tolerance**2 * allowed
        if bool((off > torch.finfo(off.dtype).tiny).any()):
            raise _refused(module, path, "what it returned for its input is no multiple of weight * x per row")
        return torch.where(size > 0, found, self._at_zero(module, x)) if bool((size == 0).any()) else found

    def _at_zero(self, module: nn.Module, x: Tensor) -> float:
        """``1 / scale`` of a row of zeros, ``eps ** -0.5``; 0 where there is no eps."""
        shape = self.weight.shape
        unit = self.centre(_alternating(shape, x.device))
        for step in (1e-3, 1e-6, 1e-9):  # the largest step that eps is not lost beside
            y = wide(type(module).forward(module, (step * unit).to(x.dtype).view(1, *shape))) - self.bias
            basis = step * self.weight * unit
            found = ((y * basis).sum() / (basis**2).sum()).item()
            eps = found**-2 - (step * unit.to(x.dtype).double()).square().mean().item() if found > 0 else 0.0
            if eps > 0.1 * step**2:
                return float(eps**-0.5)
        return 0.0


def wide(tensor: Tensor) -> Tensor:
    """In at least single precision: half-precision scores are accumulated and returned in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def is_norm(path: str, module: nn.Module) -> bool:
    """Whether the module computes a norm; if its width is only known from an input, whether its name says so."""
    width = _width(module)
    if width is None:
        named = "norm" in type(module).__name__.lower() and not isinstance(module, nn.GroupNorm | _NormBase)
        return named and _may_be_norm(module)
    try:
        refuse_no_norm(path, module)
    except AttributionError:
        return False
    return True


def refuse_no_norm(path: str, module: nn.Module) -> None:
    """Refuse a module that is not a norm, as far as this is known without its input.

    Raises:
        AttributionError: it is none.
    """
    if not _may_be_norm(module):
        raise _refused(module, path, "a norm has no submodules, and one number per feature as weight")
    width = _width(module)
    if width is None:
        return
    like = next(module.parameters(), torch.empty(0))
    try:
        NormForm.of(module, path, like.new_empty(1, *width))
    except AttributionError as error:
        if len(width) != 1:
            raise
        try:
            NormForm.of(module, path, like.new_empty(1, *width, 1, 1))  # channels first
        except AttributionError:
            raise error from None


def _may_be_norm(module: nn.Module) -> bool:
    width = _width(module)
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    sizes = {torch.Size(shape).numel() for shape in shapes}
    return not any(True for _ in module.children()) and (sizes <= {1} or (width is not None and shapes <= {width}))


def _width(module: nn.Module) -> tuple[int, ...] | None:
    """The normalised shape, from ``normalized_shape`` or one-dimensional parameters."""
    given: Any = getattr(module, "normalized_shape", None)
    if isinstance(given, tuple | list | torch.Size):
        return tuple(given)
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    (shape,) = shapes if len(shapes) == 1 else (None,)
    return shape if shape is not None and len(shape) == 1 and shape[0] > 1 else None


def _layouts(module: nn.Module, x: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of one row and the axes that may be normalised: the last ones, or the channels."""
    width = _width(module)
    sizes = {parameter.numel() for parameter in module.parameters()} - {1}
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    last = x.shape[-1:] if width is None else width
    if tuple(x.shape[-len(last) :]) == tuple(last):
        found.append(((*(1,) * (x.ndim - 1 - len(last)), *last), tuple(range(-len(last), 0))))
    if x.ndim > 2 and (width is None or width == (x.shape[1],)):
        found.append(((x.shape[1], *(1,) * (x.ndim - 2)), (1 - x.ndim,)))
    return [(shape, axes) for shape, axes in found if sizes <= {torch.Size(shape).numel()}]


def _alternating(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Ones of alternating sign: no entry is small, and their mean is that of one entry at most."""
    signs = 1 - 2 * (torch.arange(torch.Size(shape).numel(), device=device) % 2)
    return signs.double().view(shape) if device.type != "mps" else signs.float().view(shape)


def _probe(module: nn.Module, shape: tuple[int, ...], axes: tuple[int, ...], x: Tensor) -> NormForm:
    if isinstance(module, _NormBase) or (module.training and any(True for _ in module.buffers())):
        raise _NoNormError("it keeps statistics of its batches")
    if torch.Size(shape).numel() < 2:
        raise _NoNormError("a single number has no scale")
    half = x.dtype in (torch.float16, torch.bfloat16)
    unit = _alternating(shape, x.device)
    large = 64.0 if half else 1e4  # beside its square eps is nothing
    wave = torch.cos(1.7 * torch.arange(unit.numel(), device=x.device) + 0.3).to(unit).view(shape)
    rows = torch.stack([0 * unit, large * unit, large * (unit + 0.5), 0.7 * large * wave]).to(x.dtype)
    try:
        out = type(module).forward(module, rows)
    except Exception as error:  # noqa: BLE001  # whatever a module that is no norm does with a probe
        raise _NoNormError(f"it raised {type(error).__name__} at a probe of shape {tuple(rows.shape)}") from None
    if not isinstance(out, Tensor) or out.shape != rows.shape or not out.is_floating_point():
        raise _NoNormError("it does not return one tensor of its input's shape")
    zero, high, shifted, other = wide(out)
    bias = torch.where(zero.isfinite(), zero, 0)  # a norm without eps has no value there
    tolerance = _tolerance(x, out)
    centred = _differs(high, shifted, bias) <= tolerance
    form = NormForm(torch.ones_like(bias), bias, axes, centred)
    given = wide(rows)
    weight = (high - bias) / _normalised(form, given[1])
    form = NormForm(weight, bias, axes, centred)
    off = _differs(weight * _normalised(form, given[3]) + bias, other, bias)
    if not off <= tolerance:
        kind = "with" if centred else "without"
        raise _NoNormError(f"{kind} the mean subtracted, a norm would differ from it by {off:.2g} at a probe")
    return form


def _normalised(form: NormForm, row: Tensor) -> Tensor:
    moved = row - row.mean() if form.centred else row
    return moved / moved.square().mean().sqrt()


def _differs(one: Tensor, other: Tensor, bias: Tensor) -> float:
    """The largest difference, relative to what the second holds besides the bias."""
    return float((one - other).norm() / (other - bias).norm().clamp(min=1e-30))


def _tolerance(*tensors: Tensor) -> float:
    return max(_TOLERANCES.get(tensor.dtype, 1e-4) for tensor in tensors)


def _refused(module: nn.Module, path: str, why: str) -> AttributionError:
    return AttributionError(
        f"{path!r} is a {type(module).__name__}, which does not compute weight * x / scale(x) + bias ({why}), so it "
        "has no scale to freeze; leave it out of the selector"
    )
