"""The base class of reducers.

``merge`` is part of the interface so that every reducer can be computed in parts: over data shards, over processes, and
over two entries of a context.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import CaptureError

__all__ = ["Reducer"]


class Reducer(ABC):
    """Reduces the values at one site, over calls, forwards and (with ``merge``) processes.

    Subclasses are dataclasses whose fields are the configuration; the state is kept elsewhere. A factory holds one as a
    prototype; every site of every context gets its own :meth:`fresh` copy.
    """

    ordered: ClassVar[bool] = True
    """Whether the order of updates affects the result; if so, gradients, which arrive in reverse, are sorted first."""

    aliases: ClassVar[bool] = False
    """Whether :meth:`update` keeps the tensor itself, so that a later in-place operation would change the result."""

    @staticmethod
    def of(given: Reducer | type[Reducer]) -> Reducer:
        """``given`` itself if it is a reducer; a new one with defaults if it is a class.

        Raises:
            ValueError: ``given`` is neither.
        """
        if isinstance(given, type) and issubclass(given, Reducer):
            return given()
        if not isinstance(given, Reducer):
            raise ValueError(f"reducer= is a Reducer such as Stack(), got {given!r}")
        return given

    @abstractmethod
    def update(self, value: Tensor) -> None:
        """Add a value, which is already on the device where it is kept.

        Reducers that keep whole values keep their graph too (``hold="live"``); the others detach them.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the values of ``other``, as if they came after this reducer's; ``other`` must not be used afterwards."""

    @abstractmethod
    def compute(self) -> Tensor | TensorDict:
        """The result so far; updates may follow.

        Raises:
            CaptureError: there was no value.
        """

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether there was no value yet."""

    @property
    def full(self) -> bool:
        """Whether further values would not change the result, so that they need not be copied for :meth:`update`."""
        return False

    def own(self, copied: Callable[[Tensor], Tensor]) -> None:
        """Replace every kept tensor by ``copied`` of it."""
        for name, kept in list(vars(self).items()):
            if isinstance(kept, Tensor):
                setattr(self, name, copied(kept))
            elif isinstance(kept, list):
                setattr(self, name, [copied(each) if isinstance(each, Tensor) else each for each in kept])

    def fresh(self) -> Self:
        """An empty reducer with the same configuration."""
        return dataclasses.replace(self)  # type: ignore[type-var]  # every subclass is a dataclass

    def check_mergeable(self, other: Reducer) -> None:
        """Refuse a reducer of another class or configuration."""
        if self != other:
            raise ValueError(
                f"{self!r} can be merged with a reducer of the same kind and configuration, not with {other!r}"
            )

    def nothing_seen(self) -> CaptureError:
        """The error that :meth:`compute` raises before any update."""
        return CaptureError(f"{self!r} saw no value; run a forward that reaches its site first")
