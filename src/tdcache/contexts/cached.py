"""A context with a cache, which is current while the context is open and stays readable afterwards.

Users notice a mistake when they read the cache, so the checks are here: for values overwritten in place, a context that
was never entered, a forward that never ran, and two contexts that write one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Size, nn

from tdcache.cache.named_cache import NamedCache
from tdcache.cache.recorder import Recorder
from tdcache.cache.reductions import Carried
from tdcache.cache.target import Written, first_clash
from tdcache.contexts.context import HookingContext
from tdcache.errors import CacheWriteError, ContextError, StopForward, UnfiredSiteWarning, warn_user
from tdcache.hooks.opened import open_contexts, overlap
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.hooks.threads import this_thread
from tdcache.modules.call import holds_entries
from tdcache.modules.hooked import HookedModule

__all__ = ["HookingContextWithCache", "all_paused", "capturing_contexts"]

_NO_BATCH = Size()
_NEVER_ENTERED = (
    "this context was never entered, so its cache is empty; write `with context as hooked:` and call the model inside "
    "the block"
)
_NO_FORWARD = (
    "no forward of the model was completed while this context was open, so its cache is empty; call the hooked module, "
    "or the model itself, inside the block"
)


class HookingContextWithCache(HookingContext):
    """A context with a cache, which stays readable after the block.

    Args:
        cache: the TensorDict to write to; a new one by default.
        clear_cache: empty it when the context is entered. A locked cache is left as it is. A cache that holds the
            model's inputs is the data itself; only entries that this context writes are dropped from it.
        *args: see :class:`HookingContext`.
        **kwargs: see :class:`HookingContext`.
    """

    def __init__(
        self, *args: Any, cache: TensorDictBase | None = None, clear_cache: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if cache is not None and not isinstance(cache, TensorDictBase):
            raise ContextError(f"cache= is a TensorDict, got {type(cache).__name__}; TensorDict() makes an empty one")
        self.has_own_cache = cache is None
        self._cache = self._new_cache() if cache is None else cache
        self._batch_size = _NO_BATCH if cache is None else cache.batch_size
        self._clear_cache = self._forgets = clear_cache
        self._was_left = False
        self._empty_because = _NEVER_ENTERED if cache is None else ""
        """The warning that reading the cache gives, once, while the context is closed."""
        self._carried: list[Carried | None] = []
        """With ``clear_cache=False``: the state of the reducers between two entries."""
        self.recorder: Recorder | None = None
        """The state of the capture while the context is open; the recipe sets it."""

    def _new_cache(self) -> TensorDictBase:
        return TensorDict(batch_size=[]) if self.names is None else NamedCache.of(self.names.bound_to(self.model))

    @property
    def cache(self) -> TensorDictBase:
        """The cache, up to date: the same TensorDict from entry to exit, updated in place by every forward.

        Raises:
            InplaceModificationError: a kept alias has been overwritten.
        """
        if self.recorder is not None:
            self.recorder.refresh()
        elif self._empty_because and not self._in_context:
            self.report_empty()
        return self._cache

    def report_empty(self) -> None:
        """Warn, once, if the cache is empty because the context was never entered, or because no forward ran in it."""
        if self._empty_because:
            why, self._empty_because = self._empty_because, ""
            warn_user(why, UnfiredSiteWarning)

    @property
    def _fits_graph(self) -> bool:
        return (
            super()._fits_graph
            and self._cache.device is None
            and not (self._cache.is_locked or self._cache.is_memmap())
        )

    def record(self, recorder: Recorder) -> None:
        """Let ``recorder`` keep the cache current until the context exits."""
        self.recorder = recorder
        if self._clear_cache and not self.has_own_cache and self._holds_data() and not self._cache.is_locked:
            self._drop_written(recorder)
        for channel, carried in zip(recorder.channels, self._carried, strict=False):
            if channel.reductions is not None and carried is not None:
                channel.reductions.resume(carried)
        self._carried = []

    def share(self, cache: TensorDictBase) -> None:
        """From the next entry on, write to ``cache``, which the caller clears."""
        self._cache = cache
        self._clear_cache = False

    def belong(self, before: HookingContext | None) -> None:
        """Become a child of a composite, which checks for clashes, and continue from the state of ``before``."""
        self.is_child = True
        if isinstance(before, HookingContextWithCache) and before.factory is self.factory and not self._forgets:
            self._carried = before.hand_over()

    def hand_over(self) -> list[Carried | None]:
        """The state of the reducers at exit, for another context of the same recipe."""
        carried, self._carried = self._carried, []
        return carried

    def written(self) -> Iterator[Written]:
        """The entries that this context writes while it is open."""
        recorder = self.recorder
        for channel in () if recorder is None else recorder.channels:
            for key in channel.entry_keys:
                yield Written(self, channel.target.cache, channel.target.node, key)

    def clear(self) -> None:
        """Empty the cache and reset the reducers."""
        if self.recorder is not None:
            self.recorder.forget()
        self._carried = []
        if not self._cache.is_locked:
            self._cache.clear()
            self._cache.batch_size = self._batch_size

    def _enter(self) -> HookedModule:
        if self._clear_cache and not self._in_context:
            if not self.has_own_cache:
                if not self._holds_data():
                    self.clear()
            elif self._was_left or not self._cache.is_empty():
                # Whoever still holds the previous block's cache keeps its entries.
                self._cache = self._new_cache()
                self._carried = []
        return super()._enter()

    def _hook(self, hooked: HookedModule) -> MultiHookHandle:
        handle = super()._hook(hooked)
        if not self.is_child and self.writes_given_cache():
            with handle.installing():
                self._refuse_shared_entries()
        return handle

    def _refuse_shared_entries(self) -> None:
        others = [other for other in list(open_contexts) if isinstance(other, HookingContextWithCache)]
        others = [other for other in others if other is not self and not other.is_child]
        clash = first_clash([*(each for other in others for each in other.written()), *self.written()])
        if clash is not None:
            key = clash[1].key
            raise CacheWriteError(
                f"two open contexts would both write {key!r} of one cache; give one of them a cache of its own with "
                "cache=TensorDict(), or other sites",
                paths=(key,),
            )

    def writes_given_cache(self) -> bool:
        """Whether some entry is written to a cache that the user passed in."""
        return not self.has_own_cache

    def _holds_data(self) -> bool:
        """Whether the cache is also the model's input: it has all of the model's input keys."""
        return all(self._cache.get(key, None) is not None for key in self._in_keys)

    def _drop_written(self, recorder: Recorder) -> None:
        for channel in recorder.channels:
            keys = set(channel.top_keys) - {key if isinstance(key, str) else key[0] for key in self._in_keys}
            for key in keys & set(self._cache.keys()):
                self._cache.del_(key)
            channel.target.ensure()

    def call(self, module: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call; refuses outputs that would overwrite cache entries."""
        if args and holds_entries(args[0]):
            named = {key if isinstance(key, str) else key[0] for key in (*self._in_keys, *self._out_keys)}
            if clash := self.keys_in(args[0]) & named:
                raise CacheWriteError(
                    f"the cache is the TensorDict that the model writes to, and {sorted(clash)!r} name both a site "
                    "and an input or output; rename those with in_keys= and out_keys=, or hand in another cache",
                    paths=sorted(clash),
                )
        return super().call(module, args, kwargs)

    def keys_in(self, data: TensorDictBase) -> set[str]:
        """The top-level keys of ``data`` that this context writes as a cache."""
        if data is not self._cache or self.recorder is None:
            return set()
        return {key for channel in self.recorder.channels for key in channel.top_keys}

    def _set_taking(self, taking: bool) -> None:
        if self.recorder is not None:
            self.recorder.open = taking

    def _asked_for(self, stop: StopForward) -> bool:
        return self.recorder is not None and stop.source is self.recorder

    def _leave(self, error: BaseException | None) -> None:
        super()._leave(error)
        if self.recorder is not None:
            self.recorder.open = False

    def _finish(self, error: BaseException | None) -> None:
        self._was_left = True
        recorder, self.recorder = self.recorder, None
        self._empty_because = ""
        if recorder is None:
            return
        try:
            recorder.refresh()
            if error is None:
                recorder.report_unfired(self.model)
                if self.has_own_cache and recorder.saw_nothing and self._cache.is_empty():
                    self._empty_because = _NO_FORWARD
            recorder.settle(self.model)
            if not self._forgets:
                self._carried = [each.reductions.carry() if each.reductions else None for each in recorder.channels]
        finally:
            recorder.close()


def capturing_contexts(model: nn.Module) -> list[HookingContextWithCache]:
    """The open contexts of this thread that keep values of ``model``, and are not paused."""
    caching = [each for each in list(open_contexts) if isinstance(each, HookingContextWithCache)]
    mine = [each for each in caching if each.thread is this_thread() and overlap(each.model, model)]
    return [each for each in mine if each.recorder is not None and each.recorder.open]


@contextmanager
def all_paused(contexts: Iterable[HookingContext]) -> Iterator[None]:
    """Mute the hooks of several contexts inside a block; see :meth:`HookingContext.paused`."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context.paused())
        yield
