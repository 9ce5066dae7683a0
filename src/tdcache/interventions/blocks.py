"""Several interventions in one forward: blocks of rows of one batch, each patched in its own way.

A sweep of thousands of patches would be thousands of forwards of a small batch; stacked, it is a few forwards of a
large one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.current_call import among
from tdcache.errors import EditError
from tdcache.hooks.values import check_fits
from tdcache.interventions.replay import expanded
from tdcache.regions import Region
from tdcache.types import CacheKey

__all__ = ["PatchBlocks", "SweepState", "block_of", "repeated", "rows_of"]


@dataclass(slots=True)
class SweepState:
    """State shared by the taps of a sweep while its chunks run."""

    rows: int = 0
    blocks: int = 1
    assigned: dict[str, list[tuple[int, Region]]] = field(default_factory=dict)
    """By site: which blocks of the batch are patched there, and where."""
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PatchBlocks:
    """Patches, at one site, the blocks of the batch that are patched there."""

    path: str
    state: SweepState
    value: Callable[[int], Tensor]
    patch_fn: Callable[..., Tensor | None] | None
    calls: Any = None

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The value with its blocks patched; None if no block is patched here."""
        due = self.state.assigned.get(self.path)
        if not due:
            return None
        call = self.state.calls.get(self.path, 0)
        self.state.calls[self.path] = call + 1
        if self.calls is not None and not among(call, self.calls):
            return None
        source, new = self.value(call), full.clone()
        for block, region in due:
            mine = block_of(new, block, self.state, self.path)
            if source.shape != mine.shape or source.dtype != mine.dtype or source.device != mine.device:
                raise _misfit(self.path, source, mine)
            given = region.take(source, self.path)
            if self.patch_fn is not None:
                old, given = region.take(mine, self.path).clone(), given.clone()
                made = self.patch_fn(module_key=self.path, output=old, output_to_patch=given)
                given = given if made is None else made
                check_fits(given, old, self.path)
            region.write(mine, given, self.path)
        return new


def block_of(stacked: Tensor, block: int, state: SweepState, what: str) -> Tensor:
    """The rows of one intervention in a stacked batch.

    Raises:
        EditError: the tensor has no row for each.
    """
    if state.blocks == 1:
        return stacked
    if stacked.ndim == 0 or stacked.shape[0] != state.blocks * state.rows:
        raise EditError(
            f"{what!r} has shape {tuple(stacked.shape)}, not {state.blocks} x {state.rows} rows along "
            "its first axis, so "
            "interventions cannot be stacked along the batch; run them one by one with chunk=1"
        )
    return stacked[block * state.rows : (block + 1) * state.rows]


def _misfit(path: str, source: Tensor, value: Tensor) -> EditError:
    return EditError(
        f"the source at {path!r} does not fit:\n"
        f"  there: shape {tuple(value.shape)}, {value.dtype}, {value.device}\n"
        f"  source: shape {tuple(source.shape)}, {source.dtype}, {source.device}\n"
        "a sweep patches rows of the same shape; run the source on as many rows of the same length"
    )


def rows_of(data: TensorDictBase, in_keys: list[CacheKey]) -> int:
    """The number of rows of a batch: its batch size, or the first axis of the model's first input."""
    if data.batch_size:
        return int(data.batch_size[0])
    first: Any = data.get(in_keys[0])
    return int(first.shape[0]) if first.ndim else 1


def repeated(data: TensorDictBase, keys: list[CacheKey], blocks: int, rows: int) -> TensorDictBase:
    """Some entries of a batch, repeated along the batch once per block."""
    inputs = TensorDict(batch_size=[], device=data.device)
    for key in keys:
        value = data.get(key, None)
        if value is not None:
            inputs.set(key, expanded(value, blocks, rows) if isinstance(value, Tensor) else value)
    return inputs
