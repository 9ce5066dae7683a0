"""Rows in the formats of others: streamed where the format allows it, and there whole or not at all."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from tdcache.store.arrow import write_hf, write_parquet
from tdcache.store.atomic import new_folder, refuse_existing, replacing_file
from tdcache.store.dtypes import for_numpy
from tdcache.store.files import as_store_error, save_by_torch
from tdcache.store.memmap import check_memmap, safe_name, write_memmap_column, write_memmap_meta
from tdcache.store.reader import StoreReader

__all__ = ["export_rows"]

_CHUNK_BYTES = 1 << 26


def export_rows(
    dataset: StoreReader,
    path: str | os.PathLike[str],
    kind: Literal["npz", "pt", "memmap", "hf", "arrow", "parquet"] | None = None,
) -> Path:
    """Write all rows of a store in another format; on any failure nothing is there under ``path``.

    What is read is compared with its checksums. What an export that was killed has left is removed by the next one.

    ``"npz"``: one array per column, for ``numpy.load``. ``"pt"``: a dict of tensors, for
    ``torch.load(..., weights_only=True)``; held in memory. ``"memmap"``: a folder for ``TensorDict.load_memmap``.
    ``"hf"``, also ``"arrow"``: a folder for ``datasets.load_from_disk`` (extra ``hf``). ``"parquet"``: a folder as the
    Hugging Face Hub has it, for ``datasets.load_dataset``: ``data/train-00000-of-00003.parquet`` and so on. Both with a
    dataset card. NumPy and Arrow have no bfloat16 and no float8: there such columns become float32, which holds their
    values exactly.

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


def _parts(dataset: StoreReader, key: str) -> Iterator[Tensor]:
    """One column, some rows at a time."""
    dtype, shape = dataset.describe(key)
    rows = max(1, _CHUNK_BYTES // max(1, dtype.itemsize * math.prod(shape)))
    for begin in range(0, len(dataset), rows):
        yield dataset.span(begin, min(begin + rows, len(dataset)), [key])[key]


def _write_npz(dataset: StoreReader, target: IO[bytes]) -> None:
    import numpy as np

    with zipfile.ZipFile(target, "w", allowZip64=True) as archive:
        for key in (*dataset.keys, *dataset.row_keys):
            dtype, shape = dataset.describe(key)
            like = for_numpy(torch.empty((0, *shape), dtype=dtype))
            described = {"descr": like.dtype.str, "fortran_order": False, "shape": (len(dataset), *shape)}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, described)
                for part in _parts(dataset, key):
                    file.write(memoryview(for_numpy(part)).cast("B") if part.numel() else b"")


def _write_pt(dataset: StoreReader, target: IO[bytes]) -> None:
    save_by_torch(dict(dataset.rows(...).items()), target)


def _write_memmap(dataset: StoreReader, path: Path) -> None:
    for key in dataset.keys:
        check_memmap(key, dataset.describe(key)[0])
    described = {key: dataset.describe(key) for key in dataset.columns}
    shapes = {key: (dtype, (len(dataset), *shape)) for key, (dtype, shape) in described.items()}
    for key, (dtype, shape) in shapes.items():
        write_memmap_column(path, key, math.prod(shape) * dtype.itemsize, _parts(dataset, key))
    write_memmap_meta(path, shapes, batch_size=(len(dataset),))


_FILES = {"npz": _write_npz, "pt": _write_pt}
_FOLDERS = {"memmap": _write_memmap, "hf": write_hf, "arrow": write_hf, "parquet": write_parquet}
_KINDS = {".npz": "npz", ".pt": "pt"}
