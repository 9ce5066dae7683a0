"""What a harvest was asked for, and the spec that its store gets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from tdcache.errors import SelectionError
from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.columns import OwnColumns
from tdcache.harvesting.identity import identity_of, spelled_place, spelled_positions
from tdcache.harvesting.options import HarvestOptions
from tdcache.harvesting.plan import Budget, Preflight, Probe, batches_per_unit, model_fingerprint, probe
from tdcache.harvesting.row_rule import RowKind, RowRule, as_drops, as_kind, as_positions
from tdcache.harvesting.sharding import refuse_shards
from tdcache.harvesting.sizes import as_bytes, as_count, dtype_name
from tdcache.harvesting.source import Source
from tdcache.harvesting.workers import Share
from tdcache.store.spec import has_spec, read_spec

__all__ = ["Request"]

_SEEN = ("rows", "tokens", "side", "length", "batches_per_unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, in the forms that it has inside."""

    folder: Path
    """Absolute, because a model may change the working directory."""
    given: Path
    """The same as the user wrote it, which people are shown while the working directory is that of the call."""
    options: HarvestOptions
    capture: BatchCapture
    source: Source
    paths: tuple[str, ...]
    rule: Mapping[str, Any]
    kind: RowKind | None
    budget: Budget
    columns: OwnColumns

    @classmethod
    def of(cls, model: nn.Module, data: Any, path: str | os.PathLike[str], options: HarvestOptions) -> Self:
        """Read the options; the model is not run.

        Raises:
            SelectionError: nothing selected, or an option that means nothing.
            StoreError: the order of the data is random.
        """
        capture = BatchCapture(model, options)
        if not isinstance(path, str | os.PathLike):
            raise SelectionError(f"path is the store's folder, after model and data: got a {type(path).__name__}")
        return cls(
            folder=Path(path).absolute(),
            given=Path(path),
            options=options,
            capture=capture,
            source=Source(data, batch_size=options.batch_size, collate=options.collate),
            paths=capture.paths,
            rule={"drop": as_drops(options.drop), "positions": as_positions(options.positions)},
            kind=as_kind(options.rows),
            budget=Budget(as_count(options.max_rows), as_bytes(options.max_bytes)),
            columns=OwnColumns.of(options.columns, capture.paths),
        )

    def probe(self) -> Probe:
        """One forward over the first batch."""
        return probe(self.capture, self.source, self.rule, self.kind, self.paths)

    def _fixed(self) -> dict[str, Any]:
        """What the spec has of the options, the model and the data, before anything is run."""
        options, tag, model = self.options, self.options.tag, self.capture.model
        found = {
            "direction": options.direction,
            "dtype": dtype_name(self.capture.taker.dtype),
            **{name: identity_of(getattr(options, name), name, tag) for name in ("pick", "collate", "forward")},
            "tag": tag,
            "model": {"class": type(model).__qualname__, "fingerprint": model_fingerprint(model)},
            "data": {"batches": self.source.batches, "first_batch": self.source.fingerprint()},
            "drop": list(self.rule["drop"]),
            "positions": spelled_positions(self.rule["positions"]),
            "shard_bytes": options.shard_bytes,
        }
        if options.in_keys is not None:
            found["in_keys"] = [key if isinstance(key, str) else list(key) for key in options.in_keys]
        if options.tokenizer is not None:
            found["tokenizer"] = _name_of(options.tokenizer)
        if options.names is not None:
            found["names"] = {path: spelled_place(options.names[path]) for path in self.paths}
        if self.columns.sources:
            found["columns_from"] = self.columns.identity(tag)
        return found

    def preflight(self, found: Probe) -> Preflight:
        """What would be stored, by what the first forward showed."""
        per_unit = batches_per_unit(found, shard_bytes=self.options.shard_bytes, batches=self.source.batches)
        limit = self.budget.limit(found.row_bytes)
        return Preflight.of(self.given, found, batches=self.source.batches, per_unit=per_unit, limit=limit)

    def row_rule(self, spec: Mapping[str, Any]) -> RowRule:
        """Which rows are kept, once the spec says what was found out."""
        return RowRule(kind=spec["rows"], side=spec["side"], length=spec["length"], **self.rule)

    def settled(self, share: Share, *, new: bool = False) -> tuple[dict[str, Any], Probe | None]:
        """The spec, and what the first forward showed.

        Of a store that is there, what a forward would show is taken from it, so that none is needed.

        Args:
            share: of this process.
            new: there is no store, whatever is in the folder.
        """
        asked = self._fixed()
        exists = not new and has_spec(self.folder)
        is_there = frozenset({0}) if exists else frozenset()
        if share.agree(is_there):
            there = read_spec(self.folder)
            names = (*_SEEN, "columns") if self.columns.sources else _SEEN
            seen = {name: there.get(name) for name in names}
            sites = {path: there["sites"].get(path) for path in self.paths}
            return {**asked, **seen, "rows": self.kind or seen["rows"], "sites": sites}, None
        found = self.probe()
        if share.sharded:
            refuse_shards(found.values, tuple(found.sites))
        per_unit = batches_per_unit(found, shard_bytes=self.options.shard_bytes, batches=self.source.batches)
        sites = {path: {"dtype": dtype_name(kind), "shape": list(shape)} for path, (kind, shape) in found.sites.items()}
        seen = {"rows": found.kind, "tokens": found.with_tokens, "side": found.side, "length": found.length}
        seen["batches_per_unit"] = per_unit
        if self.columns.sources:
            batch = self.source.first()
            seen["columns"] = self.columns.describe(batch, self.row_rule(seen)(batch, first=0))
        return {**asked, **seen, "sites": sites}, found


def _name_of(tokenizer: Any) -> str:
    """What a tokenizer is loaded by.

    Raises:
        SelectionError: it does not say.
    """
    name = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "name_or_path", None)
    if not isinstance(name, str) or not name:
        raise SelectionError(
            f"tokenizer= is a name, or a tokenizer that knows its own (name_or_path); got {type(tokenizer).__name__}",
            selector=tokenizer,
        )
    return name
