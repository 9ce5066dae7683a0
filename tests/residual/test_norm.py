"""Norms with a frozen scale, against the formulas of the norms."""

import pytest
import torch
from tensordict import TensorDict

from residual.hand import FAMILIES
from residual.test_decomposition import layer_norm_of_a_part, near
from tdcache import residual

WITH_LOGITS = [family for family in FAMILIES if family != "bert"]
FLOAT32_INSIDE = 2e-6  # RMS norms of transformers compute in float32 whatever the model's dtype is


@pytest.mark.parametrize("family", WITH_LOGITS)
def test_what_sums_to_the_stream_sums_to_the_final_norm(case, family):
    this = case(family)
    parts = residual.decompose(this.cache, names=this.table)
    normed = residual.apply_norm(parts, this.cache)
    path = this.table.streams[""].final_norm
    whole = this.cache[parts.of]
    wanted = whole if path is None else this.model.get_submodule(path)(whole).detach()
    near(sum(normed.values()), wanted, FLOAT32_INSIDE)
    assert normed.normed
    assert ("final_norm.bias" in list(normed.keys())) == (family in ("gpt2", "bloom", "neox"))


def test_the_parts_of_gpt2_go_through_its_layer_norm_with_the_scale_of_the_whole(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    normed = residual.apply_norm(parts)
    whole, norm = this.cache["blocks.2.resid_post"], this.model.transformer.ln_f
    for key, part in parts.items():
        near(normed[key], layer_norm_of_a_part(norm, part, whole, bias=False).detach())
    assert torch.equal(normed["final_norm.bias"], norm.bias.detach().expand_as(whole))


def test_the_parts_of_gemma2_are_multiplied_by_one_plus_weight(case):
    this = case("gemma2")
    normed = residual.apply_norm(residual.decompose(this.cache, names=this.table))
    norm, whole = this.model.model.norm, this.cache["blocks.2.resid_post"]
    part = this.cache["blocks.1.mlp.contribution"]
    wanted = (1 + norm.weight) * part / (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    near(normed["blocks.1.mlp.contribution"], wanted.detach(), FLOAT32_INSIDE)


def test_a_norm_is_chosen_by_name_or_path_with_the_value_that_it_reads(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, of="blocks.1.resid_mid", names=this.table)
    by_name = residual.apply_norm(parts, this.cache, norm="blocks.1.ln2")
    near(sum(by_name.values()), this.cache["blocks.1.ln2"])
    assert list(by_name.keys())[-1] == "blocks.1.ln2.bias"
    by_path = residual.apply_norm(parts, norm="transformer.h.1.ln_2")
    assert torch.equal(by_path["embed"], by_name["embed"])
    plain = TensorDict(dict(parts.items()))
    handed = residual.apply_norm(plain, this.cache, norm="blocks.1.ln2", at="blocks.1.resid_mid", names=this.table)
    assert torch.equal(handed["embed"], by_name["embed"])


def test_every_entry_has_a_scale_of_its_own_on_demand(case):
    this = case("gpt2")
    stack = residual.accumulated(this.cache, names=this.table)
    normed = residual.apply_norm(stack, recompute=True)
    for key, value in stack.items():
        assert torch.equal(normed[key], this.model.transformer.ln_f(value).detach())
    frozen = residual.apply_norm(stack)  # accumulated values are normalised like the last of them
    near(frozen["blocks.2.resid_post"] + frozen["final_norm.bias"], normed["blocks.2.resid_post"])


def test_some_heads_are_normalised_like_the_whole(case):
    this = case("llama")
    heads = residual.head_results(this.cache, layers=1, names=this.table)
    every = residual.apply_norm(residual.decompose(this.cache, heads=True, names=this.table))
    picked = (heads.select("blocks.1.attn.head.3"), heads.exclude("blocks.1.attn.head.0"))
    for stack in (heads, *picked, heads.clone(), heads.detach(), heads.to(torch.float64)):
        normed = residual.apply_norm(stack)
        near(normed["blocks.1.attn.head.3"], every["blocks.1.attn.head.3"])
    plain = TensorDict({"x": heads["blocks.1.attn.head.3"]})
    near(residual.apply_norm(plain, this.cache, names=this.table)["x"], every["blocks.1.attn.head.3"])


def test_the_scale_is_a_constant_for_gradients(case):
    this = case("llama")
    post = this.cache["blocks.2.resid_post"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        residual.apply_norm(residual.Parts({"x": post}), this.cache, names=this.table)["x"].sum(), post
    )
    norm, whole = this.model.model.norm, post.detach()
    wanted = norm.weight / (whole.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    near(grad, wanted.detach(), FLOAT32_INSIDE)
