"""The gradient at a hook point: all that watch it in one call of the point share one tensor hook.

Each with an alias of its own, all but the first would be lost to an in-place operation behind the point, which takes
views, and the hooks on them, out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import InplaceModificationError
from tdcache.hooks.gradients import GradOutputHook

__all__ = ["PointGradient", "watch_gradient"]

Grads = tuple[Tensor | None, ...]
Watcher = Callable[[nn.Module, Grads], Grads | None]

_WATCHED = "_tdcache_point_watch"


class PointGradient:
    """A forward hook of a point that calls ``hook(module, grads)`` when the gradient of its output arrives."""

    __slots__ = ("alive", "hook", "order")

    def __init__(self, hook: Watcher, order: int) -> None:
        self.hook = hook
        self.order = order
        self.alive = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hook!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of an output."""
        return watch_gradient(module, args, output, self.on_grads)

    def on_grads(self, module: nn.Module, grads: Grads) -> Grads | None:
        """Pass the gradients on to the hook, unless it was removed in the meantime."""
        return self.hook(module, grads) if self.alive else None


class _Watch:
    """Those who watch the gradient of one call of a point, in the order of their forward hooks."""

    __slots__ = ("base_position", "content", "fired", "into_leaf", "is_whole", "module", "version", "watchers")

    def __init__(self, module: nn.Module, first: Watcher) -> None:
        self.module = module
        self.watchers = [first]
        self.fired = False

    def on_grads(self, module: nn.Module, grads: Grads) -> Grads | None:
        """Call each with what the one before returned."""
        changed = None
        for watcher in self.watchers:
            returned = watcher(module, grads)
            if returned is not None:
                changed = grads = returned
        return changed

    def alias_of(self, passed: Tensor) -> Tensor | None:
        """An alias of the tensor that the point passes on, with a hook on its node; None where no gradient can come."""
        alias = passed.view_as(passed)
        if alias.grad_fn is None:
            return None
        alias.grad_fn.register_prehook(self.on_alias)
        base = passed if passed._base is None else passed._base
        self.into_leaf = base.is_leaf
        if base.grad_fn is not None:
            # Nothing here may hold the base: with a tensor in its own hook the graph would live until a collection.
            self.is_whole = base is passed
            self.content, self.version = alias.detach(), alias._version
            self.base_position = base.output_nr
            base.grad_fn.register_prehook(self.on_base)
        return alias

    def on_alias(self, grads: Grads) -> Grads | None:
        """The gradient of the alias."""
        self.fired = True
        (grad,) = grads
        if grad is None:
            return None
        # The memory of what flows into a leaf becomes its .grad, to which later backwards add in place.
        return self.on_grads(self.module, (grad.clone(),) if self.into_leaf else grads)

    def on_base(self, grads: Grads) -> Grads | None:
        """The gradient of what the alias is an alias of: of use where the alias was taken out of the graph."""
        at = self.base_position
        if self.fired or grads[at] is None or self.content._version == self.version:
            return None
        if not self.is_whole:
            name = getattr(self.module, "name", None)
            raise InplaceModificationError(
                f"what hook point {name!r} passes on is a view, and was changed in place afterwards, so its gradient "
                "cannot be told; put the point before the operation that makes the view",
                paths=(str(name),),
            )
        changed = self.on_alias((grads[at],))
        return None if changed is None else (*grads[:at], *changed, *grads[at + 1 :])


def watch_gradient(module: nn.Module, args: Any, output: Any, watcher: Watcher) -> Any:
    """Call ``watcher`` with the gradients of ``output``, from a forward hook; gives a new output if needed."""
    watch: _Watch | None = getattr(output, _WATCHED, None)
    passed = bool(args) and output is args[0]  # then the watch is that of an earlier point, or an earlier call
    if watch is not None and watch.module is module and not passed:
        watch.watchers.append(watcher)
        return None
    watch = _Watch(module, watcher)
    if passed and isinstance(output, Tensor) and not torch.compiler.is_compiling():
        new = watch.alias_of(output) if output.requires_grad else None
    else:
        new = GradOutputHook(watch.on_grads, 0).on_output(module, args, output)
    watched = output if new is None else new
    if isinstance(watched, Tensor) and watched.requires_grad:
        setattr(watched, _WATCHED, watch)
    return new
