"""Rows as Hugging Face datasets: a folder for ``load_from_disk``, and one in the layout of the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tdcache.errors import StoreError
from tdcache.store.card import dataset_card
from tdcache.store.dtypes import for_numpy
from tdcache.store.reader import StoreReader

__all__ = ["write_hf", "write_parquet"]

_CHUNK_BYTES = 1 << 26
_PER_FILE = 4  # chunks


def write_hf(dataset: StoreReader, path: Path) -> None:
    """Fill a folder for ``datasets.load_from_disk``.

    Raises:
        StoreError: the library is not installed, or a site has more dimensions than Arrow's arrays.
    """
    hf, features = _library(), _features(dataset)
    parts = [_table(hf, features, rows) for rows in _chunks(dataset, _CHUNK_BYTES)]
    # Of no rows it would write no file, and then not load that.
    hf.concatenate_datasets(parts).save_to_disk(path, **({} if len(dataset) else {"num_shards": 1}))
    (path / "README.md").write_text(dataset_card(dataset), encoding="utf-8")


def write_parquet(dataset: StoreReader, path: Path) -> None:
    """Fill a folder in the layout of the Hub: a card, and files that are written one after the other.

    Raises:
        StoreError: the library is not installed, or a site has more dimensions than Arrow's arrays.
    """
    hf, features = _library(), _features(dataset)
    (path / "data").mkdir()
    size = _PER_FILE * _CHUNK_BYTES
    files = max(1, -(-len(dataset) // _rows_per(dataset, size)))
    for number, rows in enumerate(_chunks(dataset, size)):
        _table(hf, features, rows).to_parquet(path / "data" / f"train-{number:05d}-of-{files:05d}.parquet")
    (path / "README.md").write_text(dataset_card(dataset, files="data/train-*.parquet"), encoding="utf-8")


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise StoreError("exporting to Hugging Face datasets needs them: pip install 'tdcache[hf]'") from None


def _rows_per(dataset: StoreReader, size: int) -> int:
    return max(1, size // max(1, dataset.row_bytes))


def _chunks(dataset: StoreReader, size: int) -> Iterator[Any]:
    """Rows in order, so many bytes at a time; of no rows one empty chunk, which has the columns."""
    rows = _rows_per(dataset, size)
    for begin in range(0, max(1, len(dataset)), rows):
        yield dataset.span(begin, min(begin + rows, len(dataset)))


def _table(hf: Any, features: Any, rows: Any) -> Any:
    return hf.Dataset.from_dict({key: for_numpy(rows[key]) for key in features}, features=features)


def _features(dataset: StoreReader) -> Any:
    hf = _library()

    def feature(key: str) -> Any:
        dtype, shape = dataset.describe(key)
        name = for_numpy(torch.empty(0, dtype=dtype)).dtype.name
        if not shape:
            return hf.Value(name)
        return hf.Sequence(hf.Value(name), length=shape[0]) if len(shape) == 1 else hf.Array2D(shape, name)

    wide = [key for key in dataset.keys if len(dataset.describe(key)[1]) > 2]
    if wide:
        raise StoreError(f"site {wide[0]!r} has more than two feature dimensions, which Arrow's arrays cannot hold")
    return hf.Features({key: feature(key) for key in dataset.columns})
