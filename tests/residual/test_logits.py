"""Parts and layers in terms of logits, against the model's own logits."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from residual.hand import TOKENS, capture, finish, places
from residual.test_decomposition import near
from residual.test_norm import FLOAT32_INSIDE, WITH_LOGITS
from tdcache import residual


def before_the_cap(this):
    """The logits of the model as they are before they are capped."""
    cap = this.table.streams[""].logit_softcap
    return this.logits if cap is None else cap * torch.atanh(this.logits / cap)


@pytest.mark.parametrize("family", WITH_LOGITS)
@pytest.mark.parametrize("pieces", [{}, {"heads": True}])
def test_the_scores_of_a_decomposition_sum_to_the_logit(case, family, pieces):
    this = case(family)
    scores = residual.logit_attribution(residual.decompose(this.cache, names=this.table, **pieces), TOKENS)
    wanted = before_the_cap(this).gather(-1, TOKENS[..., None])[..., 0]
    near(sum(scores.values()), wanted, 2e-5 if family == "gemma2" else FLOAT32_INSIDE)  # atanh near 1 is steep
    assert ("unembed.bias" in list(scores.keys())) == (family == "own")


def test_tokens_are_one_for_all_one_per_row_or_one_per_position(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    one = sum(residual.logit_attribution(parts, 7).values())
    near(one, this.logits[..., 7])
    rows = sum(residual.logit_attribution(parts, torch.tensor([7, 2])).values())
    near(rows, torch.stack([this.logits[0, :, 7], this.logits[1, :, 2]]))
    last = residual.decompose(this.cache, positions=-1, names=this.table)
    near(sum(residual.logit_attribution(last, torch.tensor([7, 2])).values()), rows[:, -1])


@pytest.mark.parametrize("family", ["gpt2", "own", "granite"])
def test_with_incorrect_tokens_the_scores_sum_to_the_difference_of_logits(case, family):
    this = case(family)
    parts = residual.decompose(this.cache, heads=True, names=this.table)
    scores = residual.logit_attribution(parts, TOKENS, 3)
    wanted = this.logits.gather(-1, TOKENS[..., None])[..., 0] - this.logits[..., 3]
    near(sum(scores.values()), wanted, FLOAT32_INSIDE)


def test_a_score_is_the_part_through_the_norm_times_the_row_of_the_unembedding(case):
    this = case("llama")
    parts = residual.decompose(this.cache, names=this.table)
    scores = residual.logit_attribution(parts, 4)
    norm, whole = this.model.model.norm, this.cache["blocks.2.resid_post"]
    scale = (whole.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    for key, part in parts.items():
        wanted = (norm.weight * part / scale) @ this.model.lm_head.weight[4]
        near(scores[key], wanted.detach(), FLOAT32_INSIDE)


def test_a_stack_that_went_through_the_norm_does_not_go_again(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    normed = residual.apply_norm(parts)
    twice = residual.logit_attribution(normed, 4)
    once = residual.logit_attribution(parts, 4)
    for key, value in once.items():
        near(twice[key], value)
    plain = TensorDict(dict(normed.items()))
    again = residual.logit_attribution(plain, 4, normed=True, names=this.table)
    assert all(torch.equal(again[key], value) for key, value in twice.items())
    raw = TensorDict(dict(parts.items()))
    again = residual.logit_attribution(raw, 4, normed=False, cache=this.cache, names=this.table)
    assert all(torch.equal(again[key], value) for key, value in once.items())


def test_directions_of_tokens_are_rows_of_the_unembedding_scaled_as_the_logits(case):
    this = case("granite")
    weight = this.model.lm_head.weight.detach()
    assert torch.equal(residual.token_directions(this.table, 5), 0.25 * weight[5])
    assert torch.equal(residual.token_directions(this.table, TOKENS), 0.25 * weight[TOKENS])
    assert torch.equal(residual.token_directions(this.table, 5, 6), 0.25 * weight[5] - 0.25 * weight[6])


@pytest.mark.parametrize("family", WITH_LOGITS)
def test_the_last_entry_of_a_logit_lens_is_what_the_model_returned(case, family):
    this = case(family)
    found = residual.logit_lens(this.cache, names=this.table)
    *_, last = found.keys()
    near(found[last], this.logits)
    assert all(value.shape == this.logits.shape for value in found.values())
    chosen = residual.logit_lens(this.cache, tokens=TOKENS, names=this.table)
    for key, value in found.items():
        assert torch.equal(chosen[key], value.gather(-1, TOKENS[..., None])[..., 0])


def test_an_earlier_entry_is_the_norm_and_the_unembedding_of_that_value(case):
    this = case("gemma2")
    found = residual.logit_lens(this.cache, mid=True, names=this.table)
    value = this.model.lm_head(this.model.model.norm(this.cache["blocks.1.resid_mid"])).detach()
    near(found["blocks.1.resid_mid"], 2.0 * torch.tanh(value / 2.0))
    assert len(found.keys()) == 7


def test_a_logit_lens_calls_no_module(case):
    this = case("gpt2")
    calls = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in this.model.modules()]
    residual.logit_lens(this.cache, names=this.table)
    residual.logit_attribution(residual.decompose(this.cache, heads=True, names=this.table), 1)
    for handle in handles:
        handle.remove()
    assert calls == []


def test_a_lens_carries_a_graph_only_where_the_values_do(case):
    this = case("gpt2")
    assert not residual.logit_lens(this.cache, names=this.table)["blocks.0.resid_pre"].requires_grad
    live = this.cache.clone()
    live["blocks.1.resid_pre"] = live["blocks.1.resid_pre"].requires_grad_()
    found = residual.logit_lens(live, names=this.table)
    assert found["blocks.1.resid_pre"].requires_grad
    assert not found["blocks.0.resid_pre"].requires_grad


def test_the_first_loss_of_a_tuned_lens_is_that_of_the_logit_lens_and_falls(case):
    this = case("llama")
    grads = [parameter.grad for parameter in this.model.parameters()]
    lens = residual.tuned_lens(this.cache, steps=80, lr=1e-2, names=this.table)
    assert all(
        before is None and parameter.grad is None
        for before, parameter in zip(grads, this.model.parameters(), strict=True)
    )
    plain = residual.logit_lens(this.cache, names=this.table)
    *keys, last = plain.keys()
    assert list(lens.losses.keys()) == keys == list(lens.keys)
    target = plain[last].softmax(-1)
    for key in keys:
        losses = lens.losses[key]
        divergence = (target * (target.log() - plain[key].log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(losses[0], divergence)
        assert losses.shape == (80,)
        assert losses[-1] < 0.2 * losses[0]
    assert f"KL {lens.losses[keys[0]][0]:.4f} -> {lens.losses[keys[0]][-1]:.4f}" in str(lens)
    read = lens(this.cache, names=this.table)
    near(read[last], this.logits)
    divergence = (target * (target.log() - read[keys[0]].log_softmax(-1))).sum(-1).mean()
    assert divergence < lens.losses[keys[0]][-2]


class AffineModel(nn.Module):
    """Blocks that add an affine function of what they read, so that an affine translator can be perfect."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 12)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_tuned_lens_finds_the_affine_map_that_the_later_layers_are():
    torch.manual_seed(0)
    block = {"resid_pre": "<blocks.{}", "mlp.contribution": "blocks.{}"}
    posts = {"blocks.0.resid_post": "<blocks.1", "blocks.1.resid_post": "<head"}
    table = {**places(2, 1, block), **places(0, 1, {}, embed="embed", **posts)}
    this = finish(AffineModel(), table, embeddings=("embed",), unembed="head")
    this.cache, _ = capture(this.model, this.table, torch.arange(12)[None])
    lens = residual.tuned_lens(this.cache, steps=250, lr=3e-2, names=this.table)
    key = "blocks.0.resid_pre"
    assert lens.losses[key][0] > 0.1
    assert lens.losses[key][-1] < 1e-3  # zero is reached only in the limit


def test_a_tuned_lens_is_saved_and_loaded_and_takes_batches_in_turn(case):
    this = case("gpt2")
    other = this.cache.clone()
    batches = [this.cache, other]
    lens = residual.tuned_lens(batches, steps=3, mid=True, names=this.table)
    assert len(lens.keys) == 6
    same = residual.tuned_lens(this.cache, steps=3, mid=True, names=this.table)
    assert all(torch.equal(each, lens.losses[key]) for key, each in same.losses.items())
    copy = residual.TunedLens(lens.keys, 12, dtype=torch.float64)
    copy.load_state_dict(lens.state_dict())
    key = lens.keys[2]
    assert torch.equal(copy.translate(key, this.cache[key]), lens.translate(key, this.cache[key]))
    fresh = residual.TunedLens(lens.keys, 12, dtype=torch.float64)
    assert torch.equal(fresh.translate(key, this.cache[key]), this.cache[key])
