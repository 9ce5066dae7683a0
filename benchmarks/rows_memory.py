"""Memory that is held after a context, and rows gathered in memory. Each variant has a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import peers
import torch
from harness import Goal, Maker, Plan, Samples, Table, measure_makers, rounds_note, settle_process
from torch import Tensor, nn
from zoo import GPT2_PATTERN, small_gpt2, token_ids

from tdcache import ActivationCaching, Concatenate

MB = 1e6
PAYLOAD = 36 * 4 * 128 * 768 * 4  # bytes: 36 tensors of (4, 128, 768) in float32
BATCH = (50, 128, 256)
WIDTH = BATCH[-1]


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory; ``VmHWM`` for the most there were."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def map_big_blocks() -> None:
    """Take every big block straight from the system, and give it back when it is freed.

    Otherwise a block may come from what an earlier variant freed, already mapped, at five times the speed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD


def settled() -> int:
    """Resident bytes after giving back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def forget_peak() -> None:
    """Let ``VmHWM`` start again from what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


# What is held after one forward in grad mode.


def _keep_nothing(model: nn.Module, ids: Tensor) -> Any:
    model(ids)


def _keep_by_hand(model: nn.Module, ids: Tensor, *, detach: bool) -> Any:
    def take(output: Any) -> Tensor:
        return peers.first(output).detach() if detach else peers.first(output)

    return peers.one_shot_by_hand(model, GPT2_PATTERN, lambda: model(ids), take)


