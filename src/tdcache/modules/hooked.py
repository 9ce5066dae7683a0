"""The callable that a context yields.

It forwards everything to the user's model, attributes included. It exists so that a TensorDict call, the cache and the
verbs have a place without planting attributes on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from textwrap import indent
from typing import Any, Protocol, cast

from tensordict import TensorDictBase, is_tensorclass
from tensordict.nn import TensorDictModuleBase, TensorDictModuleWrapper
from torch import Tensor, nn

from tdcache.errors import ContextError, StopForward, TdcacheWarning
from tdcache.function_calls.stand_in import resolve_site
from tdcache.hooks.attach import register_hook_to_module
from tdcache.hooks.compiled import refuse_scripted
from tdcache.hooks.threads import Fence, fencing
from tdcache.modules.call import ModelCall, entries_of, holds_entries, init_module
from tdcache.modules.verbs import ModuleVerbs
from tdcache.named_places import Names
from tdcache.paths import resolve
from tdcache.place_modules import place_at
from tdcache.tables import html_note
from tdcache.types import CacheKey, HookDirection, Removable

__all__ = ["HookedModule", "OwningContext"]


class OwningContext(Protocol):
    """The part of a context that its hooked module uses."""

    _in_context: bool
    model: nn.Module
    names: Names | None
    fence: Fence | None

    def call(self, module: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of the hooked module."""


