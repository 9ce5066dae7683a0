"""File layers that fail, or kill the process, at one chosen operation; and a small store to write with them."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tdcache.store import StoreWriter, site_column
from tdcache.store.files import Files

SPEC = {
    "sites": {
        "layers.0": {"dtype": "bfloat16", "shape": [8]},
        "layers.1": {"dtype": "float32", "shape": [2, 3]},
    }
}
OPERATIONS = ("make_folder", "create", "reserve", "write", "sync", "close", "link", "replace", "remove", "sync_folder")


class Counted(Files):
    """Counts operations, and does something at one of them."""

    def __init__(self, at=None, then=None):
        self.count = 0
        self.names = []
        self.at, self.then = at, then

    def before(self, name, args):
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            self.then(self, name, args)


def _wrapped(name):
    def method(self, *args):
        self.before(name, args)
        return getattr(Files, name)(self, *args)

    return method


for _name in OPERATIONS:
    setattr(Counted, _name, _wrapped(_name))


def disk_full(files, name, args):
    """Half of a write, and then no more."""
    if name == "write":
        descriptor, data, offset = args
        Files.write(files, descriptor, data[: data.nbytes // 2], offset)
    if name == "close":
        os.close(args[0])
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(files, name, args):
    """No ``finally`` runs after this."""
    if name == "write":
        descriptor, data, offset = args
        Files.write(files, descriptor, data[: data.nbytes // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def unit_columns(unit, rows=24):
    """The columns of one unit: other numbers in each unit, in two pieces."""
    generator = torch.Generator().manual_seed(unit)
    first = torch.randn(rows, 8, generator=generator).bfloat16()
    second = torch.randn(rows, 2, 3, generator=generator)
    return {
        "seq": [torch.arange(rows) // 6 + 4 * unit],
        "pos": [(torch.arange(rows) % 6).int()],
        "tok": [torch.randint(0, 99, (rows,), generator=generator).int()],
        site_column("layers.0"): [first[:10], first[10:]],
        site_column("layers.1"): [second[:7], second[7:]],
    }


def write_units(folder, units=range(3), *, files=None, last=2):
    """Write some units of a store of three; gives the writer."""
    writer = StoreWriter(folder, SPEC, made_by={"torch": "any"}, files=files)
    for unit in units:
        if unit not in writer.committed():
            writer.write(unit, unit_columns(unit), samples=(4 * unit, 4 * unit + 4), end=unit == last)
    writer.finish()
    return writer


def contents(folder):
    """The bytes of every file that is part of a store, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".tmp" not in path.parts
    }


class ForkServer:
    """Runs a function in forks of one process, because an interpreter takes a second to start.

    Args:
        script: Python that defines ``work(*words)``.
    """

    def __init__(self, script):
        loop = (
            "import os, sys\n"
            "for line in sys.stdin:\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        work(*line.rstrip().split('|')); os._exit(0)\n"
            "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        )
        tests = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from store.faulty_files import *\n{script}\n{loop}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *words):
        """The exit status of the fork; negative for a signal."""
        self._process.stdin.write("|".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def identities(batches):
    """The numbers of the rows that batches hold, one by one."""
    return [int(number) for batch in batches for number in batch["seq"] * 100 + batch["pos"]]
