"""Hooks that keep a module's forward and exchange its backward, in some rows.

A rule needs input, output and gradient of one call together, and rows of other methods in the same pass must keep the
ordinary backward; torch's full backward hooks offer neither, and fail before an in-place activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tdcache.attribution.point import PointRows
from tdcache.hooks import InputPort, MultiHookHandle, Order, OutputPort, attach
from tdcache.hooks.transient import Transient

__all__ = ["AfterTaps", "ModuleCall", "ReplacedBackward", "ReplacedRule", "install_replaced"]


class ReplacedRule(Protocol):
    """What takes the place of a module's backward."""

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Any:
        """The gradient of the input ``x``, from that of the output ``y``.

        A rule with an attribute ``keeps_derivative`` gives two: the second goes through the module's own backward.
        """


class ReplacedBackward(Transient):
    """The hooks of one module.

    Args:
        path: its path.
        rule: what takes the place of its backward.
        rows: where; None for all rows.
        followers: by the identity of an output, the call it came from, where that is of interest.
    """

    order = Order.EDIT
    rowwise = True

    def __init__(
        self, path: str, rule: ReplacedRule, rows: PointRows | None, followers: dict[int, Any] | None = None
    ) -> None:
        self.path = path
        self.rule = rule
        self.rows = rows
        self.followers = followers
        self.reads, self.returns = InputPort(path), OutputPort(path)
        self._calls: list[tuple[Tensor, ModuleCall]] = []
        self._ended = 0

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the input; a module that works in place gets a copy."""
        x = self.reads.read(module, args, kwargs)
        axis = None if self.rows is None else self.rows.axis_in(self.reads, module, args, kwargs, x)
        self._calls.append((x, ModuleCall(self, module, axis)))
        if not getattr(module, "inplace", False):
            return None
        return self.reads.write(module, args, kwargs, x.clone())

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hand on the same values with another backward."""
        x, call = self._ended_call()
        y = self.returns.read(module, args, output)
        if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
            return None
        if self.rows is not None:
            call.output_axis = self.rows.axis_in(self.returns, module, args, output, y)
        keeps = self.rows is not None or getattr(self.rule, "keeps_derivative", False)
        new: Tensor = _Replaced.apply(x, y if keeps else y.detach(), call)  # type: ignore[no-untyped-call]
        if self.followers is not None:
            call.output = new
            self.followers[id(new)] = call
        return self.returns.write(module, args, output, new)

    def _ended_call(self) -> tuple[Tensor, ModuleCall]:
        x, call = self._calls.pop()
        call.number = self._ended
        self._ended += 1
        return x, call


@dataclass(frozen=True, slots=True)
class AfterTaps(Transient):
    """A pre-hook that runs after the taps of inputs, so that it sees the alias that they hand on."""

    hook: Callable[..., Any]
    order: int = Order.CAPTURE
    rowwise: ClassVar[bool] = True

    def __call__(self, *args: Any) -> Any:
        """Call the hook with what torch gives to it."""
        return self.hook(*args)


class ModuleCall:
    """One call of a module: what its backward needs besides tensors."""

    __slots__ = ("hook", "module", "norm", "number", "output", "output_axis", "x_axis")

    def __init__(self, hook: ReplacedBackward, module: nn.Module, x_axis: int | None) -> None:
        self.hook = hook
        self.module = module
        self.x_axis = x_axis
        self.output_axis: int | None = None
        self.number = 0
        """Which call of the forward it is."""
        self.output: Tensor | None = None
        """What it returned, held so that its identity stays its own."""
        self.norm: nn.Module | None = None
        """The batch norm that read the output, if one did."""

    @property
    def path(self) -> str:
        """Return the path of the module whose output is replaced."""
        return self.hook.path


class _Replaced(torch.autograd.Function):
    """The values of ``y``; the backward is the rule's in its rows, and ``y``'s own elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: ModuleCall) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, y)
        return y.clone()  # what comes next may write in place, and the backward needs y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: ModuleCall = ctx.call
        x, y = ctx.saved_tensors
        rule, rows = call.hook.rule, call.hook.rows
        if rows is None or call.x_axis is None or call.output_axis is None:
            through, plain = _both(rule.gradient(call, x, y, grad))
            return through, plain, None
        at, to = call.x_axis, call.output_axis
        through, plain = _both(rule.gradient(call, rows.part(x, at), rows.part(y, to), rows.part(grad, to)))
        ruled = rows.change(torch.zeros_like(x), at, lambda _: through)
        rest = rows.change(grad, to, lambda own: torch.zeros_like(own) if plain is None else plain)
        return ruled, rest, None


def _both(found: Any) -> tuple[Tensor, Tensor | None]:
    return found if isinstance(found, tuple) else (found, None)


def install_replaced(module: nn.Module, hook: ReplacedBackward, handle: MultiHookHandle) -> None:
    """Put the two hooks on one module."""
    handle.add(attach(module, AfterTaps(hook.on_input), "fwd_pre_kwargs", order=Order.CAPTURE))
    handle.add(attach(module, hook.on_output, order=hook.order))
