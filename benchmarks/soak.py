"""Fifty million rows through everything that reads and writes them: every row checked, memory measured.

``python benchmarks/soak.py --rows 50000000`` harvests so many rows, goes through a block-shuffled epoch of them,
shuffles them once and for all, and verifies every byte; each in a process of its own, and each with a tenth of the rows
as well.
A row holds the bits of its own number, so that one that is lost, doubled or damaged is noticed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tdcache import ActivationDataset, harvest

WIDTH, BATCH, SHARD = 32, 1 << 15, 1 << 24


def features(numbers):
    """The bits of some numbers, as -1 and 1: ``(n, WIDTH)``."""
    return ((numbers[:, None] >> torch.arange(WIDTH)) & 1).mul_(2).sub_(1).float()


class Numbers:
    """Batches of the features of so many numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return (self.rows + BATCH - 1) // BATCH

    def __iter__(self):
        for begin in range(0, self.rows, BATCH):
            yield features(torch.arange(begin, min(begin + BATCH, self.rows)))


def seen_once(store, batches):
    """Hold every row against its number; the sums tell whether each number came once."""
    count = total = squares = 0
    for batch in batches:
        seq = batch["seq"]
        if not torch.equal(batch["0"].float(), features(seq)):
            raise SystemExit("a row is not the one that was written")
        count, total = count + len(seq), total + int(seq.sum())
        squares += int(((seq % 65521) ** 2).sum())
    rows = len(store)
    wanted = sum(int(((torch.arange(b, min(b + BATCH, rows)) % 65521) ** 2).sum()) for b in range(0, rows, BATCH))
    if (count, total, squares) != (rows, rows * (rows - 1) // 2, wanted):
        raise SystemExit("a row is missing, or came twice")


def run_harvest(folder, rows):
    options = {"select": "0", "dtype": torch.bfloat16, "shard_bytes": SHARD}
    harvest(nn.Sequential(nn.Identity()), Numbers(rows), folder / "a.acts", **options)


def run_epoch(folder, rows):
    store = ActivationDataset.open(folder / "a.acts")
    seen_once(store, store.batches(4096, shuffle="block", seed=0))


def run_shuffle(folder, rows):
    ActivationDataset.open(folder / "a.acts").repack(folder / "b.acts", shuffle=True, shard_bytes=SHARD)


def run_verify(folder, rows):
    store = ActivationDataset.open(folder / "b.acts")
    store.verify()
    seen_once(store, store.batches(4096))


STEPS = {"harvest": run_harvest, "epoch": run_epoch, "shuffle": run_shuffle, "verify": run_verify}


def measured(step, folder, rows):
    """Seconds, and bytes at the most over those after a first small run; in a process of its own."""
    from rows_memory import forget_peak, map_big_blocks, resident, settled

    torch.set_num_threads(1)
    map_big_blocks()
    with tempfile.TemporaryDirectory(dir=folder) as small:
        for name, call in STEPS.items():
            call(Path(small), 4 * BATCH)
            if name == step:
                break
    before = settled()
    forget_peak()
    start = time.perf_counter()
    STEPS[step](folder, rows)
    return {"seconds": time.perf_counter() - start, "bytes": resident("VmHWM") - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, help="where the stores are written; three times their size is needed")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measured(options.step, options.folder, options.rows)))
        return
    for rows in (options.rows // 10, options.rows):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            for step in STEPS:
                command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--rows", str(rows)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout)
                rate, peak = rows / found["seconds"] / 1e6, found["bytes"] / 1e6
                print(f"{rows:,} rows, {step}: {rate:.2f} million rows/s, {peak:.0f} MB at the most", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
