"""What a harvest was asked for, and the spec that its store gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.identity import spelled_positions
from tdcache.harvesting.plan import Budget, Preflight, Probe, batches_per_unit, model_fingerprint, probe
from tdcache.harvesting.row_rule import RowKind
from tdcache.harvesting.sharding import refuse_shards
from tdcache.harvesting.sizes import dtype_name
from tdcache.harvesting.source import Source
from tdcache.harvesting.workers import Share
from tdcache.store.spec import read_spec

__all__ = ["Request"]


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
    fixed: Mapping[str, Any]

    def preflight(self, found: Probe) -> Preflight:
        """What would be stored, by what the first forward showed."""
        per_unit = batches_per_unit(found, shard_bytes=self.shard_bytes, batches=self.source.batches)
        limit = self.budget.limit(found.row_bytes)
        return Preflight.of(self.folder, found, batches=self.source.batches, per_unit=per_unit, limit=limit)

    def settled(self, capture: BatchCapture, share: Share) -> tuple[dict[str, Any], Probe | None]:
        """The spec, and what the first forward showed.

        Of a store that is there, what a forward would show is taken from it, so that none is needed.
        """
        asked = {
            **self.fixed,
            "model": {"class": type(capture.model).__qualname__, "fingerprint": model_fingerprint(capture.model)},
            "data": {"batches": self.source.batches, "first_batch": self.source.fingerprint()},
            "drop": list(self.rule["drop"]),
            "positions": spelled_positions(self.rule["positions"]),
            "budget": {"rows": self.budget.rows, "bytes": self.budget.bytes},
            "shard_bytes": self.shard_bytes,
        }
        is_there = frozenset({0}) if (self.folder / "spec.json").exists() else frozenset()
        if share.agree(is_there):
            there = read_spec(self.folder)
            seen = {name: there.get(name) for name in ("rows", "tokens", "side", "batches_per_unit")}
            sites = {path: there["sites"].get(path) for path in self.paths}
            return {**asked, **seen, "rows": self.kind or seen["rows"], "sites": sites}, None
        found = probe(capture, self.source, self.rule, self.kind, self.paths)
        if share.sharded:
            refuse_shards(found.values, tuple(found.sites))
        per_unit = batches_per_unit(found, shard_bytes=self.shard_bytes, batches=self.source.batches)
        sites = {path: {"dtype": dtype_name(kind), "shape": list(shape)} for path, (kind, shape) in found.sites.items()}
        seen = {"rows": found.kind, "tokens": found.with_tokens, "side": found.side, "batches_per_unit": per_unit}
        return {**asked, **seen, "sites": sites}, found
