"""Writing a store, unit by unit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.files import Files, as_store_error
from tdcache.store.layout import StorePaths
from tdcache.store.rows import ROW_COLUMNS
from tdcache.store.shard import Shard, ShardCache
from tdcache.store.shard_header import Contract, ShardInfo, own_column, site_column, statistics_column
from tdcache.store.shard_writer import write_shard
from tdcache.store.spec import has_spec, spec_id, write_spec
from tdcache.store.statistics import SiteStatistics

__all__ = ["ROW_COLUMNS", "StoreWriter", "own_column", "site_column"]


class StoreWriter:
    """Makes or continues a store. Several may work on one store at once, also from several machines.

    Args:
        folder: of the store; made if it is not there.
        spec: what it holds, as JSON values, with ``"sites"``: a mapping of paths.
        made_by: versions, for people.
        files: how files are written.

    Raises:
        SpecError: the store there was made otherwise.
        StoreError: the disk does not take it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        spec: Mapping[str, Any],
        *,
        made_by: Mapping[str, str] | None = None,
        files: Files | None = None,
    ) -> None:
        self.files = files or Files()
        self.layout = StorePaths(folder)
        with as_store_error(self.layout.folder):
            if not has_spec(self.layout.folder):  # a finished one may be on a read-only disk
                self.layout.prepare(self.files)
            self.spec = write_spec(self.layout.folder, spec, made_by=made_by or {}, files=self.files)
            self.layout.sweep(self.files)
        self.id = spec_id(self.spec)
        self._contract = Contract.of(self.id, self.spec)

    def __repr__(self) -> str:
        return f"StoreWriter({str(self.layout.folder)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self.finish()

    def committed(self) -> dict[int, Shard]:
        """The shards that are there, by unit."""
        return self.layout.open_shards(self._contract, ShardCache())

    def write(
        self,
        unit: int,
        columns: Mapping[str, Sequence[Tensor]],
        *,
        samples: tuple[int, int],
        end: bool = False,
        cut: bool = False,
        overflow: Mapping[str, int] | None = None,
        underflow: Mapping[str, int] | None = None,
    ) -> bool:
        """Write one unit, durably; with the same columns the bytes are the same, whoever writes them.

        Args:
            unit: its number.
            columns: the pieces of each column, along the first dimension: ``"seq"``, ``"pos"``, perhaps ``"tok"``, and
                ``site_column(path)`` of each site, ``own_column(name)`` of each of the user's columns.
            samples: the numbers of its first sample and of the one behind its last.
            end: whether the data ends here, or a limit was reached.
            cut: whether a limit was reached, and more of the data would follow.
            overflow: values per site that the dtype cannot hold.
            underflow: values per site that became zero.

        Returns:
            False where the unit is there already, written by another.

        Raises:
            StoreError: the columns are not those of the spec, or the disk does not take them; it names unit and path.
        """
        wanted = set(self._contract.columns) - {"tok"}
        if set(columns) - {"tok"} != wanted:
            raise StoreError(f"unit {unit} has columns {sorted(columns)}, the spec has {sorted(wanted)}")
        target = self.layout.shard(unit)
        info = ShardInfo(
            spec=self.id,
            unit=unit,
            first=samples[0],
            last=samples[1],
            rows=sum(part.shape[0] for part in columns["seq"]),
            end=end,
            cut=cut,
            overflow={name: count for name, count in sorted((overflow or {}).items()) if count},
            underflow={name: count for name, count in sorted((underflow or {}).items()) if count},
        )
        whole = {**columns, **self._measured(columns)}
        try:
            self.layout.prepare(self.files)
            self.files.make_folder(target.parent)
            return write_shard(target, whole, info=info, scratch=self.layout.scratch, files=self.files)
        except OSError as error:
            raise StoreError(
                f"unit {unit} could not be written to {target}: {error.strerror or error}; the store is whole without "
                "it: run the same harvest again to continue",
                path=target,
            ) from error

    def discard(self, unit: int) -> None:
        """Remove a unit that is to be written anew.

        Raises:
            StoreError: the disk does not take it.
        """
        target = self.layout.shard(unit)
        with as_store_error(target):
            self.files.remove(self.layout.index)  # which would be believed where the new shard has the same size
            self.files.remove(target)
            self.files.sync_folder(target.parent)

    def _measured(self, columns: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """The statistics of the floating sites."""
        return {
            statistics_column(path): [SiteStatistics.of(columns[site_column(path)]).packed()]
            for path in self.spec["sites"]
            if statistics_column(path) in self._contract.statistics
        }

    def finish(self) -> None:
        """Write the index from the shards that are there.

        Raises:
            StoreError: the disk does not take it.
        """
        with as_store_error(self.layout.index):
            self.layout.write_index(self._contract, self.committed().values(), self.files)

    @property
    def folder(self) -> Path:
        """The folder of the store that is written."""
        return self.layout.folder
