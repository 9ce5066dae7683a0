"""Values of sharded models: gathered, or refused; a shard is never taken for the whole.

What a hook sees under tensor parallelism depends on whether it was set before or after the model was parallelised: a
``DTensor`` (sharded, or a sum that was not added up yet), a tensor whose reduction is still under way, or the bare
local shard, without a trace of being one. The first two are made whole here. The last is found out once, at the start:
all ranks run the same batch, so that what differs between them is no whole value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import CaptureError

__all__ = ["ShardedModel", "holders", "refuse_shards", "shard_error", "whole_tensor"]

_TOLERANCE = 1e-3  # between ranks: reductions may add up in another order, shards are other numbers altogether


def _dtensor_class() -> type[Tensor] | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def whole_tensor(tensor: Tensor, module: nn.Module, path: str) -> Tensor:
    """The value that a single process would have, as a plain tensor; a collective where ``tensor`` is a DTensor.

    Raises:
        CaptureError: a bare shard; it names the module.
    """
    if type(tensor) is Tensor and not _is_initialized():
        return tensor
    kind = _dtensor_class()
    if kind is None:
        return tensor
    if isinstance(tensor, kind):
        return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]
    if hasattr(tensor, "trigger_wait"):  # an AsyncCollectiveTensor: its reduction may still be under way
        tensor = tensor.trigger_wait()
    weight = getattr(module, "weight", None)
    if isinstance(weight, kind) and isinstance(module, nn.Linear | nn.Embedding):
        wanted = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        if tensor.shape[-1] != wanted:
            raise shard_error(path, f"has {tensor.shape[-1]} features here and {wanted} in all")
    return tensor


def shard_error(path: str, why: str) -> CaptureError:
    """The refusal of a bare shard."""
    return CaptureError(
        f"{path!r} {why}: this rank sees only its shard of the value, which must not be stored as if it were whole; "
        "select a module whose output is whole (the row-parallel one behind it, or the block), or parallelise with "
        "use_local_output=False, so that the value says where its other parts are",
        paths=(path,),
    )


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def holders(model: nn.Module) -> tuple[int, ...]:
    """The ranks that hold parts of a model, in order; none where it is whole on each rank. No collective."""
    kind = _dtensor_class() if _is_initialized() else None
    if kind is None:
        return ()
    meshes = [each.device_mesh for each in model.parameters() if isinstance(each, kind)]  # type: ignore[attr-defined]
    return tuple(sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))


@dataclass(frozen=True, slots=True)
class ShardedModel:
    """Which ranks must run a model together, because each holds a part of it."""

    ranks: tuple[int, ...]
    """The ranks of this one's group, in order; the first of them writes."""
    groups: int
    """How many groups there are."""
    group: int
    """The number of this rank's group."""

    @classmethod
    def of(cls, model: nn.Module) -> ShardedModel | None:
        """The group, or None where the model is whole on each rank; a collective where it is not."""
        ranks = holders(model)
        if not ranks:
            return None
        said: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, ranks)
        groups = sorted(set(said))
        return cls(ranks, len(groups), groups.index(ranks))

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its group that writes."""
        return torch.distributed.get_rank() == self.ranks[0]


def refuse_shards(values: Mapping[str, Tensor], seen: Sequence[str]) -> None:
    """Compare what the ranks captured of one and the same batch; a collective.

    Args:
        values: this rank's rows, by path.
        seen: the paths, in the order that all ranks must have in common.

    Raises:
        CaptureError: the ranks captured other modules, or values that differ; it names the first such module.
    """
    mine = [(path, tuple(values[path].shape), _measures(values[path])) for path in seen]
    said: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, mine)
    for other in said:
        if [one[0] for one in other] != [one[0] for one in mine]:
            raise CaptureError("the ranks selected other modules; give all of them the same model and the same select=")
        for (path, shape, sums), (_, there, others) in zip(mine, other, strict=True):
            near = [math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in zip(sums, others, strict=True)]
            if shape != there or not all(near):
                raise shard_error(path, "has other values on other ranks")


def _measures(rows: Tensor) -> tuple[float, ...]:
    """A few numbers that two different tensors do not share: norm, and projections on two fixed directions."""
    flat = rows.detach().double().reshape(-1)
    norm = float(flat.norm())
    waves = torch.arange(flat.numel(), dtype=torch.float64)
    scale = norm or 1.0
    return norm, *(float(flat @ torch.cos(waves * step)) / scale + 10 for step in (0.37, 1.91))
