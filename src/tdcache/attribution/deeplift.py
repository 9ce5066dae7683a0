"""DeepLift: multipliers between an input and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdcache.attribution.base import Attribution, Work
from tdcache.attribution.frame import Baseline, Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.integrated import gap_key
from tdcache.attribution.lrp.linear import ELEMENTWISE
from tdcache.attribution.lrp.replaced_backward import ModuleCall, ReplacedBackward, ReplacedRule, install_replaced
from tdcache.attribution.point import PointRows, wide
from tdcache.errors import AttributionError
from tdcache.function_calls.stand_in import CallModule, check_selector, select_sites
from tdcache.hooks import MultiHookHandle
from tdcache.inplace import InplaceWatch
from tdcache.types import Selector

__all__ = ["DeepLift", "RESCALED", "Rescale"]

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

_SOFTMAXES = (nn.Softmax, nn.LogSoftmax)

RESCALED: tuple[type[nn.Module], ...] = (*ELEMENTWISE, *_POOLS, *_SOFTMAXES)
"""Modules that DeepLift has a rule for."""


class Rescale:
    """The rescale rule: at elementwise modules, the slope between input and reference replaces the derivative.

    A max pool assigns the change of its output to the maximum of the input, or to that of the reference if that is
    larger. A softmax has its own rule (:class:`_Softmax`), complete for every output and invariant to a constant added
    to all logits.

    Args:
        selector: which modules; by default the classes of :data:`RESCALED`. Those that are neither max pools nor
            softmaxes count as elementwise. Functions that a forward calls have the rule where they are selected by
            name, ``[*RESCALED, r".*::relu"]``.
        eps: differences below it use the derivative.
    """

    def __init__(self, selector: Selector = RESCALED, eps: float = 1e-7) -> None:
        check_selector(selector)
        self.selector = selector
        self.eps = eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def at(self, module: nn.Module, pairs: list[_Pair]) -> ReplacedRule:
        """The rule of one module, whose calls for the reference were ``pairs``."""
        if isinstance(module, _POOLS):
            return _MaxPool(pairs, self.eps)
        softmax = module.site.name == "softmax" if isinstance(module, CallModule) else isinstance(module, _SOFTMAXES)
        return _Softmax(pairs) if softmax else _Slope(pairs, self.eps)


_Pair = tuple[Tensor, Tensor]
"""The input and output of a module in one call of the reference's forward."""


class _References:
    """A modifier for the reference's rows: records the input and output of every module with a rule."""

    def __init__(self, rule: Rescale) -> None:
        self.rule = rule
        self.pairs: dict[str, list[_Pair]] = {}
        self.watch = InplaceWatch()

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Install the hooks that keep what the rule needs of the reference."""
        for path, module, _ in select_sites(model, self.rule.selector, allow_empty=True):
            install_replaced(module, _Reference(path, self, rows), handle)


class _Reference(ReplacedBackward):
    """Records one module's calls; changes nothing."""

    def __init__(self, path: str, found: _References, rows: PointRows | None) -> None:
        super().__init__(path, _Slope([], 0), rows)
        self.found = found

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep input and output of the reference's rows."""
        x, call = self._ended_call()
        y = self.returns.read(module, args, output)
        if self.rows is not None:
            x = self.rows.part(x, call.x_axis)
            y = self.rows.part(y, self.rows.axis_in(self.returns, module, args, output, y))
        self.found.watch.add(self.path, x)
        self.found.watch.add(self.path, y)
        self.found.pairs.setdefault(self.path, []).append((x, y))


