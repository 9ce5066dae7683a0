"""The identities of a sublayer: its output and what it adds, the hidden layer of an MLP, the router of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from tdcache.named_proof import deviation
from tdcache.named_streams import StreamChange
from tdcache.naming.prove_bench import Applied, IdentityCheck, ProofBench, apply_module
from tdcache.naming.prove_gradients import leads, mixes, unit_by_unit

__all__ = ["check_mixing", "check_mlp", "check_outputs", "check_routers"]


def check_mixing(bench: ProofBench) -> None:
    """Attention mixes positions; an MLP leaves them apart; cross attention reads another stream."""
    for prefix, head, number, _ in bench.blocks():
        changes, middle = bench.changes(prefix, number), f"{head}resid_mid"
        streams = [f"{head}resid_pre"]
        for change in changes:
            if change.kind == "add" and change.name:
                early = any(each.after == middle for each in changes[len(streams) - 1 :])
                source = streams[change.reads] if change.reads < len(streams) else ""
                _check_mixing(bench, head, change, source, middle if early else "")
            streams.append(change.after or (change.name if change.kind == "norm" else ""))


def _check_mixing(bench: ProofBench, head: str, change: StreamChange, source: str, middle: str) -> None:
    name, label = change.name, change.name.removeprefix(head).removesuffix(".contribution")
    kind = label.rstrip("0123456789")
    mixing = kind in ("attn", "mixer")
    source = source or (f"{head}resid_pre" if mixing else "")
    if kind not in ("attn", "mixer", "mlp", "cross_attn") or not bench.has(name, source):
        return
    values = bench.readings.values
    found, short = mixes(values[source], values[name]), source.removeprefix(head)
    words = f"mixes positions of {short}" if mixing else f"leaves positions of {short} apart"
    bench.true(f"{label}.contribution {words}", (name,), found is mixing)
    if mixing and label == kind and bench.has(middle):
        bench.true(f"{label}.contribution is there before resid_mid", (name,), not leads(values[middle], values[name]))


def check_outputs(bench: ProofBench) -> None:
    """A contribution is the sublayer's output, that output behind a norm, or a constant times it."""
    for _, head, _, _ in bench.blocks():
        for label in bench.labels(head, "out"):
            out, end = f"{head}{label}.out", f"{head}{label}.contribution"
            if not bench.has(out, end):
                continue
            norms = [name for name in bench.places if name.startswith(head + "ln") and name.endswith("_post")]
            made: list[tuple[str, Tensor, list[Applied]]] = [("out", bench[out], [])]
            for name in norms:
                module = bench.module(name)
                normed = apply_module(module, bench[out])
                if normed is not None:
                    made.append((f"{name.removeprefix(head)}(out)", normed, [(module, bench[out])]))
            made += [(f"constant * {words}", _scaled(value, bench[end]), by) for words, value, by in list(made)]
            checks = [_output_check(bench, (out, end), *each) for each in made]
            bench.checks.append(next((check for check in checks if check.holds), checks[0]))


def _output_check(
    bench: ProofBench, names: tuple[str, str], words: str, value: Tensor, by: list[Applied]
) -> IdentityCheck:
    error = deviation(value, bench[names[1]])
    allowed = bench.allowed(error, (bench[names[1]],), by)
    return IdentityCheck(f"contribution == {words}", names, error, allowed, binds=names[:1])


def _scaled(value: Tensor, like: Tensor) -> Tensor:
    """``value`` times the one factor per unit that brings it nearest to ``like``."""
    if value.numel() != like.numel():
        return value
    rows, wanted = value.reshape(-1, value.shape[-1]), like.reshape(-1, value.shape[-1])
    size = (rows**2).sum(0)
    factor = (rows * wanted).sum(0) / torch.where(size > 0, size, 1)
    return (rows * factor).reshape(like.shape)


def check_mlp(bench: ProofBench) -> None:
    """The hidden layer leads to the output, and the nonlinearity acts unit by unit."""
    for prefix, head, number, _ in bench.blocks():
        stream = bench.streams.get(prefix)
        path = stream.down_projections[number] if stream is not None and number < stream.blocks else None
        for label in bench.labels(head, "post"):
            name = f"{head}{label}"
            pre, post, out = name + ".pre", name + ".post", name + ".out"
            module = bench.module_at(path) if label == "mlp" else bench.module(post)
            if module is not None and bench.has(post, out):
                made = apply_module(module, bench[post])
                seen = torch.zeros(0) if made is None else made
                bench.bound(f"W_out({label}.post) == {label}.out", (post, out), seen, bench[out])
            values = bench.readings.values
            if bench.has(pre, post):
                alone = unit_by_unit(values[pre], values[post])
                bench.true(f"{label}.post depends on {label}.pre unit by unit", (pre,), alone)


def check_routers(bench: ProofBench) -> None:
    """Router logits come from this block's stream and lead to its contribution."""
    for _, head, _, _ in bench.blocks():
        for label in bench.labels(head, "router"):
            name, end, start = f"{head}{label}.router", f"{head}{label}.contribution", f"{head}resid_pre"
            if not bench.has(name, end, start):
                continue
            values = bench.readings.values
            own = leads(values[start], values[name]) and leads(values[name], values[end])
            bench.true("router depends on this block's stream and leads to its contribution", (name,), own)
