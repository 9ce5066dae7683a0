"""Harvesting: beside the forward alone, the disk alone and other stores. Peaks have a process of their own each."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Goal, Plan, Table, settle_process
from rows_memory import MB, forget_peak, map_big_blocks, resident, settled
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tdcache import ActivationDataset, harvest
from tdcache.harvesting import collect_activations_from_dataloader, extract_representations
from tdcache.store import Files, StoreWriter, site_column
from tdcache.store.checksums import crc32
from tdcache.store.layout import StorePaths

ROW = 384  # features of a row, in bfloat16


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rounds(calls: Mapping[Any, Callable[[], Any]], count: int) -> dict[Any, list[float]]:
    """Seconds of each call, in rounds of random order."""
    names, shuffle = list(calls), random.Random(0).shuffle
    for name in names:
        calls[name]()
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    for _ in range(count):
        shuffle(names)
        for name in names:
            seconds[name].append(_seconds(calls[name]))
    return seconds


def _ratio(seconds: Mapping[Any, list[float]], base: Any, name: Any) -> float:
    """How fast ``name`` is, with ``base`` as 1: the median over rounds."""
    return statistics.median(one / other for one, other in zip(seconds[base], seconds[name], strict=True))


# Beside the forward.


def _forward_only(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _preallocated(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    rows = sum(batch["input_ids"].numel() for batch in batches)
    out, place = torch.empty(rows, 768, dtype=torch.bfloat16), 0

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal place
        value = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
        out[place : place + len(value)].copy_(value)
        place += len(value)

    handle = model.get_submodule("h.6").register_forward_hook(keep)
    try:
        _forward_only(model, batches)
    finally:
        handle.remove()
    return out


def _harvested(model: nn.Module, batches: list[dict[str, Tensor]], folder: Path, *, stop_early: bool = False) -> None:
    target = folder / f"{time.monotonic_ns()}.acts"
    harvest(model, batches, target, select=r"h\.6", dtype=torch.bfloat16, stop_early=stop_early)
    shutil.rmtree(target)


def compute(plan: Plan) -> list[Table]:
    """One layer of GPT-2 small, where the forward takes the time."""
    from zoo import small_gpt2  # here: importing transformers would be most of the time of the peaks' processes

    settle_process()
    count, size = (2, 2) if plan.quick else (16, 4)
    model = small_gpt2().eval()
    model = model.transformer if hasattr(model, "transformer") else model
    batches = [{"input_ids": torch.randint(1, 1000, (size, 64))} for _ in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = {
            "forward only": partial(_forward_only, model, batches),
            "forward, preallocated copy_ by hand": partial(_preallocated, model, batches),
            "tdcache.harvest": partial(_harvested, model, batches, folder),
            "tdcache.harvest, stop_early": partial(_harvested, model, batches, folder, stop_early=True),
        }
        seconds = _rounds(calls, 3 if plan.quick else 5)
    tokens = count * size * 64
    table = Table(
        f"Harvest, compute-bound: layer 6 of GPT-2 small, {tokens} tokens, bfloat16, durable",
        ["variant", "tokens/s", "x forward only"],
    )
    for name in calls:
        rate = tokens / statistics.median(seconds[name])
        table.rows.append([name, f"{rate:,.0f}", f"{_ratio(seconds, 'forward only', name):.2f}"])
    for base in ("forward only", "forward, preallocated copy_ by hand"):
        table.goals.append(
            Goal(f"harvest, speed of: {base}", _ratio(seconds, base, "tdcache.harvest"), 0.95, at_least=True)
        )
    return [table]


# Beside the disk.


def _raw(folder: Path, rows: Tensor, parts: int) -> None:
    for number in range(parts):
        path = folder / f"{number}.raw"
        with path.open("wb", buffering=0) as file:
            data = memoryview(rows.view(torch.uint8).reshape(-1).numpy())
            while data.nbytes:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        path.unlink()


def _stored(folder: Path, rows: Tensor, parts: int) -> None:
    target = folder / f"{time.monotonic_ns()}.acts"
    spec = {"sites": {"a": {"dtype": "bfloat16", "shape": [ROW]}}}
    writer = StoreWriter(target, spec)
    seq, pos = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int32)
    for number in range(parts):
        columns = {site_column("a"): [rows], "seq": [seq], "pos": [pos]}
        writer.write(number, columns, samples=(0, len(rows)), end=number == parts - 1)
        writer.layout.shard(number).unlink()
    shutil.rmtree(target)


def disk(plan: Plan) -> list[Table]:
    """The same bytes, raw with one fsync, and as shards with checksums and an atomic commit."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # writing is two threads' work
    parts = 3 if plan.quick else 8
    rows = torch.randn((1 << 26) // (2 * ROW), ROW).bfloat16()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        calls = {
            "raw write + fsync": partial(_raw, Path(name), rows, parts),
            "tdcache shards": partial(_stored, Path(name), rows, parts),
        }
        seconds = _rounds(calls, 3 if plan.quick else 9)
    size = parts * rows.nbytes
    table = Table(f"Writing to disk, durable: {parts} files of {rows.nbytes / MB:.0f} MB", ["variant", "GB/s", "x raw"])
    for variant in calls:
        speed = size / statistics.median(seconds[variant]) / 1e9
        table.rows.append([variant, f"{speed:.2f}", f"{_ratio(seconds, 'raw write + fsync', variant):.2f}"])
    ratio = _ratio(seconds, "raw write + fsync", "tdcache shards")
    table.goals.append(Goal("writing shards, speed of raw write + fsync", ratio, 0.8, at_least=True))
    return [table]


