"""Tensors in a safetensors file: a few lines of our own, so that the package of that name is no dependency."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tdcache.store.atomic import replacing_file
from tdcache.store.files import Files
from tdcache.store.header import Header, header_length, pack_header, parse_header
from tdcache.store.regular import open_regular, read_into
from tdcache.store.shard_file import bytes_of

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    files: Files | None = None,
) -> None:
    """Write named tensors to one file, over what is there; on any failure what was there stays.

    Args:
        tensors: by name; any name, dots and slashes included. Copied to the CPU one by one where they are elsewhere.
        path: of the file; its folder must be there.
        metadata: strings by name.
        files: how files are written.

    Raises:
        StoreError: a dtype that the format does not know.
        OSError: the disk does not take it.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "a.safetensors")
        >>> write_tensors({"layers.0": torch.ones(2, 3)}, target)
        >>> read_tensors(target)["layers.0"].shape
        torch.Size([2, 3])
    """
    files, target = files or Files(), Path(path)
    # Wide dtypes first, so that every tensor begins at a multiple of its item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = pack_header({name: (each.dtype, tuple(each.shape)) for name, each in ordered.items()}, metadata or {})
    with replacing_file(target, files) as descriptor:
        files.reserve(descriptor, len(header) + sum(each.nbytes for each in ordered.values()))
        offset = len(header)
        for each in ordered.values():
            data = bytes_of(each.cpu())
            files.write(descriptor, data, offset)
            offset += data.nbytes
        files.write(descriptor, memoryview(header), 0)


def read_tensors(path: str | os.PathLike[str], *, follow_links: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in memory of their own.

    Args:
        path: of the file.
        follow_links: whether it may be a symbolic link, as in the cache of the Hugging Face hub.

    Raises:
        DamagedError: the file is truncated, forged, or no safetensors file; or a folder, a pipe, a link.
        FileNotFoundError: there is no file.
    """
    source = Path(path)
    with open_regular(source, follow_links=follow_links) as (descriptor, status):
        raw = bytearray(min(8, status.st_size))
        read_into(descriptor, memoryview(raw), 0, source)
        raw = bytearray(8 + header_length(bytes(raw), status.st_size, source))
        read_into(descriptor, memoryview(raw), 0, source)
        header = parse_header(bytes(raw), status.st_size, source)
        return {name: _read(descriptor, header, name, source) for name in header.tensors}


def _read(descriptor: int, header: Header, name: str, source: Path) -> Tensor:
    entry = header.tensors[name]
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    read_into(descriptor, bytes_of(tensor), header.data_start + entry.begin, source)
    return tensor
