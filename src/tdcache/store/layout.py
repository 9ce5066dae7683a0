"""Where things are in a store's folder, and what of it counts.

``spec.json``: what, of which model, how; immutable.
``shards/000/u00000042.safetensors``: one unit each, every site's rows for a fixed range of samples.
``index.json``: the shards' own words, gathered; can be made again from them at any time.
``.tmp/``: files without a name yet; never read.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tdcache.errors import DamagedError
from tdcache.store.files import Files, unnamed
from tdcache.store.shard import Shard, read_shard
from tdcache.store.spec import canonical

__all__ = ["Layout"]

_NAME = re.compile(r"u(\d{8})\.safetensors")
_PER_FOLDER = 1000
_STALE_SECONDS = 24 * 3600


class Layout:
    """The names in one store's folder.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shards = self.folder / "shards"
        self.scratch = self.folder / ".tmp"
        self.index = self.folder / "index.json"

    def __repr__(self) -> str:
        return f"Layout({str(self.folder)!r})"

    def prepare(self, files: Files) -> None:
        """Make the folders."""
        for folder in (self.folder, self.shards, self.scratch):
            files.make_folder(folder)

    def shard(self, unit: int) -> Path:
        """The name of a unit's shard."""
        return self.shards / f"{unit // _PER_FOLDER:03d}" / f"u{unit:08d}.safetensors"

    def units(self) -> list[int]:
        """The numbers of the shards that are there, in order; foreign names are ignored."""
        if not self.shards.is_dir():
            return []
        found = [
            int(match[1])
            for folder in os.scandir(self.shards)
            if folder.is_dir(follow_symlinks=False)
            for entry in os.scandir(folder.path)
            if (match := _NAME.fullmatch(entry.name)) and self.shard(int(match[1])).parent.name == folder.name
        ]
        return sorted(found)

    def open_shards(self, spec: str, known: Mapping[int, Shard] | None = None) -> dict[int, Shard]:
        """Every shard that is there, opened, by unit; those in ``known`` are not opened again.

        Raises:
            DamagedError: a shard is not what was written, or not the unit that its name says.
        """
        found: dict[int, Shard] = {}
        for unit in self.units():
            shard = known[unit] if known and unit in known else read_shard(self.shard(unit), spec=spec)
            if shard.info.unit != unit:
                raise DamagedError(f"{shard.path} holds unit {shard.info.unit}, not {unit}", path=shard.path)
            found[unit] = shard
        return found

    def write_index(self, spec: str, shards: Iterable[Shard], files: Files) -> None:
        """Write what the shards say of themselves into one file, over the one that is there."""
        rows = [[each.info.unit, each.rows, each.info.first, each.info.last, each.size] for each in shards]
        document = {"shards": rows, "spec": spec}
        data = canonical({**document, "crc32": f"{zlib.crc32(canonical(document)):08x}"}) + b"\n"
        temporary = unnamed(self.scratch, "index")
        descriptor = files.create(temporary)
        try:
            files.write(descriptor, memoryview(data), 0)
            files.sync(descriptor)
        finally:
            files.close(descriptor)
        files.replace(temporary, self.index)
        files.sync_folder(self.folder)

    def read_index(self) -> dict[int, list[int]] | None:
        """Unit, rows, first and last sample and bytes of each shard, by unit; None where there is no index.

        Raises:
            DamagedError: it is not what was written.
        """
        try:
            raw = self.index.read_bytes()
        except FileNotFoundError:
            return None
        try:
            document = json.loads(raw)
            found = {row[0]: row for row in document["shards"]}
            crc = document.pop("crc32")
            sound = crc == f"{zlib.crc32(canonical(document)):08x}"
            sound = sound and raw == canonical({**document, "crc32": crc}) + b"\n"
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            sound = False
        if not sound:
            raise DamagedError(
                f"{self.index} is not what was written; delete it: ActivationDataset.open does without, and the next "
                "harvest makes it anew from the shards",
                path=self.index,
            )
        return found

    def sweep(self, files: Files) -> None:
        """Remove files without a name whose writer is dead."""
        for entry in os.scandir(self.scratch):
            if _is_stale(entry):
                files.remove(Path(entry.path))  # which another writer that starts may do as well


def _is_stale(entry: os.DirEntry[str]) -> bool:
    parts = entry.name.split(".")
    if len(parts) > 3 and ".".join(parts[1:-2]) == socket.gethostname() and parts[-2].isdigit():
        try:
            os.kill(int(parts[-2]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return False
