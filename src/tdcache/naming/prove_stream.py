"""The identities of the stream: sums, chain, norms, embeddings, logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdcache.naming.prove_bench import FLOAT32_INSIDE, IdentityCheck, ProofBench, deviation

__all__ = ["check_chain", "check_ends", "check_norms", "check_sums"]


def check_chain(bench: ProofBench) -> None:
    """``resid_post`` of a block is ``resid_pre`` of the next."""
    for prefix, head, number, _ in bench.blocks():
        post, after = head + "resid_post", f"{prefix}blocks.{number + 1}.resid_pre"
        if bench.has(post, after):
            bench.equal("resid_post == the next block's resid_pre", (post, after), bench[post], bench[after])


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
    first = next((part for part in parts if part in (f"{head}attn.contribution", f"{head}mixer.contribution")), None)
    found = {first: head + "resid_mid"} if first is not None else {}
    cross = f"{head}cross_attn.contribution"
    if cross in parts:
        found[cross] = head + "resid_mid_cross"
    return {part: middle for part, middle in found.items() if middle in bench.places}


def _check_sum(bench: ProofBench, head: str, names: list[str], layout: str, first: int = 0) -> None:
    start, *parts, end = names
    value = bench[start]
    short = [name.removeprefix(head) for name in names]
    if layout == "post-norm":
        identity = short[0]
        for number, part in enumerate(parts, 1 + first):
            norm = bench.module(f"{head}ln{number}")
            if norm is None:
                return
            value = _apply(norm, value + bench[part].reshape(value.shape))
            identity = f"ln{number}({identity} + {part.removeprefix(head)})"
        bench.equal(f"{identity} == {short[-1]}", names, value, bench[end], inside=True)
        return
    for part in parts:
        if bench[part].numel() != value.numel():
            bench.true(
                " + ".join(short[:-1]), (part,), False, f"its shape {tuple(bench[part].shape)} is not the stream's"
            )
            return
        value = value + bench[part].reshape(value.shape)
    bench.equal(f"{' + '.join(short[:-1])} == {short[-1]}", names, value, bench[end])


@torch.no_grad()
def _apply(module: nn.Module, value: Tensor) -> Tensor:
    made: Tensor | tuple[Tensor, ...] = module(value)
    return made if isinstance(made, Tensor) else made[0]


def check_norms(bench: ProofBench) -> None:
    """A norm's name is what its module makes of the stream, or of what the sublayer returned."""
    for _, head, _, layout in bench.blocks():
        for name in [each for each in bench.places if each.startswith(head + "ln") and bench.has(each)]:
            module = bench.module(name)
            if layout == "post-norm" and not name.endswith("_post"):
                continue  # part of the block's sum
            if module is None:
                bench.true("a norm is a module", (name,), False, "its place is no module whose norm could be applied")
                continue
            streams = (
                "resid_pre",
                "resid_mid",
                "resid_mid_cross",
                "attn.out",
                "mlp.out",
                "cross_attn.out",
                "mixer.out",
            )
            errors = [
                (_norm_error(module, bench[head + stream], bench[name]), head + stream)
                for stream in streams
                if bench.has(head + stream)
            ]
            error, nearest = min(errors, default=(float("inf"), ""))
            identity = f"{name.removeprefix(head)} == norm({nearest.removeprefix(head)})"
            bench.checks.append(IdentityCheck(identity, (name,), error, FLOAT32_INSIDE[bench.dtype]))


def _norm_error(module: nn.Module, given: Tensor, made: Tensor) -> float:
    try:
        return deviation(_apply(module, given), made)
    except (RuntimeError, TypeError, ValueError):  # it normalises another width
        return float("inf")


def check_ends(bench: ProofBench) -> None:
    """Embeddings sum to the first ``resid_pre``; the unembedding of the final norm gives the logits."""
    for prefix, stream in bench.streams.items():
        _check_embeddings(bench, prefix, stream.embeddings)
        last = f"{prefix}blocks.{stream.blocks - 1}.resid_post"
        norm, unembed = prefix + "final_norm", prefix + "unembed"
        module = bench.module_at(stream.final_norm)
        if bench.has(norm, last) and module is not None:
            bench.equal(
                "final_norm == norm(last resid_post)",
                (norm,),
                *_cut(_apply(module, bench[last]), bench[norm]),
                inside=True,
            )
        projection = bench.module_at(stream.unembed)
        if projection is not None and bench.has(unembed):
            source = norm if bench.has(norm) else last
            if bench.has(source):
                made = _apply(projection, bench[source])
                bench.equal(
                    f"unembed({source.removeprefix(prefix)}) == unembed",
                    (unembed,),
                    *_cut(made, bench[unembed]),
                    inside=True,
                )
            _check_logits(bench, prefix)


def _cut(whole: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """A value at all positions beside one that may have been kept at the last or first ones only."""
    if whole.shape == seen.shape or whole.dim() < 3:
        return whole, seen
    if seen.dim() == whole.dim() - 1:
        return whole[:, 0], seen
    return whole[:, -seen.shape[1] :], seen


def _check_logits(bench: ProofBench, prefix: str) -> None:
    result, stream = bench.readings.result, bench.streams[prefix]
    logits = result.get("logits") if hasattr(result, "get") else result if isinstance(result, Tensor) else None
    if not isinstance(logits, Tensor):
        return
    expected = bench[prefix + "unembed"] * stream.logit_scale
    words = "unembed" if stream.logit_scale == 1 else f"{stream.logit_scale:.4g} * unembed"
    if stream.logit_softcap is not None:
        cap = stream.logit_softcap
        expected, words = cap * torch.tanh(expected / cap), f"{cap:.4g} * tanh({words} / {cap:.4g})"
    bench.equal(f"{words} == logits", (prefix + "unembed",), expected, logits.detach(), inside=True)


def _check_embeddings(bench: ProofBench, prefix: str, names: tuple[str, ...]) -> None:
    first = f"{prefix}blocks.0.resid_pre"
    if not names or not bench.has(first, *names):
        return
    total = bench[names[0]]
    for name in names[1:]:
        total = total + bench[name]
    norm = bench.module_at(bench.places[names[0]].note.rpartition("N being ")[2] or None)
    words = " + ".join(name.removeprefix(prefix) for name in names)
    if norm is not None:
        total, words = _apply(norm, total), f"norm({words})"
    if total.numel() < bench[first].numel():
        total = total.expand_as(bench[first])
    bench.equal(f"{words} == first resid_pre", names, total, bench[first], inside=norm is not None)
