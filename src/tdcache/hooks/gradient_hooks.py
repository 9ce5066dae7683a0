"""Gradient hooks that users write: they have the signature of torch's full backward hooks, without using those.

Forward hooks on the module register the tensor hooks of :mod:`tdcache.hooks.gradients`, which explains why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import InplaceModificationError
from tdcache.hooks.gradients import Grads, alias_inputs, watch_outputs
from tdcache.hooks.loans import OpenCalls, lend
from tdcache.hooks.values import exchanged, leaves

__all__ = ["GradInputHook", "GradOutputHook", "GradientHandle", "overwritten_input"]

ForCall = Callable[[], Callable[..., Any]]
"""Returns, during a forward, the hook for the gradients of that call."""


def overwritten_input(where: str) -> InplaceModificationError:
    """The error for a module that changes its input in place."""
    return InplaceModificationError(
        f"{where!r} changes its input in place, so the gradient of that input cannot be told from the gradient "
        "of its output; capture direction 'bwd' of the module that produces it instead",
        paths=(where,),
    )


class _GradHook:
    """A user's gradient hook at one module.

    Args:
        hook: the hook.
        order: its position among the hooks of the module.
        path: the name for messages.
        for_call: returns the hook of one call, if each call has its own.
    """

    use = "watch"  # a value derived from an attention call is made part of the graph, so that it gets a gradient

    def __init__(self, hook: Callable[..., Any], order: int, path: str = "", for_call: ForCall | None = None) -> None:
        self.hook = hook
        self.order = order
        self.path = path
        self.for_call = for_call
        self.alive = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hook!r})"

    def _hook_of_call(self) -> Callable[..., Any]:
        return self.hook if self.for_call is None else self.for_call()


class GradOutputHook(_GradHook):
    """A forward hook that calls ``hook(module, grad_output)`` when the gradient of the output arrives.

    ``grad_output`` is a tuple with one entry per output tensor, None for one without a gradient. A return value other
    than None replaces it.
    """

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of an output."""
        hook = self._hook_of_call()
        return _watch_whole(module, args, output, _OutputCall(self, module, hook).on_grads, self.path)


