"""Kill processes at random instants while they write, run them again, and compare the end with one uninterrupted run.

``python tests/kills.py --kills 1000`` goes round the jobs below until so many processes were killed. Each job is killed
and started again until one process comes to its end; then its bytes have to be those of the run that nobody killed, and
nothing else may be left in its folder.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from tdcache import ActivationBuffer, ActivationDataset, harvest
from tdcache.store.atomic import replacing_file

SAMPLES, WIDTH = 600, 32


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))


def data():
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))


def run_harvest(base, target):
    harvest(model(), data(), target / "a.acts", select="0|2", batch_size=10, shard_bytes=20_000)


def run_repack(base, target):
    ActivationDataset.open(base).repack(target / "a.acts", dtype=torch.bfloat16, shard_bytes=20_000)


def run_shuffle(base, target):
    ActivationDataset.open(base).repack(target / "a.acts", shuffle=True, seed=3, shard_bytes=20_000)


def run_merge(base, target):
    store = ActivationDataset.open(base)
    store.merge(store, path=target / "a.acts")


def run_npz(base, target):
    if not (target / "a.npz").exists():
        ActivationDataset.open(base).export(target / "a.npz")


def run_memmap(base, target):
    if not (target / "a").exists():
        ActivationDataset.open(base).export(target / "a", "memmap")


def run_buffer(base, target):
    """Save the state after every few batches, with the numbers of the rows that were handed out by then."""
    buffer = ActivationBuffer(model(), data(), select="2", rows=128, batch_size=16, samples=10)
    handed = []
    if (target / "state.pt").exists():
        found = torch.load(target / "state.pt", weights_only=True)
        handed = found["handed"]
        buffer.load_state_dict(found["state"])
        if len(handed) == SAMPLES:
            return
    for number, batch in enumerate(buffer):
        handed = [*handed, *batch["seq"].tolist()]
        if number % 3 == 0 or len(handed) == SAMPLES:
            with replacing_file(target / "state.pt") as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
                torch.save({"state": buffer.state_dict(), "handed": handed}, file)


JOBS = {name.removeprefix("run_"): job for name, job in globals().items() if name.startswith("run_")}


def content(job, target):
    """What has to be the same: every file, but for scratch folders; of a buffer what it handed out."""
    if job == "buffer":
        return torch.load(target / "state.pt", weights_only=True)["handed"]
    paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in paths}


def started(job, base, target):
    """The process id of a fork that runs a job."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            JOBS[job](base, target)
            status = 0
        except BaseException:  # noqa: BLE001 - the fork ends here, whatever it is
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def finished(child, seconds):
    """Whether a process came to its end within so many seconds; it is killed where it did not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit("a process failed that was not killed")
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def rounds(kills, seed, root):
    """Kill so many processes; gives how many of each job."""
    drawn, counts = random.Random(seed), dict.fromkeys(JOBS, 0)
    base = root / "base.acts"
    harvest(model(), data(), base, select="0|2", batch_size=10, shard_bytes=20_000)
    whole, lasts = {}, {}
    for job in JOBS:
        target = root / f"whole-{job}"
        target.mkdir()
        begin = time.monotonic()
        if not finished(started(job, base, target), 600):
            raise SystemExit(f"{job} did not end")
        whole[job], lasts[job] = content(job, target), time.monotonic() - begin
    while sum(counts.values()) < kills:
        job = min(JOBS, key=counts.__getitem__)
        target = root / "killed"
        target.mkdir()
        for attempt in range(3):
            share = 0.5 if attempt == 0 else 1.0  # so that most jobs are killed at least once
            if finished(started(job, base, target), drawn.random() * share * lasts[job]):
                break
            counts[job] += 1
        else:
            finished(started(job, base, target), 600)
        if content(job, target) != whole[job]:
            raise SystemExit(f"{job} left something else than an uninterrupted run")
        shutil.rmtree(target)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    with tempfile.TemporaryDirectory() as root:
        counts = rounds(options.kills, options.seed, Path(root))
    print(f"{sum(counts.values())} kills, nothing lost:", ", ".join(f"{job} {count}" for job, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
