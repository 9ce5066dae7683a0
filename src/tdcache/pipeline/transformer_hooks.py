"""Ready-made trees of the places in a transformer where a hand-written forward may call hooks.

They fix the names, so that hooks written for one model can be used in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tdcache.pipeline.collection import FwdBwdHooks, HookCollection

__all__ = [
    "AttentionHooks",
    "MLPHooks",
    "NormalizationHooks",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "TransformerHooks",
]


class _Tree(HookCollection):
    """A collection whose children are listed in a class attribute."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = {}

    def __init__(self) -> None:
        super().__init__()
        for name, kind in self.places.items():
            self.add_subhooks(name, kind())


class MLPHooks(_Tree):
    """A feed-forward layer: before and after its activation function, ``(batch, seq, d_hidden)``."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = {"pre_act": FwdBwdHooks, "post_act": FwdBwdHooks}


class AttentionHooks(_Tree):
    """An attention layer: queries, keys, values, scores, softmax denominators, pattern, output before projection."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = dict.fromkeys(
        ("q", "k", "v", "qk_logits", "qk_softmax_denominator", "qk_probs", "v_out"), FwdBwdHooks
    )


class NormalizationHooks(_Tree):
    """A normalisation layer: the centred value, the scale that it is divided by, and the normalised value."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = dict.fromkeys(
        ("post_mean_subtraction", "scale", "post_scale"), FwdBwdHooks
    )


class ResidualStreamTorsoHooks(_Tree):
    """The residual stream in one layer: normalised inputs and outputs of both sublayers, and the stream after each."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = {
        "post_ln_attn": FwdBwdHooks,
        "ln_attn": NormalizationHooks,
        "delta_attn": FwdBwdHooks,
        "post_attn": FwdBwdHooks,
        "ln_mlp": NormalizationHooks,
        "post_ln_mlp": FwdBwdHooks,
        "delta_mlp": FwdBwdHooks,
        "post_mlp": FwdBwdHooks,
    }


class ResidualStreamHooks(_Tree):
    """The residual stream from the embedding to the final normalisation; ``torso`` is for each layer."""

    places: ClassVar[Mapping[str, type[HookCollection]]] = {
        "post_emb": FwdBwdHooks,
        "torso": ResidualStreamTorsoHooks,
        "ln_f": NormalizationHooks,
        "post_ln_f": FwdBwdHooks,
    }


class TransformerHooks(_Tree):
    """A whole transformer: ``mlp`` and ``attn`` of each layer, ``resid`` and ``logits``.

    Example:
        >>> TransformerHooks().append_to_path("resid.torso.post_mlp.fwd", abs).bind(layer=3)
        TransformerHooks() [layer=3]
            resid.torso.post_mlp.fwd
                abs
    """

    places: ClassVar[Mapping[str, type[HookCollection]]] = {
        "mlp": MLPHooks,
        "attn": AttentionHooks,
        "resid": ResidualStreamHooks,
        "logits": FwdBwdHooks,
    }
