"""The in-place check: was a kept tensor overwritten after it was captured?

Aliases make capturing free, but an in-place operation (``ReLU(inplace=True)``, ``x += y``) silently turns them into
other values. Every tensor has a version counter, which such an operation on it or on an alias of it increments. Code
that keeps an alias records the version here and compares it before the value is used. Writes that do not increment the
counter (through ``.data``, numpy, dlpack, ``swap_tensors``, some fused optimisers) are only found by comparing
checksums.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdcache.errors import InplaceModificationError, listed

__all__ = [
    "InplaceWatch",
    "NO_COUNTER",
    "checksum",
    "eager_version_of",
    "overwritten",
    "shares_memory",
    "storage_address",
    "untouched",
    "version_of",
]

NO_COUNTER = -1


def version_of(value: Any) -> int:
    """The version counter of a tensor; -1 for what has none: an inference tensor, or something else than a tensor."""
    if not isinstance(value, Tensor) or value.is_inference():
        return NO_COUNTER
    return value._version


def eager_version_of(value: Any) -> int:
    """:func:`version_of`, but none while a graph is traced, where nothing may branch on it."""
    return NO_COUNTER if torch.compiler.is_compiling() else version_of(value)


def untouched(before: Tensor, after: Any, version: int) -> bool:
    """Whether ``after`` is ``before``, or a view of all of it, and neither was written to since ``version``.

    In doubt (tensors without a version counter) the answer is no.
    """
    if version == NO_COUNTER or version_of(before) != version:
        return False
    if after is before:
        return True
    # A gradient hook on a tensor that a module passes on is set on a view of it.
    if not isinstance(after, Tensor) or after._base is None:
        return False
    base = before if before._base is None else before._base
    places = [(each.shape, each.stride(), each.storage_offset(), each.dtype) for each in (before, after)]
    return after._base is base and places[0] == places[1] and after.requires_grad == before.requires_grad


def storage_address(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none of its own (sparse, nested, wrapper and empty tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether writing to one tensor in place could change the other; True where torch does not say."""
    if one is other:
        return True
    mine, its = storage_address(one), storage_address(other)
    return not (mine and its) or (mine == its and one.device == other.device)


def checksum(tensor: Tensor) -> int:
    """A number that changes with the values of a tensor; 0 of a sparse, nested or meta tensor."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return 0
    flat = tensor.detach().reshape(-1).resolve_conj().resolve_neg().cpu()
    values: Any = flat.view(torch.uint8).numpy()
    return zlib.crc32(values)


def overwritten(paths: Sequence[str], remedy: str = "keep a copy with hold='snapshot'") -> InplaceModificationError:
    """The error for the values kept at ``paths``."""
    return InplaceModificationError(
        f"the value kept at {listed(paths, 20)} was overwritten by a later in-place operation "
        f"(such as ReLU(inplace=True)), so it is no longer the activation; {remedy}",
        paths=paths,
    )


class _WatchedTensor(NamedTuple):
    path: str
    tensor: Tensor
    version: int
    checksum: int


class InplaceWatch:
    """Tensors that are kept, each with the path and the version it was seen with.

    Args:
        by_value: compare checksums as well, for writes that no counter sees.
    """

    __slots__ = ("_by_value", "seen")

    def __init__(self, *, by_value: bool = False) -> None:
        self._by_value = by_value
        self.seen: list[_WatchedTensor] = []

    def add(self, path: str, tensor: Any) -> None:
        """Watch a tensor from now on; what has no version counter is left out."""
        version = version_of(tensor)
        if version != NO_COUNTER:
            self.seen.append(_WatchedTensor(path, tensor, version, checksum(tensor) if self._by_value else 0))

    def changed(self) -> list[str]:
        """The paths whose tensor was overwritten since, each once."""
        return list(dict.fromkeys(seen.path for seen in self.seen if self._is_changed(seen)))

    def _is_changed(self, seen: _WatchedTensor) -> bool:
        if seen.tensor._version != seen.version:
            return True
        return self._by_value and checksum(seen.tensor) != seen.checksum

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
