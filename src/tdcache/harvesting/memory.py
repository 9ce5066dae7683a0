"""The in-memory collectors under their earlier import path; they live in :mod:`tdcache.compat`."""

from tdcache.compat.collector import ActivationCollector, collect_activations_from_dataloader
from tdcache.compat.representations import ActivationStore, extract_representations

__all__ = ["ActivationCollector", "ActivationStore", "collect_activations_from_dataloader", "extract_representations"]
