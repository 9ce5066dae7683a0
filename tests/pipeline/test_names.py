"""Pipelines and splices at canonical names."""

import torch

from named_model import HEADS, Transformer, ids, table
from tdcache import Ablation, ActivationCaching, Splice
from tdcache.pipeline import attach


def test_a_pipeline_runs_on_the_value_of_a_name():
    model = Transformer()
    names, seen = table(model), []

    def zero(x, layer, path):
        seen.append((layer, path, tuple(x.shape)))
        return 0 * x

    with attach(model, r"blocks\.(?P<layer>[01])\.attn\.z", zero, names=names):
        piped = model(ids())
    assert seen == [(layer, f"blocks.{layer}.attn.z", (2, 5, HEADS, 4)) for layer in (0, 1)]
    with Ablation(r"blocks\.[01]\.attn\.z", names=names).prepare(model):
        assert torch.equal(piped, model(ids()))


def test_a_splice_encodes_the_value_of_a_name():
    model = Transformer()
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    pair = (lambda x: x @ basis, lambda latents: latents @ basis.T)
    names, plain = table(model), model(ids())
    splice = Splice("blocks.1.attn.z", {"blocks.1.attn.z": pair}, names=names)
    with splice.prepare(model), ActivationCaching(r".*/sae\.latents").prepare(model) as hooked:
        assert torch.equal(model(ids()), plain)  # with the error term it is the identity
    with ActivationCaching("blocks.1.attn.z", names=names).prepare(model) as whole:
        model(ids())
    assert torch.equal(hooked.cache["blocks.1.attn.z/sae.latents"], whole.cache["attn.z", 1] @ basis)
