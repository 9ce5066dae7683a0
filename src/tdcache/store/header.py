"""The header of a safetensors file: names, dtypes, shapes and offsets, in JSON, before the data.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of the header, the header,
the data without holes. Reading trusts nothing: whatever does not add up is refused before a byte of data is touched.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdcache.errors import DamagedError, StoreError
from tdcache.store.dtypes import SAFETENSORS_DTYPES

__all__ = ["Header", "TensorEntry", "header_length", "pack_header", "parse_header"]

_LENGTH = 8
_MOST = 100_000_000  # bytes of header, as in the reference implementation
_MOST_ITEMS, _MOST_DIMENSIONS = 1 << 60, 64  # what torch can describe
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its dtype and shape, and where its bytes are, counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself, checked against its size."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def pack_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str], *, align: int = 8
) -> bytes:
    """The bytes of a header, its length first, padded with spaces so that the data begins at a multiple of ``align``.

    Args:
        tensors: dtype and shape by name, in the order in which their bytes follow.
        metadata: strings by name.
        align: of the beginning of the data.

    Raises:
        StoreError: a dtype that the format does not know, or a machine whose numbers are stored the other way round.
    """
    if sys.byteorder != "little":
        raise StoreError("safetensors files hold little-endian numbers, and this machine's are big-endian")
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _NAMES or name == "__metadata__":
            raise StoreError(
                f"tensor {name!r} of {dtype} cannot be stored; the dtypes are {', '.join(SAFETENSORS_DTYPES)}"
            )
        size = math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(_LENGTH + len(text)) % align)
    return len(text).to_bytes(_LENGTH, "little") + text


def parse_header(raw: bytes, size: int, name: object) -> Header:
    """Read a header and hold it against the size of its file.

    Args:
        raw: the beginning of the file, at least the whole header.
        size: bytes of the file.
        name: the file, for messages.

    Raises:
        DamagedError: anything that does not add up.
    """
    length = header_length(raw, size, name)
    try:
        described = json.loads(raw[_LENGTH : _LENGTH + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name}: the header is no JSON ({error}); the file is damaged", path=name) from None
    if not isinstance(described, dict):
        raise DamagedError(f"{name}: the header is {type(described).__name__}, not a mapping", path=name)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError(f"{name}: __metadata__ is not a mapping of strings", path=name)
    data_start = _LENGTH + length
    tensors = {key: _entry(key, fields, name) for key, fields in described.items()}
    _check_extent(tensors, size - data_start, name)
    return Header(tensors, metadata, data_start)


def header_length(raw: bytes, size: int, name: object) -> int:
    """The length of the header, from the first eight bytes of a file of ``size`` bytes."""
    if len(raw) < _LENGTH:
        raise DamagedError(f"{name}: {size} bytes are too few for a safetensors file; it is truncated", path=name)
    length = int.from_bytes(raw[:_LENGTH], "little")
    if length > min(_MOST, size - _LENGTH):
        raise DamagedError(
            f"{name}: a header of {length} bytes is not in a file of {size}; it is truncated, or no safetensors file",
            path=name,
        )
    return length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(key: str, fields: Any, name: object) -> TensorEntry:
    shape = fields.get("shape") if isinstance(fields, dict) else None
    offsets = fields.get("data_offsets") if isinstance(fields, dict) else None
    sound = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(_is_size, [*shape, *offsets]))
        and math.prod(max(each, 1) for each in shape) <= _MOST_ITEMS  # also of a tensor without items
        and len(shape) <= _MOST_DIMENSIONS
        and isinstance(fields.get("dtype"), str)
        and fields["dtype"] in SAFETENSORS_DTYPES
    )
    if not sound or shape is None or offsets is None:
        raise DamagedError(f"{name}: tensor {key!r} is described by {str(fields)[:200]}, which is no tensor", path=name)
    dtype = SAFETENSORS_DTYPES[fields["dtype"]]
    begin, end = offsets
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        raise DamagedError(
            f"{name}: tensor {key!r} of shape {shape}, {dtype}, takes {wanted} bytes, and [{begin}, {end}] is not that",
            path=name,
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_extent(tensors: Mapping[str, TensorEntry], size: int, name: object) -> None:
    """The tensors follow one another without hole or overlap and fill the file to its end."""
    reached = 0
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise DamagedError(f"{name}: tensor {key!r} begins at {entry.begin}, where {reached} was due", path=name)
        reached = entry.end
    if reached != size:
        raise DamagedError(f"{name}: {size} bytes of data, the header says {reached}; it was cut or grown", path=name)
