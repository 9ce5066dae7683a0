"""The binding of a recipe to one model, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdcache.cache.recorder import Recorder
from tdcache.errors import CacheWriteError, CaptureError, ContextError
from tdcache.hooks.attach import MultiHookHandle
from tdcache.hooks.compiled import eager_where_stale
from tdcache.introspect import is_wrapped_by_compile
from tdcache.modules.call import ModelCall
from tdcache.modules.hooked import HookedModule, holds_entries
from tdcache.selection import Matcher, Selection
from tdcache.types import CacheKey

if TYPE_CHECKING:
    from tdcache.contexts.factory import HookingContextFactory

__all__ = ["HookingContext", "HookingContextWithCache"]


class HookingContext:
    """A recipe bound to one model. Entering installs, all or nothing; leaving restores the model exactly.

    It can be entered again after it was left, but not inside itself. Several contexts may be open on one model, in any
    order; each removes only its own hooks.

    Args:
        factory: the recipe.
        module: the model.
        in_keys: see :meth:`HookingContextFactory.prepare`.
        out_keys: likewise.
        pre_factories: recipes whose contexts are entered first and left last.
    """

    def __init__(
        self,
        factory: HookingContextFactory,
        module: nn.Module,
        in_keys: Sequence[CacheKey] | Mapping[CacheKey, str] | None = None,
        out_keys: Sequence[CacheKey] | None = None,
        pre_factories: Sequence[HookingContextFactory] | None = None,
    ) -> None:
        self.factory = factory
        self._pre_factories = tuple(pre_factories or ())
        if isinstance(module, HookedModule):
            self._module: TensorDictModuleBase = module
            self._extra_relative_path = module.relative_path
            self.model = module.model
        elif isinstance(module, ModelCall):
            self._module, self._extra_relative_path, self.model = module, "module", module.module
        elif isinstance(module, TensorDictModuleBase):
            self._module, self._extra_relative_path, self.model = module, "", module
        else:
            self._module, self._extra_relative_path, self.model = ModelCall(module, in_keys, out_keys), "module", module
        self._in_keys, self._out_keys = list(self._module.in_keys), list(self._module.out_keys)
        self._in_context = False
        self._paused = False
        self._managed = True
        self._was_traced = False
        self._hooked_module: HookedModule | None = None
        self._handle = MultiHookHandle()
        self._undo = ExitStack()

    def __repr__(self) -> str:
        state = "open" if self._in_context else "closed"
        return f"<{state} {type(self).__name__} of {self.factory!r} on {type(self.model).__name__}>"

    def __enter__(self) -> HookedModule:
        return self._enter()

    def open(self) -> HookedModule:
        """Enter without a ``with`` block; the hooked module's ``restore()`` leaves."""
        hooked = self._enter()
        self._managed = False
        return hooked

    def _enter(self) -> HookedModule:
        if self._in_context:
            raise ContextError(
                "this context is open already; it can be entered again after it was left, not inside itself: "
                "prepare a second one for nesting"
            )
        self._undo = undo = ExitStack()
        try:
            working = self._enter_inner(undo)
            extra = working.relative_path if isinstance(working, HookedModule) else self._extra_relative_path
            keys = (self._in_keys, self._out_keys, extra)
            prepared = self.factory._prepare_module(working, *keys)
            undo.callback(self.factory._restore_module, prepared, *keys)
            self._was_traced = eager_where_stale(self.model, undo)
            self._hooked_module = hooked = self.factory._spawn_hooked_module(prepared, self, extra)
            self._in_context = self._managed = True
            self._install()
        except BaseException as error:
            self._leave(error)
            raise
        return hooked

    def _enter_inner(self, undo: ExitStack) -> TensorDictModuleBase:
        """Enter the contexts that come first; what is wrapped is the module, or the last one's hooked module."""
        working = self._module
        for factory in self._pre_factories:
            working = undo.enter_context(factory.prepare(working))
        return working

    def _install(self) -> None:
        self._handle = self.factory._hook_module(self._needed())

    def _uninstall(self) -> None:
        self._handle.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                self._leave(error)  # the model is restored before anything is reported
            finally:
                self._finish(error)
        except BaseException as failure:
            if error is None:
                raise
            error.add_note(f"while leaving the context: {type(failure).__name__}: {failure}")

    def _leave(self, error: BaseException | None) -> None:
        undo, self._undo = self._undo, ExitStack()
        try:
            with undo:
                self._uninstall()
                if error is not None:
                    undo.__exit__(type(error), error, error.__traceback__)
        finally:
            self._in_context = False
            self._hooked_module = None
            self._handle = MultiHookHandle()

    def _finish(self, error: BaseException | None) -> None:
        """What is left to do when the model is restored; ``error`` is the body's."""

    def restore(self) -> None:
        """Leave a context that was entered by ``prepare(..., return_context=False)`` or :meth:`open`."""
        self._needed()
        if self._managed:
            raise ContextError("this context belongs to a with block, which leaves it at its end")
        self.__exit__(None, None, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the hooks off inside a block and put them back on after it; what was captured stays."""
        self._needed()
        if self._paused:
            raise ContextError("this context is paused already")
        self._uninstall()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if self._in_context:
                self._install()

    def disable_hooks(self) -> Any:
        """The same as :meth:`paused`."""
        return self.paused()

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """Undo everything inside a block, which gets the user's own model."""
        with self.paused():
            keys = (self._in_keys, self._out_keys, self._extra_relative_path)
            hooked = self._needed()
            self.factory._restore_module(hooked.td_module, *keys)
            try:
                yield self.model
            finally:
                hooked.td_module = self.factory._prepare_module(self._module, *keys)

    def call(self, module: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of the hooked module."""
        if args and holds_entries(args[0]):
            forward = self.runner(lambda data: module.call_model(data, *args[1:], **kwargs))
            return forward(args[0])
        if self.factory.runs_module:
            raise ContextError(
                f"{self.factory!r} needs a TensorDict: call hooked(TensorDict({{...}})) with the entries "
                f"{self._in_keys!r}"
            )
        return module.call_model(*args, **kwargs)

    @property
    def runs_module(self) -> bool:
        """Whether the recipe carries out calls itself."""
        return self.factory.runs_module

    def runner(self, forward: Callable[[TensorDictBase], TensorDictBase]) -> Callable[[TensorDictBase], TensorDictBase]:
        """``forward`` as the recipe carries it out."""
        if not self.factory.runs_module:
            return forward
        return lambda data: self.factory._run_module(self._needed(), data, forward)

    def _needed(self) -> HookedModule:
        if not self._in_context or self._hooked_module is None:
            raise ContextError("this context is closed; enter it first: with context as hooked: ...")
        return self._hooked_module


class HookingContextWithCache(HookingContext):
    """A context with a cache, which stays readable after the block.

    Args:
        cache: the TensorDict to write to; a new one by default.
        clear_cache: empty it when the context is entered (a locked one is left as it is).
        *args: see :class:`HookingContext`.
        **kwargs: likewise.
    """

    def __init__(
        self, *args: Any, cache: TensorDictBase | None = None, clear_cache: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if cache is not None and not isinstance(cache, TensorDictBase):
            raise ContextError(f"cache= is a TensorDict, got {type(cache).__name__}; TensorDict() makes an empty one")
        self.has_own_cache = cache is None
        self._cache = TensorDict(batch_size=[]) if cache is None else cache
        self._clear_cache = clear_cache
        self.recorder: Recorder | None = None
        """The state of the capture while the context is open, as the recipe has begun it."""
        self._remembered: tuple[Matcher, list[tuple[str, nn.Module]], Selection] | None = None

    @property
    def cache(self) -> TensorDictBase:
        """The cache, up to date: one TensorDict from entering to leaving, updated in place by every forward.

        Raises:
            InplaceModificationError: a kept alias was overwritten since.
        """
        if self.recorder is not None:
            self.recorder.refresh()
        return self._cache

    def record(self, recorder: Recorder) -> None:
        """Keep the cache current by ``recorder`` until the context is left."""
        self.recorder = recorder

    def remember(self, matcher: Matcher, tree: list[tuple[str, nn.Module]], selection: Selection) -> None:
        """Keep what ``matcher`` selected among the modules ``tree``, for the next entry."""
        self._remembered = (matcher, tree, selection)

    def recall(self, matcher: Matcher, tree: list[tuple[str, nn.Module]]) -> Selection | None:
        """What was remembered for just this matcher and these modules."""
        if self._remembered is None or self._remembered[0] is not matcher or self._remembered[1] != tree:
            return None
        return self._remembered[2]

    def share(self, cache: TensorDictBase) -> None:
        """Write to ``cache``, which somebody else clears, from the next entry on."""
        self._cache = cache
        self._clear_cache = False

    def clear(self) -> None:
        """Empty the cache, and forget what the reducers hold."""
        if self.recorder is not None:
            self.recorder.forget()
        if not self._cache.is_locked:
            self._cache.batch_size = torch.Size([])
            self._cache.clear()

    def _enter(self) -> HookedModule:
        if self._clear_cache and not self._in_context:
            if self.has_own_cache:  # what the last block left stays with those who hold it
                self._cache = TensorDict(batch_size=[])
            else:
                self.clear()
        return super()._enter()

    def call(self, module: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call; refuses to write outputs over cache entries."""
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

    def _install(self) -> None:
        super()._install()
        if self.recorder is not None:
            self.recorder.open = True

    def _uninstall(self) -> None:
        super()._uninstall()
        if self.recorder is not None:
            self.recorder.open = False

    def _finish(self, error: BaseException | None) -> None:
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        try:
            recorder.refresh()
            fired = any(channel.fired for channel in recorder.channels)
            if error is None and self._was_traced and not fired and is_wrapped_by_compile(self.model):
                raise CaptureError(
                    f"no site of {type(self.model).__name__} saw a value, and torch.compile had traced the model "
                    "before: its graph skips hooks that came later; prepare the compiled module itself, or enter "
                    "before its first run"
                )
            if error is None:
                recorder.report_unfired(self.model)
        finally:
            recorder.close()
