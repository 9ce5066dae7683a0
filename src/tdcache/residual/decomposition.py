"""The residual stream as a sum: where it stands after each block, and what was added to it on the way."""

from __future__ import annotations

from functools import partial
from typing import Any

import regex
import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import ResidualError
from tdcache.named_places import Names
from tdcache.named_proof import deviation
from tdcache.named_streams import ResidualStream, StreamChange
from tdcache.residual.columns import Columns
from tdcache.residual.linear import NormStep, tolerance
from tdcache.residual.parts import Parts
from tdcache.residual.pieces import Pieces, heads_of, neurons_of
from tdcache.residual.remembered import once
from tdcache.residual.stream import CachedStream
from tdcache.tokens import Positions

__all__ = ["accumulated", "decompose", "needed"]


def needed(
    names: Names,
    *,
    heads: bool = False,
    neurons: bool = False,
    mid: bool = False,
    embeddings: bool = True,
    prefix: str | None = None,
) -> str:
    r"""The pattern of the names that the functions here ask of a cache.

    Args:
        names: the table of the model.
        heads: also what :func:`head_results` needs.
        neurons: also what :func:`neuron_results` needs.
        mid: also the stream between attention and MLP.
        embeddings: the embeddings apart; without them the stream before the first block is one part. Position
            embeddings often have one row for all, of which a context cannot keep the ``positions=`` of each row.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Raises:
        CanonicalNameError: the model has no such values, or they are refused there.

    Example:
        >>> from tdcache.named_streams import ResidualStream
        >>> places = {"blocks.0.mlp.contribution": "mlp", "blocks.0.resid_pre": "", "blocks.0.resid_post": ""}
        >>> needed(Names(places, streams={"": ResidualStream(layouts=("pre-norm",))}))
        'blocks\\.(0\\.resid_pre|\\d+\\.(mlp\\.contribution|resid_post))'
    """
    stream = CachedStream.of(Parts(), names, prefix)
    kinds = dict.fromkeys(kind for block in range(stream.stream.blocks) for kind in stream.contributions(block))
    roles = [rf"{kind}\.contribution" for kind in kinds] + ["resid_post"]
    roles += [role for wanted, role in ((heads, r"attn\.z"), (neurons, r"mlp\.post"), (mid, "resid_mid")) if wanted]
    blocks = rf"blocks\.(0\.resid_pre|\d+\.({'|'.join(roles)}))"
    first = stream.stream.embeddings if embeddings else ()
    pattern = "|".join([*map(regex.escape, first), regex.escape(stream.stream.prefix) + blocks])
    if names.style is None:
        return pattern
    meant = [name for name in stream.canonical(refused=False) if regex.fullmatch(pattern, name)]
    return "|".join(regex.escape(names.spelled(name)) for name in meant)


