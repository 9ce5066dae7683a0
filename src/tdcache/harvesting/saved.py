"""Dicts of tensors in files of four kinds, each name and dtype as it was."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import DamagedError, StoreError
from tdcache.store.export import check_memmap, safe_name
from tdcache.store.safetensors import read_tensors, write_tensors

__all__ = ["SUFFIXES", "load_activations", "save_activations"]

SUFFIXES = (".npz", ".safetensors", ".pt", ".memmap")
"""What the names of files of activations end in."""
_DTYPES = "__dtypes__"


def save_activations(acts: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write named tensors; the suffix says how.

    ``.safetensors``; ``.npz`` (NumPy has no bfloat16 and no float8: such tensors are stored as float32, which is exact,
    and come back as they were); ``.pt`` (loaded without running anything); ``.memmap``, a folder that
    ``TensorDict.load_memmap`` reads. Without one of these suffixes ``.npz`` is added behind the name, never in place of
    a part of it.

    Args:
        acts: tensors by name; any name.
        path: where; folders are made.

    Returns:
        The path that was written.

    Example:
        >>> import tempfile
        >>> target = save_activations({"layers.0": torch.ones(2)}, Path(tempfile.mkdtemp(), "acts.step50"))
        >>> target.name, list(load_activations(target))
        ('acts.step50.npz', ['layers.0'])
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        target = target.with_name(target.name + ".npz")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu() for name, tensor in acts.items()}
    if target.suffix == ".safetensors":
        write_tensors(kept, target)
    elif target.suffix == ".pt":
        torch.save(_of_their_own(kept), target)
    elif target.suffix == ".memmap":
        for name, tensor in kept.items():
            check_memmap(name, tensor.dtype)
        TensorDict(kept, batch_size=[]).memmap(str(target))
    else:
        _save_npz(kept, target)
    return target


def _of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; a copy of each that is not the one and only user of all of its memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        found[name] = tensor if is_whole else tensor.clone()
        seen.add(storage.data_ptr())
    return found


def _save_npz(acts: Mapping[str, Tensor], target: Path) -> None:
    import numpy as np

    lost = {name: str(each.dtype)[6:] for name, each in acts.items() if _is_strange(each.dtype)}
    with zipfile.ZipFile(target, "w", allowZip64=True) as archive:  # np.savez has parameters, which names may be
        for name, tensor in acts.items():
            _add(archive, name, _for_numpy(tensor))  # one at a time: a copy is gone before the next is made
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
    """What :func:`save_activations` wrote: names, shapes and dtypes as they were; nothing is executed.

    Raises:
        StoreError: no such file, or a suffix that says nothing.
        DamagedError: a file that is not what was written.
    """
    source = Path(path)
    if not source.exists() and source.with_name(source.name + ".npz").exists():
        source = source.with_name(source.name + ".npz")
    if not source.exists() or source.suffix not in SUFFIXES:
        raise StoreError(f"{source} is no file of activations; they end in {', '.join(SUFFIXES)}", path=source)
    if source.suffix == ".safetensors":
        return read_tensors(source)
    if source.suffix == ".memmap":
        _check_folder(source)
        loaded: Any = TensorDict.load_memmap(str(source))
        return {str(name): tensor for name, tensor in loaded.items()}
    try:
        if source.suffix == ".pt":
            return dict(torch.load(source, weights_only=True, map_location="cpu"))
        return _load_npz(source)
    except Exception as error:
        raise DamagedError(f"{source} cannot be read: {type(error).__name__}: {error}", path=source) from error


def _check_folder(source: Path) -> None:
    """Hold the sizes of a folder's files against what it says of them: a map would lengthen a short one with zeros."""
    try:
        said = json.loads((source / "meta.json").read_bytes())
        described = {name: each for name, each in said.items() if isinstance(each, dict)}
        sizes = {
            name: getattr(torch, each["dtype"].removeprefix("torch.")).itemsize * math.prod(each["shape"])
            for name, each in described.items()
        }
        if said["_type"] != str(TensorDict):
            raise ValueError(f"it is a {said['_type']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"{source} is no folder of activations: {type(error).__name__}: {error}", path=source
        ) from error
    for name, size in sizes.items():
        file = source / f"{safe_name(name)}.memmap"
        found = file.stat().st_size if file.exists() else 0
        if found < size:
            raise DamagedError(
                f"{file} has {found} bytes where meta.json says {size}; it is truncated, save it again", path=file
            )


def _load_npz(source: Path) -> dict[str, Tensor]:
    import numpy as np

    with np.load(source, allow_pickle=False) as archive:
        lost = json.loads(str(archive[_DTYPES])) if _DTYPES in archive.files else {}
        return {name: _as_saved(archive[name], lost.get(name)) for name in archive.files if name != _DTYPES}


def _as_saved(array: Any, dtype: str | None) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))
