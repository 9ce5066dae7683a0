"""The whole way: names that are found and proved, values that are kept by them, and what is made of these."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import tdcache
from families import build
from residual.hand import FAMILIES, TOKENS, jolted
from residual.test_decomposition import FLOAT32_INSIDE, near
from tdcache import ActivationCaching, Concatenate, NamedPlace, Names, residual
from tdcache.attribution import DirectLogitAttribution, LogitLens
from tdcache.errors import CanonicalNameError, ResidualError


def kept(model, table, *, inputs=TOKENS, **wanted):
    """A cache of what the functions need, and what the model returned."""
    with ActivationCaching(residual.needed(table, **wanted), names=table).prepare(model) as hooked, torch.no_grad():
        out = hooked(inputs) if isinstance(inputs, torch.Tensor) else hooked(**inputs)
    return hooked.cache, getattr(out, "logits", out)


@pytest.mark.parametrize("family", FAMILIES)
def test_found_names_give_the_parts_that_names_written_by_hand_give(case, family):
    this = case(family)
    table = tdcache.names(this.model)
    cache, _ = kept(this.model, table, heads=True)
    found = residual.decompose(cache, heads=True)
    near(sum(found.values()), this.cache[found.of], FLOAT32_INSIDE if family == "gemma2" else 1e-9)
    wanted = residual.decompose(this.cache, heads=True, names=this.table)
    both = set(found.keys()) & set(wanted.keys())
    assert len(both) > 10
    for key in both:
        near(found[key], wanted[key])
    if family != "bert":
        lens = residual.logit_lens(cache, positions=-1)
        *_, last = lens.keys()
        near(lens[last], this.logits[:, -1])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_names_in_the_spelling_of_transformer_lens_do_as_well(case, family):
    this = case(family)
    table = tdcache.names(this.model, style="transformer_lens")
    cache, _ = kept(this.model, table, heads=True)
    assert "blocks.1.attn.hook_z" in cache.keys()  # noqa: SIM118
    found = residual.decompose(cache, heads=True)
    wanted = residual.decompose(this.cache, heads=True, names=this.table)
    for key in set(found.keys()) & set(wanted.keys()):
        near(found[key], wanted[key])
    near(found.total(), this.cache["blocks.2.resid_post"], FLOAT32_INSIDE)
    name = "blocks.1.hook_resid_post"
    assert residual.decompose(cache, of=name).of == "blocks.1.resid_post"
    assert torch.equal(residual.stack_activation(cache, "attn.z")[0], cache["blocks.0.attn.hook_z"])
    with pytest.raises(ResidualError, match=r"the cache lacks 'blocks\.0\.attn\.hook_z'"):
        residual.head_results(cache.exclude("blocks.0.attn.hook_z"))
    scores = residual.logit_attribution(residual.decompose(cache), TOKENS)
    assert torch.equal(
        sum(scores.values()), sum(residual.logit_attribution(residual.decompose(cache), TOKENS).values())
    )


MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_values_of_one_position_and_rows_of_real_tokens_are_taken_apart(case, family):
    this = case(family)
    table = tdcache.names(this.model)
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}
    for options in ({"positions": -2}, {"positions": slice(None), "reducer": Concatenate(flatten=2)}):
        heads = "reducer" not in options  # which have no rows of (batch, position) to gather
        pattern = residual.needed(table, heads=heads, neurons=True, embeddings=False)
        with ActivationCaching(pattern, names=table, **options).prepare(this.model) as hooked, torch.no_grad():
            logits = hooked(**inputs).logits
        cache = hooked.cache
        rows = logits[:, -2] if heads else logits[MASK.bool()]
        parts = residual.decompose(cache, heads=heads, neurons=True)
        assert parts["blocks.0.resid_pre"].shape[:-1] == rows.shape[:-1]
        near(parts.total(), cache[parts.of])
        if family != "bert":
            near(sum(residual.logit_attribution(parts, 7).values()), rows[:, 7], FLOAT32_INSIDE)
            lens = residual.tuned_lens(cache, steps=2)
            near(lens(cache)["blocks.2.resid_post"], rows, FLOAT32_INSIDE)


def test_a_cache_of_inference_mode_fits_a_lens(case):
    this = case("llama")
    table = tdcache.names(this.model)
    with ActivationCaching(residual.needed(table), names=table).prepare(this.model) as hooked, torch.inference_mode():
        hooked(TOKENS)
    lens = residual.tuned_lens(hooked.cache, steps=20, lr=1e-2)
    losses = lens.losses["blocks.0.resid_pre"]
    assert losses[-1] < losses[0]


def test_a_model_in_training_mode_is_said_to_drop_some_of_its_parts():
    model = FAMILIES["gpt2"]().model
    table = tdcache.names(model)
    cache, _ = kept(model.train(), table)
    with pytest.raises(ResidualError, match="the model was in training mode, which drops some of what is written"):
        residual.decompose(cache)


def test_a_cache_knows_the_model_that_its_values_are_from():
    model = FAMILIES["gpt2"]().model
    other = jolted(copy.deepcopy(model))
    table = tdcache.names(model)
    for names in (table, pickle.loads(pickle.dumps(table))):
        cache, logits = kept(other, names)
        lens = residual.logit_lens(cache)
        near(lens["blocks.2.resid_post"], logits)
        assert cache.table.model is other
    assert table.bound_to(model) is table


def test_each_stack_of_an_encoder_and_decoder_is_taken_apart():
    model = jolted(build("t5")).double()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
    table = tdcache.names(model)
    for prefix in ("encoder.", "decoder."):
        cache, _ = kept(model, table, inputs=inputs, heads=True, prefix=prefix)
        parts = residual.decompose(cache, heads=True, prefix=prefix)
        near(parts.total(), cache[parts.of])
        assert parts.of == f"{prefix}blocks.1.resid_post"
        assert f"{prefix}blocks.0.attn.head.3" in list(parts.keys())
    assert "decoder.blocks.1.cross_attn.contribution" in list(parts.keys())
    streams = {prefix: replace(stream, unembed=None) for prefix, stream in table.streams.items()}
    silent = Names(dict(table), streams=streams, model=model)
    with pytest.raises(CanonicalNameError, match=r"with prefix ''; its prefixes are 'encoder.', 'decoder.'"):
        residual.decompose(cache, names=silent)


def test_a_mapping_of_ones_own_is_enough(case):
    this = case("own")
    mapping = {
        "embed": "embed",
        "blocks.{i}.resid_pre": NamedPlace(path="layers.{i}", side="fwd_pre"),
        "blocks.{i}.resid_post": "layers.{i}",
        "blocks.{i}.attn.contribution": "layers.{i}.merge",
        "blocks.{i}.mlp.contribution": "layers.{i}.scale",
        "unembed": "head",
    }
    cache, logits = kept(this.model, tdcache.names(this.model, TOKENS, mapping=mapping))
    scores = residual.logit_attribution(residual.decompose(cache), TOKENS)
    near(sum(scores.values()), logits.gather(-1, TOKENS[..., None])[..., 0])
    near(residual.logit_lens(cache)["blocks.1.resid_post"], logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "neox"])
def test_attribution_by_names_gives_the_same_scores(case, family):
    this = case(family)
    table = tdcache.names(this.model)
    cache, _ = kept(this.model, table)
    scores = residual.logit_attribution(residual.decompose(cache, positions=-1), 4)
    direct = DirectLogitAttribution(names=table, target=lambda td: td["logits"][:, -1, 4])
    with direct.prepare(this.model, in_keys={"ids": "input_ids"}, out_keys=["logits"]) as hooked:
        data = hooked(TensorDict({"ids": TOKENS}, batch_size=[2]))
    for key, score in scores.items():
        if not key.endswith("bias"):
            near(data["attr", key][:, -1], score, FLOAT32_INSIDE)
    lens = residual.logit_lens(cache)
    with LogitLens(names=table).prepare(this.model, in_keys={"ids": "input_ids"}, out_keys=["logits"]) as hooked:
        data = hooked(TensorDict({"ids": TOKENS}, batch_size=[2]))
    near(data["attr", "blocks.1.resid_post"], lens["blocks.2.resid_pre"])


class _Adapted(nn.Module):
    """A linear map and a low-rank one beside it, as adapters put them there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.dropout = base, nn.Dropout(0.1)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.scaling = {"default": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(self.dropout(x))) * self.scaling["default"]


def test_heads_and_neurons_go_through_projections_with_adapters() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = _Adapted(layer.self_attn.o_proj), _Adapted(layer.mlp.down_proj)
    model.eval().double()
    table = tdcache.names(model)
    pattern = residual.needed(table, heads=True, neurons=True)
    with ActivationCaching(pattern, names=table).prepare(model) as hooked, torch.no_grad():
        hooked(torch.arange(10).view(2, 5))
    parts = residual.decompose(hooked.cache, heads=True, neurons=True)
    # Sums of some tens of float64 values of order one round by far less than 1e-9.
    torch.testing.assert_close(sum(parts.values()), hooked.cache["resid_post", -1], rtol=0, atol=1e-9)
