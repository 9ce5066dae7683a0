"""Names of every family in ``families.py``: which roles are proved, which refused and why; writes the docs' table.

``python tests/names_zoo.py`` goes over all of them and writes ``docs/names_table.md``; arguments are families to look
at instead, with their tables. The command fails if fewer than 95 of 100 families have all of their blocks proved.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import regex

import families
from tdcache.errors import TdcacheError
from tdcache.named_places import Names
from tdcache.naming import proved, resolve

TABLE = Path(__file__).parents[1] / "docs" / "names_table.md"
SHARE = 0.95
ROLES = (
    *("embed", "pos_embed", "resid_pre", "ln1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z"),
    *("attn.out", "attn.contribution", "resid_mid", "ln2", "mlp.pre", "mlp.post", "mlp.router", "mlp.out"),
    *("mlp.contribution", "resid_post", "final_norm", "unembed"),
)
HEAD = """# Families and roles

Written by `nox -s names_zoo` from tiny random models, one per family: which canonical names are found by data flow and
proved by arithmetic (`yes`: in every block that has it; `some`: in some blocks), which are refused (a number, for the
reason below the table), and which the model has no use for (empty). `mixer` marks families whose blocks mix positions
without an attention call, in some or all of their blocks; there its contribution is proved instead of attention's.
"""


@dataclass
class Row:
    """What one family gave."""

    family: str
    layouts: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    whole: bool = False


def look(family: str) -> tuple[Row, Names | None]:
    """Resolve and prove one family."""
    model = families.build(family)
    try:
        table = proved(model, resolve(model))
    except TdcacheError as error:
        return Row(family, cells={"resid_pre": str(error).partition(":")[0]}), None
    layouts = sorted({layout for stream in table.streams.values() for layout in stream.layouts})
    mixer = ["mixer"] if any(".mixer.contribution" in name for name in table) else []
    row = Row(family, ", ".join([*layouts, *mixer]), whole=is_whole(table))
    for role in ROLES:
        row.cells[role] = cell(role, table)
    return row, table


def is_whole(table: Names) -> bool:
    """Whether each block's stream is proved, with everything that is added to it."""
    assert table.proof is not None
    sums = [set(each.names) for each in table.proof.identities if "contribution" in each.identity]
    blocks = [f"{prefix}blocks.{at}." for prefix, stream in table.streams.items() for at in range(stream.blocks)]
    return all(any({head + "resid_pre", head + "resid_post"} <= names for names in sums) for head in blocks)


def cell(role: str, table: Names) -> str:
    """What a role is in one family."""
    pattern = regex.compile(rf"(.*\.)?{regex.escape(role)}")
    found = [name for name in table if pattern.fullmatch(name)]
    refused = [reason for name, reason in table.refused.items() if pattern.fullmatch(name)]
    if found:
        per_block = "." in role or role.startswith(("resid", "ln"))
        return "some" if refused and per_block else "yes"
    return plain(refused[0]) if refused else ""


def plain(reason: str) -> str:
    """A reason without the numbers and paths of one model."""
    reason = reason.partition("; nearest")[0]
    reason = regex.sub(r"\b[\w.]*blocks\.\d+\.", "", reason)
    reason = regex.sub(r"'[\w.]+::", "'...::", regex.sub(r" at '[^']*'", "", reason))
    reason = regex.sub(r"\d\.\de[+-]\d+|\binf\b", "more than is allowed", reason)
    return reason.replace(" of the largest value", "").replace("|", "/")


def page(rows: Iterable[Row]) -> str:
    """The docs' page."""
    rows = list(rows)
    reasons: dict[str, int] = {}
    lines = [f"| family | blocks | {' | '.join(ROLES)} |", "|---" * (len(ROLES) + 2) + "|"]
    for row in rows:
        cells = []
        for role in ROLES:
            text = row.cells.get(role, "")
            known = text in ("", "yes", "some")
            cells.append(text if known else str(reasons.setdefault(text, len(reasons) + 1)))
        lines.append(f"| {row.family} | {row.layouts} | {' | '.join(cells)} |")
    whole = sum(row.whole for row in rows)
    summary = f"Every block of {whole} of {len(rows)} families is proved: its stream and all that is added to it."
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([HEAD, summary, "", *lines, "", "## Reasons", "", *listed, ""])


def main(arguments: list[str]) -> int:
    """Look at all families, or at those that are named."""
    rows = []
    for family in arguments or families.FAMILIES:
        row, table = look(family)
        rows.append(row)
        print(family, "whole" if row.whole else "in part", flush=True)
        if arguments and table is not None:
            print(table, table.proof, sep="\n")
    if arguments:
        return 0
    TABLE.write_text(page(rows))
    share = sum(row.whole for row in rows) / len(rows)
    print(f"{share:.1%} of {len(rows)} families are proved whole")
    return int(share < SHARE)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
