"""Contributions in pieces: an attention's by head, an MLP's by neuron, each through the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdcache.errors import PathError, ResidualError
from tdcache.paths import resolve
from tdcache.residual.linear import LinearMap, LinearStep, deviation, step_between, tolerance
from tdcache.residual.stream import CachedStream

__all__ = ["Pieces", "heads_of", "neurons_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """One contribution as a sum over units of what the output projection reads.

    Args:
        name: the contribution without its last word, ``"blocks.3.attn"``.
        kind: what a piece is: ``"head"`` or ``"neuron"``.
        values: what the projection reads, ``(..., piece, unit)``.
        weight: its weight, ``(piece, unit, out)``.
        bias: what the projection adds, or None.
        step: what happens to the projection's result before it is added to the stream.
    """

    name: str
    kind: str
    values: Tensor
    weight: Tensor
    bias: Tensor | None
    step: LinearStep

    def parts(self, chosen: Sequence[int], *, onto: Tensor | None = None) -> dict[str, Tensor]:
        """The chosen pieces, by name; with ``onto`` their products with that direction."""
        values, weight = self.values[..., list(chosen), :], self.weight[list(chosen)]
        if onto is None:
            found = self.step(torch.einsum("...hi,hio->...ho", values, weight)).unbind(-2)
        else:
            back = self.step.back(onto.to(values))
            found = (values * torch.einsum("hio,...o->...hi", weight, back)).sum(-1).unbind(-1)
        return {f"{self.name}.{self.kind}.{number}": each for number, each in zip(chosen, found, strict=True)}

    def all(self) -> dict[str, Tensor]:
        """All pieces, and the biases of the projection and of what follows it as a piece of their own."""
        found = self.parts(range(len(self.weight)))
        like = next(iter(found.values()))
        biases = [] if self.bias is None else [self.step(self.bias.expand_as(like))]
        biases += [] if self.step.bias is None else [self.step.bias.expand_as(like)]
        return {**found, f"{self.name}.bias": torch.stack(biases).sum(0)} if biases else found


def heads_of(stream: CachedStream, block: int) -> Pieces:
    """The heads of the attention of one block.

    Raises:
        ResidualError: the cache lacks ``z`` or the contribution, or no projection leads from one to the other.
    """
    stream.require([stream.name("attn.z", block), stream.name("attn.contribution", block)])
    values = stream.split(stream.name("attn.z", block))
    return _pieces(stream, block, "attn", "head", values, stream.stream.out_projections)


def neurons_of(stream: CachedStream, block: int) -> Pieces:
    """The neurons of the MLP of one block.

    Raises:
        ResidualError: the cache lacks ``mlp.post`` or the contribution, or no projection leads from one to the other.
    """
    stream.require([stream.name("mlp.post", block), stream.name("mlp.contribution", block)])
    values = stream.value(stream.name("mlp.post", block)).unsqueeze(-1)
    return _pieces(stream, block, "mlp", "neuron", values, stream.stream.down_projections)


def _pieces(
    stream: CachedStream, block: int, role: str, kind: str, values: Tensor, projections: Sequence[str | None]
) -> Pieces:
    name, path = stream.name(role, block), projections[block] if block < len(projections) else None
    contribution = f"{name}.contribution"
    if path is None:
        raise ResidualError(
            f"the table names no projection from {kind}s to {contribution!r}, so they cannot be told apart there",
            names=[contribution],
        )
    (module,) = stream.modules(path)
    pieces, units = values.shape[-2:]
    linear = LinearMap.of(module, path, pieces * units).to(values)
    added = stream.value(contribution)
    given = linear(values.flatten(-2))
    allowed = tolerance(stream.cache.get(contribution))
    way = (
        step_between(_module(stream, contribution), contribution, given, added, allowed)
        if given.shape == added.shape
        else None
    )
    if way is None:
        off = deviation(given, added) if given.shape == added.shape else float("inf")
        raise ResidualError(
            f"{contribution!r} is not what {path!r} makes of its {kind}s, nor that through one norm or scale (it "
            f"differs by {off:.1e}); a model in training mode drops some of it, and a wrong table names another "
            "projection",
            names=[contribution],
        )
    weight = linear.weight.reshape(pieces, units, -1)
    return Pieces(name, kind, values, weight, linear.bias, way)


def _module(stream: CachedStream, name: str) -> nn.Module | None:
    """The module that returns the value of a name; None where a call inside a forward does."""
    place = stream.place(name)
    (root,) = stream.modules("")
    try:
        return resolve(root, place.path) if place.side == "fwd" else None
    except PathError:
        return None
