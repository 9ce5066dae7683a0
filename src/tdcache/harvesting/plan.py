"""What will be stored: sites, rows, units and bytes, worked out before the first of them is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import CaptureError, SelectionError, listed
from tdcache.harvesting.capture import BatchCapture, Losses
from tdcache.harvesting.row_rule import BatchRows, RowKind, RowRule, batch_length, has_tokens, row_dims, side_of
from tdcache.harvesting.source import Source
from tdcache.store.header import pack_header
from tdcache.store.writer import ROW_COLUMNS
from tdcache.tables import without_addresses

__all__ = ["Budget", "Preflight", "Probe", "batches_per_unit", "model_fingerprint", "probe", "row_bytes"]

_SAMPLED = 16  # values per parameter that go into a model's fingerprint
_UNITS = 16  # at least so many, where the data is long enough: a unit is what a crash can cost
_MOST_BATCHES = 1024  # in a unit
_ROW_BYTES = 8 + 4
_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """How many rows at most: one number for all sites, counted in the order of the samples."""

    rows: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("max_rows", self.rows), ("max_bytes", self.bytes)):
            if size is not None and (type(size) is not int or size < 1):
                raise SelectionError(f"{name} is at least 1, got {size!r}; leave it out for all rows", selector=size)

    def limit(self, row_bytes: int) -> int | None:
        """The most rows, given the bytes of one in all columns.

        Raises:
            SelectionError: not even one.
        """
        if self.bytes is not None and self.bytes < row_bytes:
            raise SelectionError(
                f"max_bytes={self.bytes:,} holds no row: one has {row_bytes:,} bytes in all columns; allow more, or "
                "select fewer sites",
                selector=self.bytes,
            )
        limits = [self.rows, None if self.bytes is None else self.bytes // row_bytes]
        return min((each for each in limits if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one forward over the first batch showed, and the rows that it gave."""

    sites: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and feature shape as they will be stored, by path."""
    kind: RowKind
    with_tokens: bool
    side: str
    """Which sequence the rows belong to, where batches feed two."""
    length: int | None
    """How many tokens the model makes of each sample, where batches do not say."""
    rows: int
    """Rows of the first batch that are kept."""
    most_rows: int
    """Rows that would be kept of a batch like it without padding."""
    seconds: float
    """How long the forward took."""
    values: Mapping[str, Tensor]
    """The kept rows of the first batch, by path."""
    lost: Losses
    """Values among them that the dtype cannot hold."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all columns."""
        sizes = {path: (dtype.itemsize, shape) for path, (dtype, shape) in self.sites.items()}
        return row_bytes(sizes, self.with_tokens)


def row_bytes(sites: Mapping[str, tuple[int, tuple[int, ...]]], with_tokens: bool) -> int:
    """Bytes of one row, given item size and feature shape of each site."""
    wide = sum(size * math.prod(shape) for size, shape in sites.values())
    return wide + _ROW_BYTES + (_TOKEN_BYTES if with_tokens else 0)


def probe(
    capture: BatchCapture, source: Source, rule: Mapping[str, Any], kind: RowKind | None, paths: Sequence[str]
) -> Probe:
    """Run the first batch, to see shapes and dtypes; the first unit need not run it again.

    Args:
        capture: the model.
        source: the data.
        rule: the fields of the row rule but its kind.
        kind: one row per token or per sample; None to find out.
        paths: the sites.

    Raises:
        SelectionError: there is no batch, or a site has the name of a row's own column.
        CaptureError: the sites' values have no rows in common.
    """
    batch = source.first()
    if batch is None:
        raise SelectionError("the data holds no batch, so there is nothing to harvest")
    guess = _likely_side(batch, paths)
    likely = kind or ("tokens" if has_tokens(batch, guess) else "samples")
    rows = RowRule(kind=likely, side=guess, **rule)(batch, first=0)
    look = capture.look(batch, rows)
    taken = [path for path in look.described if path in ROW_COLUMNS]
    if taken:
        raise SelectionError(f"no site can be called {taken[0]!r}: a row's own column has that name", selector=taken[0])
    shapes = {path: shape for path, (_, shape) in look.described.items()}
    kind = kind or _kind_of(shapes, rows)
    side = _side_of(batch, shapes) if kind == "tokens" else ""
    length = _length_of(batch, shapes, rows, side or guess) if kind == "tokens" else None
    made = RowRule(kind=kind, side=side, length=length, **rule)
    if length is not None or (side and side != guess):  # rows were taken by another sequence's mask
        look = capture.look(batch, made(batch, first=0))
    if kind == "samples" and (made.positions is not None or "bos" in made.drop):
        raise SelectionError("positions= and drop='bos' choose among tokens, and these rows are samples, one each")
    rows = made(batch, first=0)  # where no value has tokens, values were taken whole: those are the rows of samples
    dtype = capture.taker.dtype
    _check_grid(shapes, rows)
    sites = {
        path: (dtype if dtype and own.is_floating_point else own, shape[row_dims(shape, rows.grid) :])
        for path, (own, shape) in look.described.items()
    }
    pack_header(sites, {})  # a dtype that cannot be stored is refused before anything is written
    most = made.most_rows(rows.grid)
    return Probe(sites, kind, rows.tok is not None, side, length, len(rows), most, look.seconds, look.values, look.lost)


def _check_grid(shapes: Mapping[str, tuple[int, ...]], rows: BatchRows) -> None:
    odd = {path: shape for path, shape in shapes.items() if row_dims(shape, rows.grid) is None}
    if odd:
        path, shape = next(iter(odd.items()))
        raise CaptureError(
            f"{listed(list(odd))} cannot stand in one store with the other sites: rows lie along {rows.grid}, and "
            f"{path!r} gives values of shape {shape}; leave it out, pick= another value, or give rows='samples'",
            paths=tuple(odd),
        )


