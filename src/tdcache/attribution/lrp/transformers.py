"""Rules for transformers: RelP and AttnLRP, as modifiers made of gradients that are scaled, stopped or linearised."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdcache.attribution.lrp.maps import RuleMap, is_activation
from tdcache.attribution.lrp.method import RelevanceRules
from tdcache.attribution.lrp.norms import FrozenNorm
from tdcache.attribution.lrp.rules import Epsilon, Pass, Rule
from tdcache.attribution.modifiers import ScaleGradient, StopGradient
from tdcache.norms import is_norm
from tdcache.types import Selector

__all__ = ["attnlrp", "relp", "transformer_rules"]


def transformer_rules(linear: Rule | None = None) -> RuleMap:
    """Norm scales are constants, activations pass relevance on, linear modules follow ``linear`` (LRP-0 by default)."""
    pairs: list[tuple[Any, Any]] = [(is_norm, FrozenNorm()), (is_activation, Pass())]
    if linear is not None and linear != Epsilon(0.0):
        pairs.append((nn.Linear, linear))
    return tuple(pairs)


def relp(*, attention: Selector, gated: Selector | None = None) -> tuple[Any, ...]:
    r"""RelP's modifiers (Rezaei Jafari et al. 2025, arXiv:2508.21258): with them, patching scores cancel less.

    The scale of norms and the attention pattern are constants, activations are linearised, and both factors of a gated
    unit get half. Use as ``AttributionPatching(..., modifiers=relp(attention=r".*\.(q|k)_proj"))``.

    Args:
        attention: the modules that give queries and keys; the pattern depends on nothing else.
        gated: the modules whose outputs are multiplied in a gated unit: the activation and the up projection.
    """
    return (_rules(), StopGradient(attention), *(() if gated is None else (ScaleGradient(gated, 0.5),)))


def attnlrp(*, query_key: Selector, value: Selector, gated: Selector | None = None) -> tuple[Any, ...]:
    """AttnLRP's modifiers (Achtibat et al. 2024, arXiv:2402.05602): relevance also flows through the pattern.

    Of a product of two tensors each gets half. Values take part in one product, and queries and keys in two: with each
    other, and, as the pattern, with the values.

    Args:
        query_key: the modules that give queries and keys.
        value: the modules that give values.
        gated: see :func:`relp`.
    """
    halves = () if gated is None else (ScaleGradient(gated, 0.5),)
    return (_rules(), ScaleGradient(value, 0.5), ScaleGradient(query_key, 0.25), *halves)


def _rules() -> RelevanceRules:
    return RelevanceRules(transformer_rules(), canonise=False)
