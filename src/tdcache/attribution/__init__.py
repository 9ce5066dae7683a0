"""Attribution: taps, modifiers and reducers around one forward and one backward.

Methods only ask for activations and gradients. What all of them have in common (rows, targets, baselines, chunks,
several methods in one pass) is done by the pass, so that a new method is its formula.
"""

from tdcache.attribution.attention import QKAttributionPatching
from tdcache.attribution.base import Attribution, SiteAttribution
from tdcache.attribution.deeplift import DeepLift
from tdcache.attribution.edges import EdgeAttributionPatching
from tdcache.attribution.gradients import GradCAM, GradientXActivation, GuidedBackpropagation, InputXGradient, Saliency
from tdcache.attribution.influence import Conductance, InternalInfluence
from tdcache.attribution.integrated import IntegratedGradients
from tdcache.attribution.logits import DirectLogitAttribution, LogitLens
from tdcache.attribution.lrp import (
    LRP,
    AlphaBeta,
    Epsilon,
    Flat,
    FreezeNorm,
    Gamma,
    Pass,
    RelevanceRules,
    Rule,
    RuleMap,
    WSquare,
    ZPlus,
    attnlrp,
    epsilon_alpha2_beta1,
    epsilon_gamma,
    epsilon_plus,
    epsilon_plus_flat,
    relp,
    transformer_rules,
    uniform,
)
from tdcache.attribution.maximisation import ActivationMaximisation
from tdcache.attribution.modifiers import GradDrop, GuidedReLU, ScaleGradient, StopGradient
from tdcache.attribution.patching import AttributionPatching
from tdcache.attribution.quadrature import quadrature
from tdcache.attribution.reductions import attention_rollout, difference_x_gradient, grad_cam, gradient_x_activation
from tdcache.attribution.rollout import AttentionRollout
from tdcache.attribution.smoothgrad import SmoothGrad
from tdcache.attribution.targets import Unit
from tdcache.public_names import MissingName

__all__ = [
    "ActivationMaximisation",
    "AlphaBeta",
    "AttentionRollout",
    "Attribution",
    "AttributionPatching",
    "Conductance",
    "DeepLift",
    "DirectLogitAttribution",
    "EdgeAttributionPatching",
    "Epsilon",
    "Flat",
    "FreezeNorm",
    "Gamma",
    "GradCAM",
    "GradDrop",
    "GradientXActivation",
    "GuidedBackpropagation",
    "GuidedReLU",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "LRP",
    "LogitLens",
    "Pass",
    "QKAttributionPatching",
    "RelevanceRules",
    "Rule",
    "RuleMap",
    "Saliency",
    "ScaleGradient",
    "SiteAttribution",
    "SmoothGrad",
    "StopGradient",
    "Unit",
    "WSquare",
    "ZPlus",
    "attention_rollout",
    "attnlrp",
    "difference_x_gradient",
    "epsilon_alpha2_beta1",
    "epsilon_gamma",
    "epsilon_plus",
    "epsilon_plus_flat",
    "grad_cam",
    "gradient_x_activation",
    "quadrature",
    "relp",
    "transformer_rules",
    "uniform",
]

__getattr__ = MissingName(__name__)
