"""Reads dictionaries from the file layouts of several libraries, and writes one of them.

A file either computes the same as in the library that wrote it, or is refused: an ignored setting would give latents
that look plausible and are wrong.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tdcache.errors import StoreError, listed
from tdcache.pipeline.dictionaries import Dictionary, DictionaryConfig, Normalization
from tdcache.store.safetensors import read_tensors, write_tensors

__all__ = ["load_dictionary", "save_dictionary"]

# Names of the same tensors in other libraries; matrices under these names are transposed.
_TENSOR_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
_NUMPY_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec"}
_CONFIG_FILES = ("cfg.json", "config.json")
_NOT_WEIGHTS = ("sparsity.safetensors",)
_NUMPY = "params.npz"
_MOST = 1 << 24  # bytes of config
# Settings of other libraries that change what a dictionary computes, with the values that mean "off".
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "signed": (False, None),
}
_TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_AVERAGE = "expected_average_only_in"


def load_dictionary(folder: str | Path, *, norm_scaling_factor: float | None = None) -> Dictionary:
    """Read a dictionary from a folder with a JSON config and a safetensors file, or with Gemma Scope's ``params.npz``.

    Reads the files of :func:`save_dictionary`, the layouts of SAELens (``standard``, ``topk``, ``jumprelu``, ``gated``,
    transcoders with and without skip connection) and of sparsify (``topk``, with ``transcode`` and
    ``skip_connection``), and crosscoders in the same files, with a layer axis in their tensors. A setting that affects
    the result and is not implemented is an error. The parameters are on the CPU and do not require grad.

    Args:
        folder: the folder of the files.
        norm_scaling_factor: the factor that activations were multiplied by in training, for ``normalize_activations`` =
            ``"expected_average_only_in"``; it becomes part of the weights. By default read from
            ``activation_scaler.json``.

    Raises:
        StoreError: a file is missing or damaged, or the dictionary needs a setting that is not implemented; ``path`` is
            the file or folder.
    """
    folder = Path(folder)
    if (folder / _NUMPY).is_file():
        tensors, settings = _gemma_scope(folder / _NUMPY)
    else:
        settings = _read_json(_only(folder, _CONFIG_FILES))
        tensors = _read_weights(folder)
    try:
        if settings.get("normalize_activations") == _AVERAGE:
            tensors = _scaled(tensors, _factor(folder) if norm_scaling_factor is None else norm_scaling_factor)
        elif norm_scaling_factor is not None:
            raise ValueError(
                f"norm_scaling_factor={norm_scaling_factor!r} is for normalize_activations={_AVERAGE!r}, and it was "
                f"made with {settings.get('normalize_activations')!r}"
            )
        return Dictionary(tensors, _config_of(settings, tensors)).requires_grad_(False)
    except ValueError as error:
        raise StoreError(f"the dictionary in {folder} cannot be used: {error}", path=folder) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    there = [each.name for each in sorted(folder.glob("*.safetensors")) if each.name not in _NOT_WEIGHTS]
    tensors = {}
    for name, tensor in read_tensors(_only(folder, there)).items():
        known = _TENSOR_NAMES.get(name, name)
        tensors[known] = tensor.mT.contiguous() if known != name and tensor.dim() == 2 else tensor
    return tensors


def _gemma_scope(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of an ``npz`` archive, which has no config: always JumpReLU, never centred."""
    import numpy as np

    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            tensors = {_NUMPY_NAMES.get(name, name): torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(f"{file} is no archive of arrays: {error}", path=file) from error
    return tensors, {"architecture": "jumprelu", "apply_b_dec_to_input": False}


def _factor(folder: Path) -> float:
    """The scaling factor that was saved with a checkpoint.

    Raises:
        ValueError: no factor was saved.
    """
    file = folder / "activation_scaler.json"
    factor = _read_json(file).get("scaling_factor") if file.is_file() else None
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ValueError(
            f"it was made with normalize_activations={_AVERAGE!r}, and neither its config nor activation_scaler.json "
            "tells the factor; give norm_scaling_factor="
        )
    return float(factor)


def _scaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Weights that map x to the result of these weights on ``factor * x``, divided by ``factor``."""
    scales = {"W_enc": factor, "W_dec": 1 / factor, "b_dec": 1 / factor}
    return {name: each * scales[name] if name in scales else each for name, each in tensors.items()}


def _only(folder: Path, names: Sequence[str]) -> Path:
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        wanted = " or ".join(names) or "*.safetensors"
        there = listed([path.name for path in found]) or "none"
        raise StoreError(f"a dictionary's folder holds one {wanted}; in {folder} there is {there}", path=folder)
    return found[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MOST:
            raise ValueError(f"longer than {_MOST} bytes")
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is no JSON config: {error}", path=file) from error
    return settings


def _config_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DictionaryConfig:
    for name, off in _UNSUPPORTED.items():
        if settings.get(name) not in off:
            raise ValueError(f"it was made with {name}={settings[name]!r}, which is not implemented")
    normalize: Any = settings.get("normalize_activations") or "none"  # older files say false
    normalize = "none" if normalize == _AVERAGE else normalize  # already part of the weights
    if normalize not in get_args(Normalization):
        raise ValueError(f"it was made with normalize_activations={normalize!r}, which is not implemented")
    if bool(settings.get("skip_connection", "W_skip" in tensors)) != ("W_skip" in tensors):
        there = "has" if "W_skip" in tensors else "lacks"
        raise ValueError(f"it was made with skip_connection={settings['skip_connection']!r} and {there} 'W_skip'")
    # sparsify's files have no architecture, and older ones no activation either, which then is topk.
    architecture = settings.get("architecture", settings.get("activation", "topk" if "k" in settings else "standard"))
    transcodes = bool(settings.get("transcode", False)) or (
        isinstance(architecture, str) and architecture in _TRANSCODERS
    )
    if isinstance(architecture, str):
        architecture = _TRANSCODERS.get(architecture, architecture)
    function = settings.get("activation_fn", settings.get("activation_fn_str", "relu"))
    if architecture == "standard":
        architecture = function
    elif function not in ("relu", architecture):
        raise ValueError(f"its activation function is {function!r}, which is not implemented for {architecture!r}")
    options = settings.get("activation_fn_kwargs")
    k = settings.get("k", options.get("k") if isinstance(options, dict) else None)
    crosses = "W_enc" in tensors and tensors["W_enc"].dim() > 2  # crosscoders do not centre, as published
    return DictionaryConfig(
        architecture=architecture,
        k=None if architecture in ("jumprelu", "gated") else k,
        center=bool(settings.get("apply_b_dec_to_input", not (transcodes or crosses))),
        normalize=normalize,
        rescale_by_decoder_norm=bool(settings.get("rescale_acts_by_decoder_norm", False)),
        transcodes=transcodes,
    )


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary as ``cfg.json`` and ``sae_weights.safetensors`` in the layout of SAELens; creates the folder.

    Example:
        >>> import tempfile
        >>> made = Dictionary(dict(W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2), b_dec=torch.ones(2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dictionary(made, folder)
        ...     load_dictionary(folder)
        Dictionary(d_in=2, latents=2, DictionaryConfig(architecture='relu'))
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dictionary.config
    architecture: str = "standard" if config.architecture == "relu" else config.architecture
    if config.transcodes:
        skip = "skip_" if dictionary.skips else ""
        named = {"relu": f"{skip}transcoder", "jumprelu": f"jumprelu_{skip}transcoder"}
        architecture = named.get(config.architecture, architecture)
    settings = {
        "architecture": architecture,
        "d_in": dictionary.W_enc.shape[-2],
        "d_out": dictionary.W_dec.shape[-1],
        "d_sae": dictionary.W_enc.shape[-1],
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": config.center,
        "normalize_activations": config.normalize,
        **({} if config.k is None else {"k": config.k, "rescale_acts_by_decoder_norm": config.rescale_by_decoder_norm}),
        **({"transcode": True} if config.transcodes else {}),
        **({"skip_connection": True} if dictionary.skips else {}),
    }
    write_tensors(
        {name: each.detach() for name, each in dictionary.named_parameters()}, folder / "sae_weights.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
