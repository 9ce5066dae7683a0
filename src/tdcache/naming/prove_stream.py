"""The identities of the stream outside of its blocks: their chain, embeddings, the final norm, logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdcache.named_proof import deviation
from tdcache.naming.prove_bench import Applied, ProofBench, apply_module

__all__ = ["check_chain", "check_ends"]


def check_chain(bench: ProofBench) -> None:
    """``resid_post`` of a block is ``resid_pre`` of the next."""
    for prefix, head, number, _ in bench.blocks():
        post, after = head + "resid_post", f"{prefix}blocks.{number + 1}.resid_pre"
        if bench.has(post, after):
            bench.bound("resid_post == the next block's resid_pre", (post, after), bench[post], bench[after])


def check_ends(bench: ProofBench) -> None:
    """Embeddings sum to the first ``resid_pre``; the unembedding of the final norm gives the logits."""
    for prefix, stream in bench.streams.items():
        _check_embeddings(bench, prefix)
        last = f"{prefix}blocks.{stream.blocks - 1}.resid_post"
        norm, unembed = prefix + "final_norm", prefix + "unembed"
        module = bench.module_at(stream.final_norm)
        made = apply_module(module, bench[last]) if bench.has(norm, last) else None
        if made is not None:
            by = ((module, bench[last]),)
            bench.equal("final_norm == norm(last resid_post)", (norm,), *_cut(made, bench[norm]), by=by)
        source = norm if bench.has(norm) else last
        projection = bench.module_at(stream.unembed)
        if projection is not None and bench.has(unembed, source):
            made = apply_module(projection, bench[source])
            if made is None:
                bench.true("the unembedding can be applied", (unembed,), False, "its module takes another width")
            else:
                _check_logits(bench, prefix, made, source.removeprefix(prefix))


def _cut(whole: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """A value at all positions beside one that may have been kept at the last or first ones only."""
    if whole.shape == seen.shape or whole.dim() < 3:
        return whole, seen
    if seen.dim() == whole.dim() - 1:
        return whole[:, 0], seen
    return whole[:, -seen.shape[1] :], seen


def _check_logits(bench: ProofBench, prefix: str, made: Tensor, source: str) -> None:
    stream, unembed = bench.streams[prefix], prefix + "unembed"
    scaled = made * stream.logit_scale  # the factor may come before the map or after it
    nearest = min((made, scaled), key=lambda each: deviation(*_cut(each, bench[unembed])))
    bench.equal(f"unembed({source}) == unembed", (unembed,), *_cut(nearest, bench[unembed]))
    result = bench.readings.result
    logits = result.get("logits") if hasattr(result, "get") else result
    if not isinstance(logits, Tensor):
        return
    words = "unembed" if stream.logit_scale == 1 else f"{stream.logit_scale:.4g} * unembed"
    if stream.logit_softcap is not None:
        cap = stream.logit_softcap
        scaled, words = cap * torch.tanh(scaled / cap), f"{cap:.4g} * tanh({words} / {cap:.4g})"
    bench.equal(f"{words} == logits", (unembed,), *_cut(scaled, logits.detach()))


def _check_embeddings(bench: ProofBench, prefix: str) -> None:
    stream, first = bench.streams[prefix], f"{prefix}blocks.0.resid_pre"
    names = stream.embeddings
    if not names or not bench.has(first, *names):
        return
    _check_kinds(bench, prefix, names)
    total: Tensor | None = bench[names[0]]
    for name in names[1:]:
        total = torch.as_tensor(total) + bench[name]
    words = " + ".join(name.removeprefix(prefix) for name in names)
    norm = bench.module_at(stream.embedding_norm)
    by: list[Applied] = []
    if norm is not None and total is not None:
        by.append((norm, total))
        total, words = apply_module(norm, total), f"norm({words})"
    if total is None:
        bench.true(f"{words} == first resid_pre", names, False, "the norm of the embeddings cannot be applied")
        return
    if total.numel() < bench[first].numel():
        total = total.expand_as(bench[first])
    bench.bound(f"{words} == first resid_pre", (*names, first), total, bench[first], by=by)


def _check_kinds(bench: ProofBench, prefix: str, names: Sequence[str]) -> None:
    """Rows differ in their tokens, and so in ``embed``; at one position ``pos_embed`` is the same in all rows."""
    for name in names:
        kind, value = name.removeprefix(prefix).rstrip("0123456789"), bench[name]
        if value.dim() < 3 or value.shape[0] < 2:
            continue
        same = bool((value[0] == value[1]).all())
        if kind == "embed":
            bench.true("embed differs between rows of other tokens", (name,), not same)
        else:
            bench.true(f"{kind} is the same in every row", (name,), same)
