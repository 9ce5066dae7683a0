"""The proof of a table by arithmetic: identities over values of one forward, on an input of its own.

A name that an identity contradicts is refused with the identity and the error. What no identity reaches is not proved,
and the proof says so by not listing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import regex
from torch import nn

from tdcache.named_places import Names
from tdcache.named_proof import Proof, ProvedIdentity
from tdcache.naming.copies import WorkingCopy, in_best_dtype
from tdcache.naming.inputs import like, own_inputs
from tdcache.naming.prove_attention import check_attention
from tdcache.naming.prove_bench import IdentityCheck, ProofBench
from tdcache.naming.prove_stream import check_chain, check_ends
from tdcache.naming.prove_sublayers import check_mixing, check_mlp, check_outputs, check_routers
from tdcache.naming.prove_sums import check_norms, check_sums
from tdcache.naming.prove_values import read_places

__all__ = ["Verdict", "prove", "proved", "verdict_of"]

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
NOISE = 0.3
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a proof found: itself, and the names that it refuses, with reasons."""

    proof: Proof
    refused: dict[str, str]


_EMPTY = CellType()

_verdicts: dict[str, Verdict] = {}


def prove(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Proof:
    """The identities that hold for a table; see :func:`verdict_of` for those that do not."""
    return verdict_of(model, names, inputs, skip=skip).proof


def proved(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Names:
    """The table without the names that a proof refuses; these are among ``refused``, with the reasons.

    A name of the vocabulary that no identity reaches is refused as well; one of the user's own words stays.
    """
    verdict = verdict_of(model, names, inputs, skip=skip)
    reached = {name for each in verdict.proof.identities for name in each.names}
    alone = [
        name for name in names if name not in reached and name not in verdict.proof.skipped and ROLE.fullmatch(name)
    ]
    unproved = dict.fromkeys(alone, _ALONE)
    refused = {**names.refused, **unproved, **verdict.refused}
    places = {name: place for name, place in names.items() if name not in refused}
    return names.replaced(places=places, refused=refused, proof=verdict.proof, model=model)


def verdict_of(model: nn.Module, names: Names, inputs: Any = None, *, skip: Iterable[str] = ()) -> Verdict:
    """Check a table on a copy of ``model`` whose parameters are shaken, in float64 where it is small enough.

    Args:
        model: left alone.
        names: the table, canonical in its spelling.
        inputs: what kind of input the model takes; other random numbers of that kind are made. By default an input of
            the proof's own.
        skip: names, or patterns of whole names, that are not looked at.

    Verdicts are kept per model class, configuration and table.
    """
    skipped = tuple(name for name in names if any(regex.fullmatch(pattern, name) for pattern in skip))
    key = _key(model, names, inputs, skipped)
    if key not in _verdicts:
        while len(_verdicts) >= _KEPT:
            _verdicts.pop(next(iter(_verdicts)))
        _verdicts[key] = in_best_dtype(model, NOISE, lambda copy: _verdict(copy, names, inputs, skipped))
    return _verdicts[key]


def _key(model: nn.Module, names: Names, inputs: Any, skipped: tuple[str, ...]) -> str:
    """What a verdict depends on: classes with their code, configuration, settings, shapes, the table, kind of input."""
    kinds = sorted({str(_code_of_class(type(module))) for module in model.modules()})  # one defined anew is another one
    settings = [_settings(module) for module in model.modules()]
    shapes = [(name, tuple(each.shape)) for name, each in model.named_parameters()]
    parts = (type(model).__module__, str(getattr(model, "config", None)), str(model), kinds, settings, shapes)
    table = sorted(map(repr, names.values())), repr(dict(names.streams)), skipped
    given = None if inputs is None else str(sorted(inputs) if isinstance(inputs, dict) else type(inputs))
    return hashlib.sha256(repr((parts, table, given)).encode()).hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """The numbers and functions that a module keeps beside its parameters."""
    plain = (bool, int, float, str, tuple, FunctionType)
    return [(name, _plain(each)) for name, each in vars(module).items() if isinstance(each, plain) and name[0] != "_"]


def _plain(value: Any) -> Any:
    """A value without the addresses that its repr may hold."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_varnames, [_plain(each) for each in value.co_consts]
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return _plain(value.__code__), [each for each in held if isinstance(each, bool | int | float | str)]
    return value


def _code_of_class(kind: type[nn.Module]) -> str:
    own = [each for each in kind.__mro__ if each not in nn.Module.__mro__]
    functions = [(name, _plain(each)) for base in own for name, each in vars(base).items() if callable(each)]
    return repr((kind.__qualname__, [each for each in functions if not callable(each[1])]))


def _verdict(copy: WorkingCopy, names: Names, inputs: Any, skipped: tuple[str, ...]) -> Verdict:
    given = copy.fitted(own_inputs(copy.model, SEED) if inputs is None else like(inputs, SEED))
    places = {name: place for name, place in names.items() if name not in skipped}
    readings = read_places(copy.model, places, given)
    bench = ProofBench(copy.model, places, dict(names.streams), readings, copy.dtype)
    zero = {name: "it is zero all over" for name, each in readings.values.items() if not bool((each.data != 0).any())}
    for check in CHECKS:
        check(bench)
    refused = {**readings.missing, **_contradicted(bench.checks), **zero}
    refused = {name: reason for name, reason in refused.items() if name in places}
    words = "random numbers of its own" if inputs is None else "other random numbers of the kind that was given"
    proof = Proof(
        inputs=words,
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
