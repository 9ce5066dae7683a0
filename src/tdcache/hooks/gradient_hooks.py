"""Hooks that a user writes for gradients: called as torch calls backward hooks, without torch's backward hooks.

What is registered on the module are forward hooks; they set the tensor hooks of :mod:`tdcache.hooks.gradients`.
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
"""Gives, in the forward, the hook for the gradients of that very call."""


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
        order: where it stands among the hooks of the module.
        path: the name for messages.
        for_call: gives the hook of one call, where it differs from call to call.
    """

    use = "watch"  # at a value that is derived from an attention call: the output is made to depend on it

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

    ``grad_output`` is a tuple with an entry per output tensor, None where no gradient came. What the hook returns, if
    not None, replaces it.
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
        """Pass the gradients on to the hook, unless it was removed in the meantime."""
        return _as_grads(self.hook(self.module, grads), len(grads)) if self.tap.alive else None


class GradInputHook(_GradHook):
    """Forward hooks that call ``hook(module, grad_input, grad_output)`` once both gradients are there.

    Both are tuples, as torch's full backward hooks have them: ``grad_input`` with an entry per tensor among the
    arguments (positional, then keyword), None where it needs no gradient; ``grad_output`` with one per output tensor.
    What the hook returns, if not None, replaces ``grad_input``. Where no input needs a gradient the hook is called when
    ``grad_output`` arrives.
    """

    def __init__(self, hook: Callable[..., Any], order: int, path: str = "", for_call: ForCall | None = None) -> None:
        super().__init__(hook, order, path, for_call)
        self._open = OpenCalls()
        self._calls: list[_InputCall] = []  # a stack beside it: a module may call itself

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the module aliases of the inputs that need a gradient, and watch those."""
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
        """Watch the gradient of the output that belongs to the latest input."""
        call = self._calls.pop()
        where = self.path or type(module).__name__
        if self._open.end(output):
            raise overwritten_input(where)
        return _watch_whole(module, args, output, call.on_outputs, where)

    def forget(self) -> None:
        """Let go of calls that an exception ended."""
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
        """Keep the gradients of the outputs until those of the inputs are there."""
        self.grad_output = grads
        if not self.watched and self.tap.alive:
            self.hook(self.module, (None,) * len(self.needs), grads)

    def __call__(self, grads: Grads) -> Grads | None:
        """Call the hook with the gradients of the inputs; gives those that go on."""
        if not self.tap.alive:
            return None
        full = _spread(grads, self.needs)
        changed = _as_grads(self.hook(self.module, full, self.grad_output), len(full))
        return None if changed is None else _gathered(changed, self.needs)


def _watch_whole(
    module: nn.Module, args: Any, output: Any, on_grads: Callable[[Grads], Grads | None], where: str
) -> Any:
    """Call ``on_grads`` with the gradients of all tensors in ``output``; gives a new output where one is needed."""
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
    """Calls a watcher of all tensors with the gradients of those that need one."""

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
    """What a gradient hook returned, as a tuple: None, a bare tensor, or a tuple with an entry per tensor."""
    if returned is None:
        return None
    grads = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    if len(grads) != count:
        raise ValueError(f"a gradient hook must return {count} gradients (or None for no change), got {len(grads)}")
    return grads


class GradientHandle:
    """Removes the forward hooks of a gradient hook, and silences the tensor hooks that already sit on a graph."""

    def __init__(self, tap: GradOutputHook | GradInputHook, handles: Sequence[Any]) -> None:
        self._tap = tap
        self._handles = handles

    def mute(self) -> None:
        """Silence the hook without giving up its place."""
        self._tap.alive = False
        for handle in self._handles:
            handle.mute()

    def unmute(self) -> None:
        """Let it act again."""
        self._tap.alive = True
        for handle in self._handles:
            handle.unmute()

    def remove(self) -> None:
        """Remove; a second call does nothing."""
        self._tap.alive = False
        for handle in self._handles:
            handle.remove()
        if isinstance(self._tap, GradInputHook):
            self._tap.forget()
