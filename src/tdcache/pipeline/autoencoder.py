"""The arithmetic of splices: a value through an encode/decode pair, with its error term; also in the form of hooks.

``reconstruction + (x - reconstruction)`` differs from ``x`` by rounding, so a spliced model that nobody edited would
give other results than the model itself. The form used here is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import EditError, HookSignatureError
from tdcache.inplace import NO_COUNTER, eager_version_of, shares_memory, untouched
from tdcache.pipeline.calling import spell
from tdcache.pipeline.collection import FwdBwdHooks, HookCollection

__all__ = ["Autoencoder", "AutoencoderHooks", "Sites", "as_autoencoder"]


@dataclass(frozen=True, slots=True)
class Autoencoder:
    """An encode/decode pair: a sparse autoencoder, a transcoder, a linear basis.

    Both must be deterministic, since the decoder runs twice if an error term is added.
    """

    encode: Callable[[Tensor], Tensor]
    """From the value ``(..., d)`` to latents of any shape."""
    decode: Callable[..., Tensor]
    """From latents to a value of the shape of the one it replaces."""
    needs_source: bool = False
    """Whether ``decode`` takes the encoded value as a second argument, as for a skip connection."""

    def latents_of(self, source: Tensor) -> Tensor:
        """The latents of ``source``.

        Raises:
            EditError: the encoder does not return a tensor.
        """
        latents: Any = self.encode(source)
        if not isinstance(latents, Tensor):
            raise EditError(
                f"encode() must return a tensor of latents, got {type(latents).__name__} from {spell(self.encode)}; "
                "give a pair of functions (encode, decode) that pass one tensor"
            )
        return latents

    def decoded(self, latents: Tensor, like: Tensor, source: Tensor | None = None) -> Tensor:
        """Decode, in the dtype of ``like``; ``source`` is the encoded value, by default ``like`` itself.

        Raises:
            EditError: the decoder returns another shape.
        """
        found: Any = (
            self.decode(latents, like if source is None else source) if self.needs_source else self.decode(latents)
        )
        if not isinstance(found, Tensor) or found.shape != like.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise EditError(
                f"decode() must return what it replaces, a tensor of shape {tuple(like.shape)}, got {got} from latents "
                f"of shape {tuple(latents.shape)}"
            )
        return found if found.dtype is like.dtype else found.to(like.dtype)


def as_autoencoder(given: Any) -> Autoencoder:
    """A pair ``(encode, decode)``, or anything with these two methods, as an :class:`Autoencoder`.

    Raises:
        HookSignatureError: ``given`` is neither.
    """
    if isinstance(given, Autoencoder):
        return given
    pair = given if isinstance(given, Sequence) and len(given) == 2 else None
    encode, decode = pair or (getattr(given, "encode", None), getattr(given, "decode", None))
    if not callable(encode) or not callable(decode):
        raise HookSignatureError(
            "an autoencoder is an object with encode() and decode(), or a pair of functions, "
            f"got {type(given).__name__}"
        )
    return Autoencoder(encode, decode, pair is None and getattr(given, "needs_source", False) is True)


def _summed(x: Tensor, plain: Tensor, reconstruction: Tensor, error: Tensor, *, edited: bool) -> Tensor:
    """The sum of reconstruction and error, which has exactly the value of ``x`` if nothing was edited."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x - ((plain - reconstruction) + ((x - plain) - error)) if edited else x.clone()
    total = reconstruction + error  # for its graph: the gradients of both are that of the sum
    with torch.no_grad():
        total.copy_(x - ((plain - reconstruction) + ((x - plain) - error)) if edited else x)
    return total


def _passed(site: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, bool]:
    """What a site returns for ``value``, and whether that is edited."""
    version = eager_version_of(value)
    returned = site(value)
    return returned, not untouched(value, returned, version)