def _keep_by_tdcache(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    with ActivationCaching(GPT2_PATTERN, **options).prepare(model) as hooked:
        model(ids)
    return hooked.cache


def _keep_by_tdhook(model: nn.Module, ids: Tensor) -> Any:
    factory = peers.tdhook_caching(GPT2_PATTERN, callback=lambda *, output, **_: peers.first(output))
    with factory.prepare(model) as hooked:
        model(ids)
        return hooked.hooking_context.cache


HELD: Mapping[str, Callable[[nn.Module, Tensor], Any]] = {
    "no hook": _keep_nothing,
    "hand-written, detached": partial(_keep_by_hand, detach=True),
    "hand-written": partial(_keep_by_hand, detach=False),
    "tdcache": _keep_by_tdcache,
    "tdcache, hold='snapshot'": partial(_keep_by_tdcache, hold="snapshot"),
    "tdcache, hold='live'": partial(_keep_by_tdcache, hold="live"),
    "tdhook": _keep_by_tdhook,
}


def held(variant: str, quick: bool) -> dict[str, int]:
    """Run in a process of its own: bytes held after, and the most there were meanwhile."""
    model = small_gpt2()
    ids = token_ids(4, 128)
    with torch.no_grad():
        model(ids[:1])  # the libraries underneath set themselves up
    before = settled()
    forget_peak()
    kept = HELD[variant](model, ids)
    peak = resident("VmHWM")
    after = settled()
    del kept
    return {"held": after - before, "peak": peak - before}


def memory(plan: Plan) -> list[Table]:
    """What is still held when the block is over, in grad mode."""
    table = Table(
        f"Memory held after exit, grad mode: GPT-2 small, payload {PAYLOAD / MB:.1f} MB",
        ["variant", "held, MB", "x payload (less no hook)", "peak, MB"],
    )
    quick = ("no hook", "tdcache")
    names = [name for name in HELD if name in quick or not plan.quick]
    found = _in_own_processes("held", names, plan.quick)
    for name, answer in found.items():
        if "error" in answer:
            table.notes.append(f"{name}: {answer['error']}")
            continue
        idle = found["no hook"].get("held", nan)
        ratio = "" if name == "no hook" else f"{(answer['held'] - idle) / PAYLOAD:.2f}"
        table.rows.append([name, f"{answer['held'] / MB:.0f}", ratio, f"{answer['peak'] / MB:.0f}"])
    ratio = (found["tdcache"].get("held", nan) - found["no hook"].get("held", nan)) / PAYLOAD
    table.goals.append(Goal("memory held after exit, of the payload", ratio, 1.1))
    return [table]


# Rows gathered in memory.


def _batches(payload: int) -> Iterator[Tensor]:
    ones = torch.ones(BATCH)
    for _ in range(payload // ones.nbytes):
        yield ones


def _gather_copy(payload: int) -> Tensor:
    rows = payload // (4 * BATCH[1] * WIDTH)
    out = torch.empty(rows, *BATCH[1:])
    for number, batch in enumerate(_batches(payload)):
        out[number * BATCH[0] : (number + 1) * BATCH[0]].copy_(batch)
    return out


def _gather_list(payload: int) -> Tensor:
    return torch.cat([batch.clone() for batch in _batches(payload)])


def _gather_reducer(payload: int, *, budget: bool) -> Tensor:
    rows = payload // (4 * BATCH[1] * WIDTH)
    reducer = Concatenate(max_rows=rows if budget else None)
    for batch in _batches(payload):
        reducer.update(batch)
    return reducer.compute()


def _gather_context(payload: int, *, budget: bool) -> Tensor:
    rows = payload // (4 * BATCH[1] * WIDTH)
    model = nn.Sequential(nn.Identity())
    reducer = Concatenate(max_rows=rows if budget else None)
    with ActivationCaching("0", reducer=reducer).prepare(model) as hooked:
        for batch in _batches(payload):
            model(batch)
    return hooked.cache["0"]


GATHER: Mapping[str, Callable[[int], Tensor]] = {
    "preallocated copy_": _gather_copy,
    "list + cat": _gather_list,
    "Concatenate(max_rows)": partial(_gather_reducer, budget=True),
    "Concatenate()": partial(_gather_reducer, budget=False),
    "context, Concatenate(max_rows)": partial(_gather_context, budget=True),
    "context, Concatenate()": partial(_gather_context, budget=False),
}


def gathered(variant: str, quick: bool) -> dict[str, int]:
    """Run in a process of its own: the most there was, in bytes."""
    payload = _payload(quick)
    GATHER[variant](4 * 4 * BATCH[0] * BATCH[1] * WIDTH)
    before = settled()
    forget_peak()
    result = GATHER[variant](payload)
    if result.nbytes != payload:
        raise AssertionError(f"gathered {result.nbytes} of {payload} bytes")
    return {"peak": resident("VmHWM") - before}


def _payload(quick: bool) -> int:
    return (20 if quick else 80) * 4 * BATCH[0] * BATCH[1] * WIDTH


def reducers(plan: Plan) -> list[Table]:
    """How fast rows are gathered, and how much memory that takes."""
    peaks = _in_own_processes("gathered", list(GATHER), plan.quick)
    settle_process()
    map_big_blocks()
    payload = _payload(plan.quick)
    batch = 4 * BATCH[0] * BATCH[1] * WIDTH
    makers: dict[str, Maker] = {name: partial(_gather_call, gather, payload) for name, gather in GATHER.items()}
    skipped: dict[str, str] = {}
    samples = measure_makers(makers, plan, skipped, copies=1, rounds=4 if plan.quick else 12)
    table = Table(
        f"Rows to memory: {payload / MB:.0f} MB in batches of {batch / MB:.1f} MB",
        ["variant", "GB/s", "x copy_", "peak over payload", "peak less one batch"],
    )
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    for name in samples.seconds:
        speed, rate = _rates(samples, name, payload)
        peak = peaks[name].get("peak", nan)
        table.rows.append(
            [name, f"{speed:.2f}", f"{rate:.2f}", f"{peak / payload:.3f}", f"{(peak - batch) / payload:.3f}"]
        )
        if "Concatenate" in name:
            table.goals.append(Goal(f"rows to memory, {name}, speed of copy_", rate, 0.8, at_least=True))
            limit = 1.1 if "max_rows" in name else 1.15
            table.goals.append(Goal(f"rows to memory, {name}, peak less one batch", (peak - batch) / payload, limit))
    table.notes.append(rounds_note([samples]))
    return [table]


def _gather_call(gather: Callable[[int], Tensor], payload: int, stack: ExitStack) -> Callable[[], None]:
    def call() -> None:
        gather(payload)  # the result is freed inside the measured time, for every variant alike

    return call


def _rates(samples: Samples, name: str, payload: int) -> tuple[float, float]:
    mine = samples.time(name).median
    pairs = zip(samples.seconds["preallocated copy_"], samples.seconds[name], strict=True)
    ratios = sorted(copy / own for copy, own in pairs)
    return payload / mine / 1e9, ratios[len(ratios) // 2]


# Processes.


def _in_own_processes(what: str, variants: list[str], quick: bool) -> dict[str, dict[str, Any]]:
    """Two at a time: memory is what is measured here, not time."""
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(partial(_in_own_process, what, quick=quick), variants)
        return dict(zip(variants, answers, strict=True))


def _in_own_process(what: str, variant: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, what, variant, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": "not measured: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure one variant and print the answer as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("held", "gathered"))
    parser.add_argument("variant")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    map_big_blocks()
    print(json.dumps({"held": held, "gathered": gathered}[options.what](options.variant, options.quick)))


if __name__ == "__main__":
    main()
