"""The in-place check: was a tensor that is kept overwritten after it was seen?

Aliases are what makes capture free, and what an in-place operation (``ReLU(inplace=True)``, ``x += y``) silently turns
into another value. Every tensor has a version counter that such an operation raises, on it or on any alias of it.
Whoever keeps an alias notes the version here and asks before the value is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tdcache.errors import InplaceModificationError, listed

__all__ = ["InplaceWatch", "NO_COUNTER", "overwritten", "version_of"]

NO_COUNTER = -1


def version_of(value: Any) -> int:
    """The version counter of a tensor; -1 for what has none: an inference tensor, or something else than a tensor."""
    if not isinstance(value, Tensor) or value.is_inference():
        return NO_COUNTER
    return value._version


def overwritten(paths: Sequence[str], remedy: str = "keep a copy with hold='snapshot'") -> InplaceModificationError:
    """The error for the values kept at ``paths``."""
    return InplaceModificationError(
        f"the value kept at {listed(paths, 20)} was overwritten by a later in-place operation "
        f"(such as ReLU(inplace=True)), so it is no longer the activation; {remedy}",
        paths=paths,
    )


class _Seen(NamedTuple):
    path: str
    tensor: Tensor
    version: int


class InplaceWatch:
    """Tensors that are kept, each with the path and the version it was seen with."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[_Seen] = []

    def add(self, path: str, tensor: Any) -> None:
        """Watch a tensor from now on; what has no version counter is left out."""
        version = version_of(tensor)
        if version != NO_COUNTER:
            self.seen.append(_Seen(path, tensor, version))

    def changed(self) -> list[str]:
        """The paths whose tensor was overwritten since, each once."""
        return list(dict.fromkeys(path for path, tensor, version in self.seen if tensor._version != version))

    def check(self, remedy: str = "keep a copy with hold='snapshot'") -> None:
        """Refuse to go on with overwritten values.

        Raises:
            InplaceModificationError: it names every path concerned, and ``remedy``.
        """
        changed = self.changed()
        if changed:
            raise overwritten(changed, remedy)

    def clear(self) -> None:
        """Let go of every tensor."""
        self.seen.clear()
