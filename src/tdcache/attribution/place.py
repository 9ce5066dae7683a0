"""Where a pass reads: a model input, or one side of a module."""

from __future__ import annotations

from typing import NamedTuple

from tdcache.hooks import InputPort, OutputPort, Port
from tdcache.types import CacheKey, Pick

__all__ = ["Place"]


class Place(NamedTuple):
    """Something with a value and a gradient: a model input, what a module returns, or what it reads."""

    kind: str
    """``"key"``, ``"out"`` or ``"in"``."""
    name: CacheKey
    """The input's key, or the module's path."""
    pick: Pick = None
    call: int | None = None
    """Which call of a module that runs several times."""
    part: tuple[str, ...] = ()
    """What is added to the score's key, where several tensors of one value are explained."""

    @property
    def port(self) -> Port:
        """Where the value is read and written."""
        return (OutputPort if self.kind == "out" else InputPort)(str(self.name), self.pick)
