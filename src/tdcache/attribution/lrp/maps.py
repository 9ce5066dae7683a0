"""Which rule is applied where: maps by class and by regex, and the composites that papers name.

A module that no rule covers would lose or create relevance unnoticed; these maps also find such modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tdcache.attribution.lrp.linear import ELEMENTWISE, LINEAR, is_linear
from tdcache.attribution.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, ZPlus
from tdcache.errors import AttributionError
from tdcache.selection import Matcher, as_matcher, walk
from tdcache.tables import shorten
from tdcache.types import Selector

__all__ = [
    "BATCH_NORMS",
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
    """Whether the module is elementwise: an activation of torch or of Hugging Face."""
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


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# f(c x) = c f(x), or an average or selection of inputs: gradient x input sums to gradient x output.
_CONSERVING: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.Embedding,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """A rule map, parsed."""

    pairs: tuple[tuple[Matcher, Any], ...]

    @classmethod
    def of(cls, rules: RuleMap | Rule) -> Rules:
        """Parse; a single rule is :func:`uniform`."""
        pairs: Any = uniform(rules) if isinstance(rules, Rule) else rules
        if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise AttributionError(
                "rules= is a rule such as Epsilon(), a map such as epsilon_plus(), or pairs of a selector and a rule, "
                f"got {shorten(repr(rules), 80)}"
            )
        return cls(tuple((as_matcher(selector), rule) for selector, rule in pairs))

    def at(self, path: str, module: nn.Module) -> Any:
        """The rule of a module, or None."""
        return next(self._fitting(path, module), None)

    def forgotten(self, model: nn.Module, *, canonise: bool) -> dict[str, nn.Module]:
        """Modules that no pair selects and whose ordinary gradient does not conserve relevance.

        Those are leaves, and modules with parameters of their own beside their children, as ``nn.MultiheadAttention``.
        """
        conserving = (*_CONSERVING, *(BATCH_NORMS if canonise else ()))
        return {
            path: module
            for path, module in [("", model), *walk(model)]
            if (next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None)
            and not isinstance(module, conserving)
            and not any(True for _ in self._fitting(path, module))
        }

    def _fitting(self, path: str, module: nn.Module) -> Iterator[Any]:
        return (rule for matcher, rule in self.pairs if matcher(path, module) is not None)
