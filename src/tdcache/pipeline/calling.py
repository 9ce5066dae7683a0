"""Calls a user's hook with the keyword arguments that it takes, and no others.

Otherwise every hook of a pipeline would need ``**kwargs``, only because another hook needs ``layer``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tdcache.errors import HookSignatureError, listed

__all__ = ["HookCall", "only_positional", "spell"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class HookCall:
    """A callable, and the keyword arguments that it takes.

    Hooks ``lambda x: ...`` and ``def hook(x, layer): ...`` can be in one pipeline: each gets the arguments that it
    names, and one with ``**kwargs`` gets all of them.

    Raises:
        HookSignatureError: the hook is not callable.
    """

    hook: Callable[..., Any]
    names: frozenset[str] | None = field(init=False, repr=False)
    """The keyword arguments that it takes; None for all."""
    needed: tuple[str, ...] = field(init=False, repr=False)
    """The keyword arguments without a default."""

    def __post_init__(self) -> None:
        if not callable(self.hook):
            raise HookSignatureError(f"a hook is a callable x -> x, got {self.hook!r} ({type(self.hook).__name__})")
        names, needed = _accepted(self.hook)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "needed", needed)

    def __call__(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call it with ``x``, the positional arguments, and the keyword arguments that it takes.

        Raises:
            HookSignatureError: one that it needs is not in scope.
        """
        return self.hook(x, *args, **self.taken(kwargs, is_enough=bool(args)))

    def taken(self, kwargs: Mapping[str, Any], *, is_enough: bool = False) -> Mapping[str, Any]:
        """The keyword arguments in scope that it takes.

        Args:
            kwargs: all keyword arguments in scope.
            is_enough: do not report missing ones, since positional arguments may supply them.

        Raises:
            HookSignatureError: one that it needs is not in scope.
        """
        if not is_enough and any(name not in kwargs for name in self.needed):
            raise self._missing(kwargs)
        if self.names is None:
            return kwargs
        return {name: kwargs[name] for name in self.names if name in kwargs}

    def _missing(self, kwargs: Mapping[str, Any]) -> HookSignatureError:
        missing = [name for name in self.needed if name not in kwargs]
        return HookSignatureError(
            f"hook {spell(self.hook)} needs {', '.join(f'{name}=' for name in missing)}; in scope are "
            f"{listed(list(kwargs)) or 'no keyword arguments'}: bind it, pass it with the call, or attach the "
            "pipeline by a pattern with such a named group, e.g. (?P<layer>\\d+)"
        )


def _accepted(hook: Callable[..., Any]) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    if getattr(type(hook), "takes_any_keyword", False):
        return None, ()
    if isinstance(hook, nn.Module):  # its __call__ takes anything and passes it on
        hook = hook.forward
    try:
        parameters = list(inspect.signature(hook).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature; they take no context either
        return frozenset(), ()
    if parameters and parameters[0].kind in _POSITIONAL:
        del parameters[0]  # the value
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        names = None
    else:
        names = frozenset(
            each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        )
    wanted = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return names, tuple(each.name for each in wanted if each.default is each.empty)


def only_positional(hook: Callable[..., Any]) -> str | None:
    """The name of the only parameter that can be given by position; None if there are several or it is unknown."""
    try:
        parameters = inspect.signature(hook.forward if isinstance(hook, nn.Module) else hook).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [each.name for each in parameters if each.kind in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL)]
    return names[0] if len(names) == 1 else None


def spell(hook: Any) -> str:
    """A hook as text for a repr or a message: functions by name, without an address that differs between runs."""
    name = getattr(hook, "__name__" if inspect.isbuiltin(hook) else "__qualname__", None)
    return name.rpartition("<locals>.")[2] if isinstance(name, str) else repr(hook)
