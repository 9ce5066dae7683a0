"""Hooks at hook points for the length of a block.

TransformerLens removes hooks by level, which also removes hooks that somebody else added at that level; here a block
removes the hooks that it added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Protocol

from torch import nn

from tdcache.errors import ContextError, HookSignatureError
from tdcache.hooks import MultiHookHandle
from tdcache.hooks.compiled import running_eagerly
from tdcache.hooks.opened import OpenedHere
from tdcache.points.hook_point import LensHandle, hook_name

__all__ = ["HookedByName", "PointHooks"]

Pairs = tuple[tuple[Any, Callable[..., Any]], ...]


class HookedByName(Protocol):
    """The part of a model with hook points that a context uses."""

    context_level: int

    @property
    def called_model(self) -> nn.Module:
        """The module that a run calls."""

    def install(
        self,
        name: Any,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"],  # noqa: A002  (TransformerLens' name)
        **options: Any,
    ) -> list[LensHandle]:
        """Add a hook to every point that a filter matches, or to none."""

    def refuse_stale_graph(self) -> None:
        """Refuse permanent hooks if a traced graph would skip them."""

    def clear_contexts(self) -> None:
        """Give every point an empty ``ctx``."""


class PointHooks:
    """The context of ``model.hooks(...)``: adds its hooks, all or none, and removes exactly these.

    It can be entered again after it has exited, and contexts of one model may exit in any order; entering it inside
    itself is an error.
    """

    def __init__(
        self, root: HookedByName, fwd_hooks: Pairs, bwd_hooks: Pairs, reset_hooks_end: bool, clear_contexts: bool
    ) -> None:
        pair: Any
        for pair in (*fwd_hooks, *bwd_hooks):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not callable(pair[1]):
                raise HookSignatureError(f"hooks are pairs of a name and a hook, [('hook_embed', hook)], got {pair!r}")
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
        handle = MultiHookHandle()
        with ExitStack() as undo, handle.installing():
            root.context_level += 1
            undo.callback(self._lower)
            with undo.enter_context(OpenedHere(root.called_model)):
                for direction, pairs in self._by_direction():
                    for name, hook in pairs:
                        for added in root.install(name, hook, direction, level=root.context_level):
                            handle.add(added.hook)
            undo.enter_context(running_eagerly(root.called_model))
            if self.reset_hooks_end:
                undo.callback(handle.remove)
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
