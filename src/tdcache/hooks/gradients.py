"""Gradients at a module's boundary, by tensor hooks.

torch's full backward hooks fail before an in-place operation, cost ten times as much and go on firing after they were
removed. Here a forward hook sets a tensor hook on the output, and, where the gradient of the input is wanted, a
forward pre-hook hands the module an alias of its input, so that the gradient is the module's own and not the sum over
everything else that uses the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdcache.errors import InplaceModificationError
from tdcache.hooks.values import children, leaves, with_parts

__all__ = ["GradInputHook", "GradOutputHook", "GradientHandle", "handed_on", "watch_tensor"]

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


def _exchange(value: Any, new: Iterator[Tensor | None]) -> Any:
    """``value`` with the next of ``new`` in place of each tensor, where it is not None; rebuilt only where needed."""
    if isinstance(value, Tensor):
        other = next(new)
        return value if other is None else other
    parts = {step: (child, _exchange(child, new)) for step, child in children(value)}
    changed = {step: after for step, (before, after) in parts.items() if after is not before}
    return with_parts(value, changed) if changed else value


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
        return _watch_outputs(args, output, lambda grads: self.on_grads(module, grads), type(module).__name__)

    def on_grads(self, module: nn.Module, grads: Grads) -> Grads | None:
        """Pass the gradients on to the hook, unless it was removed in the meantime."""
        if not self.alive:
            return None
        return _as_grads(self.hook(module, grads), len(grads))


class GradInputHook:
    """Forward hooks that call ``hook(module, grad_input, grad_output)`` once both gradients are there.

    Both are tuples, as torch's full backward hooks have them: ``grad_input`` with an entry per tensor among the
    arguments (positional, then keyword), None where it needs no gradient or stands in a TensorDict; ``grad_output``
    with one per output tensor. What the hook returns, if not None, replaces ``grad_input``. Where no input needs a
    gradient the hook is called when ``grad_output`` arrives.
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
        # A module writes its results into the TensorDict it is given, so that one cannot be exchanged for a copy.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TensorDictBase)]
        fixed = {id(tensor) for _, tensor in leaves(given)}
        graph = torch.is_grad_enabled()
        needs = [graph and tensor.requires_grad and id(tensor) not in fixed for tensor in tensors]
        needing = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        call = _Call(self, module, needs)
        self._calls.append(call)
        if not needing:
            return None
        entry: _Entry | None = getattr(needing[0], _ENTRY, None)
        if entry is not None and entry.is_shared_by(call, needing):
            entry.calls.append(call)
            call.entry = entry
            return None
        entry = call.entry = _Entry(call, needing)
        aliases = iter(entry.aliases)
        return _exchange((args, kwargs), iter([next(aliases) if needed else None for needed in needs]))

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of the output that belongs to the latest input."""
        call = self._calls.pop()
        where = self.path or type(module).__name__
        if call.entry is not None and call.entry.was_overwritten():
            raise InplaceModificationError(
                f"{where!r} changes its input in place, so the gradient of that input cannot be told from the gradient "
                "of its output; capture direction 'bwd' of the module that produces it instead",
                paths=(where,),
            )
        return _watch_outputs(args, output, call.on_outputs, where)


_ENTRY = "_tdcache_entry"


class _Entry:
    """The aliases through which a tensor enters one call of one module, shared by all gradient hooks of that module.

    Were each hook to make its own, the last one registered would see the gradient first.
    """

    __slots__ = ("aliases", "calls", "versions")

    def __init__(self, call: _Call, tensors: list[Tensor]) -> None:
        self.calls = [call]
        if len(tensors) == 1:
            self.aliases = [tensors[0].view_as(tensors[0])]
            base = tensors[0] if tensors[0]._base is None else tensors[0]._base
            self.aliases[0].register_hook(_OneGrad(self.on_grads, into_leaf=base.is_leaf))
        else:
            self.aliases = list(_Gate.apply(self.on_grads, *tensors))  # type: ignore[no-untyped-call]
        self.versions = [alias._version for alias in self.aliases]
        for alias in self.aliases:
            setattr(alias, _ENTRY, self)

    def is_shared_by(self, call: _Call, tensors: list[Tensor]) -> bool:
        """Whether the aliases were made for this very call, and not for one that it is nested in."""
        if self.calls[0].module is not call.module or any(other.tap is call.tap for other in self.calls):
            return False
        return [id(tensor) for tensor in tensors] == [id(alias) for alias in self.aliases]

    def was_overwritten(self) -> bool:
        """Whether the module changed an alias in place; the aliases are let go."""
        aliases, self.aliases = self.aliases, []
        return any(alias._version != version for alias, version in zip(aliases, self.versions, strict=False))

    def on_grads(self, grads: Grads) -> Grads:
        """Call the hooks, each with what the one before returned."""
        for call in self.calls:
            grads = call.on_inputs(grads)
        return grads


class _Call:
    """One call of one module, between its forward and its backward."""

    __slots__ = ("entry", "grad_output", "module", "needs", "tap")

    def __init__(self, tap: GradInputHook, module: nn.Module, needs: list[bool]) -> None:
        self.tap = tap
        self.module = module
        self.needs = needs
        self.entry: _Entry | None = None
        self.grad_output: Grads = ()

    def on_outputs(self, grads: Grads) -> None:
        """Keep the gradients of the outputs until those of the inputs are there."""
        self.grad_output = grads
        if self.entry is None and self.tap.alive:
            self.tap.hook(self.module, (None,) * len(self.needs), grads)

    def on_inputs(self, grads: Grads) -> Grads:
        """Call the hook; gives the gradients that go on."""
        if not self.tap.alive:
            return grads
        full = _spread(grads, self.needs)
        changed = _as_grads(self.tap.hook(self.module, full, self.grad_output), len(full))
        return grads if changed is None else _gathered(changed, self.needs)


def _spread(grads: Grads, needs: list[bool]) -> Grads:
    arrived = iter(grads)
    return tuple(next(arrived) if needed else None for needed in needs)


def _gathered(grads: Grads, needs: list[bool]) -> Grads:
    return tuple(grad for grad, needed in zip(grads, needs, strict=True) if needed)


def _watch_outputs(args: Any, output: Any, on_grads: Callable[[Grads], Grads | None], where: str) -> Any:
    """Call ``on_grads`` with the gradients of the tensors in ``output``; returns a new output where one is needed."""
    tensors = [tensor for _, tensor in leaves(output)]
    needs = [tensor.requires_grad for tensor in tensors]
    needing = [tensor for tensor in tensors if tensor.requires_grad]
    if not needing:
        return None

    def on_needed(grads: Grads) -> Grads:
        changed = on_grads(_spread(grads, needs))
        return grads if changed is None else _gathered(changed, needs)

    if len(needing) > 1:
        gated = iter(_Gate.apply(on_needed, *needing))  # type: ignore[no-untyped-call]
    elif needing[0].is_leaf or handed_on(needing[0], args):
        gated = iter([_watched_alias(needing[0], on_needed, where)])
    else:
        needing[0].register_hook(_OneGrad(on_needed))
        return None
    return _exchange(output, iter([next(gated) if needed else None for needed in needs]))


def handed_on(tensor: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a module may have handed this tensor on: it is an argument, or there are only keyword arguments.

    Those a forward hook does not see.
    """
    if len(args) == 1 and isinstance(args[0], Tensor):  # the common case, and a hot path
        return args[0] is tensor
    return not args or any(tensor is given for _, given in leaves(args))


