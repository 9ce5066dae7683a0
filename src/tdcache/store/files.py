"""The few operations on files that a store is written with, in one object that a test can make fail at any of them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from tdcache.errors import StoreError

__all__ = ["Files", "as_store_error", "save_by_torch"]

_PART = 1 << 22  # bytes
_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Name what could not be written where the disk does not take it.

    Raises:
        StoreError: for an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}; what was there before is whole", path=path
        ) from error


class _WatchedFile:
    """A file that remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_by_torch(value: Any, file: IO[bytes]) -> None:
    """``torch.save``, which hides an error of the disk behind a ``RuntimeError`` about its archive.

    Raises:
        OSError: the disk does not take it.
    """
    watched = _WatchedFile(file)
    try:
        torch.save(value, watched)  # type: ignore[arg-type]
    except RuntimeError:
        if watched.error is None:
            raise
        raise watched.error from None


def _start_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the system write a range out now, so that a later ``fsync`` waits for little: Linux does it on this advice.

    What is on its way to the disk stays in the page cache all the same.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # advice that some file systems and sandboxes do not take
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


class Files:
    """What a store asks of the file system to write; every method either does all of it or raises ``OSError``.

    Stateless. A subclass that fails, or kills the process, before or in the middle of an operation shows that a store
    survives it.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it, and make their names durable."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        path.mkdir(exist_ok=True)
        self.sync_folder(path.parent)

    def create(self, path: Path) -> int:
        """A descriptor of a new file; an existing one is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)

    def reserve(self, descriptor: int, size: int) -> None:
        """Have the disk promise the space, so that a full one is an error here and not when the data is in flight."""
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``; the disk is set to work on each part while the next one is copied."""
        while data.nbytes:
            written = os.pwrite(descriptor, data[:_PART], offset)
            _start_writing(descriptor, offset, written)
            data, offset = data[written:], offset + written

    def sync(self, descriptor: int) -> None:
        """Make the content of a file durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close the descriptor of a file or folder."""
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give the file at ``source`` the name ``target``; a name that is taken is ``FileExistsError``."""
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            # Without hard links (FAT, some network file systems) a name that another writer takes just now is written
            # over: by the same bytes, because a unit's bytes do not depend on its writer.
            if target.exists():
                raise FileExistsError(errno.EEXIST, "the name is taken", str(target)) from None
            source.rename(target)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, over what has the name now."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is gone is as well."""
        path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
