"""Pipelines of hooks that compose, gradient hooks, and splices; called by hand or attached to module paths.

For code with a hand-written forward that calls its own hooks (``x = hooks.mlp.post_act(x)``), and to run such code on
any model without rewriting its forward.
"""

from tdcache.pipeline.attach import AttachedPipeline, attach
from tdcache.pipeline.autoencoder import Autoencoder, AutoencoderHooks
from tdcache.pipeline.collection import FwdBwdHooks, HookCollection
from tdcache.pipeline.conditional import AtCalls, AtLayers, AtPositions, AtRows, ConditionalHooks
from tdcache.pipeline.conditions import Calls, Condition, Keyword, Layers, Part, Positions, Rows, When
from tdcache.pipeline.dictionaries import Dictionary, DictionaryConfig
from tdcache.pipeline.dictionary_files import load_dictionary, save_dictionary
from tdcache.pipeline.gradients import GradientHook, grad_hook_wrapper, stop_gradient
from tdcache.pipeline.hooks import Hooks, WrapperHooks
from tdcache.pipeline.splice import Splice, sparse_latents
from tdcache.pipeline.transformer_hooks import (
    AttentionHooks,
    MLPHooks,
    NormalizationHooks,
    ResidualStreamHooks,
    ResidualStreamTorsoHooks,
    TransformerHooks,
)
from tdcache.public_names import MissingName

__all__ = [
    "AtCalls",
    "AtLayers",
    "AtPositions",
    "AtRows",
    "AttachedPipeline",
    "AttentionHooks",
    "Autoencoder",
    "AutoencoderHooks",
    "Calls",
    "Condition",
    "ConditionalHooks",
    "Dictionary",
    "DictionaryConfig",
    "FwdBwdHooks",
    "GradientHook",
    "HookCollection",
    "Hooks",
    "Keyword",
    "Layers",
    "MLPHooks",
    "NormalizationHooks",
    "Part",
    "Positions",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "Rows",
    "Splice",
    "TransformerHooks",
    "When",
    "WrapperHooks",
    "attach",
    "grad_hook_wrapper",
    "load_dictionary",
    "save_dictionary",
    "sparse_latents",
    "stop_gradient",
]

__getattr__ = MissingName(__name__)
