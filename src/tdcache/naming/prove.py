"""The proof of a table by arithmetic: identities over values of one forward, on an input of its own.

A name that an identity contradicts is refused with the identity and the error. What no identity reaches is not proved,
and the proof says so by not listing it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from torch import nn

from tdcache.named_places import NamedPlace, Names
from tdcache.named_proof import Proof, ProvedIdentity
from tdcache.naming.copies import WorkingCopy, in_best_dtype
from tdcache.naming.inputs import like, own_inputs
from tdcache.naming.prove_attention import check_attention
from tdcache.naming.prove_bench import IdentityCheck, ProofBench
from tdcache.naming.prove_stream import check_chain, check_ends
from tdcache.naming.prove_sublayers import check_mixing, check_mlp, check_outputs, check_routers
from tdcache.naming.prove_sums import check_norms, check_sums
from tdcache.naming.prove_values import Readings, read_places
from tdcache.naming.resolve_axes import fit_axes

__all__ = ["Verdict", "checked", "judged", "prove", "proved", "verdict_of"]

CHECKS = (
    *(check_chain, check_sums, check_norms, check_ends),
    *(check_attention, check_mixing, check_outputs, check_mlp, check_routers),
)
ROLE = regex.compile(
    r"(.+\.)?(embed|pos_embed|type_embed|final_norm|unembed|blocks\.\d+\.(resid_(pre|mid|mid_cross|post)|ln\d+(_post)?"
    r"|(attn|cross_attn|mlp|mixer)\d*\.(q|k|v|scores|pattern|z|out|contribution|pre|post|router)))"
)
"""The names whose meaning is fixed."""

_ALONE = "no identity of the proof reaches it: name what it is computed from as well, or leave it out with prove="

SEED = 1
"""Of the proof's input: not that of the forward that resolved the names."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a proof found: itself, and the names that it refuses, with reasons."""

    proof: Proof
    refused: dict[str, str]


def prove(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Proof:
    """The identities that hold for a table; see :func:`verdict_of` for those that do not."""
    return verdict_of(model, names, inputs, skip=skip).proof


def proved(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Names:
    """The table without the names that a proof refuses; these are among ``refused``, with the reasons.

    A name of the vocabulary that no identity reaches is refused as well; one of the user's own words stays.
    """
    return judged(names, verdict_of(model, names, inputs, skip=skip)).replaced(model=model)


def judged(names: Names, verdict: Verdict) -> Names:
    """The table without the names that a verdict refuses, or does not reach."""
    reached = {name for each in verdict.proof.identities for name in each.names} | set(verdict.proof.skipped)
    unproved = {name: _ALONE for name in names if name not in reached and ROLE.fullmatch(name)}
    refused = {**names.refused, **unproved, **verdict.refused}
    places = {name: place for name, place in names.items() if name not in refused}
    return names.replaced(places=places, refused=refused, proof=verdict.proof)


def verdict_of(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Verdict:
    """Check a table on a copy of ``model`` whose parameters are shaken, in float64 where it is small enough.

    Args:
        model: left alone.
        names: the table, canonical in its spelling.
        inputs: what kind of input the model takes; other random numbers of that kind are made. By default an input of
            the proof's own.
        skip: names, or patterns of whole names, that are not looked at.
    """
    return in_best_dtype(model, lambda copy: checked(copy, names, inputs, skip)[1])


def checked(
    copy: WorkingCopy, names: Names, inputs: Any, skip: Iterable[str], *, fit: bool = False
) -> tuple[Names, Verdict]:
    """Check a table on a copy that is there, which is shaken for it; with ``fit`` after its axes are set as seen."""
    skipped = tuple(name for name in names if any(regex.fullmatch(pattern, name) for pattern in skip))
    copy.shake()
    given = copy.fitted(own_inputs(copy.model, SEED) if inputs is None else like(inputs, SEED))
    readings = read_places(copy.model, names if fit else _without(names, skipped), given)
    if fit:
        names = fit_axes(names, readings)
        readings.show(names)
    return names, _verdict(copy, names, readings, inputs is None, skipped)


def _without(places: Mapping[str, NamedPlace], skipped: Collection[str]) -> dict[str, NamedPlace]:
    return {name: place for name, place in places.items() if name not in skipped}


def _verdict(copy: WorkingCopy, names: Names, readings: Readings, own: bool, skipped: tuple[str, ...]) -> Verdict:
    places = _without(names, skipped)
    for name in skipped:
        readings.values.pop(name, None)
    bench = ProofBench(copy.model, places, dict(names.streams), readings, copy.dtype)
    zero = {name: "it is zero all over" for name, each in readings.values.items() if not bool((each.data != 0).any())}
    for check in CHECKS:
        check(bench)
    refused = {**readings.missing, **_contradicted(bench.checks), **zero}
    refused = {name: reason for name, reason in refused.items() if name in places}
    proof = Proof(
        inputs="random numbers of its own" if own else "other random numbers of the kind that was given",
        dtype=str(copy.dtype).removeprefix("torch."),
        identities=_summed(bench.checks, refused),
        skipped=skipped,
    )
    return Verdict(proof, refused)


def _contradicted(checks: list[IdentityCheck]) -> dict[str, str]:
    """The names that an identity contradicts; of one that fails, those that none binds to the stream."""
    bound = {name for check in checks if check.holds for name in check.binds}
    refused: dict[str, str] = {}
    for check in checks:
        if check.holds:
            continue
        wrong = check.refuses or check.names
        if len(wrong) > 1 and not check.refuses:
            wrong = tuple(name for name in wrong if name not in bound)
        for name in wrong:
            refused.setdefault(name, check.why())
    return refused


def _summed(checks: list[IdentityCheck], refused: dict[str, str]) -> tuple[ProvedIdentity, ...]:
    """Identities over all their places: what held, with the largest error."""
    found: dict[str, list[IdentityCheck]] = {}
    for check in checks:
        if check.holds and not refused.keys() & set(check.names):
            found.setdefault(check.identity, []).append(check)
    return tuple(
        ProvedIdentity(
            identity=identity,
            names=tuple(dict.fromkeys(name for check in group for name in check.names)),
            error=max(check.error for check in group),
            tolerance=max(check.tolerance for check in group),
        )
        for identity, group in found.items()
    )