class _OutputCall:
    """One call of a module whose output is watched."""

    __slots__ = ("hook", "module", "tap")

    def __init__(self, tap: GradOutputHook, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.tap = tap
        self.module = module
        self.hook = hook

    def on_grads(self, grads: Grads) -> Grads | None:
        """Call the hook with the gradients, unless it has been removed."""
        return _as_grads(self.hook(self.module, grads), len(grads)) if self.tap.alive else None


class GradInputHook(_GradHook):
    """Forward hooks that call ``hook(module, grad_input, grad_output)`` once both gradients have arrived.

    Both are tuples, as for torch's full backward hooks: ``grad_input`` has one entry per tensor argument (positional,
    then keyword), None for one that does not require grad; ``grad_output`` has one per output tensor. A return value
    other than None replaces ``grad_input``. If no input requires grad, the hook is called when ``grad_output`` arrives.
    """

    def __init__(self, hook: Callable[..., Any], order: int, path: str = "", for_call: ForCall | None = None) -> None:
        super().__init__(hook, order, path, for_call)
        self._open = OpenCalls()
        self._calls: list[_InputCall] = []  # a stack, since a module may call itself

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the inputs that require grad by aliases, and watch those."""
        tensors = [tensor for _, tensor in leaves((args, kwargs))]
        graph = torch.is_grad_enabled()
        needs = [graph and tensor.requires_grad for tensor in tensors]
        needing = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        hook = self._hook_of_call()
        call = _InputCall(self, module, needs, hook, watched=bool(needing))
        aliases = alias_inputs(module, needing, call, self.path, tap=self) if needing else []
        args, kwargs, loan = lend(args, kwargs, iter(_spread(tuple(aliases), needs)))
        self._open.begin(module, aliases, loan)
        del self._calls[len(self._open) - 1 :]
        self._calls.append(call)
        return (args, kwargs) if needing else None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of the output of the innermost open call."""
        call = self._calls.pop()
        where = self.path or type(module).__name__
        if self._open.end(output):
            raise overwritten_input(where)
        return _watch_whole(module, args, output, call.on_outputs, where)

    def forget(self) -> None:
        """Drop calls that an exception left open."""
        self._open.forget()
        self._calls.clear()


class _InputCall:
    """One call of one module, between its forward and its backward."""

    __slots__ = ("grad_output", "hook", "module", "needs", "tap", "watched")

    def __init__(
        self, tap: GradInputHook, module: nn.Module, needs: list[bool], hook: Callable[..., Any], *, watched: bool
    ) -> None:
        self.tap = tap
        self.module = module
        self.needs = needs
        self.hook = hook
        self.watched = watched
        self.grad_output: Grads = ()

    def on_outputs(self, grads: Grads) -> None:
        """Keep the gradients of the outputs until those of the inputs arrive."""
        self.grad_output = grads
        if not self.watched and self.tap.alive:
            self.hook(self.module, (None,) * len(self.needs), grads)

    def __call__(self, grads: Grads) -> Grads | None:
        """Call the hook with the gradients of the inputs; returns those to propagate."""
        if not self.tap.alive:
            return None
        full = _spread(grads, self.needs)
        changed = _as_grads(self.hook(self.module, full, self.grad_output), len(full))
        return None if changed is None else _gathered(changed, self.needs)


def _watch_whole(
    module: nn.Module, args: Any, output: Any, on_grads: Callable[[Grads], Grads | None], where: str
) -> Any:
    """Call ``on_grads`` with the gradients of all tensors in ``output``; returns a new output if it must change."""
    if not torch.is_grad_enabled():
        return None
    tensors = [tensor for _, tensor in leaves(output)]
    needs = [tensor.requires_grad for tensor in tensors]
    needing = [tensor for tensor in tensors if tensor.requires_grad]
    if not needing:
        return None
    handed = watch_outputs(module, args, needing, _Spread(on_grads, needs), where or type(module).__name__)
    if all(map(operator.is_, needing, handed)):
        return None
    return exchanged(output, iter(_spread(tuple(handed), needs)))


class _Spread:
    """Adapts a watcher of all tensors to the gradients of those that require grad."""

    __slots__ = ("needs", "on_grads")

    def __init__(self, on_grads: Callable[[Grads], Grads | None], needs: list[bool]) -> None:
        self.on_grads = on_grads
        self.needs = needs

    def __call__(self, grads: Grads) -> Grads | None:
        changed = self.on_grads(_spread(grads, self.needs))
        return None if changed is None else _gathered(changed, self.needs)


def _spread(grads: Grads, needs: list[bool]) -> Grads:
    arrived = iter(grads)
    return tuple(next(arrived) if needed else None for needed in needs)


def _gathered(grads: Grads, needs: list[bool]) -> Grads:
    return tuple(grad for grad, needed in zip(grads, needs, strict=True) if needed)


def _as_grads(returned: Any, count: int) -> Grads | None:
    """The return value of a gradient hook (None, a tensor, or a tuple with one entry per tensor) as a tuple or None."""
    if returned is None:
        return None
    grads = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    if len(grads) != count:
        raise ValueError(f"a gradient hook must return {count} gradients (or None for no change), got {len(grads)}")
    return grads


class GradientHandle:
    """Removes the forward hooks of a gradient hook, and silences its tensor hooks on existing graphs."""

    def __init__(self, tap: GradOutputHook | GradInputHook, handles: Sequence[Any]) -> None:
        self._tap = tap
        self._handles = handles

    def mute(self) -> None:
        """Silence the hook; it keeps its position."""
        self._tap.alive = False
        for handle in self._handles:
            handle.mute()

    def unmute(self) -> None:
        """Let the hook act again after :meth:`mute`."""
        self._tap.alive = True
        for handle in self._handles:
            handle.unmute()

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        self._tap.alive = False
        for handle in self._handles:
            handle.remove()
        if isinstance(self._tap, GradInputHook):
            self._tap.forget()
