"""Gradients at a module's boundary, by tensor hooks.

torch's full backward hooks fail before an in-place operation, cost ten times as much and go on firing after they were
removed. Here a forward hook sets a tensor hook on the output, and, where the gradient of the input is wanted, a
forward pre-hook hands the module an alias of its input, so that the gradient is the module's own and not the sum over
everything else that uses the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdcache.errors import InplaceModificationError
from tdcache.hooks.values import leaves

__all__ = ["GradInputHook", "GradOutputHook", "GradientHandle"]

Grads = tuple[Tensor | None, ...]


class _Gate(torch.autograd.Function):
    """An identity over several tensors whose backward sees all their gradients at once."""

    @staticmethod
    def forward(ctx: Any, on_grads: Callable[[Grads], Grads | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.on_grads = on_grads
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        changed = ctx.on_grads(grads)
        return (None, *(grads if changed is None else changed))


def _substitute(value: Any, new: dict[int, Tensor]) -> Any:
    """``value`` with the tensors whose id is in ``new`` exchanged; containers are rebuilt only where needed."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple | list):
        items = [_substitute(item, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return type(value)({name: _substitute(item, new) for name, item in value.items()})
    return value


class GradOutputHook:
    """A forward hook that calls ``hook(module, grad_output)`` when the gradient of the output arrives.

    ``grad_output`` is a tuple with an entry per output tensor, None where no gradient came. What the hook returns, if
    not None, replaces it.
    """

    def __init__(self, hook: Callable[..., Any], order: int) -> None:
        self.hook = hook
        self.order = order
        self.alive = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hook!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of an output."""
        return watch_outputs(output, lambda grads: self.on_grads(module, grads))

    def on_grads(self, module: nn.Module, grads: Grads) -> Grads | None:
        """Pass the gradients on to the hook, unless it was removed in the meantime."""
        if not self.alive:
            return None
        return as_grads(self.hook(module, grads), len(grads))


class GradInputHook:
    """Forward hooks that call ``hook(module, grad_input, grad_output)`` once both gradients are there.

    Both are tuples, as torch's full backward hooks have them: ``grad_input`` with an entry per tensor among the
    arguments (positional, then keyword), None where it needs no gradient; ``grad_output`` with one per output tensor.
    What the hook returns, if not None, replaces ``grad_input``. Where no input needs a gradient the hook is called when
    ``grad_output`` arrives.
    """

    def __init__(self, hook: Callable[..., Any], order: int, path: str = "") -> None:
        self.hook = hook
        self.order = order
        self.path = path
        self.alive = True
        self._calls: list[_Call] = []  # a stack: a module may call itself

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hook!r})"

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the module aliases of the inputs that need a gradient, and watch those."""
        tensors = [tensor for _, tensor in leaves((args, kwargs))]
        needing = [tensor for tensor in tensors if tensor.requires_grad] if torch.is_grad_enabled() else []
        call = _Call(self, module, [tensor.requires_grad for tensor in tensors], bool(needing))
        self._calls.append(call)
        if not needing:
            return None
        if len(needing) == 1:
            alias = needing[0].view_as(needing[0])
            alias.register_hook(call.on_one_input)
            call.alias, call.version = alias, alias._version
            return _substitute((args, kwargs), {id(needing[0]): alias})
        aliases = _Gate.apply(call.on_inputs, *needing)
        return _substitute((args, kwargs), {id(old): new for old, new in zip(needing, aliases, strict=True)})

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of the output that belongs to the latest input."""
        call = self._calls.pop()
        if call.alias is not None and call.alias._version != call.version:
            where = self.path or type(module).__name__
            raise InplaceModificationError(
                f"{where!r} changes its input in place, so the gradient of that input cannot be told from the gradient "
                "of its output; capture direction 'bwd' of the module that produces it instead",
                paths=(where,),
            )
        call.alias = None
        return watch_outputs(output, call.on_outputs)


class _Call:
    """One call of one module, between its forward and its backward."""

    __slots__ = ("alias", "grad_output", "needs", "module", "tap", "version", "watches_inputs")

    def __init__(self, tap: GradInputHook, module: nn.Module, needs: list[bool], watches_inputs: bool) -> None:
        self.tap = tap
        self.module = module
        self.needs = needs
        self.watches_inputs = watches_inputs
        self.grad_output: Grads = ()
        self.alias: Tensor | None = None
        self.version = 0

    def on_outputs(self, grads: Grads) -> None:
        self.grad_output = grads
        if not self.watches_inputs and self.tap.alive:
            self.tap.hook(self.module, (None,) * len(self.needs), grads)

    def on_one_input(self, grad: Tensor) -> Tensor | None:
        changed = self.on_inputs((grad,))
        return None if changed is None else changed[0]

    def on_inputs(self, grads: Grads) -> Grads | None:
        if not self.tap.alive:
            return None
        arrived = iter(grads)
        full = tuple(next(arrived) if needed else None for needed in self.needs)
        changed = as_grads(self.tap.hook(self.module, full, self.grad_output), len(full))
        if changed is None:
            return None
        return tuple(grad for grad, needed in zip(changed, self.needs, strict=True) if needed)


def watch_outputs(output: Any, on_grads: Callable[[Grads], Grads | None]) -> Any:
    """Call ``on_grads`` with the gradients of the tensors in ``output``; returns a new output where one is needed."""
    tensors = [tensor for _, tensor in leaves(output)]
    needing = [tensor for tensor in tensors if tensor.requires_grad]
    if not needing:
        return None
    places = [tensor.requires_grad for tensor in tensors]

    def on_needed(grads: Grads) -> Grads | None:
        arrived = iter(grads)
        changed = on_grads(tuple(next(arrived) if needed else None for needed in places))
        if changed is None:
            return None
        return tuple(grad for grad, needed in zip(changed, places, strict=True) if needed)

    if len(needing) == 1:
        needing[0].register_hook(lambda grad: (on_needed((grad,)) or (None,))[0])
        return None
    gated = _Gate.apply(on_needed, *needing)
    return _substitute(output, {id(old): new for old, new in zip(needing, gated, strict=True)})


def as_grads(returned: Any, count: int) -> Grads | None:
    """What a gradient hook returned, as a tuple: None, a bare tensor, or a tuple with an entry per tensor."""
    if returned is None:
        return None
    grads = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    if len(grads) != count:
        raise ValueError(f"a gradient hook must return {count} gradients (or None for no change), got {len(grads)}")
    return grads


class GradientHandle:
    """Removes the forward hooks of a gradient hook, and silences the tensor hooks that already sit on a graph."""

    def __init__(self, tap: GradOutputHook | GradInputHook, handles: Sequence[RemovableHandle]) -> None:
        self._tap = tap
        self._handles = handles

    def remove(self) -> None:
        """Remove; a second call does nothing."""
        self._tap.alive = False
        for handle in self._handles:
            handle.remove()
