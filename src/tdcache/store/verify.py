"""Finding damage: every byte of a store is read and held against the checksums."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tdcache.errors import DamagedError, StoreError
from tdcache.store.layout import Layout
from tdcache.store.shard import Shard, read_shard
from tdcache.store.spec import read_spec, spec_id

__all__ = ["check_columns", "find_damage"]


def check_columns(shard: Shard, spec: Mapping[str, Any]) -> None:
    """Refuse a shard whose columns are not those of the spec.

    Raises:
        DamagedError: a site is missing or has another shape or dtype.
    """
    expected = {f"act/{path}": (site["dtype"], tuple(site["shape"])) for path, site in spec["sites"].items()}
    expected |= {"seq": ("int64", ()), "pos": ("int32", ())}
    found = {name: (str(each.dtype)[6:], each.shape[1:]) for name, each in shard.header.tensors.items()}
    token = found.pop("tok", ("int32", ()))
    if found != expected or token != ("int32", ()):
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)) or ["tok"]
        raise DamagedError(
            f"{shard.path}: column {wrong[0]!r} is {found.get(wrong[0], token)}, the spec has {expected.get(wrong[0])}",
            path=shard.path,
        )


def find_damage(folder: str | os.PathLike[str]) -> list[StoreError]:
    """One error for each damaged file, in order; none where every byte is the one that was written.

    A unit that is missing counts where the index names it, or where the data is known to go on behind it.

    Args:
        folder: of the store.

    Raises:
        SpecError: there is no store.
        DamagedError: the spec itself is damaged, so that nothing else can be judged.
    """
    layout, spec = Layout(folder), read_spec(Layout(folder).folder)
    found: list[StoreError] = []
    indexed: dict[int, list[int]] = {}
    try:
        indexed = layout.read_index() or {}
    except StoreError as error:
        found.append(error)
    shards: dict[int, Shard] = {}
    units = layout.units()
    for unit in units:
        try:
            shard = read_shard(layout.shard(unit), spec=spec_id(spec))
            _check_place(shard, unit, spec, indexed.get(unit))
            shard.verify()
        except StoreError as error:
            found.append(error)
        else:
            shards[unit] = shard
    ended = any(shard.info.end for shard in shards.values())
    wanted = range(units[-1] + 1) if ended else ()
    for unit in sorted({*indexed, *wanted} - set(units)):
        path = layout.shard(unit)
        found.append(
            DamagedError(f"{path}: unit {unit} is missing; run the same harvest again to have it made anew", path=path)
        )
    return found


def _check_place(shard: Shard, unit: int, spec: Mapping[str, Any], indexed: list[int] | None) -> None:
    check_columns(shard, spec)
    said = [shard.info.unit, shard.rows, shard.info.first, shard.info.last, shard.size]
    if shard.info.unit != unit:
        raise DamagedError(f"{shard.path} holds unit {shard.info.unit}, not {unit}", path=shard.path)
    if indexed is not None and indexed != said:
        raise DamagedError(f"{shard.path} says {said} of itself, the index says {indexed}", path=shard.path)