@dataclass(frozen=True, slots=True)
class Sites:
    """Functions that latents, reconstruction and error pass through, to read or edit them or watch gradients."""

    latents: Callable[[Tensor], Tensor]
    reconstruction: Callable[[Tensor], Tensor]
    error: Callable[[Tensor], Tensor]

    def run(self, x: Tensor, autoencoder: Autoencoder, *, add_error: bool, source: Tensor | None = None) -> Tensor:
        """The value that replaces ``x``.

        With the error term, where z = encode(x), r = decode(z), e = x - r, and z', r', e' are what the sites return,

            r'(z') + e' = x - ((r - r') + (e - e')),

        computed as on the right, where unedited both brackets are exactly zero (and left out), and differentiated as on
        the left, where what comes back through r' and e' to ``x`` is exactly the gradient of the output: identities to
        the last bit. The gradient of z' is the decoder transpose
        applied to the gradient of the output, that of e' (and of r') the gradient of the output.

        Args:
            x: the value to replace, ``(..., d)``.
            autoencoder: the pair.
            add_error: add the error of the reconstruction; otherwise the output is the reconstruction alone.
            source: the value to encode, if not ``x``.

        Raises:
            EditError: the pair does not fit, or the error was edited and is not added.
        """
        latents = autoencoder.latents_of(x if source is None else source)
        if not add_error:
            return self._reconstruct(x, latents, autoencoder, source)
        plain = autoencoder.decoded(latents, x, source)
        # An in-place edit at a site must not reach the graph of the unedited branch or the model's own value.
        graph = torch.is_grad_enabled() and latents.requires_grad
        if graph or shares_memory(latents, x) or (source is not None and shares_memory(latents, source)):
            latents = latents.clone()
        hooked, edited = _passed(self.latents, latents)
        decoded = autoencoder.decoded(hooked, x, source) if graph or edited else plain.clone()
        reconstruction, changed = _passed(self.reconstruction, decoded)
        error, moved = _passed(self.error, x - plain)
        return _summed(x, plain, reconstruction, error, edited=edited or changed or moved)

    def _reconstruct(self, x: Tensor, latents: Tensor, autoencoder: Autoencoder, source: Tensor | None) -> Tensor:
        if shares_memory(latents, x):
            latents = latents.clone()
        reconstruction = self.reconstruction(autoencoder.decoded(self.latents(latents), x, source))
        missed = x - reconstruction
        version = eager_version_of(missed)
        if version != NO_COUNTER and not untouched(missed, self.error(missed), version):
            raise EditError(
                "the error was edited, or given a gradient hook, but it is no part of the output; use add_error=True"
            )
        return reconstruction


class AutoencoderHooks(HookCollection):
    """A hook that passes a value through an encode/decode pair, with hooks on the values in between.

    The places are ``latents``, ``reconstruction`` and ``error``, each a :class:`~tdcache.pipeline.FwdBwdHooks`.
    With ``add_error`` the output is the value itself until something is edited, and an edit of the latents changes it
    by the decoded change; gradients are those of :class:`tdcache.Splice`. Without it, the output is the reconstruction,
    and ``error`` is read-only. Deep copies share the pair.

    Args:
        encode: from the value ``(..., d)`` to latents.
        decode: from latents to a value.
        add_error: add the error of the reconstruction.

    Example:
        >>> hooks = AutoencoderHooks(lambda x: x / 2, lambda z: 2 * z, add_error=True)
        >>> hooks.latents.append_fwd(lambda z: z + 1)(torch.zeros(2))
        tensor([1., 1.])
        >>> hooks(torch.zeros(2))
        tensor([2., 2.])
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], add_error: bool = False
    ) -> None:
        super().__init__()
        self.encode = encode
        self.decode = decode
        self.add_error = add_error
        for name in ("latents", "reconstruction", "error"):
            self.add_subhooks(name, FwdBwdHooks())

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Pass ``x`` through the pair."""
        sites = (_Bound(self._children[name], args, kwargs) for name in ("latents", "reconstruction", "error"))
        return Sites(*sites).run(x, Autoencoder(self.encode, self.decode), add_error=self.add_error)

    def is_empty(self) -> bool:
        """False, since the pair itself may change the value."""
        return False

    def title(self) -> str:
        """The first line of the repr."""
        pair = f"encode={spell(self.encode)}, decode={spell(self.decode)}"
        return f"{type(self).__name__}({pair}, add_error={self.add_error})"


@dataclass(frozen=True, slots=True)
class _Bound:
    """Hooks with the arguments of one call."""

    hooks: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.hooks(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]
