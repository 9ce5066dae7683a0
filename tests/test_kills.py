"""The short form of ``python -m nox -s kills``."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_processes_that_are_killed_at_random_instants_lose_nothing():
    done = subprocess.run(
        [sys.executable, str(TESTS / "kills.py"), "--kills", "21"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert " kills, nothing lost: harvest " in done.stdout
