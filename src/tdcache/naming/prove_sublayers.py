"""The identities inside a block: attention, its projection, the MLP, and where gradients go."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tdcache.naming.gradients import gradient_of
from tdcache.naming.prove_bench import ProofBench
from tdcache.naming.prove_values import Reading

__all__ = ["check_attention", "check_mixing", "check_mlp", "depends"]


def check_attention(bench: ProofBench) -> None:
    """Pattern, scores, values and z fit together, and z leads to this block's contribution."""
    for prefix, head, number, _ in bench.blocks():
        for label in bench.labels(head, "z"):
            name = f"{head}{label}"
            _check_pattern(bench, name)
            _check_product(bench, name)
            _check_operands(bench, name)
            _check_tie(bench, head, label)
            stream = bench.streams.get(prefix)
            path = stream.out_projections[number] if stream is not None and number < stream.blocks else None
            if label == "attn" and path is not None:
                _check_projection(bench, name, bench.module_at(path))


def _check_pattern(bench: ProofBench, name: str) -> None:
    pattern, scores = name + ".pattern", name + ".scores"
    if bench.has(pattern):
        rows = bench[pattern].sum(-1)
        one = torch.ones_like(rows)
        if bool((rows <= 1 + 1e-5).all() and (rows > 0).all()) and not torch.allclose(rows, one, atol=1e-5):
            words = "rows of pattern sum to at most one (a sink takes the rest)"
            bench.true(words, (pattern,), bool((bench[pattern] >= 0).all()))
        else:
            bench.equal("rows of pattern sum to one", (pattern,), rows, one, inside=True)
    if bench.has(pattern, scores):
        rows = bench[pattern].sum(-1, keepdim=True)
        made = torch.softmax(bench[scores].double(), -1)
        made = torch.where(made.isnan(), 0, made) * rows
        bench.equal("softmax(scores) == pattern", (scores, pattern), made, bench[pattern], inside=True)


