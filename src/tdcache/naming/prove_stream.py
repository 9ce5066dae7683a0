"""The identities of the stream: sums, chain, norms, embeddings, logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdcache.naming.prove_bench import FLOAT32_INSIDE, IdentityCheck, ProofBench, apply_module, deviation
from tdcache.naming.prove_gradients import leads

__all__ = ["check_chain", "check_ends", "check_norms", "check_sums"]


def check_chain(bench: ProofBench) -> None:
    """``resid_post`` of a block is ``resid_pre`` of the next."""
    for prefix, head, number, _ in bench.blocks():
        post, after = head + "resid_post", f"{prefix}blocks.{number + 1}.resid_pre"
        if bench.has(post, after):
            bench.bound("resid_post == the next block's resid_pre", (post, after), bench[post], bench[after])


def check_sums(bench: ProofBench) -> None:
    """What is added to the stream makes, with what was there, what goes on."""
    for _, head, _, layout in bench.blocks():
        parts = [f"{head}{label}.contribution" for label in bench.labels(head, "contribution")]
        pre, post = head + "resid_pre", head + "resid_post"
        if not parts or not bench.has(*parts):
            continue
        middles = _middles(bench, head, parts) if layout != "parallel" else {}
        if bench.has(pre, post):
            _check_sum(bench, head, [pre, *parts, post], layout)
        start, left = pre, list(parts)
        for part, middle in middles.items():
            end = left.index(part) + 1
            if bench.has(start, middle):
                _check_sum(bench, head, [start, *left[:end], middle], layout, first=len(parts) - len(left))
            start, left = middle, left[end:]
        if middles and left and bench.has(start, post):
            _check_sum(bench, head, [start, *left, post], layout, first=len(parts) - len(left))


def _middles(bench: ProofBench, head: str, parts: Sequence[str]) -> dict[str, str]:
    """After which contribution which middle stands."""
    mixing = [part for part in parts if part in (f"{head}attn.contribution", f"{head}mixer.contribution")]
    found = {} if not mixing else {mixing[_sum_nearest(bench, head, mixing)]: head + "resid_mid"}
    cross = f"{head}cross_attn.contribution"
    if cross in parts:
        found[cross] = head + "resid_mid_cross"
    return {part: middle for part, middle in found.items() if middle in bench.places}


def _sum_nearest(bench: ProofBench, head: str, parts: Sequence[str]) -> int:
    """How many more than the first of ``parts`` it takes to come from ``resid_pre`` to ``resid_mid``."""
    if len(parts) < 2 or not bench.has(head + "resid_pre", head + "resid_mid"):
        return 0
    total, errors = bench[head + "resid_pre"], []
    for part in parts:
        if bench[part].numel() != total.numel():
            return 0
        total = total + bench[part].reshape(total.shape)
        errors.append(deviation(total, bench[head + "resid_mid"]))
    return errors.index(min(errors))


def _check_sum(bench: ProofBench, head: str, names: list[str], layout: str, first: int = 0) -> None:
    start, *parts, end = names
    total: Tensor | None = bench[start]
    words = start.removeprefix(head)
    norms = []
    for number, part in enumerate(parts, 1 + first):
        if total is None or bench[part].numel() != total.numel():
            reason = f"its shape {tuple(bench[part].shape)} is not the stream's"
            bench.true("contributions have the stream's shape", (part,), False, reason)
            return
        total = total + bench[part].reshape(total.shape)
        words = f"{words} + {part.removeprefix(head)}"
        if layout == "post-norm":
            norm = f"{head}ln{number}"
            module = bench.module(norm)
            total = None if module is None else apply_module(module, total)
            words = f"ln{number}({words})"
            norms.append(norm)
            if total is not None and bench.has(norm):
                so_far = (start, *parts[: number - first], norm)
                bench.bound(f"{words} == ln{number}", so_far, total, bench[norm], inside=True)
    if total is not None:
        bench.bound(f"{words} == {end.removeprefix(head)}", names, total, bench[end], inside=bool(norms))


def check_norms(bench: ProofBench) -> None:
    """A norm's name is what its module makes of the stream, or of what the sublayer returned."""
    for _, head, _, layout in bench.blocks():
        labels = bench.labels(head, "contribution")
        for name in [each for each in bench.places if each.startswith(head + "ln") and bench.has(each)]:
            number, _, after = name.removeprefix(head + "ln").partition("_")
            if not number.isdigit() or not labels or (layout == "post-norm" and not after):
                continue  # part of the block's sum
            at = min(int(number), len(labels)) - 1
            if after:
                _check_norm(bench, head, name, [f"{label}.out" for label in labels[at:]])
            else:
                first = int(number) == 1 or layout == "parallel"
                if _check_norm(bench, head, name, ["resid_pre"] if first else ["resid_mid", "resid_mid_cross"]):
                    _check_reader(bench, head, name, labels[:1] if int(number) == 1 else labels[at:])


