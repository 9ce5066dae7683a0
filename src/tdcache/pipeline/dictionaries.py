"""Sparse dictionaries saved as safetensors with a JSON config: loading, running, saving; none is trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdcache.errors import StoreError, listed
from tdcache.store.safetensors import read_tensors, write_tensors

__all__ = ["Architecture", "Dictionary", "DictionaryConfig", "load_dictionary", "save_dictionary"]

Architecture = Literal["relu", "topk", "jumprelu", "gated"]
"""How latents are made of pre-activations."""

_ENCODER = {
    "relu": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag"),
}
_DECODER = ("W_dec", "b_dec")
# What other libraries call the same things; a matrix under such a name is transposed.
_TENSOR_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
_CONFIG_FILES = ("cfg.json", "config.json")
_NOT_WEIGHTS = ("sparsity.safetensors",)
_MOST = 1 << 24  # bytes of config
# Settings of other libraries that change what a dictionary computes, with the values that mean "off".
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False, None),
    "finetuning_scaling_factor": (False, None),
    "skip_connection": (False, None),
    "signed": (False, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DictionaryConfig:
    """What its tensors do not say about a dictionary."""

    architecture: Architecture = "relu"
    k: int | None = None
    """How many latents are kept of each vector (``topk``)."""
    center: bool = True
    """Whether the decoder's bias is subtracted from what is encoded."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            known = ", ".join(map(repr, get_args(Architecture)))
            raise ValueError(f"a dictionary's architecture is one of {known}, got {self.architecture!r}")
        counted = type(self.k) is int and self.k >= 1
        if counted if self.architecture != "topk" else not counted:
            raise ValueError(f"k is a number from 1 for 'topk', and None for all others; got {self!r}")