# In memory.


def _gathered(model: nn.Module, batches: list[Tensor], keep: Callable[[Tensor], Any]) -> None:
    handle = model[0].register_forward_hook(lambda module, args, output: keep(output))
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        handle.remove()


def _copied(model: nn.Module, batches: list[Tensor]) -> Tensor:
    out, place = torch.empty(sum(map(_rows_of, batches)), batches[0].shape[-1]), 0

    def keep(value: Tensor) -> None:
        nonlocal place
        place += len(out[place : place + _rows_of(value)].copy_(value.flatten(0, -2)))

    _gathered(model, batches, keep)
    return out


def _listed(model: nn.Module, batches: list[Tensor]) -> Tensor:
    kept: list[Tensor] = []
    _gathered(model, batches, lambda value: kept.append(value.detach().flatten(0, -2).clone()))
    return torch.cat(kept)


def _collected(model: nn.Module, batches: list[Tensor], *, budget: int) -> Tensor:
    return collect_activations_from_dataloader(model, batches, "0", budget, verbose=False)["0"]


def _rows_of(batch: Tensor) -> int:
    return batch.shape[0] * batch.shape[1]


def in_memory(plan: Plan) -> list[Table]:
    """Rows of many batches in one tensor, from a model that does nothing: copying is all the work there is."""
    model = nn.Sequential(nn.Identity())
    batches = [torch.randn(32, 16, 1024) for _ in range(16 if plan.quick else 64)]
    rows = sum(map(_rows_of, batches))
    calls = {
        "preallocated copy_ by hand": partial(_copied, model, batches),
        "list + cat, copied in the hook": partial(_listed, model, batches),
        "collect_activations_from_dataloader, exact budget": partial(_collected, model, batches, budget=rows),
        "collect_activations_from_dataloader, no budget": partial(_collected, model, batches, budget=10_000_000),
    }
    expected = _copied(model, batches)
    for name, call in calls.items():
        if not torch.equal(call(), expected):
            raise AssertionError(f"{name} gave other rows")
    seconds = _rounds(calls, 5 if plan.quick else 15)
    size = expected.nbytes
    table = Table(f"Harvest to memory: {size / MB:.0f} MB, float32", ["variant", "GB/s", "x copy_"])
    for name in calls:
        speed = size / statistics.median(seconds[name]) / 1e9
        table.rows.append([name, f"{speed:.2f}", f"{_ratio(seconds, 'preallocated copy_ by hand', name):.2f}"])
    ratio = _ratio(seconds, "preallocated copy_ by hand", "collect_activations_from_dataloader, exact budget")
    table.goals.append(Goal("harvest to memory, speed of a preallocated copy_", ratio, 0.8, at_least=True))
    return [table]


