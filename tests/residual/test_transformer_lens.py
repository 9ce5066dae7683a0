"""The same functions in TransformerLens: its ``ActivationCache`` of a bridged model gives the same numbers."""

import copy
import warnings
from importlib.metadata import version

import pytest
import torch

from residual import hand
from residual.hand import TOKENS
from tdcache import residual

lens = pytest.importorskip("transformer_lens")
if int(version("transformer-lens").partition(".")[0]) < 4:
    pytest.skip("in 3.x the bridge is in the making", allow_module_level=True)

CLOSE = {
    "rtol": 0,
    "atol": 1e-5,
}  # TransformerLens computes norms and attention in float32 whatever the model's dtype is


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our case and their cache, of one GPT-2 with the same weights and tokens."""
    this = hand.gpt2()
    wrapped = copy.deepcopy(this.model)
    path = tmp_path_factory.mktemp("gpt2")
    wrapped.save_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = lens.TransformerBridge.boot_transformers(str(path), hf_model=wrapped, tokenizer=None)
        _, theirs = bridge.run_with_cache(TOKENS)
    return this, bridge, theirs


def same(ours, theirs):
    """Whether our TensorDict has the tensors of their stack, in their order."""
    torch.testing.assert_close(torch.stack(list(ours.values())).to(theirs), theirs, **CLOSE)


def test_the_stream_before_each_block_and_between(both):
    this, _, theirs = both
    same(residual.accumulated(this.cache, names=this.table), theirs.accumulated_resid())
    same(residual.accumulated(this.cache, mid=True, names=this.table), theirs.accumulated_resid(incl_mid=True))
    ours = residual.accumulated(this.cache, of="blocks.1.resid_pre", names=this.table)
    same(ours, theirs.accumulated_resid(layer=1))
    last = residual.accumulated(this.cache, positions=-1, names=this.table)
    same(last, theirs.accumulated_resid(pos_slice=-1))


def test_the_parts_of_the_stream(both):
    this, _, theirs = both
    stack, labels = theirs.decompose_resid(return_labels=True)
    ours = residual.decompose(this.cache, names=this.table)
    same(ours, stack)
    assert labels == ["embed", "pos_embed", *(f"{i}_{kind}_out" for i in range(3) for kind in ("attn", "mlp"))]
    ours = residual.decompose(this.cache, of="blocks.1.resid_mid", names=this.table)
    same(ours, theirs.decompose_resid(layer=1, mlp_input=True))


def test_heads_and_neurons(both):
    this, _, theirs = both
    stack, labels = theirs.stack_head_results(return_labels=True)
    ours = residual.head_results(this.cache, names=this.table)
    same(ours, stack)
    assert [f"blocks.{label[1]}.attn.head.{label[3]}" for label in labels] == list(ours.keys())
    same(
        residual.head_results(this.cache, remainder=True, names=this.table),
        theirs.stack_head_results(incl_remainder=True),
    )
    same(residual.neuron_results(this.cache, names=this.table), theirs.stack_neuron_results(layer=-1))
    chosen = residual.neuron_results(this.cache, neurons=slice(2, 5), names=this.table)
    same(chosen, theirs.stack_neuron_results(layer=-1, neuron_slice=(2, 5)))


def test_everything_at_once(both):
    this, _, theirs = both
    stack, labels = theirs.get_full_resid_decomposition(return_labels=True)
    ours = residual.decompose(this.cache, heads=True, neurons=True, names=this.table)
    torch.testing.assert_close(ours.total().to(stack), stack.sum(0), **CLOSE)
    theirs_by_label = dict(zip(labels, stack, strict=True))
    torch.testing.assert_close(ours["blocks.1.attn.head.1"].to(stack), theirs_by_label["L1H1"], **CLOSE)
    torch.testing.assert_close(ours["blocks.2.mlp.neuron.4"].to(stack), theirs_by_label["L2N4"], **CLOSE)
    biases = sum(value for key, value in ours.items() if key.endswith(".bias"))
    torch.testing.assert_close(biases.to(stack), theirs_by_label["bias"], **CLOSE)


def test_roles_are_stacked(both):
    this, _, theirs = both
    ours = residual.stack_activation(this.cache, "attn.z", names=this.table)
    torch.testing.assert_close(ours.to(torch.float32), theirs.stack_activation("z").float(), **CLOSE)


def test_scores_of_tokens_add_up_to_the_logit_and_theirs_to_that_without_biases(both):
    this, bridge, theirs = both
    stack = theirs.decompose_resid()
    ours = residual.logit_attribution(residual.decompose(this.cache, names=this.table), TOKENS, 3)
    scale = theirs["ln_final.hook_scale"].double()
    centred = stack.double() - stack.double().mean(-1, keepdim=True)
    rows = (this.model.lm_head.weight[TOKENS] - this.model.lm_head.weight[3]).detach()
    weighted = (centred / scale * this.model.transformer.ln_f.weight.detach() * rows).sum(-1)
    torch.testing.assert_close(torch.stack([*ours.values()][:-1]), weighted, **CLOSE)
    assert list(ours.keys())[-1] == "final_norm.bias"
    normed = theirs.apply_ln_to_stack(stack)
    torch.testing.assert_close(normed.double(), centred / scale, **CLOSE)
    assert bridge is theirs.model
