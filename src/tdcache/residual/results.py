"""One role over all blocks: results of heads and neurons, and kept values stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import SelectionError
from tdcache.named_places import Names
from tdcache.residual.columns import Columns
from tdcache.residual.parts import Parts
from tdcache.residual.pieces import heads_of, neurons_of
from tdcache.residual.stream import CachedStream
from tdcache.tokens import Positions

__all__ = ["head_results", "neuron_results", "stack_activation"]


def head_results(
    cache: TensorDictBase,
    *,
    layers: int | Sequence[int] | None = None,
    onto: Tensor | None = None,
    remainder: bool = False,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Parts:
    """What each head adds to the stream: ``z_h @ W_O[h]``, through the norm or scale after it, if there is one.

    Args:
        cache: canonical names to values, ``attn.z`` and ``attn.contribution`` among them.
        layers: which blocks; by default those up to the last ``resid_post`` that is kept, where they have attention.
        onto: ``(unit,)``, or a direction for each position: give the heads' products with it instead.
        remainder: also what the heads leave of the last ``resid_post`` that is kept, as ``"remainder"``.
        positions: which positions; None for all.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        ``blocks.0.attn.head.0`` and so on, ``(batch, position, unit)``.

    Raises:
        ResidualError: the cache lacks a value; or the heads do not sum to the contribution.
    """
    stream = CachedStream.of(cache, names, prefix, Columns(positions, mask))
    found: dict[str, Tensor] = {}
    for block in stream.blocks(layers, "attn"):
        pieces = heads_of(stream, block)
        found.update(pieces.parts(range(len(pieces.weight)), onto=onto))
    return _results(stream, found, onto, remainder)


def neuron_results(
    cache: TensorDictBase,
    *,
    layers: int | Sequence[int] | None = None,
    neurons: slice | Sequence[int] = slice(None),
    onto: Tensor | None = None,
    remainder: bool = False,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Parts:
    """What each neuron adds to the stream: its activation times its row of the down projection.

    A tensor of the stream's shape for every neuron is a lot; choose some, or give ``onto``.

    Args:
        cache: canonical names to values, ``mlp.post`` and ``mlp.contribution`` among them.
        layers: which blocks; those up to the last ``resid_post`` that is kept by default.
        neurons: which neurons of each.
        onto: ``(unit,)``, or a direction for each position: give the neurons' products with it instead.
        remainder: also what these neurons leave of the last ``resid_post`` that is kept, as ``"remainder"``.
        positions: which positions; None for all.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        ``blocks.0.mlp.neuron.0`` and so on, ``(batch, position, unit)``.

    Raises:
        CanonicalNameError: the table has no ``mlp.post``, as where experts share the work.
        ResidualError: the cache lacks a value; or the neurons do not sum to the contribution.
    """
    stream = CachedStream.of(cache, names, prefix, Columns(positions, mask))
    found: dict[str, Tensor] = {}
    for block in stream.blocks(layers, "mlp"):
        pieces = neurons_of(stream, block)
        every = range(len(pieces.weight))
        found.update(pieces.parts(every[neurons] if isinstance(neurons, slice) else neurons, onto=onto))
    return _results(stream, found, onto, remainder)


def stack_activation(
    cache: TensorDictBase,
    role: str,
    *,
    layers: Sequence[int] | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Tensor:
    """One role of several blocks as one tensor with a leading axis: ``stack_activation(cache, "attn.pattern")``.

    Args:
        cache: canonical names to values.
        role: the name without its block.
        layers: which blocks; all whose value is kept by default.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Raises:
        CanonicalNameError: the model has no such role.
        ResidualError: the cache lacks it.
    """
    stream = CachedStream.of(cache, names, prefix)
    every = range(stream.stream.blocks)
    kept = [block for block in every if stream.keeps(stream.name(role, block))]
    chosen = stream.blocks(layers) if layers is not None else kept or list(every)
    keys = [stream.name(role, block) for block in chosen]
    stream.require(keys)
    return torch.stack([stream.raw(key) for key in keys])


def _results(stream: CachedStream, found: dict[str, Tensor], onto: Tensor | None, remainder: bool) -> Parts:
    if not found:
        raise SelectionError("layers= and neurons= mean no piece; give at least one", selector=())
    of = stream.last() if remainder or stream.kept_posts() else None
    at = None if of is None else stream.value(of)
    if remainder and at is not None:
        whole = at if onto is None else (at * onto.to(at)).sum(-1)
        found["remainder"] = whole - sum(found.values(), torch.zeros(()))
    return Parts.made(found, stream.names, stream.stream.prefix, of=of if remainder else None, at=at)
