"""DeepLift: multipliers between an input and its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdcache.attribution.asks import Rows, wide
from tdcache.attribution.base import Attribution, Work
from tdcache.attribution.frame import Baseline, Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.integrated import gap_key
from tdcache.errors import AttributionError
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["DeepLift", "ELEMENTWISE", "Rescale"]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.PReLU,
)  # fmt: skip
"""Modules that act on each number by itself."""


class Rescale:
    """At elementwise modules the slope between input and reference takes the derivative's place (the rescale rule).

    The rows are the inputs followed by as many references.

    Args:
        selector: which modules; by default the classes of :data:`ELEMENTWISE`.
        eps: differences below it use the derivative.
    """

    def __init__(self, selector: Selector = ELEMENTWISE, eps: float = 1e-7) -> None:
        self.selector = selector
        self.eps = eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add the hooks."""
        for path, module, _ in select(model, self.selector, allow_empty=True):
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
        rows = hook.rows or Rows(0, before.shape[0], before.shape[0])
        own = rows.of(before, hook.path)
        x, reference = before[own].chunk(2)
        y, y_reference = after[own].chunk(2)
        step = x - reference
        flat = step.abs() < hook.rule.eps
        slope = (y - y_reference) / torch.where(flat, torch.ones_like(step), step)
        slope, flat = torch.cat([slope, slope]), torch.cat([flat, flat])
        through = torch.zeros_like(grad)
        through[own] = torch.where(flat, torch.zeros_like(slope), slope * grad[own])
        plain = grad.clone()
        plain[own] = torch.where(flat, grad[own], torch.zeros_like(slope))  # by the module's own derivative
        return through, plain, None


class DeepLift(Attribution):
    """Differences from a reference, passed back by the rescale rule (Shrikumar et al. 2017, arXiv:1704.02685).

    Input and reference run in the same forward. The scores sum to ``f(input) - f(reference)`` where the model is made
    of linear modules and the elementwise ones of :data:`ELEMENTWISE`, called as modules; ``("gap", ...)`` holds, per
    row, by how much they miss it.

    Args:
        baseline: the reference; see :class:`IntegratedGradients`.
        rule: where the slope takes the derivative's place.
        **options: see :class:`Attribution`.
    """

    def __init__(self, *, baseline: Baseline = None, rule: Rescale | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.baseline = baseline
        self.rule = Rescale() if rule is None else rule

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
        yield [frame.ask(point, each, frame.targets[name], grads=places) for name, each in seen.items()]
        scores = {}
        for name, each in seen.items():
            rows = frame.data.batch_size[0]
            parts = {
                place: wide(each.grads[place][:rows]) * wide(frame.data.get(place.name) - start[place.name])
                for place in places
            }
            values = each.target
            if values is None:
                raise AttributionError("the target was not computed")
            total = sum(part.reshape(*values[:rows].shape, -1).sum(-1) for part in parts.values())
            for place, part in parts.items():
                scores[key_of(self.name, name, place)] = part
                scores[gap_key(self.name, name, place)] = total - wide(values[:rows] - values[rows:])
        return scores
