"""Memory-mapped TensorDicts as folders: written as plain files, so that a full disk is an error; read as data alone.

The format is that of ``TensorDict.memmap``: one file of raw numbers per tensor, and ``meta.json``.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import DamagedError, StoreError
from tdcache.store.dtypes import DTYPES
from tdcache.store.files import Files
from tdcache.store.regular import open_regular, parse_json, read_bounded
from tdcache.store.shard_file import bytes_of

__all__ = ["check_memmap", "is_text", "load_memmap_folder", "safe_name", "write_memmap_column", "write_memmap_meta"]

_WORDS = ("shape", "device", "_type", "_class", "_format_version", "_names")
_FIELDS = {"dtype", "shape", "device", "is_nested"}
_META, _MOST = "meta.json", 1 << 26


def safe_name(key: str) -> str:
    """``key``, where it can be a file's name.

    Raises:
        StoreError: it would lead to another folder, or is no text that a file system takes.
    """
    leads_away = key in ("", ".", "..") or key.startswith("~") or key[1:2] == ":"  # the last one on Windows
    if leads_away or any(each in key for each in "/\\\0") or not is_text(key):
        raise StoreError(f"site {key!r} cannot be the name of a file, so it cannot be exported; read it by ds[{key!r}]")
    return key


def is_text(name: str) -> bool:
    """Whether a name can be encoded; half of a surrogate pair cannot."""
    return not any("\ud800" <= each <= "\udfff" for each in name)


def check_memmap(key: str, dtype: torch.dtype) -> None:
    """Refuse what ``TensorDict.load_memmap`` would not read again.

    Raises:
        StoreError: a float8 tensor, or a name that would lead to another folder or is one of TensorDict's own.
    """
    if safe_name(key) in _WORDS:
        raise StoreError(f"{key!r} is a name that a memory-mapped TensorDict keeps for itself; use another format")
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise StoreError(
            f"{key!r} of {dtype} cannot be read again from a memory-mapped TensorDict; use another format, or cast it"
        )


def write_memmap_column(folder: Path, name: str, size: int, parts: Iterable[Tensor]) -> None:
    """Write the numbers of one tensor, in parts; the disk promises the space first.

    Args:
        folder: that exists.
        name: of the tensor, safe.
        size: bytes of all parts; of none no file is made.
        parts: that follow one another, on the CPU.
    """
    if size == 0:
        return
    files, offset = Files(), 0
    descriptor = files.create(folder / f"{name}.memmap")
    try:
        files.reserve(descriptor, size)
        for part in parts:
            data = bytes_of(part)
            files.write(descriptor, data, offset)
            offset += data.nbytes
    finally:
        files.close(descriptor)


def write_memmap_meta(
    folder: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, batch_size: tuple[int, ...]
) -> None:
    """Write what the files of a folder are."""
    entries: dict[str, Any] = {
        name: {"device": "cpu", "shape": list(shape), "dtype": str(dtype), "is_nested": False}
        for name, (dtype, shape) in described.items()
    }
    meta = {**entries, "shape": list(batch_size), "device": "None", "_type": str(TensorDict)}
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def load_memmap_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: private maps, so that writing to one changes neither the file nor another process.

    Tensors alone are loaded, from regular files in the folder itself. When a file is cut while its tensor is in use,
    the system kills the process at the first page that is gone (SIGBUS).

    Raises:
        DamagedError: a file is missing or too short, or the folder is not one of tensors.
    """
    try:
        described = _described(parse_json(read_bounded(folder / _META, most=_MOST), folder / _META))
    except (DamagedError, FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{folder} is no folder of activations: {type(error).__name__}: {error}", path=folder
        ) from error
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries), key=lambda name: "%" not in name)
    file_of = {unquote(name): folder / name for name in names}  # TensorDict spells some characters as %20
    return {
        name: _map(file_of.get(f"{safe_name(name)}.memmap", folder / f"{name}.memmap"), dtype, shape)
        for name, (dtype, shape) in described.items()
    }


def _described(meta: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if meta["_type"] != str(TensorDict):
        raise ValueError(f"it is a {meta['_type']}")
    found = {}
    for name, each in meta.items():
        if name in _WORDS and not isinstance(each, dict):
            continue
        if not isinstance(each, dict) or set(each) - _FIELDS or each.get("is_nested"):
            raise ValueError(f"{name!r} is no plain tensor")
        dtype, shape = DTYPES[each["dtype"].removeprefix("torch.")], each["shape"]
        if not isinstance(shape, list) or len(shape) > 64 or not all(type(s) is int and s >= 0 for s in shape):
            raise ValueError(f"{name!r} has shape {str(shape)[:100]}")
        if math.prod(max(size, 1) for size in shape) > 1 << 60:
            raise ValueError(f"{name!r} has shape {str(shape)[:100]}")
        found[name] = dtype, tuple(shape)
    return found


def _map(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        with open_regular(file) as (descriptor, status):
            found = status.st_size
            if found >= size:
                private = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
                return torch.frombuffer(private, dtype=torch.uint8).view(dtype).view(shape)
    except FileNotFoundError:
        found = 0
    raise DamagedError(
        f"{file} has {found} bytes where meta.json says {size}; it is truncated, save it again", path=file
    )
