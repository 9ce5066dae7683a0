"""Sparse dictionaries as modules, to be spliced into models: autoencoders, transcoders, crosscoders.

Libraries write the same few formulas with different names, orders and normalisations. One module with one set of
tensors computes all of them, and differences between files are settled when they are read. Training is out of scope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tdcache.errors import listed

__all__ = ["Architecture", "Dictionary", "DictionaryConfig", "Normalization"]

Architecture = Literal["relu", "topk", "jumprelu", "gated"]
"""How latents are computed from pre-activations."""

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
"""How activations are normalised before they are encoded."""

_ENCODER = {
    "relu": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag"),
}
_DECODER = ("W_dec", "b_dec")
_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class DictionaryConfig:
    """The properties of a dictionary that its tensors do not determine."""

    architecture: Architecture = "relu"
    k: int | None = None
    """How many latents of each vector are kept (``topk``)."""
    center: bool = True
    """Whether the decoder's bias is subtracted from the input before encoding."""
    normalize: Normalization = "none"
    """How activations are normalised before encoding; undone after decoding, except for a transcoder."""
    rescale_by_decoder_norm: bool = False
    """Whether pre-activations are multiplied by the norm of their decoder row (``topk``); decoding divides by it."""
    transcodes: bool = False
    """Whether the output predicts another activation than the input, possibly of another size."""

    def __repr__(self) -> str:
        shown = [
            each for each in fields(self) if each.name == "architecture" or getattr(self, each.name) != each.default
        ]
        return f"{type(self).__name__}({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in shown)})"

    def __post_init__(self) -> None:
        kinds = {"architecture": Architecture, "normalize": Normalization}
        for what, kind in kinds.items():
            got = getattr(self, what)
            if got not in get_args(kind):
                raise ValueError(f"a dictionary's {what} is one of {listed(get_args(kind))}, got {got!r}")
        counted = type(self.k) is int and self.k >= 1
        if counted if self.architecture != "topk" else not counted:
            raise ValueError(f"k is a number from 1 for 'topk', and None for all others; got {self!r}")
        if self.rescale_by_decoder_norm and self.architecture != "topk":
            raise ValueError(f"rescale_by_decoder_norm is for 'topk', got {self!r}")
        if self.transcodes and self.center:
            raise ValueError(f"a transcoder subtracts no decoder's bias from its input: center=False, got {self!r}")


