"""Contributions in pieces: an attention's by head, an MLP's by neuron, each through the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tdcache.errors import PathError, ResidualError
from tdcache.paths import resolve
from tdcache.residual.linear import LinearMap, LinearStep, step_between, tolerance
from tdcache.residual.remembered import once
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
        every = len(chosen) == len(self.weight)
        values = self.values if every else self.values[..., list(chosen), :]
        weight = self.weight if every else self.weight[list(chosen)]
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

    Args:
        stream: the cache.
        block: the number of the block.

    Raises:
        ResidualError: the cache lacks ``z`` or the contribution, or no projection leads from one to the other.
    """
    return _pieces(stream, block, "attn", stream.stream.out_projections)


def neurons_of(stream: CachedStream, block: int) -> Pieces:
    """The neurons of the MLP of one block.

    Args:
        stream: the cache.
        block: the number of the block.

    Raises:
        ResidualError: the cache lacks ``mlp.post`` or the contribution, or no projection leads from one to the other.
    """
    return _pieces(stream, block, "mlp", stream.stream.down_projections)


def _read(stream: CachedStream, name: str) -> Tensor:
    """What the projection after ``name`` reads, as ``(..., piece, unit)``."""
    return stream.split(f"{name}.z") if name.endswith("attn") else stream.value(f"{name}.post").unsqueeze(-1)


def _pieces(stream: CachedStream, block: int, role: str, projections: Sequence[str | None]) -> Pieces:
    name, kind = stream.name(role, block), "head" if role == "attn" else "neuron"
    read = "z" if role == "attn" else "post"
    stream.require([f"{name}.{read}", f"{name}.contribution"])
    path = projections[block] if block < len(projections) else None
    if path is None:
        raise ResidualError(
            f"the table names no projection from {kind}s to '{name}.contribution', so they cannot be told apart there",
            names=[f"{name}.contribution"],
        )
    values = _read(stream, name)
    find = partial(_checked, stream, name, path, kind, values)
    if stream.columns.positions is None:  # some positions are few, and compared each time
        (module,) = stream.modules(path)
        behind = [stream.raw(each) for each in (f"{name}.contribution", f"{name}.{read}")]
        linear, step = once(find, key=(name, path), owner=module, values=behind, modules=[module])
    else:
        linear, step = find()
    return Pieces(name, kind, values, linear.weight.reshape(*values.shape[-2:], -1), linear.bias, step)


def _checked(stream: CachedStream, name: str, path: str, kind: str, values: Tensor) -> tuple[LinearMap, LinearStep]:
    """The projection of ``name`` and what follows it, which lead from these values to the contribution."""
    (module,) = stream.modules(path)
    linear = _projection(stream, name, module, path, values.flatten(-2)).to(values)
    step = _step_to_stream(stream, name, linear(values.flatten(-2)))
    if step is None and stream.columns.positions is not None:
        # A scale for each unit cannot be told from few rows: all positions are asked where the wanted ones do not tell.
        every = stream.with_all_positions()
        step = _step_to_stream(every, name, linear(_read(every, name).flatten(-2)))
    if step is None:
        raise ResidualError(
            f"'{name}.contribution' is not what {path!r} makes of its {kind}s, nor that through one norm or scale; a "
            "model in training mode drops some of it, and a wrong table names another projection",
            names=[f"{name}.contribution"],
        )
    return linear, step


def _projection(stream: CachedStream, name: str, module: nn.Module, path: str, given: Tensor) -> LinearMap:
    """The map of the projection, told where that is possible by what it made of the first row."""
    width, added = given.shape[-1], stream.value(f"{name}.contribution")
    if given.shape[:-1] != added.shape[:-1]:
        return LinearMap.of(module, path, width)
    first = (0,) * (given.ndim - 1)
    return LinearMap.that_made(added[first], given[first], module, path)


def _step_to_stream(stream: CachedStream, name: str, given: Tensor) -> LinearStep | None:
    """What leads from what the projection of ``name`` gives to its contribution; None for what does not."""
    contribution = f"{name}.contribution"
    added = stream.value(contribution)
    if given.shape != added.shape:
        return None
    return step_between(_module(stream, contribution), contribution, given, added, tolerance(stream.raw(contribution)))


def _module(stream: CachedStream, name: str) -> nn.Module | None:
    """The module that returns the value of a name; None where a call inside a forward does."""
    place = stream.place(name)
    (root,) = stream.modules("")
    try:
        return resolve(root, place.path) if place.side == "fwd" else None
    except PathError:
        return None