def accumulated(
    cache: TensorDictBase,
    *,
    of: str | None = None,
    mid: bool = False,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Parts:
    """The stream before each block, and after the last: ``blocks.0.resid_pre``, ..., ``blocks.11.resid_post``.

    Args:
        cache: canonical names to values; ``resid_pre`` of the first block, and of each block that or the
            ``resid_post`` of the one before.
        of: the value of the stream to go up to; the last ``resid_post`` that is kept by default.
        mid: also the stream between attention and MLP of each block.
        positions: which positions; see ``docs/positions.md``. None for all.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several, ``"encoder."``; by default the one that logits are made of.

    Returns:
        Values ``(batch, position, unit)`` by name; those of half precision in float32. They share memory and graph
        with the cache.

    Raises:
        CanonicalNameError: the model has no such value, as a parallel block has no ``resid_mid``.
        ResidualError: the cache lacks one.
    """
    stream = CachedStream.of(cache, names, prefix, Columns(positions, mask))
    of, last, role = stream.until(of)
    found: dict[str, Tensor] = {}
    for block in range(last + 1):
        found[stream.name("resid_pre", block)] = stream.value(_chained(stream, block))
        between = stream.name("resid_mid", block)
        if (mid and (block < last or role == "resid_post")) or between == of:
            found[between] = stream.value(between)
    found[of] = found[of] if of in found else stream.value(of)
    return Parts.made(found, stream.names, stream.stream.prefix, at=found[of])


def decompose(
    cache: TensorDictBase,
    *,
    of: str | None = None,
    heads: bool = False,
    neurons: bool = False,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> Parts:
    """Everything that was written to the stream: parts whose sum is one value of it.

    The embeddings, then of each block what attention and MLP contributed. Where a norm stands *in* the stream (the
    post-norm layout of BERT: ``N(pre + contribution)``), every part so far goes through it with its scale frozen, and
    its bias is a part of its own. The sum is compared with every value of the stream that the cache keeps.

    Args:
        cache: canonical names to values; :func:`needed` gives the pattern.
        of: the value to take apart; the last ``resid_post`` that is kept by default.
        heads: attention by head, ``blocks.0.attn.head.3``, with the biases on the way as ``blocks.0.attn.bias``.
        neurons: MLPs by neuron, ``blocks.0.mlp.neuron.17``, and ``blocks.0.mlp.bias``: as many tensors as neurons.
        positions: which positions; see ``docs/positions.md``. None for all.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several, ``"encoder."``; by default the one that logits are made of.

    Returns:
        Values ``(batch, position, unit)`` by name; those of half precision in float32. Gradients flow through them
        where the cache holds ``"live"`` values, though not through the scales of norms.

    Raises:
        CanonicalNameError: a contribution is refused in this model.
        ResidualError: the cache lacks a value, or the parts do not sum to one that it keeps.
    """
    stream = CachedStream.of(cache, names, prefix, Columns(positions, mask))
    of, last, _ = stream.until(of)
    if remembered := stream.columns.positions is None:  # some positions are few, and compared each time
        once(partial(_checked, stream, of, last), key=(of, id(stream.stream)), **_behind(stream, last))
    sums = _summed(stream, of, last, heads=heads, neurons=neurons, compared=not remembered)
    at = stream.value(of) if stream.keeps(of) else sums.total
    return Parts.made(sums.parts, stream.names, stream.stream.prefix, of=of, at=at)


def _checked(stream: CachedStream, of: str, last: int) -> ResidualStream:
    """Compare every sum; returns what is remembered with the verdict, so that its ``id`` stays its own."""
    _summed(stream, of, last)
    return stream.stream


def _behind(stream: CachedStream, last: int) -> dict[str, Any]:
    """What the verdict on the sums depends on: the kept values, and what acts on the stream itself."""
    (owner,) = stream.modules("")
    changes = [change for block in range(last + 1) for change in stream.changes(block)]
    names = [*stream.stream.embeddings, *(stream.name("resid_pre", block) for block in range(last + 1))]
    names += [name for change in changes for name in (change.name, change.after) if name]
    values = [stream.raw(name) for name in dict.fromkeys(names) if stream.keeps(name)]
    norms = [change.path or stream.place(change.name).path for change in changes if change.kind == "norm"]
    parameters = [stream.parameter(change.path) for change in changes if change.kind != "norm" and change.path]
    modules = list(stream.modules(stream.stream.embedding_norm, *norms))
    return {"owner": owner, "values": [*values, *parameters], "modules": modules}


def _summed(
    stream: CachedStream, of: str, last: int, *, heads: bool = False, neurons: bool = False, compared: bool = True
) -> _RunningSum:
    """The parts of one value of the stream, compared on the way with every value that is kept."""
    sums = _embedded(stream)
    for block in range(last + 1):
        # After the first block, the value was compared under the name resid_post where that is kept.
        if compared and (block == 0 or not stream.keeps(stream.name("resid_post", block - 1))):
            sums.compare(stream.name("resid_pre", block))
        if of == stream.name("resid_pre", block):
            break
        for change in stream.changes(block):
            sums.follow(change, pieces=_pieces(stream, block, change, heads, neurons))
            if compared:
                sums.compare(change.after, block=block if change.after.endswith("resid_post") else None)
            if change.after == of:
                break
    return sums


class _RunningSum:
    """The parts so far, and their sum."""

    def __init__(self, stream: CachedStream, parts: dict[str, Tensor]) -> None:
        self._stream = stream
        self.parts = parts
        self._total, self._added = torch.zeros(()), list(parts.values())

    @property
    def total(self) -> Tensor:
        """The sum of the parts, taken when it is asked for."""
        self._total, self._added = sum(self._added, self._total), []
        return self._total

    def follow(self, change: StreamChange, *, pieces: Pieces | None) -> None:
        """Add a contribution, in pieces or whole, or send all parts through what acts on the stream itself."""
        like = next(iter(self.parts.values()))
        if change.kind == "add" and not change.name:
            self.parts[change.path] = self._stream.parameter(change.path).detach().to(like).expand_as(like)
            self._added.append(self.parts[change.path])
        elif change.kind == "add":
            value = self._stream.value(change.name)
            self.parts.update({change.name: value} if pieces is None else pieces.all())
            self._added.append(value)
        elif change.kind == "norm":
            self.normalise(change.path or self._stream.place(change.name).path, change.name)
        else:
            factor = self._stream.parameter(change.path).detach().to(like) if change.path else change.factor
            self.parts = {key: part * factor for key, part in self.parts.items()}
            self._total = self.total * factor

    def normalise(self, path: str, name: str) -> None:
        """Send all parts through a norm that stands in the stream, and call its bias by that name."""
        (module,) = self._stream.modules(path)
        norm = NormStep.of(module, path, self.total)
        self.parts = {key: norm(part) for key, part in self.parts.items()}
        if norm.bias is not None:
            self.parts[f"{name}.bias"] = norm.bias.expand_as(self.total)
        self._total, self._added = torch.zeros(()), list(self.parts.values())

    def compare(self, name: str, *, block: int | None = None) -> None:
        """Hold the sum against the value that is kept under a name, if one is.

        A contribution to ``block`` that is refused is one that it does not have if the sum holds without it.

        Raises:
            CanonicalNameError: the sum does not hold, or cannot be compared, and a contribution is refused.
            ResidualError: it does not hold.
        """
        if not name or not self._stream.keeps(name):
            if refused := self._refused(block):  # a block without attention, or one whose attention is not seen
                raise self._stream.error(refused[0])
            return
        off = deviation(self.total, self._stream.value(name))
        if not off <= tolerance(self._stream.raw(name)):
            if refused := self._refused(block):
                raise self._stream.error(refused[0])
            raise ResidualError(
                f"{name!r} differs by {off:.1e} of its largest value from the sum of what was written before: the "
                "cache holds values of several forwards, the model was in training mode, which drops some of what is "
                "written, or the table is not this model's",
                names=[name],
            )

    def _refused(self, block: int | None) -> list[str]:
        return [] if block is None else self._stream.refused(block)


def _embedded(stream: CachedStream) -> _RunningSum:
    """What the stream begins with: its embeddings, or their sum where these are not kept."""
    names, first = list(stream.stream.embeddings), stream.name("resid_pre", 0)
    if not names or (stream.keeps(first) and not all(map(stream.keeps, names))):
        return _RunningSum(stream, {first: stream.value(first)})
    stream.require(names)
    values = [stream.whole(name) for name in names]
    spread = torch.broadcast_tensors(*values)  # one row of positions serves all rows
    parts = {name: stream.columns.of(value, name) for name, value in zip(names, spread, strict=True)}
    sums = _RunningSum(stream, parts)
    if stream.stream.embedding_norm is not None:
        sums.normalise(stream.stream.embedding_norm, stream.name("embed_norm"))
    return sums


def _chained(stream: CachedStream, block: int) -> str:
    """The name under which the stream before a block is kept: blocks are chained."""
    name = stream.name("resid_pre", block)
    before = stream.name("resid_post", block - 1)
    return before if block and not stream.keeps(name) and stream.keeps(before) else name


def _pieces(stream: CachedStream, block: int, change: StreamChange, heads: bool, neurons: bool) -> Pieces | None:
    if heads and change.name == stream.name("attn.contribution", block):
        return heads_of(stream, block)
    return neurons_of(stream, block) if neurons and change.name == stream.name("mlp.contribution", block) else None