def _check_product(bench: ProofBench, name: str) -> None:
    pattern, value, z = name + ".pattern", name + ".v", name + ".z"
    if not bench.has(pattern, value, z):
        return
    weights, mixed = bench[pattern].double(), bench[value].double()
    if mixed.dim() == 4 and weights.dim() == 4 and mixed.shape[1] != weights.shape[1]:
        mixed = mixed.repeat_interleave(weights.shape[1] // mixed.shape[1], 1)
    weights = weights.reshape(*mixed.shape[:-2], *weights.shape[-2:]) if _alike(weights, mixed) else weights
    fits = weights.shape[-1] == mixed.shape[-2] and weights.shape[:-2] == mixed.shape[:-2]
    made = weights @ mixed if fits else torch.zeros(0)
    bench.equal("pattern @ v == z", (pattern, value, z), made, bench[z].double(), inside=True)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two values have the same batch and heads, be they one axis or two."""
    return math.prod(one.shape[:-2]) == math.prod(other.shape[:-2])


def _check_operands(bench: ProofBench, name: str) -> None:
    """One query's z depends on that query alone, and on several keys: which tells q from k and v."""
    query, key, z = name + ".q", name + ".k", name + ".z"
    if not bench.has(query, z) or bench[z].dim() < 3:
        return
    spread = _spread(bench.readings.values[z], bench.readings.values[query])
    if spread is not None and bench[z].shape[-2] > 1:
        bench.true("z of a query depends on no other query", (query,), spread == 1)
    if bench.has(key):
        spread = _spread(bench.readings.values[z], bench.readings.values[key])
        if spread is not None and bench[key].shape[-2] > 1:
            bench.true("z of a query depends on several keys", (key,), spread > 1)


def _spread(end: Reading, start: Reading) -> int | None:
    """How many positions of ``start`` the gradient of the last position of ``end`` reaches; None without a graph."""
    if end.edge is None or start.edge is None:
        return None
    seed = torch.zeros_like(end.data)
    seed[..., -1, :] = torch.randn(end.data[..., -1, :].shape, generator=_random(), dtype=torch.float64).to(seed)
    gradient = gradient_of(end.edge, start.edge, seed)
    if gradient is None:
        return 0
    size = gradient.abs().amax(tuple(axis for axis in range(gradient.dim()) if axis != gradient.dim() - 2))
    return int((size > 1e-9 * size.max()).sum())


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def depends(end: Reading, start: Reading) -> bool | None:
    """Whether a gradient leads from one value to the other; None where there is no graph."""
    if end.edge is None or start.edge is None:
        return None
    seed = torch.randn(end.data.shape, generator=_random(), dtype=torch.float64).to(end.data)
    gradient = gradient_of(end.edge, start.edge, seed)
    return gradient is not None and bool((gradient != 0).any())


def _check_tie(bench: ProofBench, head: str, label: str) -> None:
    """The attention call is this block's: it reads this block's stream, and its z reaches this contribution."""
    z, end, start = (f"{head}{label}.z", f"{head}{label}.contribution", f"{head}resid_pre")
    if not bench.has(z):
        return
    values = bench.readings.values
    own = tuple(f"{head}{label}.{part}" for part in ("q", "k", "v", "scores", "pattern", "z"))
    names = tuple(name for name in own if name in bench.places)
    reads = depends(values[z], values[start]) if bench.has(start) else None
    leads = depends(values[end], values[z]) if bench.has(end) else None
    if reads is not None:
        bench.true("z depends on this block's resid_pre", names, reads)
    if leads is not None:
        bench.true("z leads to this block's contribution", names, leads)


def _check_projection(bench: ProofBench, name: str, module: nn.Module | None) -> None:
    z, out = name + ".z", name + ".out"
    if module is None or not bench.has(z, out):
        return
    width = next((weight.shape for weight in module.parameters() if weight.dim() == 2), None)
    merged = _merged(bench[z], bench[out])
    if width is None or merged is None or merged.shape[-1] not in width:
        return
    try:
        with torch.no_grad():
            made = module(merged.to(bench.dtype))
    except (RuntimeError, TypeError, ValueError):
        return
    if isinstance(made, Tensor) and made.numel() == bench[out].numel():
        bench.equal("W_O z == attn.out", (z, out), made, bench[out], inside=True)


def _merged(z: Tensor, out: Tensor) -> Tensor | None:
    """Heads side by side, ``(batch, position, heads * width)``."""
    if z.dim() == 3 and out.dim() == 3 and z.shape[0] % out.shape[0] == 0:
        z = z.unflatten(0, (out.shape[0], -1))
    return z.transpose(1, 2).flatten(2) if z.dim() == 4 else None


def check_mixing(bench: ProofBench) -> None:
    """AttentionCall mixes positions; an MLP leaves them apart."""
    for _, head, _, layout in bench.blocks():
        for label in bench.labels(head, "contribution"):
            name, kind = f"{head}{label}.contribution", label.rstrip("0123456789")
            source = _source(bench, head, kind, layout)
            if source is None or not bench.has(name, source):
                continue
            mixes = _mixes(bench.readings.values[name], bench.readings.values[source])
            if mixes is None:
                continue
            short = source.removeprefix(head)
            if kind == "mlp":
                bench.true(f"mlp.contribution leaves positions of {short} apart", (name,), not mixes)
            elif kind in ("attn", "mixer"):
                bench.true(f"{label}.contribution mixes positions of {short}", (name,), mixes)


def _source(bench: ProofBench, head: str, kind: str, layout: str) -> str | None:
    """The value of the stream that a sublayer reads."""
    if kind in ("attn", "mixer") or layout == "parallel":
        return head + "resid_pre"
    after = [head + name for name in ("resid_mid_cross", "resid_mid") if head + name in bench.places]
    if after:
        return after[0]
    alone = not {"attn", "mixer", "cross_attn"} & set(bench.labels(head, "contribution"))
    return head + "resid_pre" if alone or not layout else None


def _mixes(end: Reading, start: Reading) -> bool | None:
    """Whether a position of ``end`` depends on others of ``start``; None where there is no graph between them."""
    if end.edge is None or start.edge is None or end.data.numel() != start.data.numel():
        return None
    at = tuple(size // 2 for size in start.data.shape[:-1])
    seed = torch.zeros_like(start.data)
    seed[at] = torch.randn(start.data.shape[-1], generator=_random(), dtype=torch.float64).to(seed)
    seed = seed.reshape(end.data.shape)
    gradient = gradient_of(end.edge, start.edge, seed)
    if gradient is None:
        return None
    size = gradient.abs().amax(-1)
    others = torch.ones_like(size, dtype=torch.bool)
    others[at] = False
    return bool((size[others] > 1e-9 * size.max()).any())


def check_mlp(bench: ProofBench) -> None:
    """The hidden layer leads to the output, and the nonlinearity is elementwise."""
    for prefix, head, number, _ in bench.blocks():
        stream = bench.streams.get(prefix)
        for label in bench.labels(head, "post"):
            name = f"{head}{label}"
            pre, post, out = name + ".pre", name + ".post", name + ".out"
            path = stream.down_projections[number] if stream is not None and number < stream.blocks else None
            module = bench.module_at(path)
            if module is not None and bench.has(post, out):
                with torch.no_grad():
                    made = module(bench[post])
                made = made if isinstance(made, Tensor) else made[0]
                bench.equal("W_out(mlp.post) == mlp.out", (post, out), made, bench[out], inside=True)
            if bench.has(pre, post):
                alone = _elementwise(bench.readings.values[post], bench.readings.values[pre])
                if alone is not None:
                    bench.true("mlp.post depends on mlp.pre unit by unit", (pre,), alone)


def _elementwise(end: Reading, start: Reading) -> bool | None:
    """Whether one unit of ``end`` depends on that unit of ``start`` alone; None without a graph."""
    if end.edge is None or start.edge is None or end.data.shape != start.data.shape:
        return None if end.edge is None or start.edge is None else False
    whole = gradient_of(end.edge, start.edge, torch.ones_like(end.data))
    if whole is None:
        return False
    at = tuple(int(each) for each in torch.unravel_index(whole.abs().argmax(), whole.shape))  # not where it is flat
    seed = torch.zeros_like(end.data)
    seed[at] = 1
    gradient = gradient_of(end.edge, start.edge, seed)
    if gradient is None:
        return False
    own = gradient[at].clone()
    gradient[at] = 0
    return bool(own != 0) and not bool((gradient != 0).any())
