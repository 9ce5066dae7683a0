"""The residual stream of every family in ``families.py``, taken apart by names that are found.

``python tests/residual_zoo.py`` goes over all of them; arguments are families to look at instead. The command fails if
a sum that is given is not exact, or if fewer than 95 of 100 streams whose names are proved are taken apart.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import families
import tdcache
from tdcache import ActivationCaching, Names, residual
from tdcache.errors import TdcacheError
from tdcache.naming.copies import WorkingCopy, in_best_dtype
from tdcache.naming.inputs import own_inputs

SHARE = 0.95
EXACT = {torch.float64: 1e-6, torch.float32: 1e-4}
"""What rounding explains, beside the largest value: norms and softmax compute in float32 inside of float64."""
PIECES: Mapping[str, Mapping[str, bool]] = {"whole": {}, "heads": {"heads": True}, "neurons": {"neurons": True}}


@dataclass(frozen=True)
class Found:
    """What became of one decomposition of one stream."""

    family: str
    prefix: str
    what: str
    error: float
    refused: str = ""
    allowed: float = 0.0

    def __str__(self) -> str:
        said = f"refused: {self.refused}" if self.refused else f"{self.error:.1e}"
        return f"{self.family} {self.prefix}{self.what}: {said}"

    @property
    def exact(self) -> bool:
        """Whether parts were given, and sum to the stream or the logits."""
        return not self.refused and self.error <= self.allowed


def look(family: str) -> list[Found]:
    """Take every stream of one family apart; nothing for a family whose names are not found."""
    model = families.build(family)
    try:
        table = tdcache.names(model)
    except TdcacheError:
        return []
    inputs = own_inputs(model, seed=5)
    return in_best_dtype(model, lambda copy: _look_at(copy, table, inputs, family))


def _look_at(copy: WorkingCopy, table: Names, inputs: Any, family: str) -> list[Found]:
    found = []
    copy.shake()
    for prefix, stream in table.streams.items():
        if not all(f"{prefix}blocks.{at}.resid_post" in table for at in range(stream.blocks)):
            continue
        for what, pieces in PIECES.items():
            found.append(
                _tried(family, prefix, what, copy, lambda p=prefix, k=pieces: _sums(copy, table, inputs, p, k))
            )
        if stream.unembed is not None:
            found.append(_tried(family, prefix, "logits", copy, lambda p=prefix: _logits(copy, table, inputs, p)))
    return found


def _tried(family: str, prefix: str, what: str, copy: WorkingCopy, use: Any) -> Found:
    try:
        return Found(family, prefix, what, use(), allowed=EXACT.get(copy.dtype, 1e-4))
    except TdcacheError as error:
        return Found(family, prefix, what, 0.0, refused=str(error))


def _kept(copy: WorkingCopy, table: Names, inputs: Any, prefix: str, pieces: Mapping[str, bool]) -> Any:
    pattern = residual.needed(table, prefix=prefix, **pieces)
    given = copy.fitted(inputs)
    caching = ActivationCaching(pattern, names=table, hold="snapshot")  # Falcon adds in place
    with caching.prepare(copy.model) as hooked, torch.no_grad():
        hooked(**given) if isinstance(given, Mapping) else hooked(*given) if isinstance(given, tuple) else hooked(given)
    return hooked.cache


def _sums(copy: WorkingCopy, table: Names, inputs: Any, prefix: str, pieces: Mapping[str, bool]) -> float:
    cache = _kept(copy, table, inputs, prefix, pieces)
    parts = residual.decompose(cache, prefix=prefix, **pieces)
    return _off(parts.total(), cache[parts.of])


def _logits(copy: WorkingCopy, table: Names, inputs: Any, prefix: str) -> float:
    """The scores of a token against the last entry of the lens, before the cap."""
    cache, cap = _kept(copy, table, inputs, prefix, {}), table.stream(prefix).logit_softcap
    *_, last = residual.logit_lens(cache, tokens=3, prefix=prefix).values()
    scores = residual.logit_attribution(residual.decompose(cache, prefix=prefix), 3)
    return _off(sum(scores.values()), last if cap is None else cap * torch.atanh(last / cap))


def _off(found: Any, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def main(arguments: list[str]) -> int:
    """Look at all families, or at those that are named."""
    counts: Counter[str] = Counter()
    wrong = []
    for family in arguments or families.FAMILIES:
        for each in look(family):
            counts[f"{each.what}, {'refused' if each.refused else 'exact' if each.exact else 'wrong'}"] += 1
            if not each.exact:
                print(each, flush=True)
            if not each.exact and not each.refused:
                wrong.append(each)
    for what, count in sorted(counts.items()):
        print(f"{what}: {count}")
    share = counts["whole, exact"] / max(1, counts["whole, exact"] + counts["whole, refused"])
    print(f"{share:.1%} of the streams are taken apart")
    return int(bool(wrong) or (share < SHARE and not arguments))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
