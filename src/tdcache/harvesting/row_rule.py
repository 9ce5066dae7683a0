"""Which rows of a batch are kept: one per token or one per sample, without padding, BOS and positions not asked for.

The answer depends on the batch alone, never on the model, so that rows can be counted without a forward.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tdcache.errors import SelectionError
from tdcache.hooks.values import first_tensor
from tdcache.sequences import Sequences
from tdcache.tokens import Tokens

__all__ = [
    "BatchRows",
    "FedTokens",
    "RowKind",
    "RowRule",
    "as_drops",
    "as_kind",
    "as_positions",
    "batch_length",
    "has_tokens",
    "ids_of",
    "row_dims",
    "side_of",
]

RowKind = Literal["tokens", "samples"]
_DROPS = ("bos", "pad")


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of one batch that are kept."""

    grid: tuple[int, ...]
    """The leading dimensions that every site's value must have: ``(batch, tokens)`` or ``(batch,)``."""
    chosen: Tensor | None
    """Numbers of the kept rows of the flattened grid, or None for all of them."""
    seq: Tensor
    pos: Tensor
    tok: Tensor | None

    def __len__(self) -> int:
        return self.seq.numel()

    def columns(self) -> dict[str, Tensor]:
        """What each row knows of itself: ``"seq"``, ``"pos"`` and perhaps ``"tok"``."""
        return {"seq": self.seq, "pos": self.pos} | ({} if self.tok is None else {"tok": self.tok})

    def first(self, count: int) -> BatchRows:
        """The first ``count`` of these rows."""
        if count >= len(self):
            return self
        chosen = torch.arange(len(self)) if self.chosen is None else self.chosen
        tok = None if self.tok is None else self.tok[:count]
        return BatchRows(self.grid, chosen[:count], self.seq[:count], self.pos[:count], tok)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """What is dropped.

    Args:
        kind: one row per token or per sample.
        drop: ``"pad"`` (tokens that the attention mask leaves out) and ``"bos"`` (the first token that it keeps).
        positions: the kept places among a sample's own tokens, counted from 0, or from -1 at its end; None for all.
            Padding has no place.
        side: which sequence rows belong to, where a batch feeds two: ``"encoder"`` or ``"decoder"``.
        length: how many tokens each sample has inside the model, where the batch does not say (the patches of an
            image, ``[CLS]`` included); None where it does.
    """

    kind: RowKind
    drop: tuple[str, ...] = ("pad",)
    positions: slice | tuple[int, ...] | None = None
    side: str = ""
    length: int | None = None

    def __call__(self, batch: Any, *, first: int) -> BatchRows:
        """The kept rows of a batch whose first sample has number ``first``."""
        if self.kind == "samples":
            count = batch_length(batch)
            seq = torch.arange(first, first + count)
            return BatchRows((count,), None, seq, torch.zeros(count, dtype=torch.int32), None)
        fed = FedTokens.of(batch, self.side) if self.length is None else FedTokens.made(batch, self.length)
        size, place = fed.size, fed.place.cpu()
        real = place >= 0
        kept = real if "pad" in self.drop else torch.ones_like(real)
        if "bos" in self.drop:
            kept = kept & (place != 0)
        if self.positions is not None:
            kept = kept & real & self._asked_for(place, real.sum(1, keepdim=True))
        chosen = kept.reshape(-1).nonzero().squeeze(1)
        return BatchRows(
            size,
            None if chosen.numel() == kept.numel() else chosen,
            (torch.arange(first, first + size[0]).unsqueeze(1).expand(size)).reshape(-1)[chosen],
            place.reshape(-1)[chosen].int(),
            None if fed.ids is None else fed.ids.cpu().reshape(-1)[chosen].int(),
        )

    def most_rows(self, grid: tuple[int, ...]) -> int:
        """The rows of a batch of this size without padding, at the most."""
        per_sample = grid[1] if len(grid) > 1 else 1
        if isinstance(self.positions, tuple):
            per_sample = min(per_sample, len(self.positions))
        return grid[0] * per_sample

    def _asked_for(self, place: Tensor, length: Tensor) -> Tensor:
        if isinstance(self.positions, slice):
            begin = _from_start(self.positions.start, length, 0)
            stop = _from_start(self.positions.stop, length, None)
            on_step = (place - begin) % (self.positions.step or 1) == 0
            return (place >= begin) & (place < stop) & on_step
        wanted = [place == (each if each >= 0 else length + each) for each in self.positions or ()]
        return torch.stack(wanted).any(0)


def _from_start(bound: int | None, length: Tensor, default: int | None) -> Tensor:
    if bound is None:
        return length if default is None else torch.full_like(length, default)
    return torch.full_like(length, bound) if bound >= 0 else (length + bound).clamp(min=0)


def as_positions(positions: Any) -> slice | tuple[int, ...] | None:
    """A slice, a number or several, in the one form that a rule has.

    Raises:
        SelectionError: something else.
    """
    if _is_number(positions):
        return (operator.index(positions),)
    if isinstance(positions, slice):
        bounds = (positions.start, positions.stop, positions.step)
        if all(each is None or isinstance(each, int) for each in bounds) and (positions.step or 1) > 0:
            return positions
    elif positions is None:
        return None
    elif isinstance(positions, Sequence) and positions and all(_is_number(each) for each in positions):
        return tuple(map(operator.index, positions))
    raise SelectionError(
        f"positions is a number, several, or a slice with a positive step, got {positions!r}", selector=positions
    )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def as_kind(rows: str | None) -> RowKind | None:
    """``"tokens"``, ``"samples"`` or None.

    Raises:
        SelectionError: something else.
    """
    if rows not in (None, "tokens", "samples"):
        raise SelectionError(f"rows is 'tokens', 'samples' or None, got {rows!r}", selector=rows)
    return rows  # type: ignore[return-value]


