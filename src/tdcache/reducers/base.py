"""What every reducer is."""

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
    """What is kept of the values that pass one site, over calls, forwards and (after ``merge``) processes.

    Subclasses are dataclasses: their fields are the configuration, their state is not part of it. A factory holds one
    as a recipe; every site of every context gets its own :meth:`fresh` one.
    """

    ordered: ClassVar[bool] = True
    """Whether the order of updates changes the result; gradients arrive in reverse, and are put in order for these."""

    aliases: ClassVar[bool] = False
    """Whether :meth:`update` keeps the tensor itself, so that a later in-place operation would change what is kept."""

    @staticmethod
    def of(given: Reducer | type[Reducer]) -> Reducer:
        """A reducer as it is, and of a class one with its defaults.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(given, type) and issubclass(given, Reducer):
            return given()
        if not isinstance(given, Reducer):
            raise ValueError(f"reducer= is a Reducer such as Stack(), got {given!r}")
        return given

    @abstractmethod
    def update(self, value: Tensor) -> None:
        """Take one more value in, on the device it is to stay on.

        Those that keep values whole keep its graph too, where it has one (``hold="live"``); the others detach it.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what ``other`` saw, as if its values had come after these; ``other`` must not be used any more."""

    @abstractmethod
    def compute(self) -> Tensor | TensorDict:
        """What is kept, so far; updates may follow.

        Raises:
            CaptureError: nothing was seen.
        """

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing was seen yet."""

    @property
    def full(self) -> bool:
        """Whether further values would change nothing, so that they need not be kept for :meth:`update`."""
        return False

    def own(self, copied: Callable[[Tensor], Tensor]) -> None:
        """Exchange every tensor that is kept for what ``copied`` makes of it."""
        for name, kept in list(vars(self).items()):
            if isinstance(kept, Tensor):
                setattr(self, name, copied(kept))
            elif isinstance(kept, list):
                setattr(self, name, [copied(each) if isinstance(each, Tensor) else each for each in kept])

    def fresh(self) -> Self:
        """An empty reducer with the same configuration."""
        return dataclasses.replace(self)  # type: ignore[type-var]  # every subclass is a dataclass

    def check_mergeable(self, other: Reducer) -> None:
        """Refuse another kind of reducer, or one with another configuration."""
        if self != other:
            raise ValueError(
                f"{self!r} can be merged with a reducer of the same kind and configuration, not with {other!r}"
            )

    def nothing_seen(self) -> CaptureError:
        """The error of :meth:`compute` before any update."""
        return CaptureError(f"{self!r} saw no value; run a forward that reaches its site first")