class HookedModule(ModuleVerbs, TensorDictModuleWrapper):
    """A model inside an open context, or without a context if made by :meth:`from_module`.

    Called with a TensorDict (or a tensorclass) it reads ``in_keys``, runs the model, writes ``out_keys`` and returns
    the same TensorDict; called with anything else it passes everything to the model and returns the model's own result.
    A forward that was stopped early returns the TensorDict without outputs, or None.

    Args:
        td_module: the module to call.
        hooking_context: the context that it belongs to; calling it while that is closed is an error.
        relative_path: the path from this module to the user's own model; all other paths are relative to the latter.
    """

    def __init__(
        self,
        td_module: TensorDictModuleBase,
        hooking_context: OwningContext | None = None,
        relative_path: str = "td_module",
    ) -> None:
        # Without nn.Module.__init__ and __setattr__, which cost more than everything else in entering a context.
        init_module(self)
        self._modules["td_module"] = td_module
        self.__dict__["_hooking_context"] = hooking_context
        self.__dict__["_relative_path"] = relative_path

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        in_keys: Sequence[CacheKey] | Mapping[CacheKey, str] | None = None,
        out_keys: Sequence[CacheKey] | None = None,
        *,
        hooking_context: OwningContext | None = None,
    ) -> HookedModule:
        """A hooked module around ``module`` without a context, for runs and for hooks of your own."""
        if isinstance(module, TensorDictModuleBase):
            return cls(module, hooking_context=hooking_context)
        return cls(
            ModelCall(module, in_keys, out_keys), hooking_context=hooking_context, relative_path="td_module.module"
        )

    @property
    def relative_path(self) -> str:
        """The path from this module to the user's own model."""
        return cast(str, self._relative_path)

    @property
    def hooking_context(self) -> Any:
        """The context this module belongs to, or None."""
        return self._hooking_context

    @property
    def model(self) -> nn.Module:
        """The user's own model, to which all paths are relative."""
        context = self._hooking_context
        if context is not None:
            model: nn.Module = context.model
            return model
        called = self.td_module
        if isinstance(called, ModelCall) and self._relative_path == "td_module.module":
            return called.module  # the usual case, without looking a path up
        return resolve(self, self._relative_path)

    @property
    def names(self) -> Names | None:
        """The table of canonical names of the context; None if keys are module paths."""
        context = self._hooking_context
        return None if context is None else context.names

    @property
    def cache(self) -> TensorDictBase:
        """The cache of the context, up to date.

        Raises:
            ContextError: there is no context, or it has no cache.
        """
        if self._hooking_context is None or not hasattr(type(self._hooking_context), "cache"):
            raise ContextError(
                "this hooked module has no cache; prepare a caching factory such as ActivationCaching (scores of an "
                "attribution are in the TensorDict that the call returns)"
            )
        return cast(TensorDictBase, self._hooking_context.cache)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see the class."""
        if args and type(args[0]) is not Tensor and is_tensorclass(args[0]):
            data = entries_of(args[0])
            result = self.forward(data, *args[1:], **kwargs)
            return args[0] if result is data else result
        context = self._hooking_context
        if context is None:
            return self.call_model(*args, **kwargs)
        if not context._in_context:
            raise ContextError("this hooked module's context is closed; enter it again, or call your own model")
        return context.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Missing attributes are looked up on the model: hooked.generate(...), hooked.config.
        if name == "td_module":  # asked several times in every call
            return self.__dict__["_modules"][name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.model, name)

    def call_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, bypassing the context; a stopped forward returns the TensorDict, or None."""
        called: Any = self._modules["td_module"]  # attribute access to a submodule costs more than this whole method
        if type(called) is ModelCall and not (args and holds_entries(args[0])):
            called = called._modules["module"]
        try:
            return called(*args, **kwargs)
        except StopForward:
            return args[0] if args and isinstance(args[0], TensorDictBase) else None

    def register_submodule_hook(
        self,
        key: str,
        hook: Callable[..., Any],
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> Removable:
        """Register a hook at one path; the caller removes it.

        Args:
            key: the path, relative to the user's own model; ``""`` is the model.
            hook: called with the direction's parameters.
            direction: which value.
            prepend: register before existing hooks.
            relative: with False, the path is relative to this wrapper.

        Raises:
            PathError: no such path.
            HookSignatureError: the hook does not take the direction's parameters.
        """
        path, module = self.find_site(key, relative)
        with self.fencing():
            return register_hook_to_module(module, hook, direction, prepend, path=path)

    def fencing(self) -> AbstractContextManager[None]:
        """Keep the hooks of the block out of the forwards of threads with contexts of their own, as the context's."""
        context = self._hooking_context
        return nullcontext() if context is None else fencing(context.fence)

    def find_site(self, key: str, relative: bool = True) -> tuple[str, nn.Module]:
        """The canonical path and the module of ``key``; warns if it is a container, which is never called.

        Raises:
            PathError: no such path.
            ContextError: the module is inside a TorchScript module.
        """
        context = self._hooking_context
        if context is not None and not context._in_context:
            raise ContextError("this hooked module's context is closed; enter it again before adding hooks through it")
        names = self.names
        if names is not None and (key in names or key in names.refused):
            return place_at(names, self.model, key)
        path, module = resolve_site(self.model if relative else self, key)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            warnings.warn(
                f"{key!r} is a {type(module).__name__}, which is never called; hook its members instead",
                TdcacheWarning,
                stacklevel=3,
            )
        refuse_scripted(self.model if relative else self, [(path, module)])
        return path, module

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the context's hooks inside a block; captured values stay in the cache."""
        with self._needed_context().paused():
            yield

    disable_hooks = paused

    @contextmanager
    def disable_context(self) -> Iterator[nn.Module]:
        """Suspend the context inside a block; yields the user's own model."""
        with self._needed_context().disable() as module:
            yield module

    def restore(self) -> None:
        """Close the context of a module that came from ``prepare(..., return_context=False)``."""
        self._needed_context().restore()

    def _needed_context(self) -> Any:
        if self._hooking_context is None:
            raise ContextError("this hooked module has no context; get one from factory.prepare(model)")
        return self._hooking_context

    def __repr__(self) -> str:
        fields = f"td_module={self.td_module},\nin_keys={self.in_keys},\nout_keys={self.out_keys}"
        return f"{type(self).__name__}(\n{indent(fields, 4 * ' ')})"

    def _repr_html_(self) -> str:
        of = type(self.model).__name__
        keys = html_note(f"{type(self).__name__} of {of}: reads {self.in_keys}, writes {self.out_keys}")
        context = self._hooking_context
        return keys if context is None else keys + context._repr_html_()
