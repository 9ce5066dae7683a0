"""Saves interventions to a directory: arguments as JSON, their tensors as safetensors.

Loading a pickle runs code, so an intervention from somebody else would have to be trusted; these files are only data.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.errors import DamagedError, HookSignatureError, StoreError, listed
from tdcache.interventions.ablation import Ablation
from tdcache.interventions.addition import ActivationAddition
from tdcache.interventions.base import Intervention
from tdcache.interventions.causal_tracing import CausalTracing
from tdcache.interventions.patching import ActivationPatching
from tdcache.interventions.path_patching import PathPatching
from tdcache.interventions.resume import ResumeFrom
from tdcache.interventions.steering import SteeringVectors
from tdcache.named_places import Names
from tdcache.store.atomic import write_bytes
from tdcache.store.files import as_store_error
from tdcache.store.regular import parse_json, read_bounded
from tdcache.store.safetensors import read_tensors, write_tensors

__all__ = ["load_intervention", "save_intervention"]

_KINDS: Mapping[str, type[Intervention | ResumeFrom]] = {
    kind.__name__: kind
    for kind in (
        Ablation, ActivationAddition, ActivationPatching, CausalTracing, PathPatching, ResumeFrom, SteeringVectors,
    )
}  # fmt: skip
_CONFIG, _FORMAT, _MOST = "intervention.json", 1, 10_000_000
# The config names the current one, so that renaming the config replaces both files atomically.
_TENSORS = ("tensors.safetensors", "tensors.1.safetensors")


def save_intervention(intervention: Intervention | ResumeFrom, directory: str | os.PathLike[str]) -> None:
    """Write an intervention with its tensors to a directory, which is created if necessary.

    An existing one is replaced atomically: whatever fails, the directory holds either the old or the new one.

    Functions (``patch_fn``, ``steer_fn``, ``metric``, a predicate) and tables of names, which belong to one model, are
    not saved and have to be passed again to :func:`load_intervention`; a selector has to be a regex, or a sequence of
    these.

    Raises:
        StoreError: an argument is not data, or the class is a user's subclass, which could not be found on loading.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_intervention(SteeringVectors("0", torch.ones(3), coefficient=2.0), folder)
        ...     load_intervention(folder)
        SteeringVectors('0', vectors=Tensor(3,), coefficient=2.0)
    """
    kind = type(intervention).__name__
    if _KINDS.get(kind) is not type(intervention):
        raise StoreError(f"{kind} is none of {', '.join(_KINDS)}, so it could not be loaded again")
    tensors: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    again: list[str] = []
    for name, parameter in inspect.signature(type(intervention)).parameters.items():
        value = getattr(intervention, name)
        is_function = callable(value) and not isinstance(value, Tensor | TensorDictBase) and name != "selector"
        if is_function or isinstance(value, Names):
            again.append(name)
        elif value is not parameter.default:
            arguments[name] = _as_data(value, name, tensors)
    folder = Path(directory)
    old, new = _tensor_names(folder)
    config = {"format": _FORMAT, "kind": kind, "arguments": arguments, "give_again": again, "tensors": new}
    with as_store_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, folder / new)
        write_bytes(folder / _CONFIG, json.dumps(config, indent=1).encode() + b"\n")
        (folder / old).unlink(missing_ok=True)


def _tensor_names(folder: Path) -> tuple[str, str]:
    """The file that the config of a directory names, and the one to write."""
    try:
        there = _read_config(folder / _CONFIG)["tensors"]
    except DamagedError:  # or there is none
        there = _TENSORS[1]
    return there, _TENSORS[there == _TENSORS[0]]


def load_intervention(directory: str | os.PathLike[str], **functions: Any) -> Any:
    """The intervention that was saved in a directory, for any model with the same paths.

    Args:
        directory: the directory that it was saved to.
        **functions: the functions that it was made with, by argument name; they are not in the files.

    Raises:
        DamagedError: a file is missing, damaged, or does not describe an intervention.
        StoreError: a function is missing, or was not an argument.
    """
    folder = Path(directory)
    config = _read_config(folder / _CONFIG)
    kind, again = _KINDS[config["kind"]], set(config["give_again"])
    if again != set(functions):
        raise StoreError(
            f"{kind.__name__} was saved without its functions: give {listed(sorted(again)) or 'none'} "
            "to load_intervention, "
            f"got {listed(sorted(functions)) or 'none'}"
        )
    try:
        tensors = read_tensors(folder / config["tensors"], follow_links=False)
    except FileNotFoundError:
        raise DamagedError(f"{folder / config['tensors']} is missing", path=folder / config["tensors"]) from None
    arguments = {name: _from_data(value, tensors, folder) for name, value in config["arguments"].items()}
    if clash := set(arguments) - set(inspect.signature(kind).parameters):
        raise DamagedError(f"{folder / _CONFIG}: {kind.__name__} has no argument {listed(sorted(clash))}", path=folder)
    try:
        return kind(**arguments, **functions)
    except HookSignatureError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder / _CONFIG} describes no {kind.__name__}: {error}", path=folder) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_bounded(path, most=_MOST), path)
    except FileNotFoundError:
        raise DamagedError(
            f"{path} is missing; is {path.parent} the directory of an intervention?",
            path=path,
        ) from None
    good = isinstance(config, dict) and isinstance(config.get("arguments"), dict)
    again = config.get("give_again") if good and str(config.get("kind")) in _KINDS else None
    if not isinstance(again, list) or not all(isinstance(name, str) for name in again):
        raise DamagedError(f"{path} does not describe an intervention", path=path)
    if config.setdefault("tensors", _TENSORS[0]) not in _TENSORS:
        raise DamagedError(f"{path} names {config['tensors']!r} as its tensors, not {listed(_TENSORS)}", path=path)
    if config.get("format") != _FORMAT:
        raise DamagedError(f"{path} is of format {config.get('format')!r}; this version reads {_FORMAT}", path=path)
    return config  # type: ignore[no-any-return]  # checked above


def _as_data(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON types; tensors are put into ``tensors`` under names that begin with ``name``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, regex.Pattern | re.Pattern):
        raise StoreError(
            f"{name}= is a compiled pattern; use its text, with flags in it as in '(?i)layers', to save it"
        )
    if isinstance(value, TensorDictBase | Mapping):
        nodes = {"tensordict" if isinstance(value, TensorDictBase) else "mapping": None}
        entries = [[key, _as_data(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {next(iter(nodes)): entries}
    if isinstance(value, tuple | list | range):
        items = [_as_data(item, f"{name}/{at}", tensors) for at, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else {"list": items}
    raise StoreError(
        f"{name}= is {type(value).__name__}, which is no data: a selector can be saved as a regex, a "
        "source as a tensor or "
        "TensorDict (resolve the proxy of a run first)"
    )


def _from_data(data: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise DamagedError(f"{folder / _CONFIG} holds a bare list", path=folder / _CONFIG)
        return data
    try:
        ((kind, content),) = data.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "slice":
            return slice(*content)
        if kind in ("list", "tuple"):
            items = [_from_data(item, tensors, folder) for item in content]
            return tuple(items) if kind == "tuple" else items
        if kind in ("tensordict", "mapping"):
            entries = {str(key): _from_data(item, tensors, folder) for key, item in content}
            return TensorDict(entries, batch_size=[]) if kind == "tensordict" else entries
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder / _CONFIG} does not fit its tensors: {error!r}", path=folder / _CONFIG) from None
    raise DamagedError(f"{folder / _CONFIG} holds an unknown kind of value, {kind!r}", path=folder / _CONFIG)
