"""Which share of the units is this process's: the only thing that several processes need to agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from tdcache.errors import CaptureError, TdcacheWarning, warn_user
from tdcache.harvesting.sharding import ShardedModel, holders

__all__ = ["Share", "wait_for_others"]


@dataclass(frozen=True, slots=True)
class Share:
    """One of ``world`` equal shares of the units: those whose number leaves ``rank`` when divided by ``world``."""

    rank: int = 0
    world: int = 1
    writes: bool = True
    """Whether this process writes; of those that hold one model together, one does."""
    sharded: bool = False
    """Whether several processes hold one model together, and so must run the same batches."""
    waits: bool = False
    """Whether the ranks of the process group have one harvest in common, and so meet at its end."""

    @classmethod
    def of(cls, model: nn.Module, rank: int | None, world: int | None) -> Share:
        """The share that was asked for, or else the one that torchrun (or an open process group) gives this process.

        A collective where the model is sharded over processes. Nothing is known of the other ranks where the share was
        asked for: there is no meeting at the end.

        Raises:
            CaptureError: a share was asked for of a model that several ranks hold together.
        """
        if rank is not None or world is not None:
            return cls._explicit(model, rank or 0, world or 1)
        if _in_group():
            together = ShardedModel.of(model)
            if together is not None:
                return cls(together.group, together.groups, together.writes, sharded=True, waits=True)
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), waits=True)
        return cls._of_environment()

    @classmethod
    def _of_environment(cls) -> Share:
        """What a launcher says of this process where no process group was opened.

        Raises:
            ValueError: the variables are no share.
        """
        told = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if None in told or told == ("0", "1"):
            return cls()
        try:
            rank, world = (int(each or "") for each in told)
            if not 0 <= rank < world:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"the environment says RANK={told[0]!r} and WORLD_SIZE={told[1]!r}, which is no share of the work; "
                "give rank= and world=, or unset the variables"
            ) from None
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sets it; left-overs of a shell or a notebook do not
            warn_user(
                f"this process runs share {rank} of {world} only, because the environment says RANK={rank} and "
                f"WORLD_SIZE={world}, and no process group is open; if it is alone, give rank=0 and world=1",
                TdcacheWarning,
            )
        return cls(rank, world)

    @classmethod
    def _explicit(cls, model: nn.Module, rank: int, world: int) -> Share:
        if not 0 <= rank < world:
            raise ValueError(f"a share needs 0 <= rank < world, got {rank=}, {world=}")
        together = holders(model)
        if len(together) > 1:
            raise CaptureError(
                f"the ranks {', '.join(map(str, together))} hold this model together and must run the same batches, "
                f"which shares by {rank=}, {world=} are not; leave rank= and world= out, and one of the ranks writes"
            )
        return cls(rank, world)

    def has(self, unit: int) -> bool:
        """Whether a unit is in this share."""
        return unit % self.world == self.rank

    def agree(self, units: frozenset[int]) -> frozenset[int]:
        """What the writer of this share's group said: they must run the same units."""
        if not self.sharded:
            return units
        said: list[tuple[int, bool, frozenset[int]]] = [(0, False, frozenset())] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, (self.rank, self.writes, units))
        return next(there for rank, writes, there in said if writes and rank == self.rank)

    def wait(self) -> None:
        """Meet the other ranks, where they have this harvest in common; see :func:`wait_for_others`."""
        if self.waits:
            wait_for_others()


def wait_for_others() -> None:
    """Wait for the other ranks, where there is a process group; one that died is a warning: it costs its units only."""
    if not _in_group():
        return
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        warn_user(
            f"another rank did not come to the end of the harvest ({str(error).splitlines()[0]}); what was written is "
            "whole: run it again, with any number of ranks, to fill in the units that are missing",
            TdcacheWarning,
        )


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
