"""TransformerLens' own tests, on its own models, with tdcache's hook points in place of its own.

The hook points promise its interface; the tests that its authors wrote for that interface are the judge. Each test runs
twice, with its classes and with ours, so that what fails without a network or on this machine does not count.

    python -m validator.lens_tests                      # pip downloads the source of the installed version
    python -m validator.lens_tests --source CHECKOUT    # or a git checkout, or an unpacked sdist
    python -m validator.lens_tests -- tests/unit/test_hook_points.py    # what pytest is to run
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parents[1]
KNOWN = {"tests.unit.test_hook_points.test_add_hook_prepend": "it replaces the point's register_forward_hook by a mock"}
"""Tests of its own classes' inner workings, with the reason why they cannot pass with others."""

USES_HOOKS = re.compile(r"HookPoint|HookedRootModule|hook_dict|add_hook")
PLUGIN = "validator.points_in_lens"
PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--continue-on-collection-errors", "-o", "addopts="),
    *("-m", "not slow", "-W", "ignore"),
)


def source_of(version: str, folder: Path) -> Path:
    """The source that the package index has of a version, with its tests, unpacked in ``folder``."""
    requirement = f"transformer-lens=={version}"
    command = ("-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformer-lens", requirement)
    subprocess.run([sys.executable, *command, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def tests_of_hooks(source: Path) -> list[str]:
    """The files of its unit tests, which need no weights from the hub, that use hook points."""
    files = sorted((source / "tests" / "unit").rglob("test_*.py"))
    return [str(file.relative_to(source)) for file in files if USES_HOOKS.search(file.read_text(encoding="utf-8"))]


def outcomes(source: Path, tests: Sequence[str], *, ours: bool, report: Path) -> dict[str, str]:
    """Run the tests of ``source``, with our hook points or with its own; gives by test what came of it."""
    # pytest runs in another folder, so what is relative here has to be absolute there.
    already = [str(Path(place).resolve()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    places = os.pathsep.join([str(source), str(FOLDER), *already])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": places}
    plugin = ("-p", PLUGIN) if ours else ()
    command = [sys.executable, *PYTEST, *plugin, f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=source, env=env, check=False, stdout=subprocess.DEVNULL)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report; see what it says: cd {source} && {' '.join(command)}")
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}": outcome_of(case) for case in cases}


def outcome_of(case: ElementTree.Element) -> str:
    """``passed``, or the kind of the first element that says otherwise."""
    kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    return kinds[0] if kinds else "passed"


def compared(theirs: dict[str, str], ours: dict[str, str]) -> tuple[str, list[str]]:
    """What is said of two runs in a line, and the tests that pass with their classes only."""
    passed = [test for test, outcome in theirs.items() if outcome == "passed"]
    lost = [test for test in passed if ours.get(test) != "passed"]
    others = Counter(outcome for outcome in theirs.values() if outcome != "passed")
    rest = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "none"
    return (
        f"{len(passed) - len(lost)} of the {len(passed)} tests that pass with TransformerLens' hook points pass with "
        f"tdcache's (not counted, as they fail with its own or were skipped: {rest})",
        lost,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, print what differs; 1 if anything does that is not known."""
    parser = argparse.ArgumentParser(description="TransformerLens' own tests on tdcache's hook points.")
    parser.add_argument("--source", type=Path, help="a checkout or unpacked sdist; by default pip downloads one")
    parser.add_argument("tests", nargs="*", help="what pytest runs; by default the unit tests that use hook points")
    options: Any = parser.parse_args(arguments)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.source.resolve() if options.source else source_of(installed_version(), folder)
        tests = options.tests or tests_of_hooks(source)
        theirs = outcomes(source, tests, ours=False, report=folder / "theirs.xml")
        ours = outcomes(source, tests, ours=True, report=folder / "ours.xml")
    said, lost = compared(theirs, ours)
    print(*(f"{test}: {KNOWN.get(test, 'not known')}" for test in lost), said, sep="\n")
    return 1 if set(lost) - set(KNOWN) else 0


def installed_version() -> str:
    """That of TransformerLens here."""
    from importlib.metadata import version

    return version("transformer-lens")


if __name__ == "__main__":
    raise SystemExit(main())
