"""Hugging Face Llama from a tiny configuration: rotary embeddings, grouped heads, generation."""

import pytest
import torch
from tensordict import TensorDict

import tiny_transformers as tiny
from small_models import by_hand
from tdcache import ActivationCaching, Concatenate, Mean, Stack


@pytest.fixture
def model():
    return tiny.llama(num_hidden_layers=3)[0]


@pytest.fixture
def ids():
    return torch.randint(3, 20, (2, 5))


def generate(model, ids):
    return model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)


def test_layers_are_stacked_into_one_tensor_per_kind(model, ids):
    pattern = r"model\.layers\.(?P<layer>\d+)\.(?P<kind>self_attn|mlp)"
    with ActivationCaching(pattern, stack_by="layer").prepare(model) as hooked, torch.no_grad():
        hooked(input_ids=ids)
    with ActivationCaching(pattern).prepare(model) as apart, torch.no_grad():
        model(ids)
    assert sorted(hooked.cache.keys()) == ["mlp", "self_attn"]
    for kind in hooked.cache.keys():  # noqa: SIM118  a TensorDict is no dict
        assert torch.equal(
            hooked.cache[kind], torch.stack([apart.cache[f"model.layers.{layer}.{kind}"] for layer in range(3)])
        )


def test_a_tensordict_goes_in_by_a_mapping_and_comes_out_by_field_names(model, ids):
    context = ActivationCaching("model.norm").prepare(model, in_keys={"tokens": "input_ids"}, out_keys=["logits"])
    with context as hooked, torch.no_grad():
        data = hooked(TensorDict({"tokens": ids}, batch_size=2))
        assert torch.equal(data["logits"], model.lm_head(hooked.cache["model.norm"]))


def test_inputs_given_by_keyword_are_kept(model, ids):
    with (
        ActivationCaching(r"model\.layers\.0\.self_attn", directions=["fwd_pre"]).prepare(model) as hooked,
        torch.no_grad(),
    ):
        hooked(ids)
    wanted = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    assert torch.equal(hooked.cache["model.layers.0.self_attn"], wanted)


def test_gradients_arrive_at_every_layer(model, ids):
    with ActivationCaching(r"model\.layers\.\d+", directions=["fwd", "bwd", "grad_in"]).prepare(model) as hooked:
        hooked(ids).logits.sum().backward()
    for layer in range(2):  # what a layer gets is the gradient of the input of the next
        assert torch.equal(
            hooked.cache["bwd", f"model.layers.{layer}"], hooked.cache["grad_in", f"model.layers.{layer + 1}"]
        )


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_one_entry_per_step(model, ids, use_cache):
    model.generation_config.use_cache = use_cache
    with ActivationCaching(r"model\.layers\.1\.mlp", reducer=Stack(), index=(slice(None), -1)).prepare(model) as hooked:
        generate(model, ids)
    steps = by_hand(model, ["model.layers.1.mlp"], lambda: generate(model, ids))["model.layers.1.mlp"]
    assert len(steps) == 3
    assert torch.equal(hooked.cache["model.layers.1.mlp"], torch.stack([value[:, -1] for value in steps]))


def test_statistics_over_generation_cover_every_token(model, ids):
    with (
        ActivationCaching(r"model\.layers\.1\.mlp", reducer=Mean(dim=(0, 1))).prepare(model) as mean,
        ActivationCaching(r"model\.layers\.1\.mlp", reducer=Concatenate(flatten=2)).prepare(model) as rows,
    ):
        generate(model, ids)
    assert rows.cache["model.layers.1.mlp"].shape == (2 * 7, 8)
    # The mean is accumulated in float64 step by step, the other in single precision at once.
    torch.testing.assert_close(
        mean.cache["model.layers.1.mlp"], rows.cache["model.layers.1.mlp"].mean(0), rtol=1e-5, atol=1e-6
    )


def test_the_first_layers_alone_need_no_full_forward(model, ids):
    ran = []
    model.model.layers[1].register_forward_hook(lambda *args: ran.append(1))
    with ActivationCaching(r"model\.layers\.0", stop_early=True).prepare(model) as hooked:
        assert hooked(input_ids=ids) is None
    assert ran == []
    assert hooked.cache["model.layers.0"].shape == (2, 5, 8)