def _check_reader(bench: ProofBench, head: str, name: str, labels: Sequence[str]) -> None:
    """Check that a sublayer reads the norm: of two norms of one stream, that tells which is whose."""
    ends = [label for label in labels if bench.has(f"{head}{label}.contribution")]
    values = bench.readings.values
    reads = [label for label in ends if leads(values[name], values[f"{head}{label}.contribution"])]
    if ends:
        words = reads[0] if reads else ends[0]
        bench.true(f"{name.removeprefix(head)} leads to {words}.contribution", (name,), bool(reads))


def _check_norm(bench: ProofBench, head: str, name: str, streams: Sequence[str]) -> bool:
    """Check a norm against what it may be applied to; False where no such value is in the table."""
    module, short = bench.module(name), name.removeprefix(head)
    errors = []
    for stream in streams:
        if bench.has(head + stream):
            made = None if module is None else apply_module(module, bench[head + stream])
            errors.append((float("inf") if made is None else deviation(made, bench[name]), stream))
    if errors:
        error, stream = min(errors)
        check = IdentityCheck(f"{short} == norm({stream})", (name,), error, FLOAT32_INSIDE[bench.dtype])
        bench.checks.append(check)
    return bool(errors)


def check_ends(bench: ProofBench) -> None:
    """Embeddings sum to the first ``resid_pre``; the unembedding of the final norm gives the logits."""
    for prefix, stream in bench.streams.items():
        _check_embeddings(bench, prefix)
        last = f"{prefix}blocks.{stream.blocks - 1}.resid_post"
        norm, unembed = prefix + "final_norm", prefix + "unembed"
        module = bench.module_at(stream.final_norm)
        if bench.has(norm, last) and module is not None:
            made = apply_module(module, bench[last])
            if made is not None:
                bench.equal("final_norm == norm(last resid_post)", (norm,), *_cut(made, bench[norm]), inside=True)
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
    bench.equal(f"unembed({source}) == unembed", (unembed,), *_cut(nearest, bench[unembed]), inside=True)
    result = bench.readings.result
    logits = result.get("logits") if hasattr(result, "get") else result
    if not isinstance(logits, Tensor):
        return
    words = "unembed" if stream.logit_scale == 1 else f"{stream.logit_scale:.4g} * unembed"
    if stream.logit_softcap is not None:
        cap = stream.logit_softcap
        scaled, words = cap * torch.tanh(scaled / cap), f"{cap:.4g} * tanh({words} / {cap:.4g})"
    bench.equal(f"{words} == logits", (unembed,), *_cut(scaled, logits.detach()), inside=True)


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
    if norm is not None and total is not None:
        total, words = apply_module(norm, total), f"norm({words})"
    if total is None:
        bench.true(f"{words} == first resid_pre", names, False, "the norm of the embeddings cannot be applied")
        return
    if total.numel() < bench[first].numel():
        total = total.expand_as(bench[first])
    bench.bound(f"{words} == first resid_pre", (*names, first), total, bench[first], inside=norm is not None)


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
