"""Rows in the formats of others: streamed where the format allows it, and there whole or not at all."""

from __future__ import annotations

import importlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.atomic import new_folder, refuse_existing, replacing_file
from tdcache.store.card import dataset_card
from tdcache.store.files import as_store_error
from tdcache.store.memmap import check_memmap, safe_name, write_memmap_column, write_memmap_meta
from tdcache.store.reader import StoreReader

__all__ = ["export_rows"]

_CHUNK_BYTES = 1 << 26
_NUMPY_KNOWS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
    | {torch.bool, torch.complex64}
)


def export_rows(
    dataset: StoreReader,
    path: str | os.PathLike[str],
    kind: Literal["npz", "pt", "memmap", "hf", "arrow"] | None = None,
) -> Path:
    """Write all rows of a store in another format; on any failure nothing is there under ``path``.

    What is read is compared with its checksums. What an export that was killed has left is removed by the next one.

    ``"npz"``: one array per column, for ``numpy.load``. ``"pt"``: a dict of tensors, for
    ``torch.load(..., weights_only=True)``; held in memory. ``"memmap"``: a folder for ``TensorDict.load_memmap``.
    ``"hf"``, also ``"arrow"``: a folder for ``datasets.load_from_disk`` (extra ``hf``), with a dataset card. NumPy and
    Arrow have no bfloat16 and no float8: there such columns become float32, which holds their values exactly.

    Args:
        dataset: the store.
        path: the file or folder; it must not be there.
        kind: the format; by default what a suffix ``.npz`` or ``.pt`` says.

    Returns:
        ``path``.

    Raises:
        StoreError: ``path`` is there, the disk does not take it, or a site's name would lead out of it.
        DamagedError: a byte of the store is not the one that was written.
        ValueError: no such format, or none given and none in the suffix.
    """
    target = Path(path).absolute()
    kind = kind or _KINDS.get(target.suffix)  # type: ignore[assignment]
    if kind not in _FILES and kind not in _FOLDERS:
        raise ValueError(f"export knows {', '.join(map(repr, [*_FILES, *_FOLDERS]))}, got {kind!r}")
    refuse_existing(target)
    for key in (*dataset.keys, *dataset.row_keys):
        safe_name(key)
    checked = dataset.checking()
    with as_store_error(target):
        if kind in _FOLDERS:
            with new_folder(target) as folder:
                _FOLDERS[kind](checked, folder)
        else:
            with replacing_file(target) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
                _FILES[kind](checked, file)
    return target


def _chunks(dataset: StoreReader) -> Iterator[tuple[int, TensorDict]]:
    """Rows in order, some at a time, each with the number of its first row."""
    rows = max(1, _CHUNK_BYTES // max(1, dataset.row_bytes))
    for begin in range(0, max(1, len(dataset)), rows):  # of no rows one empty chunk: it has the columns
        yield begin, dataset.span(begin, min(begin + rows, len(dataset)))


def _parts(dataset: StoreReader, key: str) -> Iterator[Tensor]:
    """One column, some rows at a time."""
    dtype, shape = dataset.describe(key)
    rows = max(1, _CHUNK_BYTES // max(1, dtype.itemsize * math.prod(shape)))
    for begin in range(0, len(dataset), rows):
        yield dataset.span(begin, min(begin + rows, len(dataset)), [key])[key]


def _for_numpy(tensor: Tensor) -> Any:
    return (tensor if tensor.dtype in _NUMPY_KNOWS else tensor.float()).numpy()


def _write_npz(dataset: StoreReader, target: IO[bytes]) -> None:
    import numpy as np

    with zipfile.ZipFile(target, "w", allowZip64=True) as archive:
        for key in (*dataset.keys, *dataset.row_keys):
            dtype, shape = dataset.describe(key)
            like = _for_numpy(torch.empty((0, *shape), dtype=dtype))
            described = {"descr": like.dtype.str, "fortran_order": False, "shape": (len(dataset), *shape)}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, described)
                for part in _parts(dataset, key):
                    file.write(memoryview(_for_numpy(part)).cast("B") if part.numel() else b"")


def _write_pt(dataset: StoreReader, target: IO[bytes]) -> None:
    torch.save(dict(dataset.rows(...).items()), target)


def _write_memmap(dataset: StoreReader, path: Path) -> None:
    for key in dataset.keys:
        check_memmap(key, dataset.describe(key)[0])
    described = {key: dataset.describe(key) for key in dataset.columns}
    shapes = {key: (dtype, (len(dataset), *shape)) for key, (dtype, shape) in described.items()}
    for key, (dtype, shape) in shapes.items():
        write_memmap_column(path, key, math.prod(shape) * dtype.itemsize, _parts(dataset, key))
    write_memmap_meta(path, shapes, batch_size=(len(dataset),))


def _write_hf(dataset: StoreReader, path: Path) -> None:
    try:
        hf: Any = importlib.import_module("datasets")
    except ImportError:
        raise StoreError("exporting to Hugging Face datasets needs them: pip install 'tdcache[hf]'") from None

    def feature(key: str) -> Any:
        dtype, shape = dataset.describe(key)
        name = _for_numpy(torch.empty(0, dtype=dtype)).dtype.name
        if not shape:
            return hf.Value(name)
        return hf.Sequence(hf.Value(name), length=shape[0]) if len(shape) == 1 else hf.Array2D(shape, name)

    wide = [key for key in dataset.keys if len(dataset.describe(key)[1]) > 2]
    if wide:
        raise StoreError(f"site {wide[0]!r} has more than two feature dimensions, which Arrow's arrays cannot hold")
    columns = (*dataset.keys, *dataset.row_keys)
    features = hf.Features({key: feature(key) for key in columns})
    parts = [
        hf.Dataset.from_dict({key: _for_numpy(rows[key]) for key in columns}, features=features)
        for _, rows in _chunks(dataset)
    ]
    # Of no rows it would write no file, and then not load that.
    hf.concatenate_datasets(parts).save_to_disk(path, **({} if len(dataset) else {"num_shards": 1}))
    (path / "README.md").write_text(dataset_card(dataset), encoding="utf-8")


_FILES = {"npz": _write_npz, "pt": _write_pt}
_FOLDERS = {"memmap": _write_memmap, "hf": _write_hf, "arrow": _write_hf}
_KINDS = {".npz": "npz", ".pt": "pt"}
