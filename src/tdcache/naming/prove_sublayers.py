"""The identities of a sublayer: its output and what it adds, the hidden layer of an MLP, the router of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from tdcache.naming.prove_bench import FLOAT32_INSIDE, IdentityCheck, ProofBench, apply_module, deviation
from tdcache.naming.prove_gradients import leads, mixes, unit_by_unit

__all__ = ["check_mixing", "check_mlp", "check_outputs", "check_routers"]


def check_mixing(bench: ProofBench) -> None:
    """Attention mixes positions; an MLP leaves them apart; cross attention reads another stream."""
    for _, head, _, layout in bench.blocks():
        labels = bench.labels(head, "contribution")
        for label in labels:
            name, kind = f"{head}{label}.contribution", label.rstrip("0123456789")
            source = _source(bench, head, kind, layout, labels)
            if source is None or not bench.has(name, source):
                continue
            mixing = mixes(bench.readings.values[source], bench.readings.values[name])
            short = source.removeprefix(head)
            if kind == "mlp":
                bench.true(f"{label}.contribution leaves positions of {short} apart", (name,), mixing is False)
            elif kind in ("attn", "mixer"):
                bench.true(f"{label}.contribution mixes positions of {short}", (name,), mixing is True)
                if label == kind and bench.has(head + "resid_mid") and len(labels) > 1:
                    values = bench.readings.values
                    before = not leads(values[head + "resid_mid"], values[name])
                    bench.true(f"{label}.contribution is there before resid_mid", (name,), before)
            elif kind == "cross_attn":
                bench.true(f"{label}.contribution leaves positions of {short} apart", (name,), mixing is False)


def _source(bench: ProofBench, head: str, kind: str, layout: str, labels: list[str]) -> str | None:
    """The value of the stream that a sublayer reads."""
    if kind in ("attn", "mixer") or layout == "parallel":
        return head + "resid_pre"
    middles = ("resid_mid",) if kind == "cross_attn" else ("resid_mid_cross", "resid_mid")
    after = [head + name for name in middles if head + name in bench.places]
    if after:
        return after[0]
    return head + "resid_pre" if not {"attn", "mixer", "cross_attn"} & set(labels) else None


def check_outputs(bench: ProofBench) -> None:
    """A contribution is the sublayer's output, that output behind a norm, or a constant times it."""
    for _, head, _, _ in bench.blocks():
        for label in bench.labels(head, "out"):
            out, end = f"{head}{label}.out", f"{head}{label}.contribution"
            if not bench.has(out, end):
                continue
            norms = [name for name in bench.places if name.startswith(head + "ln") and name.endswith("_post")]
            made = [("out", bench[out])]
            for name in norms:
                module = bench.module(name)
                normed = None if module is None else apply_module(module, bench[out])
                if normed is not None:
                    made.append((f"{name.removeprefix(head)}(out)", normed))
            made += [(f"constant * {words}", _scaled(value, bench[end])) for words, value in list(made)]
            errors = [(deviation(value, bench[end]), words) for words, value in made]
            tolerance = FLOAT32_INSIDE[bench.dtype]
            error, words = next((each for each in errors if each[0] <= tolerance), errors[0])
            identity = f"contribution == {words}"
            bench.checks.append(IdentityCheck(identity, (out, end), error, tolerance, binds=(out,)))


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
                error = float("inf") if made is None else deviation(made, bench[out])
                words = f"W_out({label}.post) == {label}.out"
                check = IdentityCheck(words, (post, out), error, FLOAT32_INSIDE[bench.dtype], binds=(post, out))
                bench.checks.append(check)
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
