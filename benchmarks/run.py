"""Measure tdcache beside its peers: ``python benchmarks/run.py [--rows capture,oneshot] [--quick] [--markdown PATH]``.

Every row group runs in a process of its own, one after the other; the variants of a row share one process, because only
there can they be compared. A peer that is not installed leaves its line out and is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness import Goal, Plan, Table

ROWS = {
    "capture": "rows_forward:capture",
    "oneshot": "rows_forward:one_shot",
    "gradient": "rows_gradient:gradient",
    "gpt2": "rows_gpt2:gpt2",
    "stop": "rows_gpt2:early_stop",
    "memory": "rows_memory:memory",
    "reducers": "rows_memory:reducers",
    "compile": "rows_compile:compiled",
    "pipeline": "rows_pipeline:pipeline",
    "edit": "rows_interventions:one_edit",
    "sweep": "rows_interventions:sweep",
    "runstop": "rows_interventions:stopped_run",
    "points": "rows_points:points",
    "calls": "rows_calls:calls",
    "attribution": "rows_attribution:attribution",
    "residual": "rows_residual:stream",
    "harvest": "rows_harvest:rows",
    "shuffle": "rows_shuffle:rows",
}
PEERS = (
    *("tensordict", "regex", "tdhook", "nnsight", "captum", "zennit", "transformer-lens", "pyvene", "transformers"),
    *("datasets", "torchlens"),
)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> int:
    """Measure what is asked for, print it, and write it where that is asked for."""
    options = _arguments()
    if options.child:
        return _measure_here(options.child, options.quick, Path(options.json))
    stored = Path(options.json) if options.json else None
    results = json.loads(stored.read_text()) if stored and stored.exists() else {}
    failed = []
    for row in options.rows.split(","):
        start = time.perf_counter()
        tables = _measure_apart(row, options.quick)
        if tables is None:
            failed.append(row)
            continue
        results[row] = tables
        for table in tables:
            print(_plain(Table.from_json(table)), flush=True)
        print(f"({row}: {time.perf_counter() - start:.0f} s)\n", flush=True)
    results = {row: results[row] for row in ROWS if row in results}
    tables = [Table.from_json(table) for found in results.values() for table in found]
    print(_verdicts(tables))
    if stored:
        stored.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        _write(Path(options.markdown), tables, options.quick)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure tdcache beside its peers.")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes: about a minute, and noisier")
    parser.add_argument("--markdown", help="write the tables between the markers of this page")
    parser.add_argument("--json", help="keep the tables here; rows that are not measured now are taken from it")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return options


def _measure_apart(row: str, quick: bool) -> list[dict] | None:
    """One row group in a process of its own; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "tables.json")
        command = [sys.executable, __file__, "--child", row, "--json", str(answer), *(["--quick"] if quick else [])]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(command, env=environment, check=False)
        return json.loads(answer.read_text()) if done.returncode == 0 else None


def _measure_here(row: str, quick: bool, answer: Path) -> int:
    module, function = ROWS[row].split(":")
    tables = getattr(importlib.import_module(module), function)(Plan(quick=quick))
    answer.write_text(json.dumps([table.as_json() for table in tables]))
    return 0


# Printing.


def _plain(table: Table) -> str:
    lines = [table.title, *_aligned([table.head, *table.rows])]
    lines += [f"  {note}" for note in table.notes]
    lines += [f"  {_verdict(goal)}" for goal in table.goals]
    return "\n".join(lines).replace("**", "") + "\n"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _verdict(goal: Goal) -> str:
    return f"{'met  ' if goal.met else 'SHORT'} {goal.what}: {goal.found()}, wanted {goal.wanted()}"


def _verdicts(tables: list[Table]) -> str:
    goals = [goal for table in tables for goal in table.goals]
    short = [goal for goal in goals if not goal.met]
    lines = [f"{len(goals) - len(short)} of {len(goals)} goals met"]
    return "\n".join(lines + [_verdict(goal) for goal in short])


# The page.


def _write(page: Path, tables: list[Table], quick: bool) -> None:
    text = page.read_text() if page.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks the markers {BEGIN} and {END}, between which the tables go")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text("".join([before, BEGIN, "\n\n", _measured(tables, quick), "\n", END, after]))


def _measured(tables: list[Table], quick: bool) -> str:
    short = [goal for table in tables for goal in table.goals if not goal.met]
    lines = [_machine(quick), "", "### What falls short", ""]
    if short:
        lines += [f"- {goal.what}: {goal.found()}, wanted {goal.wanted()}." for goal in short]
    else:
        lines.append("Nothing: every goal is met in this run.")
    for table in tables:
        lines += ["", f"### {table.title}", "", *_markdown([table.head, *table.rows])]
        if table.goals:
            head = ["goal", "wanted", "measured", "met"]
            rows = [[goal.what, goal.wanted(), goal.found(), "yes" if goal.met else "**no**"] for goal in table.goals]
            lines += ["", *_markdown([head, *rows])]
        if table.notes:
            lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _machine(quick: bool) -> str:
    found = [f"torch {_version('torch')}", *(f"{name} {_version(name)}" for name in PEERS if _version(name))]
    kind = " A quick run: noisier than the full one." if quick else ""
    return (
        f"Measured on {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), Python "
        f"{platform.python_version()}, {', '.join(found)}; one torch thread.{kind}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