# Peaks.


class _Ones(torch.utils.data.Dataset):
    """Samples of ones."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        return torch.ones(16, 1024)


def _list_cat(model: nn.Module, data: _Ones) -> Tensor:
    kept: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: kept.append(output.detach().cpu().clone()))
    for batch in torch.utils.data.DataLoader(data, batch_size=32):
        model(batch)
    handle.remove()
    return torch.cat(kept)


def _to_disk(model: nn.Module, data: _Ones) -> ActivationDataset:
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()), "a.acts")
    try:
        return harvest(model, data, folder, select="0", shard_bytes=1 << 23)
    finally:
        shutil.rmtree(folder.parent)


PEAKS: Mapping[str, Callable[[nn.Module, _Ones], Any]] = {
    "list + cat (KempnerForge, nanochat)": _list_cat,
    "extract_representations": lambda model, data: extract_representations(model, data, ["0"], "cpu"),
    "harvest": _to_disk,
}


def _peaks_of(variant: str, counts: list[int]) -> list[int]:
    """Run in a process of its own, with data of each size: bytes at the most over those before."""
    torch.set_num_threads(1)
    map_big_blocks()
    model = nn.Sequential(nn.Identity())
    run = partial(PEAKS[variant], model)
    run(_Ones(64))
    found = []
    for count in counts:
        before = settled()
        forget_peak()
        kept = run(_Ones(count))
        del kept
        found.append(resident("VmHWM") - before)
    return found


def peaks(plan: Plan) -> list[Table]:
    """The most memory there was, over one and ten times the data."""
    sizes = (512, 2048) if plan.quick else (1024, 10240)
    table = Table(
        "Peak memory of a harvest, MB over what was there before",
        ["variant", *(f"{count * 16 * 1024 * 4 / MB:.0f} MB of data" for count in sizes)],
    )
    found: dict[str, list[float]] = {}
    for variant in PEAKS:
        command = [sys.executable, __file__, variant, *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = [each / MB for each in json.loads(done.stdout.splitlines()[-1])]
        table.rows.append([variant, *(f"{each:.0f}" for each in found[variant])])
    payload = [count * 16 * 1024 * 4 / MB for count in sizes]
    table.goals.append(Goal("peak of a harvest, growth with the data", found["harvest"][1] / payload[1], 0.2))
    inside = found["extract_representations"][1] / payload[1]
    table.goals.append(Goal("peak of extract_representations, of the payload", inside, 1.15))
    return [table]


# Reading.


def _evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache, as far as the system lets us."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            with suppress(AttributeError, OSError):
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _epoch_store(folder: Path, rows: int) -> Iterator[int]:
    dataset = ActivationDataset.open(folder / "a.acts")
    for batch in dataset.batches(1024, shuffle="block", seed=0):
        yield len(batch)


def _epoch_npz(folder: Path, rows: int) -> Iterator[int]:
    import numpy as np

    with np.load(folder / "a.npz") as archive:
        values = torch.from_numpy(archive["a"])
    for chosen in torch.randperm(rows).split(1024):
        yield len(values[chosen])


def _epoch_pt(folder: Path, rows: int) -> Iterator[int]:
    for number in torch.randperm(len(list((folder / "pt").iterdir()))).tolist():
        values = torch.load(folder / "pt" / f"{number}.pt", weights_only=True)["a"]
        for chosen in torch.randperm(len(values)).split(1024):
            yield len(values[chosen])


def _epoch_memmap(folder: Path, rows: int) -> Iterator[int]:
    from tensordict import TensorDict

    loaded = TensorDict.load_memmap(folder / "memmap")
    for chosen in torch.randperm(rows).split(1024):
        yield len(loaded[chosen])


def _epoch_hf(folder: Path, rows: int) -> Iterator[int]:
    import datasets

    loaded = datasets.load_from_disk(str(folder / "hf")).with_format("torch")
    for chosen in torch.randperm(rows).split(1024):
        yield len(loaded[chosen.tolist()]["a"])


EPOCHS: Mapping[str, Callable[[Path, int], Iterator[int]]] = {
    "tdcache, shuffle='block'": _epoch_store,
    "npz (float32), all in memory": _epoch_npz,
    "one .pt per shard, mixed within it": _epoch_pt,
    "memory-mapped TensorDict": _epoch_memmap,
    "Hugging Face datasets": _epoch_hf,
}


def _write_rows(folder: Path, rows: int) -> Iterator[Tensor]:
    """A store of random rows; gives the rows of its shards."""
    values = torch.randn(rows, ROW).bfloat16()
    with StoreWriter(folder / "a.acts", {"sites": {"a": {"dtype": "bfloat16", "shape": [ROW]}}}) as writer:
        for number, part in enumerate(values.split(1 << 14)):
            first = number << 14
            columns = {site_column("a"): [part], "seq": [torch.arange(first, first + len(part))]}
            columns["pos"] = [torch.zeros(len(part), dtype=torch.int32)]
            end = first + len(part) == rows
            writer.write(number, columns, samples=(first, first + len(part)), end=end)
    return iter(values.split(1 << 14))


def _fill(folder: Path, rows: int) -> dict[str, str]:
    """The same rows in every format; the reasons of those that cannot be had."""
    skipped: dict[str, str] = {}
    (folder / "pt").mkdir()
    for number, part in enumerate(_write_rows(folder, rows)):
        torch.save({"a": part.clone()}, folder / "pt" / f"{number}.pt")
    dataset = ActivationDataset.open(folder / "a.acts")
    for kind, name in (("npz", "a.npz"), ("memmap", "memmap"), ("hf", "hf")):
        try:
            dataset.export(folder / name, kind)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - an extra that is not installed leaves its line out
            skipped[name] = str(error)
    return skipped


def reading(plan: Plan) -> list[Table]:
    """One shuffled epoch in batches of 1024, with files in the page cache and without."""
    rows = (1 << 15) if plan.quick else (1 << 18)
    table = Table(
        f"Shuffled reading: {rows:,} rows of {ROW} bfloat16, batches of 1024, Mrow/s",
        ["variant", "warm", "cold"],
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        skipped = _fill(folder, rows)
        rates = _read_all(folder, rows, plan, skipped)
    for variant, found in rates.items():
        table.rows.append([variant, *(f"{each:.2f}" for each in found)])
    ours = rates.pop("tdcache, shuffle='block'")
    for at, state in enumerate(("warm", "cold")):
        best = max(rates, key=lambda name: rates[name][at])
        what = f"shuffled reading, {state}, beside the fastest other ({best})"
        table.goals.append(Goal(what, ours[at] / rates[best][at], 1.0, at_least=True))
    table.notes += [f"{name}: not measured: {reason}" for name, reason in skipped.items()]
    table.notes.append("cold: the pages were given back with posix_fadvise; a disk of its own may still cache")
    return [table]


def _read_all(folder: Path, rows: int, plan: Plan, skipped: dict[str, str]) -> dict[str, list[float]]:
    """Million rows per second of each variant, warm and cold: the median of some epochs, which take turns."""
    found: dict[str, list[list[float]]] = {variant: [[], []] for variant in EPOCHS}
    order, shuffle = list(EPOCHS), random.Random(0).shuffle
    for _ in range(2 if plan.quick else 7):
        shuffle(order)
        for variant in order:
            if variant in skipped:
                continue
            try:
                _rate(EPOCHS[variant], folder, rows, cold=False)  # the first use of much memory takes time of its own
                for state in (1, 0):  # a cold epoch leaves what it read in the page cache, for the warm one
                    found[variant][state].append(_rate(EPOCHS[variant], folder, rows, cold=state == 1))
            except (ImportError, OSError) as error:
                skipped[variant] = str(error)
    return {
        variant: [statistics.median(each) for each in states]
        for variant, states in found.items()
        if variant not in skipped
    }


def _rate(epoch: Callable[[Path, int], Iterator[int]], folder: Path, rows: int, *, cold: bool) -> float:
    gc.collect()  # pages that are mapped stay
    if cold:
        _evict(folder)
    start = time.perf_counter()
    seen = sum(epoch(folder, rows))
    seconds = time.perf_counter() - start
    if seen != rows:
        raise AssertionError(f"{seen} of {rows} rows")
    return rows / seconds / 1e6


# A stock loader, and arrays.


def _through(batches: Any) -> float:
    """Seconds per row from the first batch on: workers and the first pool are there by then."""
    iterator = iter(batches)
    next(iterator)
    start = time.perf_counter()
    seen = sum(len(batch["seq"]) for batch in iterator)
    return (time.perf_counter() - start) / seen


def loading(plan: Plan) -> list[Table]:
    """One shuffled epoch, page cache warm, by our iterator and by a stock ``DataLoader``; and a column as an array."""
    count = (1 << 16) if plan.quick else (1 << 19)
    options: dict[str, Any] = {"shuffle": "block", "seed": 0}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        _write_rows(Path(name), count)
        dataset = ActivationDataset.open(Path(name, "a.acts"))
        epochs: dict[str, Any] = {"batches": dataset.batches(1024, **options)}
        for workers in (0, 1, 2):
            more = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
            loader = DataLoader(dataset.iterable(1024, **options), batch_size=None, num_workers=workers, **more)
            epochs[f"DataLoader(iterable), {workers} workers"] = loader
        seconds: dict[Any, list[float]] = {variant: [] for variant in epochs}
        names, shuffle = list(epochs), random.Random(0).shuffle
        for _ in range(3 if plan.quick else 9):
            shuffle(names)
            for variant in names:
                seconds[variant].append(_through(epochs[variant]))
        values = dataset["a"][...]
        floats = {"tensor.float()": values.float, "np.asarray(ds['a'])": partial(np.asarray, dataset["a"])}
        arrays = _rounds(floats, 3 if plan.quick else 7)
    table = Table(
        f"Into training: {count:,} rows of {ROW} bfloat16, batches of 1024", ["variant", "Mrow/s", "x batches"]
    )
    for variant in epochs:
        rate = 1e-6 / statistics.median(seconds[variant])
        table.rows.append([variant, f"{rate:.2f}", f"{_ratio(seconds, 'batches', variant):.2f}"])
    best = max(_ratio(seconds, "batches", variant) for variant in epochs if variant != "batches")
    table.goals.append(Goal("a stock DataLoader, speed of: batches", best, 1 / 1.2, at_least=True))
    ratio = _ratio(arrays, "tensor.float()", "np.asarray(ds['a'])")
    table.goals.append(Goal("np.asarray(ds['a']), speed of converting a tensor in memory", ratio, 0.8, at_least=True))
    return [table]


# Many shards, and checks on reading.


class _Volatile(Files):
    """Files that are not waited for: ten thousand waits for a disk are no part of what is measured."""

    def sync(self, descriptor: int) -> None:
        """Nothing."""

    def sync_folder(self, path: Path) -> None:
        """Nothing."""


def _write_many(folder: Path, shards: int) -> None:
    rows = 8
    with StoreWriter(folder, {"sites": {"a": {"dtype": "bfloat16", "shape": [ROW]}}}, files=_Volatile()) as writer:
        values = torch.randn(rows, ROW).bfloat16()
        for unit in range(shards):
            columns = {site_column("a"): [values], "seq": [torch.arange(rows) + unit * rows]}
            columns["pos"] = [torch.zeros(rows, dtype=torch.int32)]
            samples = (unit * rows, (unit + 1) * rows)
            writer.write(unit, columns, samples=samples, end=unit == shards - 1)


def _opening_simulated(shards: int) -> float:
    """Milliseconds to open a store of so many shards, of which there are the names, the sizes and the index."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        _write_many(Path(name, "a.acts"), 1)
        (only,) = ActivationDataset.open(Path(name, "a.acts")).shards
        layout, made = StorePaths(Path(name, "a.acts")), []
        for unit in range(shards):
            path = layout.shard(unit)
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.truncate(only.size)
            made.append(replace(only, path=path, row=only.row._replace(unit=unit)))
        layout.write_index(only.contract.spec, made, _Volatile())
        return _microseconds(lambda: ActivationDataset.open(Path(name, "a.acts")), 3) / 1e3


