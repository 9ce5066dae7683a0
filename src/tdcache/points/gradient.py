"""The gradient at a hook point: all that watch it in one call of the point share one tensor hook.

Each with an alias of its own, all but the first would be lost to an in-place operation behind the point, which takes
views, and the hooks on them, out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

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

    __slots__ = ("module", "watchers")

    def __init__(self, module: nn.Module, first: Watcher) -> None:
        self.module = module
        self.watchers = [first]

    def on_grads(self, module: nn.Module, grads: Grads) -> Grads | None:
        """Call each with what the one before returned."""
        changed = None
        for watcher in self.watchers:
            returned = watcher(module, grads)
            if returned is not None:
                changed = grads = returned
        return changed


def watch_gradient(module: nn.Module, args: Any, output: Any, watcher: Watcher) -> Any:
    """Call ``watcher`` with the gradients of ``output``, from a forward hook; gives a new output if needed."""
    watch: _Watch | None = getattr(output, _WATCHED, None)
    passed = bool(args) and output is args[0]  # then the watch is that of an earlier point, or an earlier call
    if watch is not None and watch.module is module and not passed:
        watch.watchers.append(watcher)
        return None
    watch = _Watch(module, watcher)
    new = GradOutputHook(watch.on_grads, 0).on_output(module, args, output)
    watched = output if new is None else new
    if isinstance(watched, Tensor) and watched.requires_grad:
        setattr(watched, _WATCHED, watch)
    return new
