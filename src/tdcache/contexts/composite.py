"""Several recipes as one context.

Nested ``with`` blocks would do for hooks. One context is needed where recipes share a cache, where one of them runs the
model for the others, and where two of them would write the same entry without noticing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdcache.cache.target import Written, first_clash
from tdcache.contexts.cached import HookingContextWithCache, all_paused
from tdcache.contexts.context import HookingContext
from tdcache.contexts.factory import HookingContextFactory
from tdcache.errors import CacheWriteError, ContextError, StopForward
from tdcache.modules.hooked import HookedModule
from tdcache.tables import shorten

__all__ = ["CompositeHookingContext", "CompositeHookingContextFactory"]


class CompositeHookingContext(HookingContextWithCache):
    """The contexts of several recipes, entered in order and exited in reverse, with their caches side by side in one.

    A child that was given a cache of its own keeps it; ``caches`` lists the cache of each child.
    """

    children: tuple[HookingContext, ...] = ()
    factory: CompositeHookingContextFactory

    @property
    def caches(self) -> tuple[TensorDictBase | None, ...]:
        """The cache of each child, up to date; None for a child without one."""
        return tuple(child.cache if isinstance(child, HookingContextWithCache) else None for child in self.children)

    @property
    def cache(self) -> TensorDictBase:
        """The children's entries side by side, up to date."""
        for child in self._caching_children():
            if child.recorder is not None:
                child.recorder.refresh()
        return self._cache

    @property
    def selected_sites(self) -> dict[str, str]:
        """The paths that the children selected when they were last entered, with the classes of their modules."""
        return {path: kind for child in self.children for path, kind in child.selected_sites.items()}

    def clear(self) -> None:
        """Empty the cache of every child and reset their reducers."""
        for child in self._caching_children():
            child.clear()
        super().clear()

    def keys_in(self, data: TensorDictBase) -> set[str]:
        """The top-level keys of ``data`` that the children write as a cache."""
        return {key for child in self._caching_children() for key in child.keys_in(data)}

    def _caching_children(self) -> list[HookingContextWithCache]:
        return [child for child in self.children if isinstance(child, HookingContextWithCache)]

    def _enter_inner(self) -> TensorDictModuleBase:
        working = super()._enter_inner()
        children: list[HookingContext] = []
        before = dict(enumerate(self.children))
        for number, factory in enumerate(self.factory.factories):
            child = factory.prepare(working)
            if isinstance(child, HookingContextWithCache):
                child.belong(before.get(number))
                if child.has_own_cache:
                    child.share(self._cache)
            hooked = self._to_undo().enter_context(child)
            children.append(child)
            # How the child runs the model, and what it added to its hooked module, become part of the composite's.
            if hooked.td_module is not working or child.runs_module or factory.spawns:
                working = hooked
        self.children = tuple(children)
        self._refuse_clashes()
        return working

    def belong(self, before: HookingContext | None) -> None:
        """Become a child of another composite; its children continue from the state of those of ``before``."""
        super().belong(before)
        if isinstance(before, CompositeHookingContext) and before.factory is self.factory:
            self.children = before.children

    def written(self) -> Iterator[Written]:
        """The entries that the children write."""
        for child in self._caching_children():
            yield from child.written()

    def writes_given_cache(self) -> bool:
        """Whether some entry is written to a cache that the user passed in."""
        return any(child.writes_given_cache() for child in self._caching_children())

    def _refuse_clashes(self) -> None:
        clash = first_clash(
            Written(number, each.cache, each.node, each.key)
            for number, child in enumerate(self.children)
            if isinstance(child, HookingContextWithCache)
            for each in child.written()
        )
        if clash is not None:
            first, second = clash
            raise CacheWriteError(
                f"children {first.writer} and {second.writer} of the composite both cache {second.key!r}; give one of "
                "them a cache of its own with cache=TensorDict(), or other sites",
                paths=(second.key,),
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mute the hooks of all children inside a block; each keeps its position."""
        self._needed()
        with all_paused(self.children):
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
    """Several recipes as one: any recipes can be combined, and all act in the same forward and backward.

    A recipe that runs the model more than once (patching from a second input, attribution) wraps those before it.

    Args:
        *factories: the recipes, in the order in which they are entered.

    Raises:
        ContextError: an argument is not a factory.
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = CompositeHookingContext

    def __init__(self, *factories: HookingContextFactory) -> None:
        super().__init__()
        given: tuple[object, ...] = factories
        strangers = [factory for factory in given if not isinstance(factory, HookingContextFactory)]
        if strangers:
            wrong = strangers[0]
            got = f"the module {type(wrong).__name__}" if isinstance(wrong, nn.Module) else shorten(repr(wrong), 80)
            raise ContextError(f"a composite is made of factories such as ActivationCaching(...), got {got}")
        self.factories: Sequence[HookingContextFactory] = factories
        tables = {id(factory.names): factory.names for factory in factories if factory.names is not None}
        self.names = next(iter(tables.values())) if len(tables) == 1 else None
        self._hooked_module_class = _joined([factory.hooked_module_class for factory in factories])
        for factory in factories:
            own = {name: value for name, value in factory.hooked_module_kwargs.items() if name != "relative_path"}
            self._hooked_module_kwargs = {**self._hooked_module_kwargs, **own}

    @property
    def spawns(self) -> bool:
        """Whether a child overrides how its hooked module is made."""
        return any(factory.spawns for factory in self.factories)

    @property
    def fits_graph(self) -> bool:
        """Always: each child decides for itself."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.factories))})"


def _joined(kinds: Sequence[type[HookedModule]]) -> type[HookedModule]:
    """A class of hooked module that inherits from those of all children."""
    distinct = list(dict.fromkeys(kinds))
    own = [kind for kind in distinct if not any(kind is not other and issubclass(other, kind) for other in distinct)]
    if len(own) < 2:
        return own[0] if own else HookedModule
    return type("And".join(str(kind.__name__) for kind in own), tuple(own), {})
