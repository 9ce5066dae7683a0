"""Harvesting with Ray actors, where machines come and go: actors write shards, index rows come back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tdcache.errors import StoreError, TdcacheWarning, warn_user
from tdcache.harvesting.entry import harvest
from tdcache.store.dataset import ActivationDataset
from tdcache.store.spec import has_spec

__all__ = ["harvest_with_ray"]

Make = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True, slots=True)
class _ActorWork:
    """What one actor does: its share of the units, and then a row for the index per shard."""

    make: Make
    path: str
    options: dict[str, Any]

    def __call__(self, rank: int, world: int) -> list[tuple[int, int]]:
        model, data = self.make()
        dataset = harvest(model, data, self.path, rank=rank, world=world, **self.options)
        return [(shard.info.unit, shard.rows) for shard in dataset.shards]


def harvest_with_ray(
    make: Make,
    path: str | os.PathLike[str],
    *,
    workers: int = 2,
    rounds: int = 3,
    actor_options: dict[str, Any] | None = None,
    **options: Any,
) -> ActivationDataset:
    """:func:`tdcache.harvest` on Ray actors; needs the extra ``ray``.

    Each actor makes the model and the data, and writes the shards of its units to ``path``, which all of them must see.
    Only numbers come back: activations never travel through Ray's object store. The units of an actor that died are run
    by others in the next round.

    Args:
        make: gives model and data; called on the actor.
        path: the store's folder.
        workers: how many actors.
        rounds: how often units that are still missing are dealt again.
        actor_options: for Ray, such as ``{"num_gpus": 1}``.
        **options: of :func:`tdcache.harvest`, ``select`` among them.

    Raises:
        StoreError: Ray is not installed, or units are still missing after the last round.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise StoreError("harvesting with Ray needs it: pip install 'tdcache[ray]'") from None
    folder = Path(path).absolute()
    actor = ray.remote(**{"num_cpus": 1, **(actor_options or {})})(_Harvester)
    part = _ActorWork(make, str(folder), options)
    failure: BaseException | None = None
    for _ in range(rounds):
        actors = [actor.remote(part) for _ in range(workers)]
        calls = [each.run.remote(rank, workers) for rank, each in enumerate(actors)]
        for rank, call in enumerate(calls):
            try:
                ray.get(call)
            except ray.exceptions.RayTaskError:  # an error of the harvest itself, which another actor would meet too
                raise
            except ray.exceptions.RayError as error:
                failure = error
                warn_user(f"the Ray actor of share {rank} was lost: {type(error).__name__}", TdcacheWarning)
        if has_spec(folder) and (dataset := ActivationDataset.open(folder)).complete:
            return dataset
    raise StoreError(f"units are missing in {folder} after {rounds} rounds; run it again", path=folder) from failure


class _Harvester:
    """What becomes an actor."""

    def __init__(self, part: _ActorWork) -> None:
        self.part = part

    def run(self, rank: int, world: int) -> list[tuple[int, int]]:
        """Unit and rows of the shards that are there when this share is done."""
        return self.part(rank, world)
