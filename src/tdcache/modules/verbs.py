"""The verbs of a hooked module: read, change and stop at one path.

A recipe acts at all sites that a pattern matches; these are for one place at a time, interactively or in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Unpack

from tensordict import TensorDictBase
from torch import nn

from tdcache.errors import TdcacheWarning, warn_user
from tdcache.function_calls.places import refuse_direction
from tdcache.function_calls.sites import is_call
from tdcache.hooks.attach import UserHook, attach
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.factory import HookFactory, check_callback
from tdcache.hooks.registrations import Order
from tdcache.introspect import has_stale_graph
from tdcache.modules.directed_verbs import DirectedForms
from tdcache.modules.run import HookedModuleRun
from tdcache.modules.taps import Forwards, GetTap, SetTap, ValueProxy
from tdcache.modules.value_part import ValuePart, WhereOptions
from tdcache.named_places import Names
from tdcache.options import refuse_unknown
from tdcache.place_modules import dims_of, refuse_at_names
from tdcache.reducers import Reducer
from tdcache.types import CacheKey, Hold, HookDirection, Pick, Removable

__all__ = ["ModuleVerbs"]


_OPTIONS = (
    *("callback", "direction", "hold", "pick", "prepend", "reducer", "relative"),
    *WhereOptions.__annotations__,
)


class ModuleVerbs(DirectedForms):
    """The verbs of a hooked module, each in effect until the returned handle is removed; and runs of it."""

    if TYPE_CHECKING:  # the hooked module's

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the model with the arguments of its ``forward``."""

        @property
        def model(self) -> nn.Module:
            """The user's own model."""

        @property
        def names(self) -> Names | None:
            """The canonical names of the context."""

        @property
        def cache(self) -> TensorDictBase:
            """The cache of the context."""

        def fencing(self) -> AbstractContextManager[None]:
            """Keep the hooks of the block out of the forwards of threads with contexts of their own."""

        def find_site(self, key: str, relative: bool = True) -> tuple[str, nn.Module]:
            """Canonical path and module of ``key``."""

    def run(
        self,
        data: Any = None,
        cache: TensorDictBase | None = None,
        run_name: str | None = None,
        run_cache: TensorDictBase | None = None,
        grad_enabled: bool = False,
        run_callback: Callable[[Any, Any], Any] | None = None,
    ) -> HookedModuleRun:
        """One run of the model: declare in the block what to get, set and save; the model runs when the block ends.

        Args:
            data: the input of the model: a TensorDict, a mapping of keyword arguments, or one value.
            cache: the TensorDict that ``save`` writes to; by default the run's own cache.
            run_name: the prefix of the keys of saved values, ``"run"`` by default.
            run_cache: the TensorDict that ``get`` writes to; a new one by default.
            grad_enabled: run with gradients. Asking for a gradient in the block does so too.
            run_callback: called as ``run_callback(hooked, data)`` instead of ``hooked(data)``, for instance to run a
                backward.

        Example:
            >>> import torch
            >>> from tdcache import HookedModule
            >>> hooked = HookedModule.from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3)))
            >>> with hooked.run(torch.ones(1, 2)) as run:
            ...     run.set("1", run.get("0"))
            >>> torch.equal(run.result, run.cache["0_output"])
            True
        """
        hooked: Any = self
        return HookedModuleRun(hooked, data, cache, run_name, run_cache, grad_enabled, run_callback)

    def set(
        self,
        module_key: str,
        value: Any = None,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        *,
        pick: Pick = None,
    ) -> Removable:
        """Replace a value in every call of the module, until the handle is removed.

        Args:
            module_key: the path, relative to the user's own model.
            value: a tensor, a copy of which replaces the picked tensor; a complete value of the same type as the old
                one (a tuple of arguments or gradients); or a proxy of a ``get``.
            callback: called with the direction's parameters, ``value=`` and ``direction=``; returns the new value, or
                None for no change.
            direction: which value.
            prepend: register before existing hooks.
            relative: with False, the path is relative to the hooked module.
            pick: which tensor of a structured value.

        Raises:
            PathError: no such path.
            EditError: neither ``value`` nor ``callback`` is given; or, when the model runs, the value does not fit or
                does not exist yet.
        """
        self._warn_if_skipped(module_key)
        tap, module = self.declare_set(
            module_key, value, callback=callback, direction=direction, prepend=prepend, relative=relative, pick=pick
        )
        return self.attach_tap(tap, module)

    def get(
        self,
        cache: Any,
        module_key: str,
        cache_key: CacheKey | None = None,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        *,
        pick: Pick = None,
        hold: Hold = "live",
    ) -> tuple[Removable, ValueProxy]:
        """Write a value to ``cache`` in every call of the module, until the handle is removed.

        Args:
            cache: a TensorDict.
            module_key: the path, relative to the user's own model.
            cache_key: the key, ``"<path>_output"`` (``_input``, ``_grad_input``, ``_grad_output``) by default.
            callback: called with the direction's parameters, ``key=`` and ``direction=``; returns what is written.
            direction: which value.
            prepend: see the value before edits at the same path.
            relative: with False, the path is relative to the hooked module.
            pick: which tensor of a structured value, the first by default.
            hold: ``"live"`` (with its graph, if there is one), ``"detached"`` or ``"snapshot"``.

        Returns:
            The handle, and a proxy that resolves to the value.

        Raises:
            PathError: no such path.
            DirectionError: unknown direction.
        """
        self._warn_if_skipped(module_key)
        tap, module = self.declare_get(
            cache, module_key, cache_key, callback=callback, direction=direction, prepend=prepend, relative=relative,
            pick=pick, hold=hold,
        )  # fmt: skip
        return self.attach_tap(tap, module), tap.proxy

    def save(
        self, module_key: str, cache_key: CacheKey | None = None, *, cache: TensorDictBase | None = None, **options: Any
    ) -> tuple[Removable, ValueProxy]:
        """:meth:`get` into the cache of the context, or into ``cache``."""
        return self.get(self.cache if cache is None else cache, module_key, cache_key, **options)

    def stop(self, key: str) -> Removable:
        """End every forward after the module at ``key``, until the handle is removed."""
        self._warn_if_skipped(key)
        path, module = self.find_site(key)
        with self.fencing():
            stop = UserHook(HookFactory.make_stopping_hook(path), path, "fwd", Order.STOP)
            return attach(module, stop, "fwd", order=Order.STOP)

    def declare_set(
        self,
        module_key: str,
        value: Any,
        *,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        pick: Pick = None,
        **where: Unpack[WhereOptions],
    ) -> tuple[SetTap, nn.Module]:
        """The unregistered hook of a :meth:`set` and its module; ``where``: which part of the value."""
        row, path, module = self._place(module_key, direction, callback, relative, "value")
        default = Order.EDIT_GRADIENT if row.gradient else Order.EDIT
        order = Order.FIRST if prepend else default
        part = self._part(module_key, where)
        return SetTap(path, row, value, callback=callback, pick=pick, order=order, where=part), module

    def declare_get(
        self,
        cache: Any,
        module_key: str,
        cache_key: CacheKey | None,
        *,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        pick: Pick = None,
        hold: Hold = "live",
        forwards: Forwards | None = None,
        reducer: Reducer | None = None,
        **where: Unpack[WhereOptions],
    ) -> tuple[GetTap, nn.Module]:
        """The unregistered hook of a :meth:`get` and its module.

        ``forwards`` lets it tell a second call from a second forward, ``reducer`` reduces the values of all of them,
        and ``where`` is the part of the value.
        """
        row, path, module = self._place(module_key, direction, callback, relative, "key")
        proxy = ValueProxy(cache_key or f"{module_key}_{row.noun}", cache, path)
        order = Order.FIRST if prepend else Order.CAPTURE
        tap = GetTap(
            proxy, row, callback=callback, pick=pick, hold=hold, forwards=forwards, order=order,
            where=self._part(module_key, where), reducer=None if reducer is None else Reducer.of(reducer).fresh(),
        )  # fmt: skip
        return tap, module

    def attach_tap(self, tap: GetTap | SetTap, module: nn.Module) -> Removable:
        """Register the hook of a verb on its module."""
        with self.fencing():
            return attach(module, tap.on_call, tap.row.name, order=tap.order, path=tap.path)

    def _place(
        self, key: str, direction: HookDirection, callback: Callable[..., Any] | None, relative: bool, extra: str
    ) -> tuple[Direction, str, nn.Module]:
        row = direction_row(direction)
        if callback is not None:
            check_callback(callback, (*row.params, extra, "direction"))
        elif direction == "fwd_pre":
            row = direction_row("fwd_pre_kwargs")  # the first tensor may be a keyword argument
        path, module = self.find_site(key, relative)
        if self.names is not None and key in self.names:
            refuse_at_names(self.names, [direction])
            row = direction_row("bwd_pre") if row.name == "bwd" and callback is None else row
        elif is_call(path):  # what a hook of 'bwd' returns is the gradient of the arguments
            refuse_direction((path,), "grad_in" if row.name == "bwd" and extra == "value" else row.name)
        return row, path, module

    def _part(self, key: str, where: WhereOptions) -> ValuePart:
        """The part of a value that a verb means; of a name, along the axes that the table says it has."""
        refuse_unknown("this verb", where, _OPTIONS)
        if self.names is not None and key in self.names:
            known: Any = dims_of(self.names[key])
            return ValuePart(**{**known, **where})
        return ValuePart(**where)

    def _warn_if_skipped(self, key: str) -> None:
        if has_stale_graph(self.model):
            warn_user(
                f"the model was compiled and has run before, and its graph skips the hook at {key!r}; use a run or a "
                "context, which run it eagerly, or the model that was not compiled",
                TdcacheWarning,
            )
