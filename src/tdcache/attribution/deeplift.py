"""DeepLift: multipliers between an input and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional

from tdcache.attribution.asks import Rows, wide
from tdcache.attribution.base import Attribution, Work
from tdcache.attribution.frame import Baseline, Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.integrated import gap_key
from tdcache.attribution.lrp.linear import ELEMENTWISE
from tdcache.attribution.lrp.replaced import Call, ReplacedBackward, ReplacedRule, install_replaced
from tdcache.attribution.targets import At, Target
from tdcache.errors import AttributionError
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["DeepLift", "RESCALED", "Rescale"]

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

_SOFTMAXES = (nn.Softmax, nn.LogSoftmax)

RESCALED: tuple[type[nn.Module], ...] = (*ELEMENTWISE, *_POOLS, *_SOFTMAXES)
"""Modules that DeepLift has a rule for."""


class Rescale:
    """At elementwise modules the slope between input and reference takes the derivative's place (the rescale rule).

    The rows are the inputs followed by as many references. A max pool hands what its output rises by to the input's
    maximum, or to the reference's where that is larger. A softmax has a rule of its own (:class:`_Softmax`), complete
    for every output and indifferent to a constant added to all logits.

    Args:
        selector: which modules; by default the classes of :data:`RESCALED`. Those that are neither max pools nor
            softmaxes count as elementwise.
        eps: differences below it use the derivative.
    """

    def __init__(self, selector: Selector = RESCALED, eps: float = 1e-7) -> None:
        self.selector = selector
        self.eps = eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add the hooks."""
        for path, module, _ in select(model, self.selector, allow_empty=True):
            if isinstance(module, (*_POOLS, *_SOFTMAXES)):
                rule: ReplacedRule = _MaxPool(self.eps) if isinstance(module, _POOLS) else _Softmax()
                install_replaced(module, ReplacedBackward(path, rule, rows), handle)
                continue
            hook = _RescaleHook(self, path, rows)
            handle.add(attach(module, hook.on_input, "fwd_pre", order=Order.EDIT))
            handle.add(attach(module, hook.on_output, order=Order.EDIT))


class _RescaleHook:
    """Exchanges the derivative of one elementwise module."""

    order = Order.EDIT

    def __init__(self, rule: Rescale, path: str, rows: Rows | None) -> None:
        self.rule = rule
        self.path = path
        self.rows = rows
        self._inputs: list[Tensor] = []

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Keep the input; a module that works in place gets a copy."""
        self._inputs.append(args[0])
        return (args[0].clone(), *args[1:]) if getattr(module, "inplace", False) else None

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hand on the same values with another derivative."""
        before = self._inputs.pop()
        rescaled: Tensor = _Slope.apply(before, output, self)  # type: ignore[no-untyped-call]
        return rescaled


class _Slope(torch.autograd.Function):
    """The output, whose backward multiplies with ``(f(x) - f(x')) / (x - x')`` in its rows."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor, hook: _RescaleHook) -> Tensor:
        ctx.hook = hook
        ctx.save_for_backward(before, after)
        return after.clone()  # what comes next may write in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        before, after = ctx.saved_tensors
        hook: _RescaleHook = ctx.hook
        rows = slice(None) if hook.rows is None else hook.rows.of(before, hook.path)
        step, rise = _rise(before[rows]), _rise(after[rows])
        steps = step.abs() >= hook.rule.eps
        slope = torch.where(steps, rise / torch.where(steps, step, 1), 0)
        arrives = grad[rows].unflatten(0, (2, -1))
        through, plain = (arrives * slope).flatten(0, 1), (arrives * ~steps).flatten(0, 1)
        if rows != slice(None):
            through = torch.zeros_like(grad).index_put((_indices(rows, grad),), through)
            plain = grad.index_put((_indices(rows, grad),), plain)
        return through, plain, None  # where there is no step, by the module's own derivative


def _indices(rows: slice, tensor: Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=tensor.device)


@dataclass(frozen=True, slots=True)
class _MaxPool:
    """What a maximum rises by from reference to input comes from the larger of the two maxima."""

    eps: float

    def gradient(self, call: Call, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The multipliers of inputs and references times ``grad``."""
        settings: Any = call.module
        space = next(size for size, kind in enumerate(_POOLS, 1) if isinstance(settings, kind))
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
        at, flat_x = found.flatten(-space), x.flatten(-space)
        (high, low), rise = y.chunk(2), _rise(y)
        # Below each maximum of the input by what it exceeds that of the reference, and the other way round.
        here, there = at.chunk(2)
        above = torch.where(high > low, rise, 0).flatten(-space)
        below = torch.where(high > low, 0, rise).flatten(-space)
        empty, arrives = torch.zeros_like(flat_x), grad.flatten(-space)
        moved = empty.scatter_add(-1, torch.cat([here, here]), arrives * torch.cat([above, above]))
        moved = moved.scatter_add(-1, torch.cat([there, there]), arrives * torch.cat([below, below]))
        derivative = empty.scatter_add(-1, at, arrives)
        return _quotient(moved, flat_x, derivative, self.eps).view_as(x)


