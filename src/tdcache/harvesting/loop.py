"""From a model and data to a store: units are run, written beside the next forwards, and never run twice."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import tensordict
import torch
from torch import Tensor

from tdcache.errors import SpecError, StoreError
from tdcache.harvesting.plan import Probe, row_bytes
from tdcache.harvesting.progress import Progress
from tdcache.harvesting.recheck import check_like, refuse_overflow, run_again
from tdcache.harvesting.request import Request
from tdcache.harvesting.row_rule import BatchRows, batch_length
from tdcache.harvesting.source import SourceBatch, Visit
from tdcache.harvesting.workers import Share
from tdcache.harvesting.writer_thread import WriterThread
from tdcache.modules import HookedModule
from tdcache.store.dtypes import DTYPES
from tdcache.store.files import Files
from tdcache.store.shard import Shard
from tdcache.store.spec import has_spec
from tdcache.store.upload import StoreUpload
from tdcache.store.writer import StoreWriter, site_column

__all__ = ["HarvestRun"]

Upload = tuple[str, Mapping[str, Any] | None]
"""A URL, and the options of its file system."""


@dataclass(slots=True)
class _UnitRows:
    """The rows of a unit while it is run."""

    number: int
    first: int
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    overflow: Counter[str] = field(default_factory=Counter)
    underflow: Counter[str] = field(default_factory=Counter)

    def add(self, values: Mapping[str, Tensor], rows: BatchRows, own: Mapping[str, Tensor]) -> None:
        sites = {site_column(path): value for path, value in values.items()}
        for name, part in (rows.columns() | sites | dict(own)).items():
            self.columns.setdefault(name, []).append(part)


@dataclass(slots=True)
class HarvestRun:
    """One process's share of a harvest."""

    request: Request
    writer: StoreWriter
    share: Share
    shown: bool
    upload: StoreUpload | None
    found: Probe | None
    """The first batch, where it was run already; let go once its turn has come."""
    expected: int | None
    """About how many rows there will be, by the first batch; None where that is not known."""
    there: dict[int, int] = field(default_factory=dict)
    """Rows of the units that are there, or were counted or run, by unit."""
    limit: int | None = None
    unit: _UnitRows | None = None
    rows_before: int = 0
    counted: int = 0

    @classmethod
    def begun(
        cls, request: Request, share: Share, *, resume: bool, shown: bool, files: Files | None, upload: Upload | None
    ) -> Self:
        """Make the store, or find the one that is there.

        Args:
            request: what was asked for.
            share: of this process.
            resume: whether a store may be there.
            shown: whether progress is printed.
            files: how files are written.
            upload: where a copy is sent, by URL, and the options of its file system.

        Raises:
            SpecError: the store there holds something else, or there is one and ``resume`` is False.
        """
        spec, found = request.settled(share)
        ahead = None if found is None else request.preflight(found)  # refused before anything is written
        if ahead is not None and shown and share.rank == 0 and share.writes:
            print(ahead, file=sys.stderr)
        if not resume and has_spec(request.folder):
            raise SpecError(f"{request.folder} holds a store already, and resume=False", path=request.folder)
        made_by = {"torch": torch.__version__, "tensordict": str(tensordict.__version__)}
        writer = StoreWriter(request.folder, spec, made_by=made_by, files=files)
        sent = StoreUpload(writer.layout, *upload) if upload is not None and share.writes else None
        return cls(request, writer, share, shown, sent, found, None if ahead is None else ahead.rows)

    def go(self, *, recheck: bool) -> None:
        """Run the units that are missing, and write the index: at once, and again when the others have written."""
        committed = self.writer.committed()
        agreed = self.share.agree(frozenset(committed))
        one_asks = self.share.rank == 0 or self.share.sharded
        if recheck and one_asks and self.found is None and 0 in agreed and 0 in committed:
            rule = self.request.row_rule(self.writer.spec)
            run_again(self.request.capture, self.request.source, rule, committed[0], self.writer)
        self._prepare()
        committed = self._uncut(committed)
        self.there = {unit: committed[unit].rows for unit in agreed & committed.keys()}
        if self.upload is not None:
            self.upload.send_missing(unit for unit in committed if self.share.has(unit))
        ended = any(shard.row.end for shard in committed.values())
        if not (ended and len(committed) == max(committed) + 1):
            if self.shown and committed and self.share.writes:
                rows = sum(self.there.values())
                print(f"going on with {self.writer.folder}: {len(self.there)} units, {rows:,} rows", file=sys.stderr)
            self._walk()
        self._write_index()
        self.share.wait()
        if self.share.rank == 0 and self.share.world > 1:
            self._write_index()

    def _write_index(self) -> None:
        if self.share.writes:
            self.writer.finish()
            if self.upload is not None:
                self.upload.finish()

    def _prepare(self) -> None:
        spec = self.writer.spec
        sizes = {path: (DTYPES[site["dtype"]].itemsize, tuple(site["shape"])) for path, site in spec["sites"].items()}
        self.limit = self.request.budget.limit(row_bytes(sizes, spec["tokens"]))

    def _uncut(self, committed: dict[int, Shard]) -> dict[int, Shard]:
        """What is there, without units that an earlier and lower limit has cut: their owners write them anew.

        Raises:
            SpecError: there are more rows than the limit allows.
        """
        rows, last = sum(shard.rows for shard in committed.values()), max(committed, default=0)
        ends = [unit for unit, shard in committed.items() if shard.row.end]
        if self.limit is not None and (rows > self.limit or (rows == self.limit and not ends)):
            raise SpecError(
                f"{self.writer.folder} holds {rows:,} rows, and at most {self.limit:,} are asked for now; a limit can "
                "be raised later and not lowered: ask for as many, or give another folder",
                path=self.writer.folder,
                fields=("max_rows",),
            )
        is_full = rows == self.limit and len(committed) == last + 1
        stale = {unit for unit in ends if committed[unit].info.cut and not (is_full and unit == last)}
        for unit in stale:
            if self.share.writes and self.share.has(unit):
                self.writer.discard(unit)
        return {unit: shard for unit, shard in committed.items() if unit not in stale}

    def _visit(self, unit: int) -> Visit:
        if unit in self.there:
            return "skip"
        if self.share.has(unit):
            return "run"
        return "skip" if self.limit is None else "count"

    def _rows_to_run(self) -> int | None:
        rows = self.limit if self.found is None else self.expected
        if self.found is None and self.there and self.request.source.batches is not None:
            # as if the other units were like those that are there
            units = -(-self.request.source.batches // self.writer.spec["batches_per_unit"])
            rows = sum(self.there.values()) * units // len(self.there)
            rows = rows if self.limit is None else min(rows, self.limit)
        return None if rows is None else -(-max(rows - sum(self.there.values()), 0) // self.share.world)

    def _walk(self) -> None:
        spec = self.writer.spec
        rule = self.request.row_rule(self.writer.spec)
        with (
            Progress(shown=self.shown and self.share.writes, total=self._rows_to_run()) as progress,
            WriterThread() as thread,
            self.request.capture.open() as hooked,
        ):
            for step in self.request.source.walk(spec["batches_per_unit"], self._visit):
                self._begin(step)
                rows = rule(step.batch, first=step.first)
                left = None if self.limit is None else self.limit - self.rows_before - self.counted
                if left is not None and left <= 0:
                    break
                full = left is not None and len(rows) >= left
                cut = left is not None and full and (len(rows) > left or not step.ends_data)
                rows = rows if left is None else rows.first(left)
                self.counted += len(rows)
                if step.visit == "run":
                    self._take(hooked, step, rows)
                    progress.add(len(rows))
                if full or step.ends_unit:
                    self._finish(step, full or step.ends_data, cut, thread)
                if full:
                    break

    def _begin(self, step: SourceBatch) -> None:
        """A batch comes; where its unit is a new one, the rows of those before it are known now."""
        if self.unit is not None and self.unit.number == step.unit:
            return
        self.unit = _UnitRows(step.unit, step.first)
        self.rows_before = sum(rows for unit, rows in self.there.items() if unit < step.unit)
        self.counted = 0

    def _take(self, hooked: HookedModule, step: SourceBatch, rows: BatchRows) -> None:
        """Run a batch, or take what its first forward gave."""
        unit, found, self.found = self._needed(), self.found, None
        is_known = found is not None and step.number == 0 and (len(rows) == found.rows or not found.lost)
        if found is not None and is_known:
            cut = len(rows) < found.rows
            values = {path: value[: len(rows)].clone() if cut else value for path, value in found.values.items()}
            lost = found.lost
        else:
            values = dict(self.request.capture.run(hooked, step.batch, rows))
            lost = self.request.capture.losses()
            check_like(values, self.writer.spec["sites"], step.number)
        if self.request.options.overflow == "raise":
            refuse_overflow(lost, self.request.capture.taker.dtype, step.number)
        unit.overflow.update(lost.overflow)
        unit.underflow.update(lost.underflow)
        own = self.request.columns(step.batch, rows, self.writer.spec.get("columns"))
        unit.add(values, rows, own)

    def _finish(self, step: SourceBatch, end: bool, cut: bool, thread: WriterThread) -> None:
        unit, self.unit = self._needed(), None
        self.there[unit.number] = self.counted
        if step.visit == "run" and self.share.writes:
            behind = int(unit.columns["seq"][-1][-1]) + 1 if self._cut(unit) else step.first + batch_length(step.batch)
            thread.submit(
                partial(
                    self._write,
                    unit.number,
                    unit.columns,
                    samples=(unit.first, max(behind, unit.first)),
                    end=end,
                    cut=cut,
                    overflow=unit.overflow,
                    underflow=unit.underflow,
                )
            )

    def _write(self, unit: int, columns: Mapping[str, list[Tensor]], **told: Any) -> None:
        self.writer.write(unit, columns, **told)
        if self.upload is not None:
            self.upload.send(unit)

    def _cut(self, unit: _UnitRows) -> bool:
        reached = self.limit is not None and self.rows_before + self.counted >= self.limit
        return reached and unit.columns["seq"][-1].numel() > 0

    def _needed(self) -> _UnitRows:
        if self.unit is None:
            raise StoreError("a unit ended that had not begun")
        return self.unit