def watch_tensor(args: Any, output: Any, tensor: Tensor, on_grad: Callable[[Tensor], None], where: str) -> Any:
    """Show ``on_grad`` the gradient of one tensor in ``output``; returns a new output where one is needed, or None.

    One is needed where the module did not compute the tensor (it hands on an input, or a parameter): the gradient is
    then that of an alias, which is the module's own.
    """
    if not tensor.is_leaf and not handed_on(tensor, args):
        tensor.register_hook(on_grad)
        return None
    alias = _watched_alias(tensor, _Shown(on_grad), where)
    return _exchange(output, iter([alias if each is tensor else None for _, each in leaves(output)]))


@dataclass(frozen=True, slots=True)
class _Shown:
    """Shows the only gradient, and changes nothing."""

    on_grad: Callable[[Tensor], None]

    def __call__(self, grads: Grads) -> Grads:
        if grads[0] is not None:
            self.on_grad(grads[0])
        return grads


@dataclass(slots=True)
class _OneGrad:
    """A tensor hook over a function of all gradients."""

    on_grads: Callable[[Grads], Grads]
    into_leaf: bool = False
    fired: bool = False

    def __call__(self, grad: Tensor) -> Tensor:
        self.fired = True
        # From a view of a leaf the gradient's memory becomes the leaf's .grad, to which later backwards add in place.
        seen = grad.clone() if self.into_leaf else grad
        (changed,) = self.on_grads((seen,))
        if changed is seen:
            return grad
        return torch.zeros_like(grad) if changed is None else changed


def _watched_alias(passed: Tensor, on_grads: Callable[[Grads], Grads], where: str) -> Tensor:
    """An alias of an output that the module did not compute: an input that it passes on, or a parameter.

    A hook on that tensor itself would see the gradients of all its other uses too, and outlive the call on a leaf.
    """
    alias = passed.view_as(passed)
    base = passed if passed._base is None else passed._base
    hook = _OneGrad(on_grads, into_leaf=base.is_leaf)
    alias.register_hook(hook)
    if base.is_leaf:
        return alias
    content, version = alias.detach(), alias._version
    is_whole = base is passed  # and not the tensor itself: held by its own hook it would live until a collection

    def instead(grad: Tensor) -> Tensor | None:
        if hook.fired or content._version == version:
            return None
        # An in-place operation took all views, and their hooks, out of the graph; what arrives is the whole gradient.
        if is_whole:
            return hook(grad)
        raise InplaceModificationError(
            f"{where!r} passes its input on, and that was changed in place afterwards, so the gradient of its output "
            "cannot be told; capture direction 'bwd' of the module that produces it instead",
            paths=(where,),
        )

    base.register_hook(instead)
    return alias


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

    def __init__(self, tap: GradOutputHook | GradInputHook, handles: Sequence[RemovableHandle]) -> None:
        self._tap = tap
        self._handles = handles

    def remove(self) -> None:
        """Remove; a second call does nothing."""
        self._tap.alive = False
        for handle in self._handles:
            handle.remove()
