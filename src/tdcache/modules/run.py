"""One run of a model, declared in a ``with`` block and carried out when the block ends.

Edits that a handle removes last until somebody remembers to remove it. Those of a run apply to one call of the model,
and to no call if the block raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdcache.current_call import CurrentCall
from tdcache.errors import ContextError, EditError, StopForward, UnfiredSiteWarning, listed, warn_user
from tdcache.hooks.attach import AttachedElsewhere, attach
from tdcache.hooks.compiled import running_eagerly
from tdcache.hooks.directions import direction_row
from tdcache.hooks.opened import OpenedHere
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.replaced_forward import skip_module
from tdcache.hooks.transient import Transient
from tdcache.introspect import why_not_called
from tdcache.modules.directed_verbs import DirectedForms
from tdcache.modules.taps import Forwards, GetTap, SetTap, SkipTap, ValueProxy
from tdcache.types import CacheKey, HookDirection, Removable

__all__ = ["HookedModuleRun", "Runnable"]


_Tap = GetTap | SetTap | SkipTap


class Runnable(Protocol):
    """The part of a hooked module that a run uses."""

    @property
    def model(self) -> nn.Module:
        """The user's own model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hooked model; arguments are those of its ``forward``."""

    def find_site(self, key: str, relative: bool = True) -> tuple[str, nn.Module]:
        """Canonical path and module of ``key``."""

    def declare_set(self, module_key: str, value: Any, **options: Any) -> tuple[SetTap, nn.Module]:
        """The tap that replaces a value, and its module."""

    def declare_get(
        self, cache: Any, module_key: str, cache_key: CacheKey | None, **options: Any
    ) -> tuple[GetTap, nn.Module]:
        """The tap that keeps a value, and its module."""

    def attach_tap(self, tap: GetTap | SetTap, module: nn.Module) -> Removable:
        """Register the hook of a verb."""

    def fencing(self) -> AbstractContextManager[None]:
        """Keep the hooks of the block out of the forwards of threads with contexts of their own."""


