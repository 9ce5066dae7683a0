"""Changing a run: patching, sweeps, steering, ablation, path patching, causal tracing, resuming from a layer."""

from tdcache.interventions.ablation import Ablation
from tdcache.interventions.addition import ActivationAddition
from tdcache.interventions.base import Intervention, InterventionContext
from tdcache.interventions.patching import ActivationPatching
from tdcache.interventions.regions import Region
from tdcache.interventions.steering import SteeringVectors
from tdcache.interventions.steps import Step

__all__ = [
    "Ablation",
    "ActivationAddition",
    "ActivationPatching",
    "Intervention",
    "InterventionContext",
    "Region",
    "SteeringVectors",
    "Step",
]
