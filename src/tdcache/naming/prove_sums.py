"""The identities of the stream within a block: its sums, norms and scales, and the norms beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdcache.named_streams import StreamChange
from tdcache.naming.prove_bench import Applied, ProofBench, apply_module
from tdcache.naming.prove_gradients import leads

__all__ = ["check_norms", "check_sums"]


@dataclass(slots=True, eq=False)
class _FollowedStream:
    """The stream as it is followed through a block.

    Attributes:
        bench: where values are.
        head: what the names of the block begin with.
        value: the stream so far.
        words: how it came about.
        names: from which names.
        by: through which norms.
        coarse: the stream as it would be if it were rounded to float32 before every change.
    """

    bench: ProofBench
    head: str
    value: Tensor
    words: str
    names: list[str]
    coarse: Tensor
    by: list[Applied] = field(default_factory=list)

    @classmethod
    def at(cls, bench: ProofBench, head: str, name: str) -> _FollowedStream:
        """The stream as it was kept under that name."""
        return cls(bench, head, bench[name], name.removeprefix(head), [name], bench[name])

    @torch.no_grad()
    def follow(self, change: StreamChange) -> bool:
        """Go on by one change; False where something that it needs is not there."""
        self.coarse = self.coarse.float().to(self.coarse)
        if change.kind == "add" and not change.name:
            bias = self.bench.model.get_parameter(change.path)
            self.value, self.coarse = self.value + bias, self.coarse + bias
            self.words = f"{self.words} + {change.path.rpartition('.')[2]}"
            return True
        if change.kind == "scale":
            factor = self.bench.model.get_parameter(change.path) if change.path else change.factor
            words = change.path.rpartition(".")[2] or f"{change.factor:.4g}"
            self.value, self.coarse = self.value * factor, self.coarse * factor
            self.words = f"{words} * ({self.words})"
            return True
        return self._norm(change) if change.kind == "norm" else self._add(change.name)

    def _add(self, name: str) -> bool:
        if not self.bench.has(name) or self.bench[name].numel() != self.value.numel():
            return False
        part = self.bench[name].reshape(self.value.shape)
        self.value, self.coarse = self.value + part, self.coarse + part
        self.words = f"{self.words} + {name.removeprefix(self.head)}"
        self.names.append(name)
        return True

    def _norm(self, change: StreamChange) -> bool:
        module = self.bench.module_at(change.path or None) or self.bench.module(change.name)
        made = apply_module(module, self.value)
        if made is None:
            return False
        self.by.append((module, self.value))
        self.value = self.coarse = made
        self.words = f"{change.name.removeprefix(self.head)}({self.words})"
        return True

    def compare(self, name: str) -> None:
        """Hold the stream against a value that was kept."""
        words = f"{self.words} == {name.removeprefix(self.head)}"
        self.bench.bound(words, (*self.names, name), self.value, self.bench[name], by=self.by, coarse=self.coarse)


def check_sums(bench: ProofBench) -> None:
    """What is added to the stream makes, with what was there, what goes on."""
    for prefix, head, number, _ in bench.blocks():
        changes = bench.changes(prefix, number)
        starts = {0: f"{head}resid_pre"}
        starts |= {at: change.after for at, change in enumerate(changes[:-1], 1) if change.after}
        for at, start in starts.items():
            if bench.has(start):
                _compare_on_the_way(_FollowedStream.at(bench, head, start), changes[at:])


def _compare_on_the_way(stream: _FollowedStream, changes: Sequence[StreamChange]) -> None:
    bench, first = stream.bench, len(stream.bench.checks)
    for change in changes:
        if not stream.follow(change):
            if change.kind == "add" and bench.has(change.name):
                reason = f"its shape {tuple(bench[change.name].shape)} is not the stream's"
                bench.true("contributions have the stream's shape", (change.name,), False, reason)
            return
        if change.kind == "norm" and bench.has(change.name):
            stream.compare(change.name)
        if change.after and bench.has(change.after):
            stream.compare(change.after)
    bench.checks[first:] = reversed(bench.checks[first:])  # the whole block first: its identity is the reason given


def check_norms(bench: ProofBench) -> None:
    """A norm beside the stream is what its module makes of the stream there, or of what the sublayer returned."""
    for prefix, head, number, _ in bench.blocks():
        changes = bench.changes(prefix, number)
        streams = _streams(bench, head, changes)
        readers: dict[str, list[StreamChange]] = {}
        for change in changes:
            readers.setdefault(change.norm, []).append(change)
            if bench.has(change.post, out := change.name.replace(".contribution", ".out")):
                _check_norm(bench, head, change.post, out.removeprefix(head), bench[out])
        for name, changes_after in readers.items():
            words, value = streams[changes_after[0].reads]
            if bench.has(name) and value is not None:
                _check_norm(bench, head, name, words, value)
                _check_reader(bench, head, name, [each.name for each in changes_after])


def _streams(bench: ProofBench, head: str, changes: Sequence[StreamChange]) -> list[tuple[str, Tensor | None]]:
    """The stream after none, one, ... of the changes, with its name: as it was kept, else as it follows from before."""
    start = f"{head}resid_pre"
    if not bench.has(start):
        return [("", None)] * (len(changes) + 1)
    stream, known = _FollowedStream.at(bench, head, start), True
    found: list[tuple[str, Tensor | None]] = [("resid_pre", stream.value)]
    for change in changes:
        known = known and stream.follow(change)
        name = change.after or (change.name if change.kind == "norm" else "")
        value = bench[name] if bench.has(name) else stream.value if known else None
        found.append((name.removeprefix(head) or "stream", value))
    return found


def _check_norm(bench: ProofBench, head: str, name: str, words: str, value: Tensor) -> None:
    module, short = bench.module(name), name.removeprefix(head)
    made = apply_module(module, value)
    if made is None:
        bench.true(f"{short} is what a module makes of {words}", (name,), False)
    else:
        bench.equal(f"{short} == norm({words})", (name,), made, bench[name], by=((module, value),))


def _check_reader(bench: ProofBench, head: str, name: str, contributions: Sequence[str]) -> None:
    """Check that a sublayer reads the norm: of two norms of one stream, that tells which is whose."""
    values = bench.readings.values
    ends = [each for each in contributions if bench.has(each)]
    reads = [each for each in ends if leads(values[name], values[each])]
    if ends:
        words = (reads or ends)[0].removeprefix(head)
        bench.true(f"{name.removeprefix(head)} leads to {words}", (name,), bool(reads))