class HookedModuleRun(DirectedForms):
    """A run, made by :meth:`HookedModule.run`, which documents the arguments.

    In the block, ``get``, ``set``, ``save``, ``skip`` and ``stop`` (and the forms for inputs and gradients) declare
    what happens at which path in this run; their hooks exist only while it runs. The model runs when the block ends,
    and not at all if the block raises. ``get`` and ``save`` return proxies, which can be used in computations: a
    ``set`` in the same run (at a path that runs later) or in another run resolves them when it needs the value.

    Raises:
        ContextError: a verb outside the block, a block inside itself, or two values for one key of the cache.
        InplaceModificationError: when the block ends, if a kept value was overwritten.
    """

    def __init__(
        self,
        module: Runnable,
        data: Any = None,
        cache: TensorDictBase | None = None,
        run_name: str | None = None,
        run_cache: TensorDictBase | None = None,
        grad_enabled: bool = False,
        run_callback: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._module = module
        self._data = data
        self._outer_cache = cache
        self._prefix = f"{run_name or 'run'}."
        self._cache = run_cache
        self._grad_asked = self._grad_enabled = grad_enabled
        self._run_callback = run_callback or _call
        self._forwards = Forwards()
        self._taps: list[_Tap] = []
        self._placing: list[Callable[[], Removable]] = []
        self._in_context = False
        self._stopped_at: str | None = None
        self.result: Any = None
        """The return value of the model; None before the call, and if the run was stopped."""

    def __repr__(self) -> str:
        model = type(self._module.model).__name__
        return f"<{type(self).__name__} {self._prefix!r} of {model}, {len(self._taps)} verbs>"

    @property
    def cache(self) -> TensorDictBase:
        """The TensorDict that ``get`` writes to, and ``save`` too unless the run was given another one."""
        if self._cache is None:
            self._cache = TensorDict(batch_size=[])
        return self._cache

    @cache.setter
    def cache(self, cache: TensorDictBase) -> None:
        self._cache = cache

    def __enter__(self) -> HookedModuleRun:
        if self._in_context:
            raise ContextError("this run is open already; begin another one with hooked.run(...)")
        self._in_context = True
        self._stopped_at, self._grad_enabled = None, self._grad_asked
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        (taps, self._taps), (placing, self._placing) = (self._taps, []), (self._placing, [])
        self._in_context = False
        if error is not None:
            return
        self._run(taps, placing)
        for tap in taps:
            if isinstance(tap, GetTap):
                tap.finish()
        self._report_unfired(taps)

    def _run(self, taps: list[_Tap], placing: list[Callable[[], Removable]]) -> None:
        model = self._module.model
        with ExitStack() as undo:
            if placing:
                undo.enter_context(running_eagerly(model))
            acting_here = undo.enter_context(OpenedHere(model))
            handle = MultiHookHandle()
            undo.callback(handle.remove)
            with acting_here, self._module.fencing():
                for place in placing:
                    handle.add(place())
                if any(isinstance(tap, GetTap) for tap in taps):  # only these tell a second call from a second forward
                    handle.add(attach(model, self._forwards.on_forward, "fwd_pre", order=Order.FIRST))
                for call in self._calls_of(taps):
                    call.attach(handle)
            undo.enter_context(torch.set_grad_enabled(self._grad_enabled))
            try:
                self.result = self._run_callback(self._module, self._data)
            except (StopForward, _RunStopped):
                self.result = self._data if isinstance(self._data, TensorDictBase) else None

    def _calls_of(self, taps: list[_Tap]) -> list[CurrentCall]:
        """The trackers of the current forward, one for all taps with the same options."""
        calls: dict[Any, CurrentCall] = {}
        for tap in taps:
            if isinstance(tap, SkipTap) or not tap.where.asks_for_call:
                continue
            where = tap.where
            key = (id(where.steps) if callable(where.steps) else where.steps, str(where.mask_key))
            if key not in calls:
                calls[key] = CurrentCall(self._module.model, where)
            tap.call = calls[key]
            tap.call.wants_tokens |= where.positions is not None
        return list(calls.values())

    def set(
        self,
        key: str,
        value: Any = None,
        *,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        **options: Any,
    ) -> None:
        """Replace a value in this run, with the arguments of :meth:`HookedModule.set`.

        The value may contain proxies, expressions of proxies, or tuples of them. Options are ``pick=`` and those of
        :class:`~tdcache.modules.value_part.ValuePart`: ``positions=`` and ``units=`` for part of the value, ``steps=``
        for some forwards of ``generate()``.
        """
        self._needs_block("set", direction)
        tap, module = self._module.declare_set(
            key, value, callback=callback, direction=direction, prepend=prepend, relative=relative, **options
        )
        self._take_in(tap, module)

    def get(
        self,
        key: str,
        *,
        cache_key: CacheKey | None = None,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        **options: Any,
    ) -> ValueProxy:
        """Write a value to the run's own cache, with the arguments of :meth:`HookedModule.get`.

        Options are ``pick=``, ``hold=``; ``positions=``, ``units=`` and ``steps=`` as in :meth:`set`; and ``reducer=``
        for several calls, such as ``Stack()`` for every step of ``generate()``. Without a reducer the last value is
        kept, with a warning. The result of a reducer is available when the run has ended.

        Returns:
            A proxy of the value.
        """
        self._needs_block("get", direction)
        return self._read(
            self.cache, key, cache_key,
            callback=callback, direction=direction, prepend=prepend, relative=relative, **options,
        )  # fmt: skip

    def save(
        self,
        key: str,
        *,
        cache_key: CacheKey | None = None,
        callback: Callable[..., Any] | None = None,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative: bool = True,
        **options: Any,
    ) -> ValueProxy:
        """Write a value to the cache that the run was given, as ``"run.<path>_output"``; see :meth:`get`."""
        self._needs_block("save", direction)
        cache = self.cache if self._outer_cache is None else self._outer_cache
        cache_key = cache_key or f"{self._prefix}{key}_{direction_row(direction).noun}"
        return self._read(
            cache, key, cache_key,
            callback=callback, direction=direction, prepend=prepend, relative=relative, **options,
        )  # fmt: skip

    def _read(self, cache: TensorDictBase, key: str, cache_key: CacheKey | None, **options: Any) -> ValueProxy:
        tap, module = self._module.declare_get(cache, key, cache_key, forwards=self._forwards, **options)
        self._take_in(tap, module)
        return tap.proxy

    def skip(self, key: str, value: Any) -> None:
        """Skip the module at ``key``; its hooks, and other verbs at this path, see ``value`` as its output.

        Args:
            key: the path.
            value: the complete return value of the module (for an attention module often a tuple), which may contain
                proxies; or a function of the module's arguments, such as ``lambda x: x``.

        Raises:
            PathError: no such path.
            EditError: a canonical name that is no module's output; when the model runs, a proxy has no value yet.
        """
        self._needs_block("skip", "fwd")
        path, module = self._module.find_site(key)
        if isinstance(module, AttachedElsewhere):
            raise EditError(
                f"{key!r} is the {module.extra_repr()}, and what can be skipped is a module; set its value, or "
                "give the path of a module"
            )
        tap = SkipTap(path, value)
        self._taps.append(tap)
        self._placing.append(partial(skip_module, module, tap))

    def stop(self, key: str) -> None:
        """End the run after the module at ``key``: both the forward and the rest of ``run_callback``."""
        self._needs_block("stop", "fwd")
        path, module = self._module.find_site(key)
        self._placing.append(partial(attach, module, _StopRun().on_output, "fwd", order=Order.STOP))
        self._stopped_at = path

    def _take_in(self, tap: GetTap | SetTap, module: nn.Module) -> None:
        if isinstance(tap, GetTap) and any(tap.clashes_with(each) for each in self._taps if isinstance(each, GetTap)):
            raise ContextError(
                f"this run writes another value to {tap.proxy.key!r} already: one with other prepend=, direction=, "
                "callback=, positions=, units=, steps= or reducer=; give one of the two a key with cache_key="
            )
        self._taps.append(tap)
        self._placing.append(partial(self._module.attach_tap, tap, module))

    def _needs_block(self, verb: str, direction: HookDirection) -> None:
        if not self._in_context:
            raise ContextError(
                f"{verb} is for inside the block: with hooked.run(data) as run: run.{verb}(...); "
                f"outside it {_outside(verb)}"
            )
        if direction_row(direction).gradient:
            self._grad_enabled = True

    def _report_unfired(self, taps: list[_Tap]) -> None:
        silent = [tap for tap in taps if not tap.fired]
        if not silent:
            return
        model = self._module.model
        paths = [f"{tap.path} ({'skip' if isinstance(tap, SkipTap) else tap.row.noun})" for tap in silent]
        reasons = dict.fromkeys(reason for tap in silent if (reason := why_not_called(model, tap.path)))
        skipped = [tap.path for tap in taps if isinstance(tap, SkipTap) and tap.fired]
        asked = [tap for tap in silent if not isinstance(tap, SkipTap)]
        if skipped and any(tap.path.startswith(f"{path}.") for tap in silent for path in skipped):
            reasons[f"{listed(skipped)} did not run: skip"] = None
        if any(tap.where.steps is not None for tap in asked):
            reasons["steps= left out every forward in which it ran"] = None
        if any(tap.row.gradient for tap in asked):
            reasons["call backward() in run_callback=, e.g. lambda hooked, data: hooked(data).sum().backward()"] = None
        if self._stopped_at is not None:
            reasons[f"the forward was stopped at {self._stopped_at!r}"] = None
        warn_user("; ".join([f"the run came to no value at {listed(paths, 20)}", *reasons]), UnfiredSiteWarning)


def _outside(verb: str) -> str:
    if verb == "skip":
        return "use tdcache.hooks.replaced_forward.skip_module(module, value), which returns a handle"
    return f"use hooked.{verb}(...), which returns a handle"


class _RunStopped(BaseException):
    """Ends a run. The hooked module would swallow a StopForward, and ``run_callback`` would go on without output."""


class _StopRun(Transient):
    order = Order.STOP

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        raise _RunStopped


def _call(module: Runnable, data: Any) -> Any:
    if isinstance(data, Mapping) and not isinstance(data, TensorDictBase):
        return module(**data)
    return module(data)
