"""Saves and loads dicts of tensors in four file formats, keeping names and dtypes.

The formats lose something when used directly: NumPy has no bfloat16, ``np.savez`` cannot store every name, and
safetensors refuses tensors that share memory. Loading never executes anything from the file.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tdcache.errors import DamagedError, StoreError
from tdcache.store.atomic import new_folder, replacing_file
from tdcache.store.dtypes import DTYPES, dtype_name
from tdcache.store.files import as_store_error, save_by_torch
from tdcache.store.memmap import check_memmap, is_text, load_memmap_folder, write_memmap_column, write_memmap_meta
from tdcache.store.regular import open_regular
from tdcache.store.safetensors import read_tensors, write_tensors

__all__ = ["SUFFIXES", "load_activations", "save_activations"]

SUFFIXES = (".npz", ".safetensors", ".pt", ".memmap")
"""What the names of files of activations end in."""
_DTYPES = "__dtypes__"


def save_activations(acts: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write named tensors in the format of the suffix; an existing file is replaced only once the new one is complete.

    ``.safetensors``; ``.npz`` (NumPy has no bfloat16 and no float8: such tensors are stored as float32, which is exact,
    and restored when loaded); ``.pt`` (loaded without executing anything); ``.memmap``, a folder that
    ``TensorDict.load_memmap`` reads. If the path has none of these suffixes, ``.npz`` is appended to it.

    Args:
        acts: tensors by name; any string is a name.
        path: the file; missing folders are created.

    Returns:
        The path that was written.

    Raises:
        StoreError: the file cannot be written, a value is no dense tensor, or the format cannot hold a name or a dtype.

    Example:
        >>> import tempfile
        >>> target = save_activations({"layers.0": torch.ones(2)}, Path(tempfile.mkdtemp(), "acts.step50"))
        >>> target.name, list(load_activations(target))
        ('acts.step50.npz', ['layers.0'])
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        target = target.with_name(target.name + ".npz")
    for name, tensor in acts.items():
        _check_dense(name, tensor, target)
    kept = {name: tensor.detach().cpu() for name, tensor in acts.items()}
    with as_store_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            write_tensors(kept, target)
        elif target.suffix == ".memmap":
            _save_folder(kept, target)
        else:
            save = _save_pt if target.suffix == ".pt" else _save_npz
            with replacing_file(target) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
                save(kept, file)
    return target


def _check_dense(name: str, value: Any, target: Path) -> None:
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not (value.is_nested or value.is_meta):
            return
        kind = "a nested tensor" if value.is_nested else f"of {value.layout} on {value.device}"
    else:
        kind = type(value).__name__
    raise StoreError(
        f"files of activations hold dense tensors with values, and {name!r} is {kind}; give it as a dense tensor (for "
        "a sparse one, tensor.to_dense()), or leave it out",
        path=target,
    )


def _save_folder(acts: Mapping[str, Tensor], target: Path) -> None:
    for name, tensor in acts.items():
        check_memmap(name, tensor.dtype)
    with new_folder(target, replace=True) as folder:
        for name, tensor in acts.items():
            write_memmap_column(folder, name, tensor.nbytes, [tensor])
        write_memmap_meta(folder, {name: (each.dtype, tuple(each.shape)) for name, each in acts.items()}, batch_size=())


def _save_pt(acts: Mapping[str, Tensor], file: IO[bytes]) -> None:
    save_by_torch(_of_their_own(acts), file)


def _of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a copy of each that shares its storage or does not fill it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        found[name] = tensor if is_whole else tensor.clone()
        seen.add(storage.data_ptr())
    return found


def _save_npz(acts: Mapping[str, Tensor], file: IO[bytes]) -> None:
    import numpy as np

    unknown = [name for name in acts if "\0" in name or not is_text(name)]
    if unknown:  # zipfile would cut the name at the zero
        raise StoreError(
            f"{unknown[0]!r} cannot be a name in an archive; save to .safetensors, or give it another name"
        )
    lost = {name: dtype_name(each.dtype) for name, each in acts.items() if _is_strange(each.dtype)}
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:  # np.savez refuses names of its own parameters
        for name, tensor in acts.items():
            _add(archive, name, _for_numpy(tensor))  # one at a time, so that only one copy exists at once
        if lost:
            _add(archive, _DTYPES, np.array(json.dumps(lost)))


def _add(archive: zipfile.ZipFile, name: str, array: Any) -> None:
    import numpy as np

    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _for_numpy(tensor: Tensor) -> Any:
    return (tensor.float() if _is_strange(tensor.dtype) else tensor).numpy()


def _is_strange(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or (dtype.is_floating_point and dtype.itemsize == 1)


def load_activations(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load what :func:`save_activations` wrote, with the original names, shapes and dtypes; nothing is executed.

    The tensors of a ``.memmap`` folder are read when they are used, through private maps: writing to a tensor does not
    change the file.

    Raises:
        StoreError: no such file, or an unknown suffix.
        DamagedError: the file is truncated, forged or not a regular file, or the folder contains a link.
    """
    source = Path(path)
    if not source.exists() and source.with_name(source.name + ".npz").exists():
        source = source.with_name(source.name + ".npz")
    if not source.exists() or source.suffix not in SUFFIXES:
        raise StoreError(f"{source} is no file of activations; they end in {', '.join(SUFFIXES)}", path=source)
    if source.suffix == ".safetensors":
        return read_tensors(source)
    if source.suffix == ".memmap":
        return load_memmap_folder(source)
    with open_regular(source, follow_links=True) as (descriptor, _), os.fdopen(descriptor, "rb", closefd=False) as file:
        try:
            return _load_pt(file) if source.suffix == ".pt" else _load_npz(file)
        except Exception as error:
            raise DamagedError(f"{source} cannot be read: {type(error).__name__}: {error}", path=source) from error


def _load_pt(file: IO[bytes]) -> dict[str, Tensor]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            _refuse_compressed(archive)
    file.seek(0)
    found = torch.load(file, weights_only=True, map_location="cpu")
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in found.items()
    ):
        raise ValueError("it holds something else than a dict of tensors")
    return dict(found)


def _refuse_compressed(archive: zipfile.ZipFile) -> None:
    """Refuse compressed entries: a file of a few kilobytes could expand to terabytes."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename!r} is compressed, which save_activations never does")


def _load_npz(file: IO[bytes]) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        _refuse_compressed(archive)
        arrays = {entry.filename.removesuffix(".npy"): _read_array(archive, entry) for entry in archive.infolist()}
    lost = json.loads(str(arrays.pop(_DTYPES))) if _DTYPES in arrays else {}
    return {name: _as_saved(array, lost.get(name)) for name, array in arrays.items()}


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    """Read one array after comparing its header with the size of its entry; NumPy would allocate whatever it states."""
    import numpy as np

    with archive.open(entry) as file:
        header = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file) == (1, 0) else None
        header = header or np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise ValueError(f"{entry.filename!r} of shape {shape}, {dtype}, is not of {entry.file_size} bytes")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _as_saved(array: Any, dtype: str | None) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(DTYPES[dtype])
