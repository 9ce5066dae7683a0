"""The crc32 of each mebibyte of a column: taken while it is written, compared when it is read."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable

__all__ = ["BLOCK", "BlockSums", "block_count", "crc32", "expected_sum"]

BLOCK = 1 << 20
"""Bytes per checksum."""
DIGITS = 8


def _fastest() -> Callable[..., int]:
    try:  # the carry-less multiplication of the processor: more than ten times zlib's speed (extra "checksums")
        found: Callable[..., int] = importlib.import_module("isal.isal_zlib").crc32
    except ImportError:
        found = zlib.crc32
    return found


crc32: Callable[..., int] = _fastest()
"""``zlib.crc32``, by the fastest implementation that is installed; all give the same numbers."""


class BlockSums:
    """The running checksum of each block of a stream of bytes."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._sum = 0
        self._room = BLOCK

    def __repr__(self) -> str:
        return f"BlockSums({len(self._done)} blocks)"

    def update(self, data: memoryview) -> None:
        """Take in the bytes that follow."""
        while data.nbytes:
            part, data = data[: self._room], data[self._room :]
            self._sum = crc32(part, self._sum)
            self._room -= part.nbytes
            if self._room == 0:
                self._close()

    def _close(self) -> None:
        self._done.append(self._sum)
        self._sum, self._room = 0, BLOCK

    def digits(self) -> str:
        """Eight hexadecimal digits per block; the last block may be shorter than :data:`BLOCK`."""
        if self._room < BLOCK:
            self._close()
        return "".join(f"{each:08x}" for each in self._done)


def block_count(size: int) -> int:
    """How many blocks so many bytes are."""
    return -(-size // BLOCK)


def expected_sum(digits: str, block: int) -> str:
    """The digits of one block among those of a column."""
    return digits[DIGITS * block : DIGITS * (block + 1)]