def as_drops(drop: str | Sequence[str] | None) -> tuple[str, ...]:
    """``"pad|bos"``, ``("pad", "bos")`` or None, sorted."""
    names = drop.split("|") if isinstance(drop, str) else list(drop or ())
    unknown = [name for name in names if name not in _DROPS]
    if unknown:
        raise SelectionError(f"drop knows 'pad' and 'bos', got {unknown[0]!r}; choose places with positions=")
    return tuple(sorted(set(names)))


@dataclass(frozen=True, slots=True)
class FedTokens:
    """The tokens of one sequence that a batch feeds."""

    size: tuple[int, int]
    """``(batch, tokens)``."""
    ids: Tensor | None
    place: Tensor
    """Which of its row's tokens each one is, ``(batch, tokens)``; -1 for padding."""

    @classmethod
    def made(cls, batch: Any, length: int) -> FedTokens:
        """Tokens that the model makes of each sample, as a vision transformer its patches."""
        size = batch_length(batch), length
        return cls(size, None, Tokens.columns_of(*size).place)

    @classmethod
    def of(cls, batch: Any, side: str) -> FedTokens:
        """Read them from a batch.

        Raises:
            SelectionError: the batch lacks the decoder's tokens, or its mask cannot be read.
        """
        ids = ids_of(batch, side)
        if not isinstance(batch, Mapping):
            tensor = first_tensor(batch) if ids is None else ids
            size = tuple(tensor.shape[:2])  # type: ignore[union-attr]
            return cls(size, ids, Tokens.columns_of(*size).place)
        sequences = Sequences(batch)
        if ids is None and side == "decoder":
            raise SelectionError(
                "these rows are the decoder's tokens, and the batch holds none; give decoder_input_ids (and "
                f"decoder_attention_mask where they are padded) beside {sorted(map(str, batch))!r}"
            )
        if ids is None:
            mask = batch.get("attention_mask")
            tensor = mask if isinstance(mask, Tensor) and mask.dim() == 2 else first_tensor(batch)
            size = tuple(tensor.shape[:2])  # type: ignore[union-attr]
        else:
            size = tuple(ids.shape)
        tokens = sequences.at(side or "the batch", batch=size[0], length=size[1])
        return cls(size, ids, tokens.place)


def side_of(batch: Any, path: str, length: int) -> str:
    """Which sequence of a batch a value of ``length`` positions at ``path`` consists of; ``""`` where there is one."""
    if not isinstance(batch, Mapping):
        return ""
    sequences = Sequences(batch)
    return sequences.own(path, length).role if len(sequences.fed) > 1 else ""


def ids_of(batch: Any, side: str = "") -> Tensor | None:
    """The token ids of a batch, ``(batch, tokens)``, where it has them."""
    if isinstance(batch, Mapping):
        ids = batch.get("decoder_input_ids" if side == "decoder" and "decoder_input_ids" in batch else "input_ids")
        if side == "decoder" and "decoder_input_ids" not in batch and "encoder_hidden_states" not in batch:
            ids = None
    else:
        ids = first_tensor(batch)
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not (ids.is_floating_point() or ids.is_complex())
    return ids if is_ids else None


def has_tokens(batch: Any, side: str = "") -> bool:
    """Whether a batch says that (one side of) it consists of tokens, by ids or a mask of them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) and side != "decoder" else None
    return ids_of(batch, side) is not None or (isinstance(mask, Tensor) and mask.dim() == 2)


def row_dims(shape: Sequence[int], grid: tuple[int, ...]) -> int | None:
    """How many leading dimensions of a value its rows lie along.

    Two for ``(batch, tokens, ...)``, one for ``(batch, ...)``, or for ``(batch * tokens, ...)`` as the routers of
    mixtures of experts give it; None where the value has no rows on this grid.
    """
    if tuple(shape[: len(grid)]) == grid:
        return len(grid)
    return 1 if len(grid) > 1 and len(shape) > 1 and shape[0] == math.prod(grid) else None


def _is_list_of_samples(batch: Any) -> bool:
    """Whether a batch was never collated: strings, mappings, or tensors that have no length in common."""
    if not isinstance(batch, tuple | list) or not batch:
        return False
    if all(isinstance(each, str | Mapping) for each in batch):
        return True
    lengths = {each.shape[:1] for each in batch if isinstance(each, Tensor)}
    return isinstance(batch, list) and len(lengths) > 1


def batch_length(batch: Any) -> int:
    """The number of samples in a batch; a list of strings, mappings or tensors of different lengths is one of samples.

    Raises:
        SelectionError: there is no tensor in it.
    """
    if _is_list_of_samples(batch):
        return len(batch)
    ids = ids_of(batch)
    tensor = first_tensor(batch) if ids is None else ids
    if tensor is None or tensor.dim() == 0:
        raise SelectionError(
            f"a batch is a tensor, or tensors in a tuple, list or mapping, with the samples along the first dimension, "
            f"or a list of strings or mappings; got {type(batch).__name__}"
        )
    return tensor.shape[0]
