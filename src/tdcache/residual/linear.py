"""What stands between a part and the stream: projections, scales and norms, as linear maps of this very forward.

A decomposition is exact because all of it is linear once the scales of norms are held. Nothing is taken on trust: a
module that is not affine is refused, and so is a step that does not lead to the value that was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tdcache.errors import AttributionError, ResidualError
from tdcache.hooks.values import first_tensor
from tdcache.named_proof import deviation
from tdcache.norms import NormForm, is_norm, wide

__all__ = [
    "LinearMap",
    "LinearStep",
    "NormStep",
    "Scaled",
    "Unchanged",
    "run",
    "step_between",
    "tolerance",
]

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By how much a sum of parts may miss what was kept, beside its largest value: room for many layers of rounding, and
for norms that compute in float32 inside of float64, and none for a missing term."""


class LinearStep(Protocol):
    """A linear map from a projection's result to what is added to the stream, and what it adds of itself."""

    @property
    def bias(self) -> Tensor | None:
        """What is added whatever comes; None for nothing."""

    def __call__(self, part: Tensor) -> Tensor:
        """What becomes of a part ``(..., unit)``."""

    def back(self, direction: Tensor) -> Tensor:
        """The direction ``u'`` for which ``part @ u' == self(part) @ direction``."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The projection's result is added as it is."""

    bias: None = None

    def __call__(self, part: Tensor) -> Tensor:
        """Give the part as it is, since nothing stands between."""
        return part

    def back(self, direction: Tensor) -> Tensor:
        """Give the direction as it is, since nothing stands between."""
        return direction


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """The projection's result is multiplied by a constant: a number, or one for each unit."""

    factor: Tensor
    bias: None = None

    def __call__(self, part: Tensor) -> Tensor:
        """The part, multiplied by the factor."""
        return part * self.factor

    def back(self, direction: Tensor) -> Tensor:
        """The direction, multiplied by the factor."""
        return direction * self.factor


@dataclass(frozen=True, slots=True, eq=False)
class NormStep:
    """A norm as the linear map that it is at one value: ``weight * centre(part) / scale``.

    Args:
        form: weight, bias, and whether it is centred.
        inverse_scale: ``1 / scale`` of every row, ``(..., 1)``, a constant.
    """

    form: NormForm
    inverse_scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, path: str, x: Tensor) -> NormStep:
        """The norm at ``x``.

        Raises:
            ResidualError: the module is no norm over the last axis.
        """
        given = x.to(_like(module, x))
        try:
            form = NormForm.of(module, path, given)
            found = form.inverse_scale(module, path, given, run(module, given))
        except AttributionError as error:
            raise ResidualError(f"the scale of the norm {path!r} cannot be frozen: {error}") from None
        if form.axes != (-1,):
            raise ResidualError(f"the norm {path!r} works on axes {form.axes}, not on the units of the stream")
        form = NormForm(form.weight.reshape(-1).to(x), form.bias.reshape(-1).to(x), form.axes, form.centred)
        return cls(form, found.to(x))

    @property
    def bias(self) -> Tensor | None:
        """What the norm returns for zeros; None where that is zero."""
        return self.form.bias if bool(self.form.bias.any()) else None

    def __call__(self, part: Tensor) -> Tensor:
        """What becomes of a part ``(..., unit)``, without the bias."""
        return self.form.weight * self.form.centre(part) * self._scale(part)

    def back(self, direction: Tensor) -> Tensor:
        """The direction before the norm that does what ``direction`` does after it, for each row."""
        return self.form.centre(self.form.weight * direction) * self.inverse_scale

    def _scale(self, part: Tensor) -> Tensor:
        """The scale of the rows, also where the part has an axis of heads or units more."""
        extra = part.ndim - self.inverse_scale.ndim
        return self.inverse_scale.reshape(*self.inverse_scale.shape[:-1], *(1,) * extra, 1)


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """``x @ weight + bias``, in at least single precision and without a graph to the parameters.

    Args:
        weight: ``(in, out)``.
        bias: ``(out,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    @torch.no_grad()
    def that_made(cls, result: Tensor, given: Tensor, module: nn.Module, path: str) -> LinearMap:
        """The map that a module computes, where one row ``(width,)`` that it was given and its result are known.

        The weight is taken as it is written if that leads from one to the other, and probed as in :meth:`of` if not.
        """
        written = cls._written(module, len(given))
        found = (each for each in written if deviation(each.to(given)(given), result) <= tolerance(given))
        return next(found, None) or cls.of(module, path, len(given))

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, path: str, width: int) -> LinearMap:
        """The map that a module computes: its weight as it stands or transposed, else what it makes of unit vectors.

        Args:
            module: the module.
            path: its path, for messages.
            width: the number of units it is called with.

        Raises:
            ResidualError: it is not affine.
        """
        if type(module) is nn.Linear:
            bias: Tensor | None = module.bias
            return cls(wide(module.weight).detach().T, None if bias is None else wide(bias).detach())
        like = _like(module, torch.empty(0))
        wave = torch.cos(1.7 * torch.arange(width, device=like.device) + 0.3).to(like.dtype)
        out = _probed(module, path, torch.stack([0 * wave, wave]))
        if out.ndim != 2 or len(out) != 2:
            raise _not_affine(module, path, f"returned {tuple(out.shape)} for {(2, width)}")
        written = (
            each for each in cls._written(module, width) if deviation(each(wide(wave)), out[1]) <= tolerance(like)
        )
        found = next(written, None) or cls._of_unit_vectors(module, path, width, like)
        off = deviation(found(wide(wave)), out[1])
        if off > tolerance(like):
            raise _not_affine(module, path, f"differs by {off:.1e} from the map of its unit vectors")
        return found

    def to(self, like: Tensor) -> LinearMap:
        """The map in the dtype and on the device of ``like``."""
        return LinearMap(self.weight.to(like), None if self.bias is None else self.bias.to(like))

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight + bias``."""
        return self.with_bias(x @ self.weight)

    def with_bias(self, result: Tensor) -> Tensor:
        """What ``x @ weight`` gives, with the bias added where there is one."""
        return result if self.bias is None else result + self.bias

    @classmethod
    def _written(cls, module: nn.Module, width: int) -> Iterator[LinearMap]:
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            added = wide(bias).detach() if isinstance(bias, Tensor) else None
            for each in (weight.T, weight):  # nn.Linear, and GPT-2's Conv1D
                if len(each) == width and (added is None or added.shape == each.shape[1:]):
                    yield cls(wide(each).detach(), added)

    @classmethod
    def _of_unit_vectors(cls, module: nn.Module, path: str, width: int, like: Tensor) -> LinearMap:
        eye = torch.eye(width, dtype=like.dtype, device=like.device)
        out = _probed(module, path, torch.cat([eye, 0 * eye[:1]]))
        return cls(out[:-1] - out[-1], out[-1] if bool(out[-1].any()) else None)


