"""Hooks that keep a module's forward and exchange its backward, in some rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdcache.attribution.asks import Rows
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.values import first_tensor, replace_tensor

__all__ = ["BehindTaps", "Call", "ReplacedBackward", "ReplacedRule", "install_replaced"]


class ReplacedRule(Protocol):
    """What takes the place of a module's backward."""

    def gradient(self, call: Call, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the input ``x``, from that of the output ``y``."""


class ReplacedBackward:
    """The hooks of one module.

    Args:
        path: its path.
        rule: what takes the place of its backward.
        rows: where; None for all rows.
        followers: by the identity of an output, the module that reads it, where that is of interest.
    """

    order = Order.EDIT
    rowwise = True

    def __init__(
        self, path: str, rule: ReplacedRule, rows: Rows | None, followers: dict[int, _Follower] | None = None
    ) -> None:
        self.path = path
        self.rule = rule
        self.rows = rows
        self.followers = followers
        self._inputs: list[Tensor | None] = []

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the input; a module that works in place gets a copy."""
        x = first_tensor((args, kwargs))
        self._inputs.append(x)
        if x is None or not getattr(module, "inplace", False):
            return None
        return replace_tensor((args, kwargs), x.clone(), path=self.path)

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hand on the same values with another backward."""
        x, y = self._inputs.pop(), first_tensor(output)
        if x is None or y is None or not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
            return None
        call = Call(self, module)
        new: Tensor = _Replaced.apply(x, y.detach() if self.rows is None else y, call)  # type: ignore[no-untyped-call]
        if self.followers is not None:
            self.followers[id(new)] = _Follower(new, call)
        return replace_tensor(output, new, path=self.path)


@dataclass(frozen=True, slots=True)
class BehindTaps:
    """A pre-hook that runs behind the taps of inputs, so that it sees the alias that they hand on."""

    hook: Callable[..., Any]
    order: int = Order.CAPTURE
    rowwise: bool = True

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self.hook(*args)


class Call:
    """One call of a module: what its backward needs besides tensors."""

    __slots__ = ("hook", "module", "norm")

    def __init__(self, hook: ReplacedBackward, module: nn.Module) -> None:
        self.hook = hook
        self.module = module
        self.norm: nn.Module | None = None
        """The batch norm that read the output, if one did."""

    @property
    def path(self) -> str:
        """The module's path."""
        return self.hook.path


class _Follower:
    """An output (kept, so that its identity stays its own) and the call it came from."""

    __slots__ = ("call", "output")

    def __init__(self, output: Tensor, call: Call) -> None:
        self.output = output
        self.call = call


class _Replaced(torch.autograd.Function):
    """The values of ``y``; the backward is the rule's in its rows, and ``y``'s own elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, y)
        return y.clone()  # what comes next may write in place, and the backward needs y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: Call = ctx.call
        x, y = ctx.saved_tensors
        hook, rows = call.hook, call.hook.rows
        if rows is None:
            return hook.rule.gradient(call, x, y, grad), None, None
        here, there = rows.of(x, hook.path), rows.of(y, hook.path)
        own = hook.rule.gradient(call, x[here], y[there], grad[there])
        ruled = torch.zeros_like(x)
        ruled[here] = own
        plain = grad.clone()
        plain[there] = 0
        return ruled, plain, None


def install_replaced(module: nn.Module, hook: ReplacedBackward, handle: MultiHookHandle) -> None:
    """Put the two hooks on one module."""
    handle.add(attach(module, BehindTaps(hook.on_input), "fwd_pre_kwargs", order=Order.CAPTURE))
    handle.add(attach(module, hook.on_output, order=hook.order))
