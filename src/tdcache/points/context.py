"""Hooks at hook points for the length of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from tdcache.errors import ContextError
from tdcache.hooks.compiled import running_eagerly
from tdcache.points.hook_point import LensHandle, hook_name, remove_all

if TYPE_CHECKING:
    from tdcache.points.surface import PointSurface

__all__ = ["PointHooks"]

Pairs = tuple[tuple[Any, Callable[..., Any]], ...]


class PointHooks:
    """What ``model.hooks(...)`` gives: adds its hooks, all or none, and removes these and no others.

    Can be entered again after it was left, and contexts of one model may be left in any order; entering it inside
    itself is an error.
    """

    def __init__(
        self, root: PointSurface, fwd_hooks: Pairs, bwd_hooks: Pairs, reset_hooks_end: bool, clear_contexts: bool
    ) -> None:
        self.root = root
        self.fwd_hooks = fwd_hooks
        self.bwd_hooks = bwd_hooks
        self.reset_hooks_end = reset_hooks_end
        self.clear_contexts = clear_contexts
        self._undo: ExitStack | None = None

    def __repr__(self) -> str:
        pairs = (*self.fwd_hooks, *self.bwd_hooks)
        hooks = ", ".join(f"{hook_name(hook)} at {name!r}" for name, hook in pairs)
        return f"<{'closed' if self._undo is None else 'open'} {type(self).__name__}: {hooks or 'no hooks'}>"

    def __enter__(self) -> Any:
        if self._undo is not None:
            raise ContextError(
                "these hooks are on already; the context can be entered again after it was left, not inside itself"
            )
        root = self.root
        if not self.reset_hooks_end:
            root.refuse_stale_graph()
        with ExitStack() as undo:
            root.context_level += 1
            undo.callback(self._lower)
            added: list[LensHandle] = []
            undo.push(_RemoveOnError(added))
            for direction, pairs in self._by_direction():
                for name, hook in pairs:
                    added += root.install(name, hook, direction, level=root.context_level)
            undo.enter_context(running_eagerly(root.called_model))
            if self.reset_hooks_end:
                undo.callback(remove_all, added)
            self._undo = undo.pop_all()
        return root

    def _by_direction(self) -> tuple[tuple[Literal["fwd", "bwd"], Pairs], ...]:
        return ("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks)

    def _lower(self) -> None:
        self.root.context_level -= 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()
        if self.reset_hooks_end and self.clear_contexts:
            self.root.clear_contexts()


class _RemoveOnError:
    """Removes the hooks of a context that could not be entered."""

    def __init__(self, added: list[LensHandle]) -> None:
        self.added = added

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            remove_all(self.added)