def _length_of(batch: Any, shapes: Mapping[str, tuple[int, ...]], rows: BatchRows, side: str) -> int | None:
    """The tokens that a model makes of samples, as a vision transformer of images; None where the batch has them."""
    if has_tokens(batch, side) or any(row_dims(shape, rows.grid) for shape in shapes.values()):
        return None
    lengths = {shape[1] for shape in shapes.values() if len(shape) > 2 and shape[0] == batch_length(batch)}
    return lengths.pop() if len(lengths) == 1 else None


def _side_of(batch: Any, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which of two sequences that a batch feeds the values consist of.

    Raises:
        CaptureError: some of the one, some of the other.
    """
    sides = {path: side_of(batch, path, shape[1]) for path, shape in shapes.items() if len(shape) > 1}
    found = sorted(set(sides.values()))
    if len(found) > 1:
        one, other = (next(path for path, side in sides.items() if side == each) for each in found[:2])
        raise CaptureError(
            f"{one!r} has the tokens of the {found[0]}, {other!r} those of the {found[1]}, and rows of one store lie "
            "along one sequence; harvest each into a store of its own",
            paths=(one, other),
        )
    return found[0] if found else ""


def _likely_side(batch: Any, paths: Sequence[str]) -> str:
    """Which of two sequences the sites belong to, by their names; ``""`` where the batch feeds no decoder's tokens."""
    if not (isinstance(batch, Mapping) and "decoder_input_ids" in batch):
        return ""
    return "decoder" if any("decoder" in path.split(".") for path in paths) else "encoder"


def _kind_of(shapes: Mapping[str, tuple[int, ...]], rows: BatchRows) -> RowKind:
    """Tokens, where some value has them.

    Raises:
        CaptureError: a value may be either: as many features as there are tokens, or one number per token.
    """
    if len(rows.grid) < 2:
        return "samples"
    unclear = [path for path, shape in shapes.items() if shape == rows.grid]
    if unclear:
        raise CaptureError(
            f"{listed(unclear)} gives values of shape {rows.grid}: one number per token, or one row per sample with as "
            "many features as there are tokens here; say which with rows='tokens' or rows='samples'",
            paths=tuple(unclear),
        )
    return "tokens" if any(row_dims(shape, rows.grid) for shape in shapes.values()) else "samples"


def batches_per_unit(found: Probe, *, shard_bytes: int, batches: int | None) -> int:
    """So many that a shard has at most ``shard_bytes``, about, and that the data has some units at least.

    The first batch may be all padding, so that it is not its kept rows that count.
    """
    wanted = min(_MOST_BATCHES, shard_bytes // max(1, found.row_bytes * found.most_rows))
    if batches is not None:
        wanted = min(wanted, -(-batches // _UNITS))
    return max(1, wanted)


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's and buffer's name, shape, dtype and some of its values, and of the model's settings.

    Settings are what its modules say of themselves, and a Hugging Face model's configuration. Of a sharded parameter
    the values are left out, so that every rank has the same fingerprint.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    digest.update(_settings(model).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type != "meta"
        if plain and tensor.numel() and not tensor.is_quantized and not tensor.is_sparse:
            flat = tensor.detach().reshape(-1)
            count = min(_SAMPLED, flat.numel())
            places = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)  # integers: float32 rounds up
            digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    told = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    kept = {name: value for name, value in told.items() if name not in _NO_SETTINGS}
    return without_addresses(f"{model!r}\n{json.dumps(kept, sort_keys=True, default=repr)}")


_NO_SETTINGS = ("transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a harvest is about to store; ``print`` it."""

    folder: Path
    sites: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    kind: RowKind
    batches: int | None
    units: int | None
    rows: int | None
    """About so many: as if every batch were like the first; None where the number of batches is not known."""
    row_bytes: int
    seconds: float
    """One forward."""
    free: int
    """Bytes that the disk has left."""

    @classmethod
    def of(cls, folder: Path, found: Probe, *, batches: int | None, per_unit: int, limit: int | None) -> Preflight:
        """Work it out from a probe."""
        rows = None if batches is None else batches * found.rows
        if limit is not None:
            rows = limit if rows is None else min(rows, limit)
        there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
        return cls(
            folder=folder,
            sites=found.sites,
            kind=found.kind,
            batches=batches if rows is None or not found.rows else -(-rows // found.rows),
            units=None if batches is None else -(-batches // per_unit),
            rows=rows,
            row_bytes=found.row_bytes,
            seconds=found.seconds,
            free=shutil.disk_usage(there).free,
        )

    @property
    def nbytes(self) -> int | None:
        """Bytes of all columns, about."""
        return None if self.rows is None else self.rows * self.row_bytes

    def __str__(self) -> str:
        width = max(len(path) for path in self.sites)
        lines = [f"harvest to {self.folder}: {len(self.sites)} sites, one row per {self.kind[:-1]}"]
        for path, (dtype, shape) in self.sites.items():
            wide = dtype.itemsize * math.prod(shape)
            lines.append(f"  {path.ljust(width)}  {str(dtype)[6:]:>9} {shape!s:>12} {wide:>8,} B/row")
        rows = "an unknown number of" if self.rows is None else f"about {self.rows:,}"
        size = "?" if self.nbytes is None else f"{self.nbytes / 1e9:,.2f} GB"
        lines.append(f"  {rows} rows of {self.row_bytes:,} bytes: {size} of {self.free / 1e9:,.0f} GB free")
        if self.batches is not None:
            left = f"{self.batches * self.seconds:,.0f} s"
            lines.append(f"  about {self.batches:,} batches at {self.seconds * 1e3:,.0f} ms: {left} for one process")
        return "\n".join(lines)
