"""Reducers that keep whole values: the last, the first, or all of them.

These keep aliases of the model's tensors; all other reducers copy or compute.
"""

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
    """Keeps the value of one call, unmodified."""

    aliases: ClassVar[bool] = True
    _value: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def compute(self) -> Tensor:
        """The value that is kept, unmodified."""
        if self._value is None:
            raise self.nothing_seen()
        return self._value

    @property
    def empty(self) -> bool:
        """Whether there was no value yet."""
        return self._value is None


@dataclass(eq=True)
class Last(_OneValue):
    """Keeps the value of the latest call; in a caching context, of the latest forward only (the default)."""

    def update(self, value: Tensor) -> None:
        """Replace the kept value."""
        self._value = value

    def merge(self, other: Last) -> None:
        """Take the value of ``other``, if it has one."""
        self.check_mergeable(other)
        if other._value is not None:
            self._value = other._value


@dataclass(eq=True)
class First(_OneValue):
    """Keeps the value of the first call and ignores the others."""

    def update(self, value: Tensor) -> None:
        """Keep the value if it is the first."""
        if self._value is None:
            self._value = value

    def merge(self, other: First) -> None:
        """Take the value of ``other`` if this one has none."""
        self.check_mergeable(other)
        if self._value is None:
            self._value = other._value

    @property
    def full(self) -> bool:
        """Whether there is a value; it is never replaced."""
        return self._value is not None


@dataclass(eq=True)
class Stack(Reducer):
    """Keeps the value of every call, in order: one entry per call, or per step of ``generate()``.

    ``compute()`` returns a dense tensor ``(calls, *shape)`` (the new axis at ``dim``) if all values have one shape, and
    otherwise, as for prefill and decoding, a TensorDict with one entry per call under its number (``"0"``, ``"1"``,
    ...). ``index=(slice(None), -1)`` in the caching context makes the shapes equal.
    """

    aliases: ClassVar[bool] = True
    dim: int = 0
    _values: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def update(self, value: Tensor) -> None:
        """Append the value of one call."""
        self._values.append(value)

    def merge(self, other: Stack) -> None:
        """Append the values of ``other``."""
        self.check_mergeable(other)
        self._values.extend(other._values)

    def compute(self) -> Tensor | TensorDict:
        """The stacked values, or a TensorDict of them if shapes differ."""
        if not self._values:
            raise self.nothing_seen()
        if len({value.shape for value in self._values}) == 1:
            return torch.stack(self._values, dim=self.dim)
        return TensorDict({str(call): value for call, value in enumerate(self._values)}, batch_size=[])

    @property
    def empty(self) -> bool:
        """Whether there was no value yet."""
        return not self._values
