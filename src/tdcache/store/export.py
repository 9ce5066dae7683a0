"""Rows in the formats of others: streamed where the format allows it, and there whole or not at all."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import StoreError

if TYPE_CHECKING:
    from tdcache.store.dataset import ActivationDataset

__all__ = ["check_memmap", "export_rows", "safe_name"]

_CHUNK_BYTES = 1 << 26
_MEMMAP_WORDS = ("shape", "device", "_type", "_class", "_format_version", "_names")
_NUMPY_KNOWS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
    | {torch.bool, torch.complex64}
)


def export_rows(
    dataset: ActivationDataset,
    path: str | os.PathLike[str],
    kind: Literal["npz", "pt", "memmap", "hf", "arrow"] | None = None,
) -> Path:
    """Write all rows of a store in another format; on any failure nothing is there under ``path``.

    ``"npz"``: one array per column, for ``numpy.load``. ``"pt"``: a dict of tensors, for
    ``torch.load(..., weights_only=True)``; held in memory. ``"memmap"``: a folder for ``TensorDict.load_memmap``.
    ``"hf"``, also ``"arrow"``: a folder for ``datasets.load_from_disk`` (extra ``hf``). NumPy and Arrow have no
    bfloat16 and no float8: there such columns become float32, which holds their values exactly.

    Args:
        dataset: the store.
        path: the file or folder; it must not be there.
        kind: the format; by default what a suffix ``.npz`` or ``.pt`` says.

    Returns:
        ``path``.

    Raises:
        StoreError: ``path`` is there, or a site's name would lead out of it.
        ValueError: no such format, or none given and none in the suffix.
    """
    target = Path(path)
    kind = kind or _KINDS.get(target.suffix)  # type: ignore[assignment]
    if kind not in _WRITERS:
        raise ValueError(f"export knows {', '.join(map(repr, _WRITERS))}, got {kind!r}")
    if target.exists():
        raise StoreError(f"{target} is there already; export to another path, or remove it first", path=target)
    for key in (*dataset.keys, *dataset.row_keys):
        safe_name(key)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _WRITERS[kind](dataset, temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise
    return target


def safe_name(key: str) -> str:
    """``key``, where it can be a file's name.

    Raises:
        StoreError: it would lead to another folder.
    """
    if not key or key in (".", "..") or any(each in key for each in "/\\\0") or key.startswith("~"):
        raise StoreError(f"site {key!r} cannot be the name of a file, so it cannot be exported; read it by ds[{key!r}]")
    return key


def check_memmap(key: str, dtype: torch.dtype) -> None:
    """Refuse what ``TensorDict.load_memmap`` would not read again.

    Raises:
        StoreError: a float8 tensor, or a name that would lead to another folder or is one of TensorDict's own.
    """
    if safe_name(key) in _MEMMAP_WORDS:
        raise StoreError(f"{key!r} is a name that a memory-mapped TensorDict keeps for itself; use another format")
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise StoreError(
            f"{key!r} of {dtype} cannot be read again from a memory-mapped TensorDict; use another format, or cast it"
        )


def _chunks(dataset: ActivationDataset) -> Iterator[tuple[int, TensorDict]]:
    """Rows in order, some at a time, each with the number of its first row."""
    rows = max(1, _CHUNK_BYTES * len(dataset) // max(1, dataset.nbytes))
    for begin in range(0, max(1, len(dataset)), rows):  # of no rows one empty chunk: it has the columns
        yield begin, dataset.span(begin, min(begin + rows, len(dataset)))


def _for_numpy(tensor: Tensor) -> Any:
    return (tensor if tensor.dtype in _NUMPY_KNOWS else tensor.float()).numpy()


def _write_npz(dataset: ActivationDataset, path: Path) -> None:
    import numpy as np

    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for key in (*dataset.keys, *dataset.row_keys):
            dtype, shape = dataset.describe(key)
            like = _for_numpy(torch.empty((0, *shape), dtype=dtype))
            described = {"descr": like.dtype.str, "fortran_order": False, "shape": (len(dataset), *shape)}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, described)
                step = max(1, _CHUNK_BYTES // max(1, like.itemsize * torch.Size(shape).numel()))
                for begin in range(0, len(dataset), step):
                    part = dataset.span(begin, min(begin + step, len(dataset)), [key])[key]
                    file.write(memoryview(_for_numpy(part)).cast("B") if part.numel() else b"")


def _write_pt(dataset: ActivationDataset, path: Path) -> None:
    torch.save(dict(dataset[...].items()), path)


def _write_memmap(dataset: ActivationDataset, path: Path) -> None:
    for key in dataset.keys:
        check_memmap(key, dataset.describe(key)[0])
    made: TensorDict = TensorDict({}, batch_size=[len(dataset)]).memmap_(str(path))
    for key in (*dataset.keys, *dataset.row_keys):
        dtype, shape = dataset.describe(key)
        made.make_memmap(key, shape=torch.Size((len(dataset), *shape)), dtype=dtype)
    for begin, rows in _chunks(dataset):
        for key, part in rows.items():
            made.get(key)[begin : begin + len(rows)].copy_(part)


def _write_hf(dataset: ActivationDataset, path: Path) -> None:
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


_WRITERS = {"npz": _write_npz, "pt": _write_pt, "memmap": _write_memmap, "hf": _write_hf, "arrow": _write_hf}
_KINDS = {".npz": "npz", ".pt": "pt"}
