"""Reducers that keep values whole: the last, the first, or every one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.reducers.base import Reducer

__all__ = ["First", "Last", "Stack"]


@dataclass(eq=True)
class _OneValue(Reducer):
    """Keeps the value of one call as it is."""

    aliases: ClassVar[bool] = True
    _value: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def compute(self) -> Tensor:
        """Return the value that is kept."""
        if self._value is None:
            raise self.nothing_seen()
        return self._value

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return self._value is None


@dataclass(eq=True)
class Last(_OneValue):
    """Keeps the value of the latest call; in a caching context, of the latest forward only (the default)."""

    def update(self, value: Tensor) -> None:
        """Take the value in place of the one before."""
        self._value = value

    def merge(self, other: Last) -> None:
        """Take the other's value, if it has one."""
        self.check_mergeable(other)
        if other._value is not None:
            self._value = other._value


@dataclass(eq=True)
class First(_OneValue):
    """Keeps the value of the first call and ignores the others."""

    def update(self, value: Tensor) -> None:
        """Take the value if it is the first."""
        if self._value is None:
            self._value = value

    def merge(self, other: First) -> None:
        """Keep the own value, or take the other's where there is none."""
        self.check_mergeable(other)
        if self._value is None:
            self._value = other._value

    @property
    def full(self) -> bool:
        """Whether there is a value, which no further one replaces."""
        return self._value is not None


@dataclass(eq=True)
class Stack(Reducer):
    """Keeps the value of every call, in order: one entry per call, or per step of ``generate()``.

    ``compute()`` gives a dense tensor ``(calls, *shape)`` (the new axis at ``dim``) where the calls agree in shape, and
    a TensorDict with one entry per call under its number (``"0"``, ``"1"``, ...) where they do not, as between prefill
    and decoding. ``index=(slice(None), -1)`` in the caching context makes them agree.
    """

    aliases: ClassVar[bool] = True
    dim: int = 0
    _values: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def update(self, value: Tensor) -> None:
        """Append the value of one call."""
        self._values.append(value)

    def merge(self, other: Stack) -> None:
        """Append the other's values."""
        self.check_mergeable(other)
        self._values.extend(other._values)

    def compute(self) -> Tensor | TensorDict:
        """The stacked values, or a TensorDict of them where shapes differ."""
        if not self._values:
            raise self.nothing_seen()
        if len({value.shape for value in self._values}) == 1:
            return torch.stack(self._values, dim=self.dim)
        return TensorDict({str(call): value for call, value in enumerate(self._values)}, batch_size=[])

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return not self._values
