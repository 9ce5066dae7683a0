"""Stores elsewhere: names in object stores and on servers, read by ranges through fsspec (extra ``remote``)."""

from __future__ import annotations

import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tdcache.errors import DamagedError, StoreError

__all__ = ["Pages", "Place", "RemotePath", "as_place"]

_PAGE = 1 << 18  # bytes; smaller reads fetch a page and keep it
_EXACT = 1 << 14  # bytes; larger reads fetch what they ask for
_PAGES = 256  # kept by a dataset: 64 MiB

_URL = re.compile(r"[a-zA-Z][\w+.-]+:(//|:)")  # "s3://..." and fsspec's chains "simplecache::s3://...", no drive

_Got = TypeVar("_Got")


@dataclass(frozen=True, slots=True)
class RemotePath:
    """What has a URL that fsspec knows: ``s3://bucket/a.acts``, ``https://...``, ``memory://...``.

    It has the few operations of a path that a reader uses. The file system is looked up in each process anew, because
    connections do not survive a fork.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """For the file system: credentials, an endpoint."""

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self.options)

    def joinpath(self, *names: str) -> RemotePath:
        """The name of something further down."""
        return self / "/".join(names)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end``, or fewer where the file ends.

        Raises:
            FileNotFoundError: nothing has that name.
            StoreError: it cannot be read.
        """
        return bytes(self._asked(lambda system, path: system.cat_file(path, start=begin, end=end)))

    def size(self) -> int:
        """Bytes of the file.

        Raises:
            FileNotFoundError: nothing has that name.
            StoreError: the server does not say.
        """
        found = self._asked(lambda system, path: system.size(path))
        if type(found) is not int:
            raise StoreError(f"{self}: the server does not tell its size, so it cannot be read by ranges", path=self)
        return found

    def read_bounded(self, most: int) -> bytes:
        """All of a file of at most ``most`` bytes.

        Raises:
            FileNotFoundError: nothing has that name.
            DamagedError: it is larger.
            StoreError: it cannot be read.
        """
        found = self.read(0, most + 1)
        if len(found) > most:
            raise DamagedError(f"{self} has more than the {most} bytes it may have", path=self)
        return found

    def listed(self) -> dict[str, int]:
        """The size of each file below, by its name from here on; none where there is nothing.

        Raises:
            StoreError: it cannot be listed.
        """

        def find(system: Any, path: str) -> dict[str, int]:
            system.invalidate_cache()
            with suppress(FileNotFoundError):
                entries = system.find(path, detail=True)
                return {name[len(path) :].lstrip("/"): int(entry["size"] or 0) for name, entry in entries.items()}
            return {}

        return self._asked(find)

    def put(self, source: Path) -> None:
        """Upload a file, over what has the name now.

        Raises:
            StoreError: it cannot be written.
        """

        def upload(system: Any, path: str) -> None:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(source), path)

        self._asked(upload)

    def remove(self) -> None:
        """Remove a file; one that is gone is as well.

        Raises:
            StoreError: it cannot be removed.
        """
        with suppress(FileNotFoundError):
            self._asked(lambda system, path: system.rm_file(path))

    def _asked(self, call: Callable[[Any, str], _Got]) -> _Got:
        """What the file system answers; every file system has errors of its own."""
        try:
            fsspec: Any = importlib.import_module("fsspec.core")
        except ImportError:
            raise StoreError(f"{self} needs fsspec: pip install 'tdcache[remote]'", path=self) from None
        try:
            return call(*fsspec.url_to_fs(self.url, **self.options))
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is nothing of that name", self.url) from None
        except Exception as error:
            raise StoreError(f"{self}: {type(error).__name__}: {error}", path=self) from error


Place = Path | RemotePath
"""Where a file or folder is."""


def as_place(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Place:
    """A URL stays one; everything else is an absolute path, whatever the working directory is later."""
    if isinstance(place, RemotePath):
        return place
    if _URL.match(name := os.fspath(place)):
        return RemotePath(name.rstrip("/"), dict(options or {}))
    return Path(name).absolute()


class Pages:
    """What was read of remote files in small parts, a bounded number of pages of 256 KiB; threads share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, path: RemotePath, offset: int, size: int, whole: int) -> Iterator[memoryview]:
        """The bytes from ``offset`` on, in parts; fewer than ``size`` where the file ends.

        Args:
            path: of the file.
            offset: of the first byte.
            size: how many bytes.
            whole: the size of the file.

        Raises:
            FileNotFoundError: nothing has that name.
            StoreError: it cannot be read, or the server gives other ranges than it is asked for.
        """
        if size > _EXACT:
            yield memoryview(_range_of(path, offset, offset + size, whole))
            return
        for number in range(offset // _PAGE, -(-(offset + size) // _PAGE)):
            page, begin = self._kept.get((path.url, number)), number * _PAGE
            if page is None:
                page = self._kept[path.url, number] = _range_of(path, begin, begin + _PAGE, whole)
                while len(self._kept) > _PAGES:
                    with suppress(KeyError):  # another thread was faster
                        self._kept.popitem(last=False)
            yield memoryview(page)[max(offset - begin, 0) : offset + size - begin]


def _range_of(path: RemotePath, begin: int, end: int, whole: int) -> bytes:
    """Bytes of a file; a server that knows no ranges answers with all of it, which is not what was asked for."""
    end = min(end, whole)
    found = path.read(begin, end)
    if len(found) > end - begin:
        raise StoreError(
            f"{path}: asked for {end - begin} bytes from byte {begin} on, the server gave {len(found)}: it knows no "
            "ranges; copy the store to a disk, or serve it from elsewhere",
            path=path,
        )
    return found
