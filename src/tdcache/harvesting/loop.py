"""From a model and data to a store: units are run, written beside the next forwards, and never run twice."""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import tensordict
import torch
from torch import Tensor, nn

from tdcache.errors import SelectionError, SpecError, StoreError, listed
from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.plan import Preflight, Probe, probe, row_bytes
from tdcache.harvesting.progress import Progress
from tdcache.harvesting.recheck import check_like, refuse_overflow, run_again
from tdcache.harvesting.request import SHARD_BYTES, Request, asked_for
from tdcache.harvesting.row_rule import BatchRows, RowKind, batch_length
from tdcache.harvesting.source import SourceBatch, Visit
from tdcache.harvesting.workers import Share
from tdcache.harvesting.writer_thread import WriterThread
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.store.dataset import ActivationDataset
from tdcache.store.dtypes import DTYPES
from tdcache.store.files import Files
from tdcache.store.shard import Shard
from tdcache.store.writer import StoreWriter, site_column
from tdcache.types import Match, Pick, Selector

__all__ = ["harvest", "preflight"]


def harvest(
    model: nn.Module,
    data: Any,
    path: str | os.PathLike[str],
    *,
    select: Selector,
    match: Match = "full",
    direction: Literal["fwd", "fwd_pre"] = "fwd",
    pick: Pick = None,
    dtype: torch.dtype | str | None = None,
    drop: str | Sequence[str] | None = "pad",
    positions: slice | int | Sequence[int] | None = None,
    rows: RowKind | None = None,
    max_rows: int | None = None,
    max_bytes: int | str | None = None,
    overflow: Literal["raise", "count"] = "raise",
    resume: bool = True,
    stop_early: bool = True,
    progress: bool = False,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    device: torch.device | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    rank: int | None = None,
    world: int | None = None,
    files: Files | None = None,
    tag: str | None = None,
    recheck: bool = True,
    in_keys: Sequence[Any] | None = None,
    columns: Sequence[str] | Mapping[str, Any] | None = None,
    names: Names | None = None,
) -> ActivationDataset:
    """Store what flows through the selected modules while ``data`` runs through ``model``; resumable at any instant.

    The data is cut into units, fixed ranges of samples; each becomes one file that is there whole or not at all. Run
    again after a crash, with any number of processes, it runs the units that are missing, and the files are byte for
    byte those of one uninterrupted run (on the same device). A finished harvest run again does
    no forward but the one that compares its first rows. The same call under ``torchrun`` deals the units to the ranks.
    The model is run without gradients in eval mode and left as it was.

    Args:
        model: any module. Batches that are mappings become keyword arguments, of those that it takes; tuples and lists
            begin with the inputs.
        data: a ``DataLoader`` that does not shuffle, a map-style dataset of samples (of any library; a tensor or
            TensorDict is one of its rows), or any iterable of batches, as a list of them.
        path: the store's folder.
        select: which modules; see :class:`tdcache.ActivationCaching`.
        match: how patterns are held against paths.
        direction: ``"fwd"`` (outputs) or ``"fwd_pre"`` (inputs).
        pick: which tensor of a structured value.
        dtype: of the stored values, also by name (``"bfloat16"``); None keeps the model's.
        drop: ``"pad"`` (by the attention mask), ``"bos"`` (each sample's first token), ``"pad|bos"``, or None.
        positions: the places among a sample's own tokens that are kept: a number, several, or a slice.
        rows: ``"tokens"`` or ``"samples"``; by default tokens where the batches have token ids or a mask.
        max_rows: the most rows, exactly: those of the first samples, the same for all sites. Run again with more, a
            harvest goes on from there.
        max_bytes: the most bytes of all columns together, also as ``"20GB"``.
        overflow: ``"raise"`` refuses values that ``dtype`` cannot hold (finite ones, and infinities where it has none),
            ``"count"`` stores how many there were. Values that become zero are stored and counted with either.
        resume: continue a store that is there; False refuses one.
        stop_early: end each forward once every site has fired; of a module that would run again, it is the first call.
            Ignored with ``forward``.
        progress: print what will be stored, then rows per second and the time left, to the standard error stream.
        batch_size: samples per batch, where ``data`` is a dataset.
        collate: makes a batch of samples, where ``data`` is a dataset.
        forward: ``forward(model, batch)``, where the model is called in a way of its own.
        device: where batches are moved; by default where the model is.
        shard_bytes: how big a shard should be, about; three of them are held in memory.
        rank: which share of the units is run here; by default torchrun's.
        world: how many shares there are.
        files: how files are written.
        tag: a name for the computation, where ``forward``, ``collate`` or a callable ``pick`` depends on something
            that cannot be told apart from another in a later process.
        recheck: of a store that is there, run its first batch again and compare the rows; what the spec does not tell
            apart shows itself here. False spares that forward.
        in_keys: the entries of a mapping or TensorDict that are the model's positional arguments; by default entries
            are found by the names of its arguments.
        columns: numbers to store beside the rows, one per sample or one per token: names of entries of the batches, or
            ``{name: key, index or function(batch)}``.
        names: the canonical names of the model, ``tdcache.names(model)``; ``select`` then means names, which the sites
            are called by in the store.

    Returns:
        The store, open for reading.

    Raises:
        SelectionError: nothing selected, nothing in the data, a budget below one row, or an unusable option.
        SpecError: the store there holds something else; the fields that differ are named. Or an option depends on
            something without a spelling, and there is no ``tag``.
        CaptureError: values without rows in common, values that ``dtype`` cannot hold, or a bare shard of one.
        StoreError: a unit could not be written; the message names it and its path.
    """
    if overflow not in ("raise", "count"):
        raise SelectionError(f"overflow is 'raise' or 'count', got {overflow!r}", selector=overflow)
    capture, request = asked_for(
        model,
        data,
        path,
        select=select,
        match=match,
        direction=direction,
        pick=pick,
        dtype=dtype,
        drop=drop,
        positions=positions,
        rows=rows,
        max_rows=max_rows,
        max_bytes=max_bytes,
        stop_early=stop_early,
        batch_size=batch_size,
        collate=collate,
        forward=forward,
        device=device,
        shard_bytes=shard_bytes,
        tag=tag,
        in_keys=in_keys,
        columns=columns,
        names=names,
    )
    share = Share.of(model, rank, world)
    spec, found = request.settled(capture, share)
    expected: int | None = None
    if found is not None:
        ahead = request.preflight(found)  # a budget that holds no row is refused before anything is written
        expected = ahead.rows
        if progress and share.rank == 0 and share.writes:
            print(ahead, file=sys.stderr)
    if not resume and (request.folder / "spec.json").exists():
        raise SpecError(f"{request.folder} holds a store already, and resume=False", path=request.folder)
    made_by = {"torch": torch.__version__, "tensordict": str(tensordict.__version__)}
    writer = StoreWriter(request.folder, spec, made_by=made_by, files=files)
    run = _HarvestRun(
        capture, request, writer, share, overflow == "raise", shown=progress, found=found, expected=expected
    )
    run.go(recheck=recheck)
    return ActivationDataset.open(request.folder)