@dataclass(frozen=True, slots=True)
class _Rescaled:
    """A modifier for the inputs' rows: every module with a rule follows it."""

    references: _References

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Install the hooks that replace the gradients of the modules selected."""
        rule = self.references.rule
        for path, module, _ in select_sites(model, rule.selector, allow_empty=True):
            pairs = self.references.pairs.get(path, [])
            install_replaced(module, ReplacedBackward(path, rule.at(module, pairs), rows), handle)


@dataclass(frozen=True, slots=True)
class _Paired:
    """A rule between a call and the same call for the reference."""

    pairs: list[_Pair]

    def reference(self, call: ModuleCall, x: Tensor) -> _Pair:
        """The input and output of the module for the reference.

        Raises:
            AttributionError: the module ran differently there.
        """
        if call.number < len(self.pairs) and self.pairs[call.number][0].shape == x.shape:
            return self.pairs[call.number]
        raise AttributionError(
            f"{call.path!r} ran {len(self.pairs)} times for the reference, and otherwise for the input, so there is "
            "nothing to compare with; give a baseline for which the model takes the same way"
        )


@dataclass(frozen=True, slots=True)
class _Slope(_Paired):
    """An elementwise module: ``(f(x) - f(x')) / (x - x')``; the derivative where there is no step."""

    eps: float
    keeps_derivative: ClassVar[bool] = True

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The multipliers times ``grad``, and what is left to the derivative."""
        low_x, low_y = self.reference(call, x)
        step, rise = x - low_x, y - low_y
        steps = step.abs() >= self.eps
        return grad * torch.where(steps, rise / torch.where(steps, step, 1), 0), grad * ~steps


@dataclass(frozen=True, slots=True)
class _MaxPool(_Paired):
    """What a maximum rises by from reference to input comes from the larger of the two maxima."""

    eps: float

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The multipliers times ``grad``."""
        low_x, low_y = self.reference(call, x)
        space = next(size for size, kind in enumerate(_POOLS, 1) if isinstance(call.module, kind))
        here, there = (_maxima(call.module, each, space) for each in (x, low_x))
        # Below each maximum of the input by what it exceeds that of the reference, and the other way round.
        above = torch.where(y > low_y, y - low_y, 0).flatten(-space)
        below = torch.where(y > low_y, 0, y - low_y).flatten(-space)
        flat, arrives = x.flatten(-space), grad.flatten(-space)
        moved = torch.zeros_like(flat).scatter_add(-1, here, arrives * above).scatter_add(-1, there, arrives * below)
        derivative = torch.zeros_like(flat).scatter_add(-1, here, arrives)
        step = flat - low_x.flatten(-space)
        steps = step.abs() >= self.eps  # false also between two infinities
        return torch.where(steps, moved / torch.where(steps, step, 1), derivative).view_as(x)


def _maxima(settings: Any, x: Tensor, space: int) -> Tensor:
    pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[space - 1]
    _, found = pool(
        x,
        settings.kernel_size,
        settings.stride,
        settings.padding,
        settings.dilation,
        ceil_mode=settings.ceil_mode,
        return_indices=True,
    )
    return found.flatten(-space)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Softmax(_Paired):
    r"""``M = diag(L) - L L^T / sum(L)``, with ``L`` the logarithmic means of the two softmaxes ``p`` and ``p'``.

    With ``d`` the step of the logits and ``c`` that of their ``logsumexp``, ``log p - log p' = d - c``, so that
    ``p - p' = L (d - c)``; both sides sum to zero, hence ``c = L^T d / sum(L)`` and ``p - p' = M d``. Equal logits give
    ``L = p``, the derivative. A logarithm rises by ``d - c``: ``nn.LogSoftmax`` has ``M = I - 1 L^T / sum(L)``. Where a
    logit is minus infinity its mean is zero, and so are its multipliers.
    """

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The multipliers times ``grad``."""
        module, axis = call.module, getattr(call.module, "dim", None)
        if axis is None:  # as torch chooses
            axis = 0 if x.ndim in (0, 1, 3) else 1
        low_x, _ = self.reference(call, x)
        mean = _logarithmic_mean(wide(x).log_softmax(axis), wide(low_x).log_softmax(axis))
        share = mean / mean.sum(axis, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        arrives = wide(grad)
        if isinstance(module, nn.LogSoftmax):
            found = arrives - share * arrives.sum(axis, keepdim=True)
        else:
            found = mean * (arrives - (share * arrives).sum(axis, keepdim=True))
        return found.to(x.dtype)


def _logarithmic_mean(high: Tensor, low: Tensor) -> Tensor:
    """``(p - p') / (log p - log p')`` of the exponentials of both; their common value where they are equal."""
    top, step = torch.maximum(high, low), (high - low).abs()
    steps = step > 0  # false also between two infinities
    step = torch.where(steps, step, 1)
    return top.exp() * torch.where(steps, -torch.expm1(-step) / step, 1)


class DeepLift(Attribution):
    """Differences from a reference, propagated by the rescale rule (Shrikumar et al. 2017, arXiv:1704.02685).

    The reference runs first, and then the input with its rules. The scores sum to ``f(input) - f(reference)`` where the
    model is made of linear modules and those that ``rule`` selects, called as modules or selected by name; ``("gap",
    ...)`` holds the remaining difference of each row.

    Args:
        baseline: the reference; see :class:`IntegratedGradients`.
        rule: the modules at which the slope replaces the derivative.
        multiply_by_inputs: multiply by the difference; with False, the scores are the multipliers.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        *,
        baseline: Baseline = None,
        rule: Rescale | None = None,
        multiply_by_inputs: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.baseline = baseline
        self.rule = Rescale() if rule is None else rule
        self.multiply_by_inputs = multiply_by_inputs

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.explained()
        start = frame.baselines(self.baseline)
        references = _References(self.rule)
        point = frame.point(("reference", id(self)), inputs=start, modifiers=(references,))
        low = {name: Seen((), with_grads=False) for name in frame.targets}
        yield [frame.ask(point, low[name], target, base_follows=True) for name, target in frame.targets.items()]
        references.watch.check("DeepLift compares with it; write the operation out of place")
        point = frame.point(("rescaled", id(self)), modifiers=(_Rescaled(references),))
        seen = {name: Seen(places, with_values=False) for name in frame.targets}
        yield [frame.ask(point, seen[name], target, grads=places) for name, target in frame.targets.items()]
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name, each in seen.items():
            steps = {place: wide(frame.data.get(place.name) - start[place.name]) for place in places}
            grads = {place: each.grad(place, step) for place, step in steps.items()}
            # A masked logit has no multiplier, and its step is infinite or undefined.
            parts = {place: torch.where(grads[place] == 0, 0, grads[place] * step) for place, step in steps.items()}
            gap = frame.completeness_gap(parts, wide(each.needed_target() - low[name].needed_target()))
            for place, part in parts.items():
                scores[key_of(self.name, name, place)] = part if self.multiply_by_inputs else grads[place]
                scores[gap_key(self.name, name, place)] = gap
        return scores
