"""Tables that lie, over every family: each has to be refused. Arguments are families to look at instead of all."""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import families
from naming.planted import lies
from tdcache.errors import TdcacheError
from tdcache.named_places import Names
from tdcache.naming import proved, resolve


def in_float32(table: Names, names: tuple[str, ...]) -> bool:
    """Whether the proof saw that sums with these names are computed in float32, which is off by as much."""
    assert table.proof is not None
    return any(each.tolerance > 1e-9 and set(names) & set(each.names) for each in table.proof.identities)


def main(arguments: list[str]) -> int:
    """Plant every lie in every family and count those that pass."""
    planted: Counter[str] = Counter()
    passed = 0
    for family in arguments or families.FAMILIES:
        model = families.build(family)
        try:
            table = proved(model, resolve(model))
        except TdcacheError as error:
            print(f"{family}: {str(error).partition(':')[0]}", flush=True)
            continue
        for lie in lies(model, table):
            if lie.kind == "a_ten_millionth" and in_float32(table, lie.names):
                continue
            planted[lie.kind] += 1
            left = set(lie.names) & set(proved(lie.model, lie.table))
            if left:
                passed += 1
                print(f"{family}: {lie.kind} passes: {sorted(left)}", flush=True)
    print(f"{planted.total()} lies in {len(arguments or families.FAMILIES)} families, {passed} passed")
    print("\n".join(f"{count:6} {kind}" for kind, count in planted.most_common()))
    return int(passed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