def preflight(
    model: nn.Module, data: Any, path: str | os.PathLike[str], *, select: Selector, **options: Any
) -> Preflight:
    """What :func:`harvest` would store with these arguments; one forward runs, nothing is written.

    Args:
        model: as there.
        data: as there.
        path: as there.
        select: as there.
        **options: those that say what is stored, as there: ``match``, ``dtype``, ``rows``, ``max_rows`` and the like.
    """
    known = [name for name in inspect.signature(asked_for).parameters if name not in _NO_OPTIONS]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"preflight has no option {unknown[0]!r}; there are {listed(known, 20)}")
    capture, request = asked_for(model, data, path, select=select, **options)
    return request.preflight(probe(capture, request.source, request.rule, request.kind, request.paths))


_NO_OPTIONS = ("model", "data", "path", "select", "held_on")


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
class _HarvestRun:
    """One process's share of a harvest."""

    capture: BatchCapture
    request: Request
    writer: StoreWriter
    share: Share
    refuse_overflow: bool
    shown: bool
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

    def go(self, *, recheck: bool) -> None:
        """Run the units that are missing, and write the index: at once, and again when the others have written."""
        committed = self.writer.committed()
        agreed = self.share.agree(frozenset(committed))
        one_asks = self.share.rank == 0 or self.share.sharded
        if recheck and one_asks and self.found is None and 0 in agreed and 0 in committed:
            run_again(
                self.capture, self.request.source, self.request.row_rule(self.writer.spec), committed[0], self.writer
            )
        self._prepare()
        committed = self._uncut(committed)
        self.there = {unit: committed[unit].rows for unit in agreed & committed.keys()}
        ended = any(shard.row.end for shard in committed.values())
        if not (ended and len(committed) == max(committed) + 1):
            if self.shown and committed and self.share.writes:
                rows = sum(self.there.values())
                print(f"going on with {self.writer.folder}: {len(self.there)} units, {rows:,} rows", file=sys.stderr)
            self._walk()
        if self.share.writes:
            self.writer.finish()
        self.share.wait()
        if self.share.writes and self.share.rank == 0 and self.share.world > 1:
            self.writer.finish()

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
            self.capture.open() as hooked,
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
            values = dict(self.capture.run(hooked, step.batch, rows))
            lost = self.capture.losses()
            check_like(values, self.writer.spec["sites"], step.number)
        if self.refuse_overflow:
            refuse_overflow(lost, self.capture.taker.dtype, step.number)
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
                    self.writer.write,
                    unit.number,
                    unit.columns,
                    samples=(unit.first, max(behind, unit.first)),
                    end=end,
                    cut=cut,
                    overflow=unit.overflow,
                    underflow=unit.underflow,
                )
            )

    def _cut(self, unit: _UnitRows) -> bool:
        reached = self.limit is not None and self.rows_before + self.counted >= self.limit
        return reached and unit.columns["seq"][-1].numel() > 0

    def _needed(self) -> _UnitRows:
        if self.unit is None:
            raise StoreError("a unit ended that had not begun")
        return self.unit