@dataclass(frozen=True, slots=True)
class _Softmax:
    r"""``M = diag(L) - L L^T / sum(L)``, with ``L`` the logarithmic means of the two softmaxes ``p`` and ``p'``.

    With ``d`` the step of the logits and ``c`` that of their ``logsumexp``, ``log p - log p' = d - c``, so that
    ``p - p' = L (d - c)``; both sides sum to zero, hence ``c = L^T d / sum(L)`` and ``p - p' = M d``. Equal logits give
    ``L = p``, the derivative. A logarithm rises by ``d - c``: ``nn.LogSoftmax`` has ``M = I - 1 L^T / sum(L)``. Where a
    logit is minus infinity its mean is zero, and so are its multipliers.
    """

    def gradient(self, call: Call, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The multipliers of inputs and references times ``grad``."""
        module, axis = call.module, getattr(call.module, "dim", None)
        if axis is None:  # as torch chooses
            axis = 0 if x.ndim in (0, 1, 3) else 1
        elif axis >= 0:
            axis -= x.ndim  # the pair gets an axis of its own, in front
        mean = _logarithmic_mean(wide(x).log_softmax(axis)).unsqueeze(0)
        share = mean / mean.sum(axis, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        arrives: Tensor = wide(grad).unflatten(0, (2, -1))
        if isinstance(module, nn.LogSoftmax):
            found: Tensor = arrives - share * arrives.sum(axis, keepdim=True)
        else:
            found = mean * (arrives - (share * arrives).sum(axis, keepdim=True))
        return found.flatten(0, 1).to(x.dtype)


def _logarithmic_mean(logs: Tensor) -> Tensor:
    """``(p - p') / (log p - log p')`` of the exponentials of both halves; their common value where they are equal."""
    high, low = logs.chunk(2)
    top, step = torch.maximum(high, low), (high - low).abs()
    steps = step > 0  # false also between two infinities
    step = torch.where(steps, step, 1)
    return top.exp() * torch.where(steps, -torch.expm1(-step) / step, 1)


def _rise(values: Tensor) -> Tensor:
    """By how much the inputs' values exceed the references'."""
    high, low = values.chunk(2)
    return high - low


def _quotient(moved: Tensor, x: Tensor, derivative: Tensor, eps: float) -> Tensor:
    """``moved`` by the step from reference to input; the derivative where there is none (as between two infinities)."""
    step = _rise(x)
    step = torch.cat([step, step])
    steps = step.abs() >= eps
    return torch.where(steps, moved / torch.where(steps, step, 1), derivative)


class DeepLift(Attribution):
    """Differences from a reference, passed back by the rescale rule (Shrikumar et al. 2017, arXiv:1704.02685).

    Input and reference run in the same forward. The scores sum to ``f(input) - f(reference)`` where the model is made
    of linear modules and those of :data:`RESCALED`, called as modules; ``("gap", ...)`` holds, per row, by how much
    they miss it.

    Args:
        baseline: the reference; see :class:`IntegratedGradients`.
        rule: where the slope takes the derivative's place.
        multiply_by_inputs: multiply by the difference; without, the scores are the multipliers.
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
        if not frame.data.batch_dims:
            raise AttributionError(
                "DeepLift runs inputs and references as one batch; call with a TensorDict whose batch_size is that of "
                "its rows, such as TensorDict({...}, batch_size=[len(x)])"
            )
        start = frame.baselines(self.baseline)
        doubled = {key: torch.cat([frame.data.get(key), low]) for key, low in start.items()}
        point = frame.point(("pair", id(self)), inputs=doubled, modifiers=(self.rule,), copies=2)
        seen = {name: Seen(places, with_values=False) for name in frame.targets}
        yield [frame.ask(point, each, _of_both(frame.targets[name]), grads=places) for name, each in seen.items()]
        scores = {}
        for name, each in seen.items():
            rows = frame.data.batch_size[0]
            grads = {place: wide(each.grads[place][:rows]) for place in places}
            steps = {place: wide(frame.data.get(place.name) - start[place.name]) for place in places}
            # A masked logit has no multiplier, and its step is infinite or undefined.
            parts = {place: torch.where(grads[place] == 0, 0, grads[place] * steps[place]) for place in places}
            values = each.target
            if values is None:
                raise AttributionError("the target was not computed")
            total = sum(part.reshape(*values[:rows].shape, -1).sum(-1) for part in parts.values())
            for place, part in parts.items():
                scores[key_of(self.name, name, place)] = part if self.multiply_by_inputs else grads[place]
                scores[gap_key(self.name, name, place)] = total - wide(values[:rows] - values[rows:])
        return scores


def _of_both(target: Target) -> Target:
    return target if isinstance(target, At) and target.is_one_for_all else _OfBoth(target)


@dataclass(frozen=True, slots=True)
class _OfBoth:
    """A target that may have one index per row, taken of the inputs and of the references by themselves."""

    target: Target

    def __call__(self, data: TensorDictBase) -> Tensor:
        rows = data.batch_size[0] // 2
        return torch.cat([self.target(data[:rows]), self.target(data[rows:])])
