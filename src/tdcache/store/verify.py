"""Finding damage: every byte of a store is read and held against the checksums."""

from __future__ import annotations

import os

from tdcache.errors import DamagedError, StoreError
from tdcache.store.layout import StoreFiles
from tdcache.store.remote import as_place
from tdcache.store.shard import Shard, ShardCache
from tdcache.store.shard_header import Contract, IndexRow
from tdcache.store.spec import read_spec, spec_id

__all__ = ["find_damage"]


def find_damage(folder: str | os.PathLike[str]) -> list[StoreError]:
    """One error for each damaged file, in order; none where every byte is the one that was written.

    A unit that is missing counts where the index names it, or where the data is known to go on after it.

    Args:
        folder: of the store.

    Raises:
        SpecError: there is no store.
        DamagedError: the spec itself is damaged, so that nothing else can be judged.
    """
    layout = StoreFiles(as_place(folder))
    spec = read_spec(layout.folder)
    contract, cache = Contract.of(spec_id(spec), spec), ShardCache()
    found: list[StoreError] = []
    indexed: dict[int, IndexRow] = {}
    try:
        indexed = layout.read_index(contract.spec) or {}
    except StoreError as error:
        found.append(error)
    ended, units = False, list(layout.units())
    for unit in units:
        try:
            shard = Shard.opened(layout.shard(unit), contract, cache)
            _check_place(shard, unit, indexed.get(unit))
            shard.verify()
        except StoreError as error:
            found.append(error)
        else:
            ended |= shard.row.end
    wanted = range(units[-1] + 1) if ended else ()
    for unit in sorted({*indexed, *wanted} - set(units)):
        path = layout.shard(unit)
        found.append(
            DamagedError(f"{path}: unit {unit} is missing; run the same harvest again to have it made anew", path=path)
        )
    return found


def _check_place(shard: Shard, unit: int, indexed: IndexRow | None) -> None:
    if shard.row.unit != unit:
        raise DamagedError(f"{shard.path} holds unit {shard.row.unit}, not {unit}", path=shard.path)
    if indexed is not None and indexed != shard.row:
        raise DamagedError(
            f"{shard.path} says {tuple(shard.row)} of itself, the index says {tuple(indexed)}", path=shard.path
        )
