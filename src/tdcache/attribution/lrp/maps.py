"""Which rule is applied where: maps by class and by regex, and ready composites of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tdcache.attribution.lrp.linear import ELEMENTWISE, LINEAR, is_linear
from tdcache.attribution.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, ZPlus
from tdcache.selection import Matcher, as_matcher
from tdcache.types import Selector

__all__ = [
    "RuleMap",
    "Rules",
    "epsilon_alpha2_beta1",
    "epsilon_gamma",
    "epsilon_plus",
    "epsilon_plus_flat",
    "is_activation",
    "is_convolution",
    "uniform",
]

RuleMap: TypeAlias = "Sequence[tuple[Selector, Rule | None]]"
"""Pairs of a selector and a rule, the first that fits counts; a rule None leaves the ordinary gradient."""


def is_activation(path: str, module: nn.Module) -> bool:
    """Whether the module acts on each number by itself: torch's activations and Hugging Face's."""
    return isinstance(module, ELEMENTWISE) or type(module).__module__ == "transformers.activations"


def is_convolution(path: str, module: nn.Module) -> bool:
    """Whether the module is a convolution."""
    return isinstance(module, LINEAR) and not isinstance(module, nn.Linear)


def _linear(path: str, module: nn.Module) -> bool:
    return is_linear(module)


def uniform(rule: Rule) -> RuleMap:
    """One rule at all linear modules; activations pass relevance on."""
    return ((is_activation, Pass()), (_linear, rule))


def epsilon_plus(eps: float = 1e-6) -> RuleMap:
    """z-plus at convolutions, epsilon at other linear modules."""
    return ((is_activation, Pass()), (is_convolution, ZPlus()), (_linear, Epsilon(eps)))


def epsilon_plus_flat(first: Selector, eps: float = 1e-6) -> RuleMap:
    """:func:`epsilon_plus`, and flat at the first layer, which ``first`` selects."""
    return ((first, Flat()), *epsilon_plus(eps))


def epsilon_alpha2_beta1(eps: float = 1e-6) -> RuleMap:
    """Alpha-beta with 2 and 1 at convolutions, epsilon at other linear modules."""
    return ((is_activation, Pass()), (is_convolution, AlphaBeta()), (_linear, Epsilon(eps)))


def epsilon_gamma(gamma: float = 0.25, eps: float = 1e-6) -> RuleMap:
    """Gamma at convolutions, epsilon at other linear modules."""
    return ((is_activation, Pass()), (is_convolution, Gamma(gamma)), (_linear, Epsilon(eps)))


@dataclass(frozen=True, slots=True)
class Rules:
    """A rule map, parsed."""

    pairs: tuple[tuple[Matcher, Any], ...]

    @classmethod
    def of(cls, rules: RuleMap | Rule) -> Rules:
        """Parse; a single rule is :func:`uniform`."""
        pairs = uniform(rules) if isinstance(rules, Rule) else rules
        return cls(tuple((as_matcher(selector), rule) for selector, rule in pairs))

    def at(self, path: str, module: nn.Module) -> Any:
        """The rule of a module, or None."""
        for matcher, rule in self.pairs:
            if matcher(path, module) is not None:
                return rule
        return None
