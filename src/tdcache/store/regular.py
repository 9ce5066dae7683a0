"""Opening what others may have put there: regular files only, no links, no waiting, and never more than a bound."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdcache.errors import DamagedError
from tdcache.store.remote import Place, RemotePath

__all__ = ["is_folder", "open_regular", "parse_json", "read_bounded", "read_into"]

# A pipe in the place of a file does not make us wait.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_DEPTH = 64  # of nested lists and mappings in JSON


@contextlib.contextmanager
def open_regular(path: Path, *, follow_links: bool = False) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor for reading, and the status of the file that it belongs to; closed on exit.

    Args:
        path: of the file.
        follow_links: for a file that the user named. What lies in a folder of ours is no link.

    Raises:
        FileNotFoundError: nothing has that name.
        DamagedError: a link, a folder, a pipe or a device has it, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, _FLAGS if follow_links else _FLAGS | _NO_LINKS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be opened as a regular file: {error.strerror}", path=path) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is no regular file, so it is not read", path=path)
        yield descriptor, status
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether a folder of its own has the name, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_bounded(path: Place, *, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: nothing has that name.
        DamagedError: it is no regular file, larger, or cannot be read.
    """
    if isinstance(path, RemotePath):
        return path.read_bounded(most)
    with open_regular(path) as (descriptor, status):
        if status.st_size > most:
            raise DamagedError(f"{path} has {status.st_size} bytes, more than the {most} it may have", path=path)
        data = bytearray(status.st_size)
        read_into(descriptor, memoryview(data), 0, path)
        return bytes(data)


def parse_json(raw: bytes, path: Place) -> Any:
    """A JSON document in which no more than 64 lists and mappings are nested.

    Raises:
        DamagedError: it is no such document.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no valid JSON: {type(error).__name__}: {error}", path=path) from None
    _check_depth(document, path)
    return document


def _check_depth(document: Any, path: Place) -> None:
    level = [document]
    for _ in range(_DEPTH):
        inside = [each for each in level if isinstance(each, dict | list)]
        level = [value for each in inside for value in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise DamagedError(f"{path} nests more than {_DEPTH} lists and mappings, so it is not read", path=path)


def read_into(descriptor: int, data: memoryview, offset: int, name: Path) -> None:
    """Fill ``data`` from ``offset`` of a file.

    Raises:
        DamagedError: the file ends early, or the disk cannot read it.
    """
    while data.nbytes:
        try:
            count = os.preadv(descriptor, [data], offset)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read at byte {offset}: {error.strerror}", path=name) from error
        if count == 0:
            raise DamagedError(f"{name}: the file ends at byte {offset}; it is truncated", path=name)
        data, offset = data[count:], offset + count
