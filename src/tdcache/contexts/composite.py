"""Several recipes as one context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from tdcache.contexts.cached import HookingContextWithCache
from tdcache.contexts.context import HookingContext
from tdcache.contexts.factory import HookingContextFactory
from tdcache.errors import CacheWriteError, ContextError, StopForward
from tdcache.types import CacheKey

__all__ = ["CompositeHookingContext", "CompositeHookingContextFactory"]


class CompositeHookingContext(HookingContextWithCache):
    """The contexts of several recipes, entered in order and left in reverse; their caches side by side in one.

    A child that was given a cache of its own keeps it; ``caches`` has each child's.
    """

    children: tuple[HookingContext, ...] = ()
    factory: CompositeHookingContextFactory

    @property
    def caches(self) -> tuple[TensorDictBase | None, ...]:
        """The cache of each child, up to date, or None where it has none."""
        return tuple(child.cache if isinstance(child, HookingContextWithCache) else None for child in self.children)

    @property
    def cache(self) -> TensorDictBase:
        """The children's entries side by side, up to date."""
        for child in self._caching_children():
            if child.recorder is not None:
                child.recorder.refresh()
        return self._cache

    def clear(self) -> None:
        """Empty the cache of every child, and forget what their reducers hold."""
        for child in self._caching_children():
            child.clear()
        super().clear()

    def keys_in(self, data: TensorDictBase) -> set[str]:
        """The top-level keys of ``data`` that the children write as a cache."""
        return {key for child in self._caching_children() for key in child.keys_in(data)}

    def _caching_children(self) -> list[HookingContextWithCache]:
        return [child for child in self.children if isinstance(child, HookingContextWithCache)]

    def _enter_inner(self, undo: ExitStack) -> TensorDictModuleBase:
        working = super()._enter_inner(undo)
        children: list[HookingContext] = []
        for factory in self.factory.factories:
            child = factory.prepare(working)
            if isinstance(child, HookingContextWithCache) and child.has_own_cache:
                child.share(self._cache)
            hooked = undo.enter_context(child)
            children.append(child)
            if hooked.td_module is not working or child.runs_module:  # its way of running the model is part of ours
                working = hooked
        self.children = tuple(children)
        self._refuse_clashes()
        return working

    def _entries(self) -> Iterator[tuple[int, int, CacheKey]]:
        """Every entry that is written: by which child, to which cache, under which full key."""
        for number, child in enumerate(self.children):
            if isinstance(child, CompositeHookingContext):
                yield from ((number, cache, key) for _, cache, key in child._entries())
            elif isinstance(child, HookingContextWithCache) and child.recorder is not None:
                for channel in child.recorder.channels:
                    node = channel.target.node
                    for key in channel.entry_keys:
                        yield number, id(channel.target.cache), key if node is None else (node, key)

    def _refuse_clashes(self) -> None:
        entries: dict[tuple[int, CacheKey], int] = {}
        nodes: dict[tuple[int, CacheKey], int] = {}
        for number, cache, key in self._entries():
            node, path = key if isinstance(key, tuple) else (None, key)
            # An entry meets another of the same key, or a node of that name; a node meets an entry of its name.
            other = entries.get((cache, key), nodes.get((cache, key)) if node is None else entries.get((cache, node)))
            if other is not None:
                raise CacheWriteError(
                    f"children {other} and {number} of the composite both cache {path!r}; give one of them "
                    "a cache of its own with cache=TensorDict(), or other sites",
                    paths=(path,),
                )
            entries[cache, key] = number
            if node is not None:
                nodes.setdefault((cache, node), number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mute the hooks of all children inside a block; each keeps its place."""
        self._needed()
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(child.paused())
            yield

    @contextmanager
    def _module_restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for child in reversed(self.children):  # what was prepared last is undone first
                stack.enter_context(child._module_restored())
            stack.enter_context(super()._module_restored())
            yield

    def _asked_for(self, stop: StopForward) -> bool:
        return any(child._asked_for(stop) for child in self.children)


class CompositeHookingContextFactory(HookingContextFactory):
    """Several recipes as one: any recipes compose, and all take part in the same forward and backward.

    A recipe that runs the model more than once (patching from a second input, attribution) wraps those before it.

    Args:
        *factories: the recipes, in the order they are entered.

    Raises:
        ContextError: something else than a factory was given.
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = CompositeHookingContext

    def __init__(self, *factories: HookingContextFactory) -> None:
        super().__init__()
        given: tuple[object, ...] = factories
        strangers = [factory for factory in given if not isinstance(factory, HookingContextFactory)]
        if strangers:
            raise ContextError(f"a composite is made of factories such as ActivationCaching(...), got {strangers[0]!r}")
        self.factories: Sequence[HookingContextFactory] = factories

    @property
    def fits_graph(self) -> bool:
        """Always: each child decides for itself."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.factories))})"