class Dictionary(nn.Module):
    """A sparse dictionary, which encodes activations into latents and decodes them, for :class:`tdcache.Splice`.

    With p = (x - b_dec) W_enc + b_enc (without ``center``, p = x W_enc + b_enc), latents are

    - ``relu``: max(p, 0) (Bricken et al., "Towards Monosemanticity", 2023);
    - ``topk``: max(p, 0) where p is among the k largest, else 0 (Gao et al., arXiv:2406.04093);
    - ``jumprelu``: max(p, 0) where p > threshold, else 0 (Rajamanoharan et al., arXiv:2407.14435);
    - ``gated``: max((x - b_dec) (W_enc exp(r_mag)) + b_mag, 0) where (x - b_dec) W_enc + b_gate > 0, else 0
      (Rajamanoharan et al., arXiv:2404.16014);

    and the reconstruction is z W_dec + b_dec. Options change this as follows:

    - ``normalize``: x is replaced by (x - m) / (s + 1e-5), with its mean m and standard deviation s (``layer_norm``),
      or by x sqrt(d_in) / norm(x) (``constant_norm_rescale``), and the reconstruction r by r s + m or
      r norm(x) / sqrt(d_in);
    - ``rescale_by_decoder_norm``: p is multiplied by the norms of W_dec's rows, z divided by them before decoding;
    - a transcoder predicts another activation, such as an MLP's output from its input, and is not normalised back;
    - with ``W_skip``, x W_skip^T is added, for x before normalisation (Paulo et al., arXiv:2501.18823);
    - a crosscoder has ``W_enc`` ``(layers, d, n)``, ``W_dec`` ``(n, layers, d)``, ``b_dec`` ``(layers, d)``, and its
      latents are shared by all layers of x ``(..., layers, d)`` (Lindsey et al., "Sparse Crosscoders", 2024).

    Gradients are those of these formulas, so none reaches a threshold or a gate. Values are cast to the dictionary's
    dtype.

    Args:
        tensors: ``W_enc`` ``(d_in, n)``, ``W_dec`` ``(n, d_out)``, ``b_dec`` ``(d_out,)``, and ``b_enc`` ``(n,)`` or
            ``b_gate``, ``r_mag``, ``b_mag`` ``(n,)``; ``threshold`` ``(n,)``; ``W_skip`` ``(d_out, d_in)`` if there
            is a skip connection. They become parameters.
        config: the properties that the tensors do not determine.

    Raises:
        ValueError: a tensor is missing, superfluous, of the wrong shape, or not floating point.

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
    W_skip: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], config: DictionaryConfig | None = None) -> None:
        super().__init__()
        self.config = config or DictionaryConfig()
        _check(tensors, self.config)
        self.skips = "W_skip" in tensors
        for name in _names(tensors, self.config):
            self.register_parameter(name, nn.Parameter(tensors[name]))

    @property
    def needs_source(self) -> bool:
        """Whether decoding needs the encoded activations, for their scale or for a skip connection."""
        return self.skips or (self.config.normalize != "none" and not self.config.transcodes)

    def encode(self, x: Tensor) -> Tensor:
        """Latents ``(..., n)`` of activations ``(..., d_in)``, or ``(..., layers, d)``."""
        return self._activate(self._prepared(x))

    def _prepared(self, x: Tensor) -> Tensor:
        x = self._flat(x.to(self.W_enc.dtype), self.W_enc.dim() - 1)
        if self.config.normalize != "none":
            shift, scale, eps = self._scales(x)
            x = (x - shift) / (scale + eps)
        return x - self.b_dec.flatten() if self.config.center else x

    def _activate(self, x: Tensor) -> Tensor:
        config, encoder = self.config, self.W_enc.flatten(0, -2)
        if config.architecture == "gated":
            return (x @ (encoder * self.r_mag.exp()) + self.b_mag).relu() * (x @ encoder + self.b_gate > 0)
        before = x @ encoder + self.b_enc
        if config.architecture == "jumprelu":
            return before.relu() * (before > self.threshold)
        if config.rescale_by_decoder_norm:
            before = before * self._norms()
        if config.k is not None:
            values, indices = before.topk(min(config.k, before.shape[-1]), dim=-1)
            return torch.zeros_like(before).scatter(-1, indices, values.relu())
        return before.relu()

    def decode(self, latents: Tensor, source: Tensor | None = None) -> Tensor:
        """Activations ``(..., d_out)`` of latents ``(..., n)``.

        Args:
            latents: the result of :meth:`encode`, possibly edited.
            source: the encoded activations, if ``needs_source``.

        Raises:
            ValueError: ``source`` is needed and was not given.
        """
        if source is None and self.needs_source:
            raise ValueError(
                "this dictionary's output depends on its input (a skip connection or a normalisation to undo): decode "
                "with decode(latents, source), or give the dictionary itself instead of the pair (encode, decode)"
            )
        latents = latents.to(self.W_dec.dtype)
        if self.config.rescale_by_decoder_norm:
            latents = latents / self._norms()
        found = latents @ self.W_dec.flatten(1) + self.b_dec.flatten()
        if source is not None and self.needs_source:
            source = self._flat(source.to(self.W_enc.dtype), self.W_enc.dim() - 1)
            if self.config.normalize != "none" and not self.config.transcodes:
                shift, scale, _ = self._scales(source)
                found = found * scale + shift
            if self.skips:
                found = found + source @ self.W_skip.mT
        return found.unflatten(-1, self.b_dec.shape) if self.b_dec.dim() > 1 else found

    def _scales(self, x: Tensor) -> tuple[Tensor | float, Tensor, float]:
        """The shift and scale of activations, and the epsilon that is added to the scale."""
        if self.config.normalize == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True), _LAYER_NORM_EPS
        return 0.0, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5, 0.0

    def _norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.W_dec.flatten(1), dim=-1)
        return norms

    @staticmethod
    def _flat(x: Tensor, axes: int) -> Tensor:
        return x.flatten(-axes) if axes > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x``."""
        return self.decode(self.encode(x), x)

    def extra_repr(self) -> str:
        """Sizes and settings, for the repr."""
        layers = f"layers={self.W_enc.shape[0]}, " if self.W_enc.dim() > 2 else ""
        return f"{layers}d_in={self.W_enc.shape[-2]}, latents={self.W_enc.shape[-1]}, {self.config!r}"


def _names(tensors: Mapping[str, Tensor], config: DictionaryConfig) -> tuple[str, ...]:
    skip = ("W_skip",) if "W_skip" in tensors else ()
    return (*_ENCODER[config.architecture], *_DECODER, *skip)


def _check(tensors: Mapping[str, Tensor], config: DictionaryConfig) -> None:
    wanted = _names(tensors, config)
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
    shapes = _shapes(tensors, config)
    for name in wanted:
        found, shape = tuple(tensors[name].shape), shapes.get(name, shapes[""])
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            spelled = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"tensor {name!r} of a dictionary has shape {found}, expected ({spelled})")
        if not tensors[name].is_floating_point():
            raise ValueError(f"tensor {name!r} of a dictionary is {tensors[name].dtype}, expected floating point")


def _shapes(tensors: Mapping[str, Tensor], config: DictionaryConfig) -> dict[str, tuple[int | None, ...]]:
    """The expected shapes by name, with None for any size; under ``""`` that of tensors with one number per latent."""
    matrix = tuple(tensors["W_enc"].shape)
    *inner, count = matrix if len(matrix) in (2, 3) else (None, None)
    bias = tuple(tensors["b_dec"].shape)
    # Without centring and normalisation, the output may differ in size from the input.
    free = not config.center and (config.transcodes or config.normalize == "none")
    outer = tuple(bias) if free and len(bias) == len(inner) else tuple(inner)
    return {
        "": (count,),
        "W_enc": (*inner, count),
        "W_dec": (count, *outer),
        "b_dec": outer,
        "W_skip": (*outer, *inner) if len(inner) == 1 else (),
    }