class Dictionary(nn.Module):
    """A sparse dictionary: latents of activations, and activations of latents. Made for :class:`tdcache.Splice`.

    With p = (x - b_dec) W_enc + b_enc (x itself, where it does not center), latents are

    - ``relu``: max(p, 0) (Bricken et al., "Towards Monosemanticity", 2023);
    - ``topk``: max(p, 0) where p is among the k largest, else 0 (Gao et al., arXiv:2406.04093);
    - ``jumprelu``: max(p, 0) where p > threshold, else 0 (Rajamanoharan et al., arXiv:2407.14435);
    - ``gated``: max((x - b_dec) (W_enc exp(r_mag)) + b_mag, 0) where (x - b_dec) W_enc + b_gate > 0, else 0
      (Rajamanoharan et al., arXiv:2404.16014);

    and the reconstruction is z W_dec + b_dec. Gradients are those of these formulas as they stand: none reaches a
    threshold or a gate. Values are cast to the dictionary's dtype.

    Args:
        tensors: ``W_enc`` ``(d_in, n)``, ``W_dec`` ``(n, d_out)``, ``b_dec`` ``(d_out,)``, and ``b_enc`` ``(n,)`` or
            ``b_gate``, ``r_mag``, ``b_mag`` ``(n,)``; ``threshold`` ``(n,)``. They become parameters.
        config: the rest.

    Raises:
        ValueError: a tensor is missing, superfluous, of the wrong shape, or not of floating point.

    Example:
        >>> eye = torch.eye(3)
        >>> found = Dictionary(dict(W_enc=eye, b_enc=torch.zeros(3), W_dec=eye, b_dec=torch.zeros(3)))
        >>> found.encode(torch.tensor([1.0, -1.0, 2.0]))
        tensor([1., 0., 2.], grad_fn=<ReluBackward0>)
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], config: DictionaryConfig | None = None) -> None:
        super().__init__()
        self.config = config or DictionaryConfig()
        _check(tensors, self.config)
        for name in (*_ENCODER[self.config.architecture], *_DECODER):
            self.register_parameter(name, nn.Parameter(tensors[name]))

    def encode(self, x: Tensor) -> Tensor:
        """Latents ``(..., n)`` of activations ``(..., d_in)``."""
        x = x.to(self.W_enc.dtype)
        if self.config.center:
            x = x - self.b_dec
        if self.config.architecture == "gated":
            return (x @ (self.W_enc * self.r_mag.exp()) + self.b_mag).relu() * (x @ self.W_enc + self.b_gate > 0)
        before = x @ self.W_enc + self.b_enc
        if self.config.architecture == "jumprelu":
            return before.relu() * (before > self.threshold)
        if self.config.k is not None:
            values, indices = before.topk(min(self.config.k, before.shape[-1]), dim=-1)
            return torch.zeros_like(before).scatter(-1, indices, values.relu())
        return before.relu()

    def decode(self, latents: Tensor) -> Tensor:
        """Activations ``(..., d_out)`` of latents ``(..., n)``."""
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x``."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """Sizes and settings, for the repr."""
        return f"d_in={self.W_enc.shape[0]}, latents={self.W_enc.shape[1]}, {self.config!r}"


def _check(tensors: Mapping[str, Tensor], config: DictionaryConfig) -> None:
    wanted = (*_ENCODER[config.architecture], *_DECODER)
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    if missing or extra:
        parts = [
            *([f"lacks {listed(missing)}"] if missing else []),
            *([f"does not use {listed(extra)}"] if extra else []),
        ]
        raise ValueError(
            f"a {config.architecture!r} dictionary consists of {list(wanted)!r}; this one {' and '.join(parts)}"
        )
    matrix = tuple(tensors["W_enc"].shape)
    d_in, count = matrix if len(matrix) == 2 else (None, None)
    shapes = dict.fromkeys(wanted, (count,)) | {"W_enc": (d_in, count), "W_dec": (count, None), "b_dec": (None,)}
    if config.center:
        shapes |= {"W_dec": (count, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            spelled = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"tensor {name!r} of a dictionary has shape {found}, expected ({spelled})")
        if not tensors[name].is_floating_point():
            raise ValueError(f"tensor {name!r} of a dictionary is {tensors[name].dtype}, expected floating point")


def load_dictionary(folder: str | Path) -> Dictionary:
    """Read a dictionary from a folder with a JSON config and a safetensors file.

    Understands what :func:`save_dictionary` writes, and the layouts of SAELens (``standard``, ``topk``, ``jumprelu``,
    ``gated``) and of sparsify (``topk``). A setting that would change what is computed, and is not implemented here, is
    refused. The parameters are on the CPU and do not require grad.

    Raises:
        StoreError: a file is missing or damaged, or the dictionary is of a kind that is not implemented; ``path`` is
            the file or folder.
    """
    folder = Path(folder)
    file = _only(folder, _CONFIG_FILES)
    weights = _only(
        folder, [each.name for each in sorted(folder.glob("*.safetensors")) if each.name not in _NOT_WEIGHTS]
    )
    settings = _read_json(file)
    tensors = {}
    for name, tensor in read_tensors(weights).items():
        known = _TENSOR_NAMES.get(name, name)
        tensors[known] = tensor.mT.contiguous() if known != name and tensor.dim() == 2 else tensor
    try:
        return Dictionary(tensors, _config_of(settings)).requires_grad_(False)
    except ValueError as error:
        raise StoreError(f"the dictionary in {folder} cannot be used: {error}", path=folder) from error


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


def _config_of(settings: Mapping[str, Any]) -> DictionaryConfig:
    for name, off in _UNSUPPORTED.items():
        if settings.get(name) not in off:
            raise ValueError(f"it was made with {name}={settings[name]!r}, which is not implemented")
    architecture = settings.get("architecture", settings.get("activation", "standard"))
    function = settings.get("activation_fn", settings.get("activation_fn_str", "relu"))
    if architecture == "standard":
        architecture = function
    elif function not in ("relu", architecture):
        raise ValueError(f"its activation function is {function!r}, which is not implemented for {architecture!r}")
    options = settings.get("activation_fn_kwargs")
    k = settings.get("k", options.get("k") if isinstance(options, dict) else None)
    center = settings.get("apply_b_dec_to_input", not settings.get("transcode", False))
    return DictionaryConfig(architecture=architecture, k=k if architecture == "topk" else None, center=bool(center))


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary as ``cfg.json`` and ``sae_weights.safetensors``, in the layout of SAELens; makes the folder.

    Example:
        >>> import tempfile
        >>> made = Dictionary(dict(W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2), b_dec=torch.ones(2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dictionary(made, folder)
        ...     load_dictionary(folder)
        Dictionary(d_in=2, latents=2, DictionaryConfig(architecture='relu', k=None, center=True))
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dictionary.config
    settings = {
        "architecture": "standard" if config.architecture == "relu" else config.architecture,
        "d_in": dictionary.W_enc.shape[0],
        "d_sae": dictionary.W_enc.shape[1],
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": config.center,
        **({} if config.k is None else {"k": config.k}),
    }
    write_tensors(
        {name: each.detach() for name, each in dictionary.named_parameters()}, folder / "sae_weights.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
