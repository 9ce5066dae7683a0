"""The identities of attention: pattern, scores and values give z; z leads to the contribution of its own block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tdcache.naming.prove_bench import IdentityCheck, ProofBench, apply_module
from tdcache.naming.prove_gradients import gradient_between, leads, random_like

__all__ = ["check_attention"]

_PARTS = ("q", "k", "v", "scores", "pattern", "z")


def check_attention(bench: ProofBench) -> None:
    """Check every attention that has a ``z`` or a ``pattern``."""
    for prefix, head, number, _ in bench.blocks():
        stream = bench.streams.get(prefix)
        path = stream.out_projections[number] if stream is not None and number < stream.blocks else None
        for label in dict.fromkeys((*bench.labels(head, "z"), *bench.labels(head, "pattern"))):
            name = f"{head}{label}"
            _check_pattern(bench, name)
            _check_product(bench, name)
            _check_operands(bench, name)
            _check_tie(bench, head, label)
            if label == "attn" and path is not None:
                _check_projection(bench, name, bench.module_at(path))


def _check_pattern(bench: ProofBench, name: str) -> None:
    pattern, scores = name + ".pattern", name + ".scores"
    if bench.has(pattern):
        rows = bench[pattern].sum(-1)
        rows = rows[rows != 0]  # a query that may see no key has a row of zeros
        sunk = bool((rows <= 1 + 1e-5).all() and (rows > 0).all()) and not bool((rows >= 1 - 1e-5).all())
        if sunk and bench.has(name + ".v", name + ".z"):
            words = "rows of pattern sum to at most one (a sink takes the rest)"
            bench.true(words, (pattern,), bool((bench[pattern] >= 0).all()))
        else:
            bench.equal("rows of pattern sum to one", (pattern,), rows, torch.ones_like(rows), through=[bench[pattern]])
    if bench.has(pattern, scores):
        if bench[pattern].shape != bench[scores].shape:
            bench.true("scores and pattern have one shape", (scores, pattern), False)
            return
        rows = bench[pattern].sum(-1, keepdim=True)
        made = torch.softmax(bench[scores].double(), -1)
        made = torch.where(made.isnan(), 0, made) * rows
        bench.equal("softmax(scores) == pattern", (scores, pattern), made, bench[pattern])


def _check_product(bench: ProofBench, name: str) -> None:
    pattern, value, z = name + ".pattern", name + ".v", name + ".z"
    if not bench.has(pattern, value, z):
        return
    weights, mixed = bench[pattern].double(), bench[value].double()
    if mixed.dim() == 4 and weights.dim() == 4 and weights.shape[1] % mixed.shape[1] == 0:
        mixed = mixed.repeat_interleave(weights.shape[1] // mixed.shape[1], 1)
    if math.prod(weights.shape[:-2]) == math.prod(mixed.shape[:-2]):  # batch and heads may be one axis or two
        weights = weights.reshape(*mixed.shape[:-2], *weights.shape[-2:])
    fits = weights.shape[-1] == mixed.shape[-2] and weights.shape[:-2] == mixed.shape[:-2]
    made, seen = weights @ mixed if fits else torch.zeros(0), bench[z].double()
    bench.equal("pattern @ v == z", (pattern, value, z), made, seen, through=[seen, bench[pattern], bench[value]])


def _check_operands(bench: ProofBench, name: str) -> None:
    """The gradient of one query's z goes to that query alone, and to keys along that query: ``dz/dk ~ q``."""
    query, key, z = name + ".q", name + ".k", name + ".z"
    if not bench.has(query, z) or bench[z].dim() not in (3, 4):
        return
    if bench[query].shape[:-1] != bench[z].shape[:-1]:
        bench.true("q and z have the same heads and positions", (query,), False, refuses=(query, key))
        return
    if bench.has(key) and bench.has(name + ".pattern") and bench[name + ".pattern"].shape[-1] == 1:
        words = "z depends on q (these inputs leave one key, whose weight is 1 whatever q is; give larger inputs=)"
        bench.true(words, (query,), False, refuses=(query, key))
        return
    at = (*(size - 1 for size in bench[z].shape[:-2]), bench[z].shape[-2] - 1)
    seed = torch.zeros_like(bench[z])
    seed[at] = random_like(bench[z][at])
    values = bench.readings.values
    gradient = gradient_between(values[z], values[query], seed)
    if gradient is None:
        bench.true("z depends on q", (query,), False)
    else:
        reached = gradient.abs().amax(-1)
        others = reached.clone()
        others[at] = 0
        alone = bool(reached[at] > 0) and float(others.max()) <= 1e-6 * float(reached[at])
        bench.true("z of a query depends on that q alone", (query,), alone)
    if bench.has(key):
        _check_key(bench, name, seed, bench[query][at])


def _check_key(bench: ProofBench, name: str, seed: Tensor, query: Tensor) -> None:
    values, names = bench.readings.values, (name + ".q", name + ".k")
    gradient = gradient_between(values[name + ".z"], values[name + ".k"], seed)
    if gradient is None or gradient.shape[-1] != query.shape[-1]:
        bench.true("z depends on k", (name + ".k",), False)
        return
    rows = gradient.reshape(-1, gradient.shape[-1]).double()
    rows = rows[rows.norm(dim=-1) > 1e-3 * rows.norm(dim=-1).max()]
    direction = query.double() / query.double().norm()
    apart = (rows - (rows @ direction)[:, None] * direction).norm(dim=-1) / rows.norm(dim=-1)
    error = float(apart.max()) if len(rows) else float("inf")
    through = [bench[part] for part in (*names, name + ".z", name + ".pattern") if bench.has(part)]
    bench.checks.append(IdentityCheck("dz/dk is along q", names, error, 10 * bench.allowed(error, through)))


def _check_tie(bench: ProofBench, head: str, label: str) -> None:
    """The attention call is this block's: it reads this block's stream, and its z reaches this contribution."""
    z, end, start = (f"{head}{label}.z", f"{head}{label}.contribution", f"{head}resid_pre")
    if not bench.has(z):
        return
    values = bench.readings.values
    own = tuple(name for name in (f"{head}{label}.{part}" for part in _PARTS) if name in bench.places)
    if bench.has(start):
        bench.true("z depends on this block's resid_pre", (z,), leads(values[start], values[z]), refuses=own)
    if bench.has(end):
        bench.true("z leads to this block's contribution", (z,), leads(values[z], values[end]), refuses=own)


def _check_projection(bench: ProofBench, name: str, module: nn.Module | None) -> None:
    z, out = name + ".z", name + ".out"
    if module is None or not bench.has(z, out):
        return
    merged = _merged(bench[z], bench[out])
    made = None if merged is None else apply_module(module, merged.to(bench.dtype))
    if made is None:
        bench.true("W_O z == attn.out", (z, out), False, f"{type(module).__name__} cannot be applied to z")
    else:
        bench.bound("W_O z == attn.out", (z, out), made, bench[out])


def _merged(z: Tensor, out: Tensor) -> Tensor | None:
    """Heads side by side, ``(batch, position, heads * width)``."""
    if z.dim() == 3 and out.dim() == 3 and z.shape[0] % out.shape[0] == 0:
        z = z.unflatten(0, (out.shape[0], -1))
    return z.transpose(1, 2).flatten(2) if z.dim() == 4 else None
