"""Several recipes as one context."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from tdcache.contexts.context import HookingContext, HookingContextWithCache
from tdcache.contexts.factory import HookingContextFactory
from tdcache.errors import CacheWriteError, ContextError

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    def _refuse_clashes(self) -> None:
        seen: dict[Any, int] = {}
        for number, child in enumerate(self.children):
            if not isinstance(child, HookingContextWithCache) or child.recorder is None:
                continue
            for channel in child.recorder.channels:
                for path in channel.paths:
                    key = (id(channel.target.cache), channel.target.node, path)
                    if key in seen:
                        raise CacheWriteError(
                            f"children {seen[key]} and {number} of the composite both cache {path!r}; give one of them "
                            "a cache of its own with cache=TensorDict(), or other sites",
                            paths=(path,),
                        )
                    seen[key] = number

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the hooks of all children off inside a block."""
        self._needed()
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(child.paused())
            yield


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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.factories))})"
