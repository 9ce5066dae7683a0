"""Norms applied to parts of a stream, with the scale of the whole: only then do the parts still sum to it."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import ResidualError
from tdcache.named_places import Names
from tdcache.named_proof import deviation
from tdcache.residual.columns import Columns
from tdcache.residual.linear import NormStep, run, tolerance
from tdcache.residual.parts import Parts, tensors
from tdcache.residual.remembered import once
from tdcache.residual.stream import CachedStream, names_of
from tdcache.tokens import Positions

__all__ = ["apply_norm", "final_norm", "frozen_norm"]


def apply_norm(
    stack: TensorDictBase,
    cache: TensorDictBase | None = None,
    *,
    norm: str | None = None,
    at: str | None = None,
    recompute: bool = False,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Parts:
    """Send every entry of ``stack`` through a norm whose scale is frozen: ``weight * centre(part) / scale``.

    The scale is that of the whole value, so that the norm is linear and what summed to its input sums to its output;
    its bias, where it has one, is an entry of its own, ``"final_norm.bias"``.

    Args:
        stack: values ``(..., unit)`` by name, such as :func:`decompose` gives.
        cache: where the whole value is kept; not needed for what the functions here return.
        norm: canonical name of the norm, such as ``"blocks.3.ln1"``, or a module's path; the final norm by default.
        at: the name of the value that the norm reads; by default the one that ``stack`` belongs to, else the last
            ``resid_post`` that is kept.
        recompute: normalise every entry by a scale of its own, with the bias: what a logit lens does.
        positions: where ``stack`` holds some positions, the same ones, for the whole value in ``cache``.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where neither ``stack`` nor ``cache`` carries it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        Entries of the same names. A model without a final norm gives them unchanged.

    Raises:
        CanonicalNameError: the model has no such norm, or what precedes its logits is none.
        ResidualError: the module is no norm, or the value it reads is not known.
    """
    table = names_of(stack if names is None and getattr(stack, "table", None) is not None else cache, names)
    prefix = stack.prefix if prefix is None and isinstance(stack, Parts) else prefix
    stream = CachedStream.of(Parts() if cache is None else cache, table, prefix, Columns(positions, mask))
    path = final_norm(stream) if norm is None else stream.path_of(norm)
    of = stack.of if isinstance(stack, Parts) else None
    if path is None:
        return Parts.made(tensors(stack), table, stream.stream.prefix, of=of, normed=True)
    if recompute:
        (module,) = stream.modules(path)
        found = {key: _fresh(module, part) for key, part in tensors(stack).items()}
        return Parts.made(found, table, stream.stream.prefix, normed=True)
    name = norm or stream.name("final_norm")
    frozen = frozen_norm(stack, stream, path, name, at)
    found = {key: frozen(part) for key, part in tensors(stack).items()}
    if frozen.bias is not None:
        found[f"{name}.bias"] = frozen.bias.expand_as(next(iter(found.values())))
    return Parts.made(found, table, stream.stream.prefix, of=of, normed=True)


def frozen_norm(stack: TensorDictBase, stream: CachedStream, path: str, name: str, at: str | None = None) -> NormStep:
    """The norm with the scale that it has at the whole value, which the entries of ``stack`` are parts of.

    Raises:
        ResidualError: that value is not known, has other rows than an entry, or is not what the norm read.
    """
    (module,) = stream.modules(path)
    whole = _whole(stack, stream, at)
    make = partial(NormStep.of, module, path, whole)
    frozen = once(make, key="norm", owner=module, values=[whole], modules=[module])
    for key, part in tensors(stack).items():
        _check_rows(part, key, frozen)
    if stream.keeps(name):
        _compare(stream, name, module, whole)
    return frozen


def final_norm(stream: CachedStream) -> str | None:
    """The path of the final norm of a stream; None where the unembedding reads the stream itself.

    Raises:
        CanonicalNameError: something else stands between the stream and the logits.
    """
    name, facts = stream.name("final_norm"), stream.stream
    if facts.final_norm is None and facts.unembed is None and name in stream.canonical(refused=True):
        raise stream.error(name)
    return facts.final_norm


def _whole(stack: TensorDictBase, stream: CachedStream, at: str | None) -> Tensor:
    """The value at which the scale is frozen."""
    if at is not None:
        return stream.value(at)
    if isinstance(stack, Parts) and stack.at is not None:
        return stack.at
    if not stream.kept_posts():
        raise ResidualError(
            "the scale of a norm is that of the whole value, which this stack does not carry; pass the cache that "
            "holds it, or recompute=True for a scale of each entry's own"
        )
    return stream.value(stream.last())


def _check_rows(part: Tensor, key: str, norm: NormStep) -> None:
    rows = norm.inverse_scale.shape[:-1]
    if part.shape[:-1] != rows:
        raise ResidualError(
            f"{key!r} is {tuple(part.shape)}, and the value whose scale is frozen is {(*rows, part.shape[-1])}; for "
            "some positions pass positions=, for parts of another value at=",
            names=[key],
        )


def _fresh(module: torch.nn.Module, part: Tensor) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and part.requires_grad):
        return run(module, part)


def _compare(stream: CachedStream, name: str, module: torch.nn.Module, whole: Tensor) -> None:
    """Hold the norm of the whole against what the norm returned, where that is kept."""
    kept = stream.value(name)
    found = run(module, whole)
    if found.shape != kept.shape or not deviation(found, kept) <= tolerance(stream.raw(name)):
        raise ResidualError(
            f"{name!r} as it is kept is not the norm of the value whose scale was to be frozen; name what it reads "
            "with at=",
            names=[name],
        )
