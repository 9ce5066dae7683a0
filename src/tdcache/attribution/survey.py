"""What a pass must know of a model before it runs: whether rows can be stacked, and what a forward would change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdcache.function_calls.scope import has_rules
from tdcache.introspect import post_hooks, pre_hooks
from tdcache.selection import walk

__all__ = ["Survey"]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one walk over the modules of a model finds.

    Args:
        watched: hooks are on it that are not row-wise modifiers of ours.
        statistics: modules that update statistics of their batch, and so mix rows.
        inplace: some module says that it works in place.
    """

    watched: bool = False
    statistics: tuple[nn.Module, ...] = ()
    inplace: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Look at every module once."""
        watched = inplace = False
        statistics = []
        for _, module in (("", model), *walk(model)):
            after, before, own = post_hooks(module), pre_hooks(module), module.__dict__
            if (after or before) and not watched:
                watched = any(map(_is_foreign, (*after.values(), *before.values())))
            if "forward" in own and has_rules(module):
                watched = True
            if "inplace" in own and own["inplace"] is True:
                inplace = True
            if module.training and getattr(module, "running_mean", None) is not None and module not in statistics:
                statistics.append(module)
        return cls(watched, tuple(statistics), inplace)

    def unchanged(self, *, kept: bool = False) -> AbstractContextManager[None]:
        """Give back the running statistics of batch norms in training mode; ``kept`` leaves the new ones."""
        return nullcontext() if kept or not self.statistics else self._given_back()

    @contextmanager
    def _given_back(self) -> Iterator[None]:
        before = [(m, name, buffer) for m in self.statistics for name, buffer in m.named_buffers(recurse=False)]
        for module, name, buffer in before:  # copies are updated: a graph may still hold the originals
            setattr(module, name, buffer.clone())
        try:
            yield
        finally:
            for module, name, buffer in before:
                setattr(module, name, buffer)


def _is_foreign(hook: Any) -> bool:
    return not getattr(getattr(hook, "__self__", hook), "rowwise", False)
