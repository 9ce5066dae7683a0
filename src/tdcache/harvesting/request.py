"""What a harvest was asked for, and the spec that its store gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.columns import OwnColumns
from tdcache.harvesting.identity import identity_of, spelled_positions
from tdcache.harvesting.plan import Budget, Preflight, Probe, batches_per_unit, model_fingerprint, probe
from tdcache.harvesting.row_rule import RowKind, RowRule, as_drops, as_kind, as_positions
from tdcache.harvesting.sharding import refuse_shards
from tdcache.harvesting.sizes import as_bytes, as_count, dtype_name
from tdcache.harvesting.source import Source
from tdcache.harvesting.workers import Share
from tdcache.store.spec import read_spec
from tdcache.types import Match, Pick, Selector

__all__ = ["Request", "SHARD_BYTES", "asked_for"]

SHARD_BYTES = 1 << 26
_SEEN = ("rows", "tokens", "side", "length", "batches_per_unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, before the model is looked at."""

    folder: Path
    source: Source
    paths: tuple[str, ...]
    rule: Mapping[str, Any]
    kind: RowKind | None
    budget: Budget
    shard_bytes: int
    columns: OwnColumns
    fixed: Mapping[str, Any]

    def preflight(self, found: Probe) -> Preflight:
        """What would be stored, by what the first forward showed."""
        per_unit = batches_per_unit(found, shard_bytes=self.shard_bytes, batches=self.source.batches)
        limit = self.budget.limit(found.row_bytes)
        return Preflight.of(self.folder, found, batches=self.source.batches, per_unit=per_unit, limit=limit)

    def row_rule(self, spec: Mapping[str, Any]) -> RowRule:
        """Which rows are kept, once the spec says what was found out."""
        return RowRule(kind=spec["rows"], side=spec["side"], length=spec["length"], **self.rule)

    def settled(self, capture: BatchCapture, share: Share, *, new: bool = False) -> tuple[dict[str, Any], Probe | None]:
        """The spec, and what the first forward showed.

        Of a store that is there, what a forward would show is taken from it, so that none is needed.

        Args:
            capture: the model.
            share: of this process.
            new: there is no store, whatever is in the folder.
        """
        asked = {
            **self.fixed,
            "model": {"class": type(capture.model).__qualname__, "fingerprint": model_fingerprint(capture.model)},
            "data": {"batches": self.source.batches, "first_batch": self.source.fingerprint()},
            "drop": list(self.rule["drop"]),
            "positions": spelled_positions(self.rule["positions"]),
            "shard_bytes": self.shard_bytes,
        }
        exists = not new and (self.folder / "spec.json").exists()
        is_there = frozenset({0}) if exists else frozenset()
        if share.agree(is_there):
            there = read_spec(self.folder)
            names = (*_SEEN, "columns") if self.columns.sources else _SEEN
            seen = {name: there.get(name) for name in names}
            sites = {path: there["sites"].get(path) for path in self.paths}
            return {**asked, **seen, "rows": self.kind or seen["rows"], "sites": sites}, None
        found = probe(capture, self.source, self.rule, self.kind, self.paths)
        if share.sharded:
            refuse_shards(found.values, tuple(found.sites))
        per_unit = batches_per_unit(found, shard_bytes=self.shard_bytes, batches=self.source.batches)
        sites = {path: {"dtype": dtype_name(kind), "shape": list(shape)} for path, (kind, shape) in found.sites.items()}
        seen = {"rows": found.kind, "tokens": found.with_tokens, "side": found.side, "length": found.length}
        seen["batches_per_unit"] = per_unit
        if self.columns.sources:
            batch = self.source.first()
            seen["columns"] = self.columns.describe(batch, self.row_rule(seen)(batch, first=0))
        return {**asked, **seen, "sites": sites}, found


def asked_for(
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
    stop_early: bool = True,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    device: torch.device | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    tag: str | None = None,
    in_keys: Sequence[Any] | None = None,
    columns: Sequence[str] | Mapping[str, Any] | None = None,
    held_on: torch.device | str = "cpu",
) -> tuple[BatchCapture, Request]:
    """The options of :func:`tdcache.harvest` in the forms that they have inside; ``held_on`` is where rows are kept."""
    capture = BatchCapture(
        model,
        select,
        match=match,
        direction=direction,
        pick=pick,
        dtype=dtype,
        stop_early=stop_early and forward is None,
        forward=forward,
        device=device,
        in_keys=in_keys,
        held_on=held_on,
    )
    paths = capture.paths
    own = OwnColumns.of(columns, paths)
    fixed = {
        "direction": direction,
        "dtype": dtype_name(capture.taker.dtype),
        "pick": identity_of(pick, "pick", tag),
        "collate": identity_of(collate, "collate", tag),
        "forward": identity_of(forward, "forward", tag),
        "tag": tag,
    }
    if in_keys is not None:
        fixed["in_keys"] = [key if isinstance(key, str) else list(key) for key in in_keys]
    if own.sources:
        fixed["columns_from"] = own.identity(tag)
    request = Request(
        folder=Path(path),
        source=Source(data, batch_size=batch_size, collate=collate),
        paths=paths,
        rule={"drop": as_drops(drop), "positions": as_positions(positions)},
        kind=as_kind(rows),
        budget=Budget(as_count(max_rows), as_bytes(max_bytes)),
        shard_bytes=shard_bytes,
        columns=own,
        fixed=fixed,
    )
    return capture, request
