"""Layer-wise relevance propagation: rules, where they apply, and the method."""

from tdcache.attribution.lrp.maps import (
    RuleMap,
    epsilon_alpha2_beta1,
    epsilon_gamma,
    epsilon_plus,
    epsilon_plus_flat,
    uniform,
)
from tdcache.attribution.lrp.method import LRP, RelevanceRules
from tdcache.attribution.lrp.norms import FreezeNorm
from tdcache.attribution.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZPlus
from tdcache.attribution.lrp.transformers import attnlrp, relp, transformer_rules

__all__ = [
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "FreezeNorm",
    "Gamma",
    "LRP",
    "Pass",
    "RelevanceRules",
    "Rule",
    "RuleMap",
    "WSquare",
    "ZPlus",
    "attnlrp",
    "epsilon_alpha2_beta1",
    "epsilon_gamma",
    "epsilon_plus",
    "epsilon_plus_flat",
    "relp",
    "transformer_rules",
    "uniform",
]
