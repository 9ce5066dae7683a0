"""Changing a run: patching, sweeps, steering, ablation, path patching, causal tracing, resuming from a layer.

They share where and when an edit acts (positions, units, heads, rows, calls, steps), so that a new method only says
what happens to a value.
"""

from tdcache.interventions.ablation import Ablation
from tdcache.interventions.addition import ActivationAddition
from tdcache.interventions.base import Intervention
from tdcache.interventions.causal_tracing import CausalTracing
from tdcache.interventions.options import EditOptions
from tdcache.interventions.patching import ActivationPatching
from tdcache.interventions.path_patching import PathPatching
from tdcache.interventions.resume import ResumeFrom, resume_from
from tdcache.interventions.saving import load_intervention, save_intervention
from tdcache.interventions.steering import SteeringVectors
from tdcache.public_names import MissingName
from tdcache.regions import Region

__all__ = [
    "Ablation",
    "ActivationAddition",
    "ActivationPatching",
    "CausalTracing",
    "EditOptions",
    "Intervention",
    "PathPatching",
    "Region",
    "ResumeFrom",
    "SteeringVectors",
    "load_intervention",
    "resume_from",
    "save_intervention",
]

__getattr__ = MissingName(__name__)
