"""What an index says of all rows together: statistics and losses of each site, merged over the shards."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tdcache.store.shard import Shard
from tdcache.store.shard_header import Contract, site_column
from tdcache.store.statistics import SiteStatistics

__all__ = ["packed_summary", "parsed_summary", "summarised"]


def summarised(contract: Contract, shards: Iterable[Shard]) -> dict[str, SiteStatistics]:
    """The statistics of each site over all shards, in their order; reads a few numbers of each shard."""
    shapes = {path: contract.columns[site_column(path)][1] for path in contract.sites}
    found = {path: SiteStatistics.none(shape) for path, shape in shapes.items()}
    for shard in shards:
        for path, own in shard.statistics().items():
            found[path] = found[path].merged(own)
    return found


def packed_summary(found: Mapping[str, SiteStatistics]) -> dict[str, Any]:
    """The statistics of each site as JSON values, without loss."""
    return {
        path: {
            "rows": each.rows,
            "overflow": each.overflow,
            "underflow": each.underflow,
            "moments": base64.b64encode(each.packed().numpy().tobytes()).decode(),
        }
        for path, each in found.items()
    }


def parsed_summary(document: Any, contract: Contract) -> dict[str, SiteStatistics]:
    """From what an index holds.

    Raises:
        ValueError: it is not what the store's spec promises.
    """
    if not isinstance(document, dict) or set(document) != set(contract.sites):
        raise ValueError("the sites are not those of the spec")
    found = {}
    for path, each in document.items():
        counts = [each["rows"], each["overflow"], each["underflow"]]
        shape = contract.columns[site_column(path)][1]
        raw = base64.b64decode(each["moments"], validate=True)
        if any(type(count) is not int or count < 0 for count in counts) or len(raw) != 16 * math.prod(shape):
            raise ValueError(f"the statistics of {path!r} do not fit its shape")
        moments = torch.frombuffer(bytearray(raw), dtype=torch.float64) if raw else torch.empty(0, dtype=torch.float64)
        part = SiteStatistics.unpacked(counts[0], moments.view(2, *shape))
        found[path] = part.with_losses(counts[1], counts[2])
    return found