def _microseconds(call: Callable[[], Any], times: int) -> float:
    return statistics.median(_seconds(call) for _ in range(times)) * 1e6


def many_shards(plan: Plan) -> list[Table]:
    """What a row costs as the shards grow in number; the rows per shard stay the same."""
    counts = (10, 1000) if plan.quick else (10, 1000, 10_000)
    table = Table(
        f"Rows of a store of many shards (8 rows of {ROW} bfloat16 each), page cache warm",
        ["shards", "open, ms", "ds[i], first time, us", "ds[i], us", "128 random rows, us", "open maps"],
    )
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            _write_many(Path(name, "a.acts"), count)
            opened = _microseconds(lambda folder=name: ActivationDataset.open(Path(folder, "a.acts")), 3) / 1e3
            dataset = ActivationDataset.open(Path(name, "a.acts"))
            generator = torch.Generator().manual_seed(0)
            numbers = iter(torch.randint(len(dataset), (100_000,), generator=generator).split(1))
            first = _microseconds(lambda rows=numbers, data=dataset: data[int(next(rows))], 5 if count == 10 else 200)
            warm = _microseconds(lambda data=dataset: data[len(data) // 2], 500)
            batches = iter(torch.randint(len(dataset), (50, 128), generator=generator))
            many = _microseconds(lambda rows=batches, data=dataset: data[next(rows)], 50)
            maps = Path("/proc/self/maps")
            shown = str(maps.read_text().count(name)) if maps.exists() else ""
        found[count] = warm
        table.rows.append([f"{count:,}", f"{opened:.1f}", *(f"{each:.0f}" for each in (first, warm, many)), shown])
    if not plan.quick:
        opened = _opening_simulated(100_000)
        table.rows.append(["100,000 (names and an index alone)", f"{opened:.0f}", "", "", "", ""])
    ratio = found[max(counts)] / found[10]
    table.goals.append(Goal(f"a row at {max(counts):,} shards, cost of: at 10", ratio, 2.0))
    return [table]


def _epoch_of(folder: Path, *, check: bool) -> None:
    for _ in ActivationDataset.open(folder, check=check).batches(1024, shuffle="block", seed=0):
        pass


def checking(plan: Plan) -> list[Table]:
    """A first epoch with and without checksums, and one row of a store that nobody has read; page cache warm."""
    rows = (1 << 16) if plan.quick else (1 << 18)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        _write_rows(Path(name), rows)
        folder = Path(name, "a.acts")
        epochs = {each: partial(_epoch_of, folder, check=each) for each in (False, True)}
        seconds = _rounds(epochs, 5 if plan.quick else 9)
        picks = {
            each: partial(lambda check: ActivationDataset.open(folder, check=check)[rows // 2], each)
            for each in (False, True)
        }
        single = _rounds(picks, 20)
    table = Table(
        f"Checksums on first reading ({crc32.__module__}): {rows:,} rows of {ROW} bfloat16",
        ["variant", "first epoch, Mrow/s", "x", "open and read one row, us"],
    )
    for each in (False, True):
        rate = rows / statistics.median(seconds[each]) / 1e6
        row = [f"check={each}", f"{rate:.2f}", f"{_ratio(seconds, False, each):.2f}"]
        table.rows.append([*row, f"{statistics.median(single[each]) * 1e6:.0f}"])
    return [table]


def rows(plan: Plan) -> list[Table]:
    """All of it."""
    return [
        *compute(plan),
        *in_memory(plan),
        *disk(plan),
        *peaks(plan),
        *reading(plan),
        *loading(plan),
        *many_shards(plan),
        *checking(plan),
    ]


def main() -> None:
    """Measure peaks over some sizes and print them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=PEAKS)
    parser.add_argument("counts", type=int, nargs="+")
    options = parser.parse_args()
    print(json.dumps(_peaks_of(options.variant, options.counts)))


if __name__ == "__main__":
    main()
