"""Files of activations under their earlier import path; reading and writing live in :mod:`tdcache.compat`."""

from tdcache.compat.activation_files import SUFFIXES, load_activations, save_activations

__all__ = ["SUFFIXES", "load_activations", "save_activations"]
