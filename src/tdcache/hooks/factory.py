"""Ready-made hooks for contexts of your own: they cache, set or read a value, or stop the forward.

They are objects rather than closures so that a registered hook can be printed, and so that a loop over paths cannot
bind the wrong variable.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdcache.errors import CaptureError, EditError, HookSignatureError, StopForward
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.port import Port, port_at
from tdcache.hooks.registrations import Order
from tdcache.hooks.values import check_fits, first_tensor, is_entries, leaves, replace_tensor
from tdcache.types import CacheKey, HookDirection

__all__ = [
    "CacheProxy",
    "CachingHook",
    "HookFactory",
    "ReadingHook",
    "SettingHook",
    "StoppingHook",
    "check_callback",
    "read_at",
    "write_at",
]


def read_at(port: Port, row: Direction, args: tuple[Any, ...]) -> Any:
    """The tensor that the port picks from the arguments of a hook.

    Raises:
        CaptureError: there is no such tensor.
    """
    return port.read(*_at_port(row, args))


def write_at(port: Port, row: Direction, args: tuple[Any, ...], new: Any) -> Any:
    """The return value with which a hook replaces its value by ``new``.

    Args:
        port: the port of the value.
        row: the direction.
        args: the arguments of the hook.
        new: a tensor to replace the picked one, or a whole value of the same type as the old one.

    Raises:
        EditError: ``new`` does not fit, or there is nothing to replace.
    """
    if isinstance(new, Tensor) and not row.gradient:
        asked: Any = port
        written = asked.write(*_at_port(row, args), new)
        return written[0] if row.name == "fwd_pre" else written
    old = args[row.returns_index]
    where = f" of {port.path!r}" if port.path else ""
    if isinstance(new, Tensor):
        if port.pick is None and first_tensor(old) is None:
            raise EditError(f"there is no gradient{where} to replace: none came")
        return replace_tensor(old, new, pick=port.pick, path=port.path)
    if type(new) is not type(old):
        raise EditError(
            f"the {row.returns}{where} of type {type(old).__name__} cannot be replaced by {type(new).__name__}; "
            "return the same type, a tensor for the first tensor in it, or None for no change"
        )
    before, after = [tensor for _, tensor in leaves(old)], [tensor for _, tensor in leaves(new)]
    if len(before) == len(after):
        for there, given in zip(before, after, strict=True):
            check_fits(given, there, port.path)
    return (new, args[-1]) if row.name == "fwd_pre_kwargs" else new


def _at_port(row: Direction, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for a port's methods, from those of a forward hook."""
    if row.name == "fwd_kwargs":
        return args[0], args[1], args[3]
    return (*args, {}) if row.name == "fwd_pre" else args


class CacheProxy:
    """A reference to a future cache entry: made before the forward, resolved when it is needed.

    It holds the cache weakly, so that a forgotten proxy does not keep activations alive.
    """

    def __init__(self, key: CacheKey, cache: Any) -> None:
        self._key = key
        self._cache = weakref.ref(cache)

    def resolve(self) -> Any:
        """The value, or None if it has not been written yet.

        Raises:
            ValueError: the cache is gone.
        """
        return _live(self._cache(), self._key).get(self._key, None)

    def __repr__(self) -> str:
        return f"CacheProxy({self._key!r})"


def _live(cache: Any, key: CacheKey) -> Any:
    found = cache.resolve() if hasattr(cache, "resolve") else cache
    if found is None:
        raise ValueError(f"the cache that was to hold {key!r} no longer exists; keep a reference to it")
    return found