def _probed(module: nn.Module, path: str, rows: Tensor) -> Tensor:
    try:
        return wide(run(module, rows))
    except Exception as error:  # noqa: BLE001  # whatever a module that is not affine does with a probe
        raise _not_affine(module, path, f"raised {type(error).__name__} at a probe {tuple(rows.shape)}") from None


def run(module: nn.Module, value: Tensor) -> Tensor:
    """What a module returns, without calling it: no hook sees the value.

    It runs in its own dtype and on its own device; what it returns has the dtype and device of ``value``.
    """
    found = first_tensor(module.forward(value.to(_like(module, value))))
    if found is None:
        raise ResidualError(f"{type(module).__name__} returned no tensor")
    return found.to(value)


def _like(module: nn.Module, default: Tensor) -> Tensor:
    """A tensor of the dtype and on the device that a module computes with."""
    return next((each for each in module.parameters() if each.is_floating_point()), default)


def tolerance(*tensors: Tensor) -> float:
    """The largest deviation that rounding in these dtypes explains."""
    return max(_TOLERANCES.get(tensor.dtype, 1e-3) for tensor in tensors)


def step_between(
    module: nn.Module | None, path: str, given: Tensor, added: Tensor, allowed: float
) -> LinearStep | None:
    """The map from what a projection returned to what is added to the stream; None where there is none.

    Args:
        module: the module that returned what is added, if it is one.
        path: its path.
        given: what the projection returned.
        added: the contribution.
        allowed: the largest deviation.
    """
    if deviation(given, added) <= allowed:
        return Unchanged()
    if module is not None and is_norm(path, module):
        norm = NormStep.of(module, path, given)
        total = norm(given) if norm.bias is None else norm(given) + norm.bias
        return norm if deviation(total, added) <= allowed else None
    factors = [(given * added).sum() / given.square().sum()]
    if given[..., 0].numel() > 1:  # of a single row any vector is a multiple, unit by unit
        rows = tuple(range(given.ndim - 1))
        factors.append((given * added).sum(rows) / given.square().sum(rows).clamp(min=torch.finfo(given.dtype).tiny))
    if module is not None and not any(True for _ in module.children()):
        ones = torch.ones(given.shape[-1:]).to(given).reshape(*(1,) * (given.ndim - 1), -1)
        factors.append(run(module, ones).reshape(-1))  # one number per unit
    return next((Scaled(each.detach()) for each in factors if deviation(each * given, added) <= allowed), None)


def _not_affine(module: nn.Module, path: str, why: str) -> ResidualError:
    return ResidualError(f"{path!r} is a {type(module).__name__} that cannot be taken as x @ weight + bias: it {why}")
