"""How good the order of an epoch is: who follows whom, and what a probe and a dictionary learn from it.

The rows are as bad as stores get: documents of sixty-four rows each that resemble each other, one source of documents
after another, so that neighbours, blocks and shards all have something in common. Each is trained by one pass; a curve
is the loss on rows that were held out, and it is held against the curves over rows in full random order.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from harness import Goal, Plan, Table
from torch import Tensor, nn

from tdcache import ActivationDataset
from tdcache.store import StoreWriter, site_column

WIDTH, DOCUMENT, SOURCES, BATCH = 64, 64, 8, 256
SHARDS = 32
DEFAULT = "block, pool of 64 (default)"


def _rows(count: int) -> tuple[Tensor, Tensor]:
    """Features of a row, with what its document and its source have in common; the label is a half space."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    document = torch.arange(count) // DOCUMENT
    source = torch.arange(count) * SOURCES // count
    of_row = drawn(count, WIDTH)
    found = of_row + drawn(int(document[-1]) + 1, WIDTH)[document] + drawn(SOURCES, WIDTH)[source]
    return found.bfloat16(), (found @ drawn(WIDTH) > 0).long()


def _store(folder: Path, count: int) -> ActivationDataset:
    values, labels = _rows(count)
    spec = {
        "sites": {"a": {"dtype": "bfloat16", "shape": [WIDTH]}},
        "columns": {"label": {"dtype": "int64", "shape": []}},
    }
    with StoreWriter(folder, spec) as writer:
        for unit, rows in enumerate(torch.arange(count).chunk(SHARDS)):
            columns = {site_column("a"): [values[rows]], "col/label": [labels[rows]], "seq": [rows // DOCUMENT]}
            columns["pos"] = [(rows % DOCUMENT).int()]
            samples = (int(rows[0]) // DOCUMENT, int(rows[-1]) // DOCUMENT + 1)
            writer.write(unit, columns, samples=samples, end=unit == SHARDS - 1)
    return ActivationDataset.open(folder)


def _probe() -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], float]:
    def loss(model: nn.Module, rows: Any) -> Tensor:
        return nn.functional.cross_entropy(model(rows["a"].float()), rows["label"])

    return nn.Linear(WIDTH, 2), loss, 0.003


class _Dictionary(nn.Module):
    """A sparse autoencoder with four features per dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.encode(rows).relu()
        return self.decode(codes), codes


def _dictionary() -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], float]:
    def loss(model: nn.Module, rows: Any) -> Tensor:
        x = rows["a"].float()
        back, codes = model(x)
        return (back - x).square().mean() + 0.01 * codes.abs().sum(1).mean()

    return _Dictionary(), loss, 0.001


LEARNERS = {"probe": _probe, "dictionary": _dictionary}


def _curve(learner: str, batches: Iterable[Any], held_out: Any, every: int) -> Tensor:
    """The loss on the rows that were held out, after every so many batches."""
    torch.manual_seed(0)
    model, loss, rate = LEARNERS[learner]()
    optimiser = torch.optim.Adam(model.parameters(), rate)
    found = []
    for number, rows in enumerate(batches, 1):
        optimiser.zero_grad()
        loss(model, rows).backward()
        optimiser.step()
        if number % every == 0:
            with torch.no_grad():
                found.append(float(loss(model, held_out)))
    return torch.tensor(found)


def _neighbours(store: ActivationDataset, batches: Iterable[Any], per_shard: int, per_block: int) -> list[float]:
    """How often a row is followed by one of its own document, block and shard."""
    place = {}
    numbers = torch.cat([batch["seq"] * DOCUMENT + batch["pos"] for batch in batches])
    for name, size in (("document", DOCUMENT), ("block", per_block), ("shard", per_shard)):
        of = numbers // size
        place[name] = float((of[1:] == of[:-1]).double().mean())
    return list(place.values())


def rows(plan: Plan) -> list[Table]:
    """Some orders of one store, with their price and what is learned from them."""
    count, block, seeds = (1 << 16, 64, 2) if plan.quick else (1 << 19, 512, 3)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        train, held = _store(Path(name, "a.acts"), count).split(0.98, 0.02, seed=0)
        train = train.repack(Path(name, "b.acts"), shard_bytes=count * 140 // SHARDS)
        blocks = {"block, pool of 1": 1, "block, pool of 16": 16, DEFAULT: 64, "block, pool of 256": 256}
        orders: dict[str, dict[str, Any]] = {"as stored": {}}
        orders |= {name: {"shuffle": "block", "block": block, "pool": each * block} for name, each in blocks.items()}
        orders["rows"] = {"shuffle": "rows"}
        return [_table(train, held[...], orders, (count, block, seeds))]


def _table(train: ActivationDataset, held_out: Any, orders: dict[str, dict[str, Any]], sizes: tuple[int, ...]) -> Table:
    count, block, seeds = sizes
    table = Table(
        f"Order of an epoch: {count:,} rows of {WIDTH} bfloat16, blocks of {block:,}, batches of {BATCH}",
        ["shuffle", "next row: own document, %", "own block, %", "own shard, %", "pools, MB", "Mrow/s"]
        + [f"{learner}: final loss, x rows; curve apart, %" for learner in LEARNERS],
    )
    curves = {learner: {} for learner in LEARNERS}
    every = max(1, count // BATCH // 16)
    for learner in LEARNERS:
        for order, options in orders.items():
            curves[learner][order] = torch.stack(
                [_curve(learner, train.batches(BATCH, seed=seed, **options), held_out, every) for seed in range(seeds)]
            )
    for order, options in orders.items():
        start = time.perf_counter()
        near = _neighbours(train, train.batches(BATCH, seed=0, **options), count // SHARDS, block)
        rate = count / (time.perf_counter() - start) / 1e6
        pool = options.get("pool", 0)
        cells = [
            order,
            *(f"{100 * each:.2f}" for each in near),
            f"{2 * pool * train.row_bytes / 1e6:.0f}",
            f"{rate:.2f}",
        ]
        for learner in LEARNERS:
            found, full = curves[learner][order], curves[learner]["rows"]
            apart = float(((found.mean(0) - full.mean(0)) / full.mean(0)).abs().max())
            cells.append(f"{float(found[:, -1].mean() / full[:, -1].mean()):.4f}; {100 * apart:.2f}")
        table.rows.append(cells)
    for learner in LEARNERS:
        found, full = curves[learner][DEFAULT], curves[learner]["rows"]
        final = float(found[:, -1].mean() / full[:, -1].mean())
        table.goals.append(Goal(f"{learner}: final loss over the default shuffle, of that over rows", final, 1.02))
        noise = statistics.pstdev(full[:, -1].tolist()) / float(full[:, -1].mean())
        table.notes.append(f"{learner}: seeds alone move the final loss over single rows by {100 * noise:.2f} %")
    return table


if __name__ == "__main__":
    for each in rows(Plan(quick=True)):
        print(each.head, *each.rows, *each.goals, *each.notes, sep="\n")
