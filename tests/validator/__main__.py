"""``python -m validator``: ask every library in a process of its own, compare, and write the page.

``--python captum=/path/to/python`` asks one library with another interpreter, where its requirements clash.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from validator.answers import PEERS, answers_of, read, write
from validator.known_faults import tried
from validator.page import page
from validator.subject_list import subjects

HAND = "hand"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m validator", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="which libraries")
    parser.add_argument("--models", nargs="+", default=[], help="which models; all where none is named")
    parser.add_argument("--page", type=Path, help="write the page here instead of printing it")
    parser.add_argument("--seconds", type=float, default=600, help="for each library; models after that are left out")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PEER=PATH", help="another interpreter for a library"
    )
    parser.add_argument(
        "--answers", type=Path, help="keep the answers here; those that are there are not asked for again"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def ask_here(options: argparse.Namespace) -> None:
    """Ask the one library of this process, and try its faults."""
    answers = answers_of(options.child, subjects(options.models), options.seconds)
    faults = [] if answers.missing else tried(options.child)
    (options.answers / f"{options.child}.faults.json").write_text(json.dumps(faults))
    write(answers, options.answers, options.child)


def ask_apart(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Ask one library in a process of its own."""
    python = dict(each.split("=", 1) for each in options.python).get(name, sys.executable)
    command = [python, "-m", "validator", "--child", name, "--answers", str(folder)]
    seconds = float("inf") if name == HAND else options.seconds
    models = ["--models", *options.models] if options.models else []
    print(f"asking {name}", flush=True)
    subprocess.run([*command, "--seconds", str(seconds), *models], check=False)


def faults_in(folder: Path, name: str) -> list[dict[str, str]]:
    """What the faults of one library showed; nothing where its process ended early."""
    path = folder / f"{name}.faults.json"
    return json.loads(path.read_text()) if path.exists() else []


def main() -> int:
    """Ask, compare, write."""
    options = arguments()
    if options.child:
        ask_here(options)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.answers or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (HAND, *options.peers):
            if not (folder / f"{name}.json").exists():
                ask_apart(name, options, folder)
        peers = {name: read(folder, name) for name in options.peers}
        faults = [row for name in options.peers for row in faults_in(folder, name)]
        text = page(read(folder, HAND), peers, faults)
    if options.page is None:
        print(text)
    else:
        options.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
