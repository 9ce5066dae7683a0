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
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tdcache.errors import DamagedError, StoreError
from tdcache.store.atomic import draft_file, sweep
from tdcache.store.checksums import crc32
from tdcache.store.files import Files
from tdcache.store.regular import is_folder, read_bounded
from tdcache.store.remote import Place, RemotePath
from tdcache.store.shard import Shard, ShardCache
from tdcache.store.shard_header import Contract, IndexRow
from tdcache.store.spec import canonical
from tdcache.store.statistics import SiteStatistics
from tdcache.store.summary import packed_summary, parsed_summary, summarised

__all__ = ["StoreFiles", "StorePaths"]

_NAME = re.compile(r"u(\d{8,})\.safetensors")
_PER_FOLDER = 1000
_MOST = 1 << 31  # bytes of index


def _names(unit: int) -> tuple[str, str]:
    """The folder and the file of a unit's shard."""
    return f"{unit // _PER_FOLDER:03d}", f"u{unit:08d}.safetensors"


def _unit_of(folder: str = "", name: str = "", *below: str) -> int | None:
    """The unit whose shard has these names; None for any others."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and not below and _names(int(match[1])) == (folder, name) else None


def _units_on_disk(shards: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    if not shards.is_dir():
        return found
    with os.scandir(shards) as folders:
        for folder in [each for each in folders if each.is_dir(follow_symlinks=False)]:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    if (unit := _unit_of(folder.name, entry.name)) is not None:
                        status = entry.stat(follow_symlinks=False)
                        found[unit] = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return found


def _check_folders(store: Path) -> None:
    """Refuse links in the places of the store's own folders.

    Raises:
        StoreError: what would be read, written or removed there is not in the store.
    """
    for folder in (store / "shards", store / ".tmp"):
        if os.path.lexists(folder) and not is_folder(folder):
            raise StoreError(f"{folder} is no folder of the store's own; put a folder in its place", path=folder)


class StoreFiles:
    """What a reader finds in one store's folder, on a disk or elsewhere.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Place) -> None:
        self.folder: Place = folder
        self.index: Place = folder / "index.json"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def shard(self, unit: int) -> Place:
        """The name of a unit's shard."""
        return self.folder.joinpath("shards", *_names(unit))

    def units(self) -> dict[int, int]:
        """The size of each shard that is there, by unit, in order; -1 where it is no regular file.

        Foreign names and links are ignored. Elsewhere the index says what there is, because a server may list nothing.
        """
        if isinstance(self.folder, RemotePath):
            found = self._units_elsewhere(self.folder)
        else:
            _check_folders(self.folder)
            found = _units_on_disk(self.folder / "shards")
        return dict(sorted(found.items()))

    def _units_elsewhere(self, folder: RemotePath) -> dict[int, int]:
        try:
            indexed = self.read_index() or {}
        except DamagedError:
            indexed = {}
        if indexed:
            return {unit: row.size for unit, row in indexed.items()}
        sizes = ((PurePosixPath(name).parts, size) for name, size in (folder / "shards").listed().items())
        return {unit: size for names, size in sizes if (unit := _unit_of(*names)) is not None}

    def open_shards(
        self, contract: Contract, cache: ShardCache, known: Mapping[int, Shard] | None = None
    ) -> dict[int, Shard]:
        """Every shard that is there, by unit.

        What the index knows, or ``known`` holds, is not opened if its size is still the same; it is looked at when it
        is read.

        Raises:
            DamagedError: a shard is not what was written, or not the unit that its name says.
            StoreError: a shard belongs to another store.
        """
        rows = {unit: shard.row for unit, shard in (known or {}).items()}
        units = self.units()
        if set(units) - set(rows):
            rows = self._indexed(contract.spec) | rows
        found: dict[int, Shard] = {}
        for unit, size in units.items():
            row, path = rows.get(unit), self.shard(unit)
            if row is not None and size == row.size:
                found[unit] = Shard(path, row, contract, cache)
                continue
            found[unit] = Shard.opened(path, contract, cache)
            if found[unit].row.unit != unit:
                raise DamagedError(f"{path} holds unit {found[unit].row.unit}, not {unit}", path=path)
        return found

    def _indexed(self, spec: str) -> dict[int, IndexRow]:
        try:
            return self.read_index(spec) or {}
        except DamagedError:
            return {}  # it says what the shards say as well

    def read_statistics(self, contract: Contract, shards: Sequence[Shard]) -> dict[str, SiteStatistics] | None:
        """The statistics of each site that the index holds; None unless they are of exactly these shards."""
        try:
            document, rows = self._read_index(contract.spec)
            known = {row.unit: row for row in rows} == {shard.row.unit: shard.row for shard in shards}
            return parsed_summary(document["sites"], contract) if known else None
        except (DamagedError, ValueError, KeyError, TypeError):
            return None

    def read_index(self, spec: str | None = None) -> dict[int, IndexRow] | None:
        """What the index says of each shard, by unit; None where there is none, or one of an earlier version.

        Args:
            spec: the id of the spec that it has to be of; None for any.

        Raises:
            DamagedError: it is not what was written.
        """
        document, rows = self._read_index(spec)
        return {row.unit: row for row in rows} if document else None

    def _read_index(self, spec: str | None) -> tuple[dict[str, Any], list[IndexRow]]:
        try:
            raw = read_bounded(self.index, most=_MOST)
        except FileNotFoundError:
            return {}, []
        try:
            document = json.loads(raw)
            crc = document.pop("crc32")
            sound = crc == f"{crc32(canonical(document)):08x}" and spec in (None, document["spec"])
            sound = sound and raw == canonical({**document, "crc32": crc}) + b"\n"
            if sound and "columns" not in document:
                return {}, []
            rows = [IndexRow.parsed(each) for each in document["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            sound = False
        if not sound:
            raise DamagedError(
                f"{self.index} is not what was written; delete it: ActivationDataset.open does without, and the next "
                "harvest makes it anew from the shards",
                path=self.index,
            )
        return document, rows


class StorePaths(StoreFiles):
    """The names in one store's folder on a disk, to write to as well.

    Args:
        folder: of the store; a relative one is that of now, whatever the working directory is later.
    """

    folder: Path
    index: Path

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(Path(folder).absolute())
        self.shards = self.folder / "shards"
        self.scratch = self.folder / ".tmp"

    def shard(self, unit: int) -> Path:
        """The name of a unit's shard."""
        return self.shards.joinpath(*_names(unit))

    def prepare(self, files: Files) -> None:
        """Make the folders.

        Raises:
            StoreError: a link leads out of the store.
        """
        for folder in (self.folder, self.shards, self.scratch):
            files.make_folder(folder)
        _check_folders(self.folder)

    def write_index(self, contract: Contract, shards: Iterable[Shard], files: Files) -> None:
        """Write what the shards say of themselves into one file, over one that says something else."""
        shards = tuple(shards)
        if self.read_statistics(contract, shards) is not None:
            return
        document = {
            "columns": list(IndexRow.__annotations__),
            "shards": [list(each.row) for each in shards],
            "sites": packed_summary(summarised(contract, shards)),
            "spec": contract.spec,
        }
        data = canonical({**document, "crc32": f"{crc32(canonical(document)):08x}"}) + b"\n"
        files.make_folder(self.scratch)
        with draft_file(self.scratch, "index", files) as (descriptor, temporary):
            files.write(descriptor, memoryview(data), 0)
            files.sync(descriptor)
            files.replace(temporary, self.index)
            files.sync_folder(self.folder)

    def sweep(self, files: Files) -> None:
        """Remove files without a name whose writer is dead."""
        _check_folders(self.folder)
        sweep(self.scratch, files)
