"""One run of a model, declared in a ``with`` block and carried out when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdcache.errors import ContextError, StopForward, UnfiredSiteWarning, listed, warn_user
from tdcache.hooks.attach import MultiHookHandle, Order, attach
from tdcache.hooks.compiled import running_eagerly
from tdcache.hooks.directions import direction_row
from tdcache.introspect import why_not_called
from tdcache.modules.directed_verbs import DirectedForms
from tdcache.modules.taps import Forwards, GetTap, SetTap, ValueProxy
from tdcache.types import CacheKey, HookDirection, Removable

__all__ = ["HookedModuleRun", "Runnable"]


class Runnable(Protocol):
    """What a run asks of the hooked module that it runs."""

    @property
    def model(self) -> nn.Module:
        """The user's own model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hooked model; arguments are those of its ``forward``."""

    def find_site(self, key: str, relative: bool = True) -> tuple[str, nn.Module]:
        """Canonical path and module of ``key``."""

    def add_set(self, module_key: str, value: Any, **options: Any) -> tuple[SetTap, Removable]:
        """Have a value replaced."""

    def add_get(
        self, cache: Any, module_key: str, cache_key: CacheKey | None, **options: Any
    ) -> tuple[GetTap, Removable]:
        """Have a value kept."""


class HookedModuleRun(DirectedForms):
    """A run that :meth:`HookedModule.run` gives; its arguments are explained there.

    In the block, ``get``, ``set``, ``save`` and ``stop`` (and the forms for inputs and gradients) say what is to happen
    at which path. The model runs when the block ends, and not at all if the block raised; then every hook is removed.
    What ``get`` and ``save`` give are proxies: a ``set`` in the same run (at a path that runs later) or in another run
    resolves them when it needs the value.

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
        self._handle = MultiHookHandle()
        self._taps: list[GetTap | SetTap] = []
        self._in_context = False
        self._stopped_at: str | None = None
        self.result: Any = None
        """What the call of the model returned; None before it, and where it was stopped."""

    def __repr__(self) -> str:
        model = type(self._module.model).__name__
        return f"<{type(self).__name__} {self._prefix!r} of {model}, {len(self._taps)} verbs>"

    @property
    def cache(self) -> TensorDictBase:
        """Where ``get`` writes, and ``save`` where no other cache was given."""
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
        taps, self._taps = self._taps, []
        self._in_context = False
        try:
            if error is None:
                self._run(taps)
        finally:
            self._handle.remove()
        if error is None:
            for tap in taps:
                if isinstance(tap, GetTap):
                    tap.proxy.check()
            self._report_unfired(taps)

    def _run(self, taps: list[GetTap | SetTap]) -> None:
        model = self._module.model
        with ExitStack() as undo:
            if taps or self._stopped_at is not None:
                undo.enter_context(running_eagerly(model))
            if any(isinstance(tap, GetTap) for tap in taps):  # only these tell a second call from a second forward
                counter = attach(model, self._forwards.on_forward, "fwd_pre", order=Order.FIRST)
                undo.callback(counter.remove)
            undo.enter_context(torch.set_grad_enabled(self._grad_enabled))
            try:
                self.result = self._run_callback(self._module, self._data)
            except (StopForward, _RunStopped):
                self.result = self._data if isinstance(self._data, TensorDictBase) else None

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
        """Replace a value in this run; see :meth:`HookedModule.set`."""
        self._needs_block("set", direction)
        tap, handle = self._module.add_set(
            key, value, callback=callback, direction=direction, prepend=prepend, relative=relative, **options
        )
        self._take_in(tap, handle)

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
        """Have a value written to the run's own cache; see :meth:`HookedModule.get`."""
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
        """Have a value written to the cache that the run was given, as ``"run.<path>_output"``; see :meth:`get`."""
        self._needs_block("save", direction)
        cache = self.cache if self._outer_cache is None else self._outer_cache
        cache_key = cache_key or f"{self._prefix}{key}_{direction_row(direction).noun}"
        return self._read(
            cache, key, cache_key,
            callback=callback, direction=direction, prepend=prepend, relative=relative, **options,
        )  # fmt: skip

    def _read(self, cache: TensorDictBase, key: str, cache_key: CacheKey | None, **options: Any) -> ValueProxy:
        tap, handle = self._module.add_get(cache, key, cache_key, forwards=self._forwards, **options)
        self._take_in(tap, handle)
        return tap.proxy

    def stop(self, key: str) -> None:
        """End the run behind the module at ``key``: the forward, and what ``run_callback`` would do after it."""
        self._needs_block("stop", "fwd")
        path, module = self._module.find_site(key)
        self._handle.add(attach(module, _StopRun().on_output, "fwd", order=Order.STOP))
        self._stopped_at = path

    def _take_in(self, tap: GetTap | SetTap, handle: Any) -> None:
        if isinstance(tap, GetTap) and any(tap.clashes_with(each) for each in self._taps if isinstance(each, GetTap)):
            handle.remove()
            raise ContextError(
                f"this run writes another value to {tap.proxy.key!r} already: one with other prepend=, direction= or "
                "callback=; give one of the two a key of its own with cache_key="
            )
        self._handle.add(handle)
        self._taps.append(tap)

    def _needs_block(self, verb: str, direction: HookDirection) -> None:
        if not self._in_context:
            raise ContextError(
                f"{verb} is for inside the block: with hooked.run(data) as run: run.{verb}(...); "
                f"outside it use hooked.{verb}(...), which returns a handle"
            )
        if direction_row(direction).gradient:
            self._grad_enabled = True

    def _report_unfired(self, taps: list[GetTap | SetTap]) -> None:
        silent = [tap for tap in taps if not tap.fired]
        if not silent:
            return
        model = self._module.model
        paths = [f"{tap.path} ({tap.row.noun})" for tap in silent]
        reasons = dict.fromkeys(reason for tap in silent if (reason := why_not_called(model, tap.path)))
        if any(tap.row.gradient for tap in silent):
            reasons["call backward() in run_callback=, e.g. lambda hooked, data: hooked(data).sum().backward()"] = None
        if self._stopped_at is not None:
            reasons[f"the forward was stopped at {self._stopped_at!r}"] = None
        warn_user("; ".join([f"the run came to no value at {listed(paths, 20)}", *reasons]), UnfiredSiteWarning)


class _RunStopped(BaseException):
    """Ends a run; no StopForward: the hooked module swallows that, and ``run_callback`` would go on without output."""


class _StopRun:
    order = Order.STOP

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        raise _RunStopped


def _call(module: Runnable, data: Any) -> Any:
    if isinstance(data, Mapping) and not isinstance(data, TensorDictBase):
        return module(**data)
    return module(data)