def check_callback(callback: Callable[..., Any] | None, expected: tuple[str, ...]) -> None:
    """Refuse a callback that cannot be called with the ``expected`` names as keyword arguments.

    Raises:
        HookSignatureError: it names the missing parameters.
    """
    if callback is None:
        return
    call = ", ".join(f"{name}=" for name in expected)
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):
        raise HookSignatureError(
            f"callback= is a function with a signature, called as callback({call}), got {callback!r}; wrap it in one"
        ) from None
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise HookSignatureError(
            "a callback is called with keyword arguments only; it cannot have positional-only parameters"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        _refuse_extra(parameters, expected)
        return
    missing = [name for name in expected if name not in {parameter.name for parameter in parameters}]
    if missing:
        raise HookSignatureError(
            f"the callback lacks the parameters {', '.join(map(repr, missing))}; it is called with "
            f"{call} (take **kwargs for those you do not need)"
        )
    _refuse_extra(parameters, expected)


def _refuse_extra(parameters: Iterable[inspect.Parameter], expected: tuple[str, ...]) -> None:
    extra = [
        parameter.name
        for parameter in parameters
        if parameter.name not in expected
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if extra:
        raise HookSignatureError(
            f"the callback wants {', '.join(map(repr, extra))}, which it is not given; it is called with "
            f"{', '.join(f'{name}=' for name in expected)}"
        )


@dataclass(frozen=True, slots=True)
class CachingHook:
    """Writes the picked tensor, or the result of ``callback``, to ``cache[key]``."""

    key: CacheKey
    cache: Any
    row: Direction
    callback: Callable[..., Any] | None = None
    order: int = Order.CAPTURE

    def __call__(self, *args: Any) -> None:
        """Write the value of this call into the cache."""
        if self.callback is not None:
            named = dict(zip(self.row.params, args, strict=True))
            value = kept = self.callback(**named, key=self.key, direction=self.row.name)
        else:
            value = args[self.row.value_index]
            is_module_value = not self.row.gradient and first_tensor(value) is not None
            kept = read_at(port_at("", self.row.name), self.row, args) if is_module_value else first_tensor(value)
        if not is_entries(kept) and not isinstance(kept, Tensor):
            raise CaptureError(
                f"a cache holds tensors and TensorDicts; the value for {self.key!r} is {type(value).__name__}: "
                "return a tensor from callback="
            )
        _live(self.cache, self.key)[self.key] = kept


@dataclass(frozen=True, slots=True)
class SettingHook:
    """Replaces the value by ``value`` (a proxy is resolved when the hook runs), or by the result of ``callback``.

    None leaves the value unchanged. If the value is structured, a tensor replaces the first tensor in it; in a
    TensorDict module, the first entry that the module itself wrote.
    """

    value: Any
    row: Direction
    callback: Callable[..., Any] | None = None
    order: int = Order.EDIT

    def __call__(self, *args: Any) -> Any:
        """Return the value that replaces the old one."""
        new = self.value.resolve() if hasattr(self.value, "resolve") else self.value
        if self.callback is not None:
            named = dict(zip(self.row.params, args, strict=True))
            new = self.callback(**named, value=new, direction=self.row.name)
        return None if new is None else write_at(port_at("", self.row.name), self.row, args, new)


@dataclass(frozen=True, slots=True)
class ReadingHook:
    """Passes the value to ``callback`` and changes nothing."""

    callback: Callable[..., Any]
    row: Direction
    order: int = Order.CAPTURE

    def __call__(self, *args: Any) -> None:
        """Call the callback with the value."""
        self.callback(**dict(zip(self.row.params, args, strict=True)), direction=self.row.name)


@dataclass(frozen=True, slots=True)
class StoppingHook:
    """Ends the forward: raises :class:`~tdcache.errors.StopForward`, which runs and contexts swallow."""

    key: str
    order: int = Order.STOP

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        """End the forward here."""
        raise StopForward(self.key)


class HookFactory:
    """Makes hooks for contexts of your own; their parameters are in the table of directions."""

    @staticmethod
    def make_caching_hook(
        key: CacheKey, cache: Any, *, callback: Callable[..., Any] | None = None, direction: HookDirection = "fwd"
    ) -> CachingHook:
        """A hook that writes the value to ``cache[key]``.

        Args:
            key: the key of the entry.
            cache: a TensorDict, or an object whose ``resolve()`` returns one when the hook runs.
            callback: called with the direction's parameters, ``key=`` and ``direction=``; returns what is written.
                Without it the value itself is written (the first tensor of a structured one), with its graph.
            direction: which value.

        Raises:
            DirectionError: unknown direction.
            HookSignatureError: the callback lacks a parameter.
        """
        row = direction_row(direction)
        check_callback(callback, (*row.params, "key", "direction"))
        return CachingHook(key, cache, row, callback)

    @staticmethod
    def make_setting_hook(
        value: Any, *, callback: Callable[..., Any] | None = None, direction: HookDirection = "fwd"
    ) -> SettingHook:
        """A hook that replaces the value.

        Args:
            value: the new value, or an object whose ``resolve()`` returns it when the hook runs.
            callback: called with the direction's parameters, ``value=`` and ``direction=``; returns the new value, or
                None for no change.
            direction: which value.

        Raises:
            DirectionError: unknown direction.
            HookSignatureError: the callback lacks a parameter.
        """
        row = direction_row(direction)
        check_callback(callback, (*row.params, "value", "direction"))
        return SettingHook(value, row, callback, Order.EDIT_GRADIENT if row.gradient else Order.EDIT)

    @staticmethod
    def make_reading_hook(*, callback: Callable[..., Any], direction: HookDirection = "fwd") -> ReadingHook:
        """A hook that calls ``callback`` with the direction's parameters and ``direction=``, and changes nothing.

        Raises:
            DirectionError: unknown direction.
            HookSignatureError: the callback lacks a parameter.
        """
        row = direction_row(direction)
        check_callback(callback, (*row.params, "direction"))
        return ReadingHook(callback, row)

    @staticmethod
    def make_stopping_hook(key: str) -> StoppingHook:
        """A hook (direction ``"fwd"``) that ends the forward; ``key`` is the path for messages."""
        return StoppingHook(key)
