"""Shows values to hooks in another layout than the model's, by a pair of functions.

A hook written for ``(batch, position, head, d_head)`` can then be used on a model that keeps heads and features in one
axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tdcache.errors import HookSignatureError

__all__ = ["Conversion", "Reshape", "as_conversion"]


@runtime_checkable
class Conversion(Protocol):
    """Changes the layout of values at a hook point: any object with these two methods."""

    def convert(self, value: Any, /) -> Any:
        """From the model's layout to the hook's."""

    def revert(self, value: Any, /) -> Any:
        """From the hook's layout to the model's."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """A conversion made of two functions.

    Example:
        >>> import torch
        >>> heads = Reshape(lambda x: x.unflatten(-1, (2, 3)), lambda x: x.flatten(-2))
        >>> heads.convert(torch.ones(5, 6)).shape, heads.revert(torch.ones(5, 2, 3)).shape
        (torch.Size([5, 2, 3]), torch.Size([5, 6]))
    """

    convert: Callable[[Any], Any]
    revert: Callable[[Any], Any]


def as_conversion(given: Any) -> Conversion | None:
    """None, an object with ``convert`` and ``revert``, or a pair of functions.

    Raises:
        HookSignatureError: ``given`` is something else.
    """
    if isinstance(given, tuple) and len(given) == 2 and all(map(callable, given)):
        return Reshape(*given)
    if given is None or (callable(getattr(given, "convert", None)) and callable(getattr(given, "revert", None))):
        return given  # type: ignore[no-any-return]  # checked just now
    raise HookSignatureError(
        f"a conversion has the methods convert(value) and revert(value), or is a pair of functions, got {given!r}"
    )
