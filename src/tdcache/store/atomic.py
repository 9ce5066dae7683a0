"""New files and folders that are under their names whole or not at all; what was there before survives any failure.

Everything is written under a temporary name, made durable, and only then renamed. While it works, the writer holds a
``flock`` on the temporary file or folder. The kernel frees it when the writer dies, however it dies and on whichever
machine or in a container it ran: what nobody holds is left over from a dead writer, and the next one sweeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tdcache.errors import StoreError
from tdcache.store.files import Files

if sys.platform != "win32":  # where drafts are swept by their age
    import fcntl

__all__ = ["draft_file", "draft_folder", "new_folder", "refuse_existing", "replacing_file", "sweep", "write_bytes"]

_DRAFT = re.compile(r".*\.[0-9a-f]{16}\.tmp")
_STALE_SECONDS = 24 * 3600  # where the file system has no locks
_EXCHANGE, _AT_CWD = 2, -100  # of linux/fs.h and linux/fcntl.h


@contextlib.contextmanager
def draft_file(folder: Path, stem: str, files: Files) -> Iterator[tuple[int, Path]]:
    """A new file under a temporary name, open for writing and locked; removed on exit unless it was renamed.

    Args:
        folder: where it is made; on the file system of the name that it will get.
        stem: what the temporary name begins with.
        files: how files are written.
    """
    while True:
        path = folder / _temporary_name(stem)
        descriptor = files.create(path)
        if _is_ours(descriptor, path):
            break
        files.close(descriptor)
    try:
        yield descriptor, path
    finally:
        try:
            files.remove(path)
        finally:
            files.close(descriptor)


@contextlib.contextmanager
def draft_folder(folder: Path, stem: str) -> Iterator[Path]:
    """A new folder under a temporary name, locked; removed on exit with what is in it then."""
    while True:
        path = folder / _temporary_name(stem)
        path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            path.rmdir()
            raise
        if _is_ours(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        _remove_tree(path)
        os.close(descriptor)


@contextlib.contextmanager
def replacing_file(target: Path, files: Files | None = None) -> Iterator[int]:
    """A descriptor to write to; when the block ends without an error, the file has the name ``target``, durably.

    Raises:
        OSError: a file operation failed; what had the name still has it.
    """
    files = files or Files()
    sweep(target.parent, files, stem=f".{target.name}")
    with draft_file(target.parent, f".{target.name}", files) as (descriptor, temporary):
        yield descriptor
        files.sync(descriptor)
        files.replace(temporary, target)
        files.sync_folder(target.parent)


def write_bytes(target: Path, data: bytes, files: Files | None = None) -> None:
    """Write a file, over the one that is there."""
    files = files or Files()
    with replacing_file(target, files) as descriptor:
        files.write(descriptor, memoryview(data), 0)


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; when the block ends without an error, it has the name ``target``, durably.

    Args:
        target: the name.
        replace: whether what has the name now, with all that is in it, gives way. On Linux the two are exchanged in one
            operation. Elsewhere a process that is killed between two renames leaves the old folder beside the name.

    Raises:
        StoreError: ``target`` is there, and ``replace`` is False.
        OSError: a file operation failed; what had the name still has it.
    """
    files = Files()
    if not replace:
        refuse_existing(target)
    sweep(target.parent, files, stem=f".{target.name}")
    with draft_folder(target.parent, f".{target.name}") as path:
        yield path
        _sync_tree(path, files)
        if replace and os.path.lexists(target):
            _exchange(path, target)
        else:
            refuse_existing(target)
            path.rename(target)
        files.sync_folder(target.parent)


def refuse_existing(target: Path) -> None:
    """Refuse a name that is taken.

    Raises:
        StoreError: it is.
    """
    if os.path.lexists(target):
        raise StoreError(f"{target} is there already; export to another path, or remove it first", path=target)


def sweep(folder: Path, files: Files, *, stem: str | None = None) -> None:
    """Remove temporary files and folders whose writers are dead.

    Args:
        folder: where they are; it may be read-only, then they stay.
        files: how files are removed.
        stem: only those whose temporary names begin with it; None for everything in the folder, which then has to hold
            nothing else.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in list(entries):
            is_draft = stem is None or (
                _DRAFT.fullmatch(entry.name) and entry.name[: -len(".0123456789abcdef.tmp")] == stem
            )
            if is_draft:
                _sweep_one(entry, files)


def _sweep_one(entry: os.DirEntry[str], files: Files) -> None:
    path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
    # For writing, because network file systems have no exclusive locks on files that are open for reading.
    mode = os.O_RDONLY if is_folder else os.O_RDWR
    try:
        descriptor = os.open(path, mode | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # a link, gone, or on a disk that is read-only
        return
    try:
        if _is_abandoned(descriptor):
            _remove_tree(path) if is_folder else files.remove(path)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(descriptor)


def _is_abandoned(descriptor: int) -> bool:
    """Whether nobody holds the lock; held from then on, so that no other process takes it for its own."""
    locked = _lock(descriptor)
    if locked is None:
        return time.time() - os.fstat(descriptor).st_mtime > _STALE_SECONDS
    return locked


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_ours(descriptor: int, path: Path) -> bool:
    """Lock a new draft; False where a sweep took it for abandoned before it was locked."""
    if _lock(descriptor) is False:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _temporary_name(stem: str) -> str:
    return f"{stem}.{secrets.token_hex(8)}.tmp"


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path, files: Files) -> None:
    for above, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(above, name), os.O_RDONLY)
            try:
                files.sync(descriptor)
            finally:
                os.close(descriptor)
        files.sync_folder(Path(above))


def _exchange(new: Path, old: Path) -> None:
    """Swap two names, in two steps where the file system has no exchange."""
    if _exchange_at_once(new, old):
        return
    aside = old.with_name(_temporary_name(f".{old.name}"))
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _exchange_at_once(new: Path, old: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_CWD, os.fsencode(new), _AT_CWD, os.fsencode(old), _EXCHANGE) == 0)
