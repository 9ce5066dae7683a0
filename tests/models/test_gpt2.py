"""Hugging Face GPT-2 from a tiny configuration: tuple values, keyword inputs, ModelOutput results, generation."""

import pytest
import torch
from tensordict import TensorDict

import tiny_transformers as tiny
from rounding import assert_same_but_rounding
from small_models import by_hand, output_gradients
from tdcache import ActivationCaching, Concatenate, Stack

BLOCKS = [f"transformer.h.{layer}" for layer in range(2)]


@pytest.fixture
def model():
    return tiny.gpt2(resid_pdrop=0.0)[0]


@pytest.fixture
def ids():
    return torch.randint(2, 20, (2, 5))


def generate(model, ids, steps=4):
    return model.generate(
        ids,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )


def test_keyword_inputs_give_the_models_own_output(model, ids):
    with ActivationCaching("lm_head").prepare(model) as hooked:
        result = hooked(input_ids=ids)
    assert type(result) is type(model(input_ids=ids))
    assert torch.equal(hooked.cache["lm_head"], result.logits)


def test_one_regex_takes_attention_and_mlp_of_every_layer(model, ids):
    with ActivationCaching(r"transformer\.h\.\d+\.(attn|mlp)").prepare(model) as hooked:
        result = hooked(ids, output_attentions=False)
    assert sorted(hooked.cache.keys()) == [f"{block}.{kind}" for block in BLOCKS for kind in ("attn", "mlp")]
    assert {value.shape for value in hooked.cache.values()} == {torch.Size([2, 5, 8])}
    assert result.logits.shape == (2, 5, 20)


def test_of_the_attentions_tuple_the_output_is_kept_and_the_weights_by_pick(model, ids):
    model.set_attn_implementation("eager")  # the fused ones return no weights
    for pick, shape in ((None, (2, 5, 8)), (1, (2, 2, 5, 5))):
        with ActivationCaching(r"transformer\.h\.0\.attn", pick=pick).prepare(model) as hooked:
            result = hooked(ids, output_attentions=True)
        assert hooked.cache["transformer.h.0.attn"].shape == shape
    assert torch.equal(hooked.cache["transformer.h.0.attn"], result.attentions[0])


def test_the_hidden_states_are_those_of_the_model(model, ids):
    with ActivationCaching(r"transformer\.h\.0").prepare(model) as hooked:
        result = hooked(ids, output_hidden_states=True)
    assert torch.equal(hooked.cache["transformer.h.0"], result.hidden_states[1])


def test_a_model_output_gives_its_first_tensor_and_by_name_another(model, ids):
    with (
        ActivationCaching("transformer").prepare(model) as first,
        ActivationCaching("", pick="logits").prepare(model) as named,
    ):
        result = model(ids)
    assert first.cache["transformer"].shape == (2, 5, 8)
    assert torch.equal(named.cache[""], result.logits)


def test_a_tensordict_goes_in_by_a_mapping_and_comes_out_by_field_names(model, ids):
    data = TensorDict({"tokens": ids, "mask": torch.ones_like(ids), "targets": ids}, batch_size=[])
    context = ActivationCaching("lm_head", directions=["fwd", "bwd"]).prepare(
        model,
        in_keys={"tokens": "input_ids", "mask": "attention_mask", "targets": "labels"},
        out_keys=["logits", "loss"],
    )
    with context as hooked:
        assert hooked(data) is data
        data["loss"].backward()
    wanted = model(input_ids=ids, labels=ids)
    assert torch.equal(data["loss"], wanted.loss)
    assert torch.equal(data["logits"], wanted.logits)
    assert torch.equal(hooked.cache["fwd", "lm_head"], wanted.logits)
    assert hooked.cache["bwd", "lm_head"].shape == (2, 5, 20)


def test_gradients_at_the_mlps_are_those_of_autograd(model, ids):
    paths = [f"{block}.mlp" for block in BLOCKS]
    wanted = output_gradients(model, paths, lambda: model(ids).logits[:, -1].square().sum())
    with ActivationCaching(r"transformer\.h\.\d+\.mlp", directions=["bwd"]).prepare(model) as hooked:
        hooked(ids).logits[:, -1].square().sum().backward()
    for path, grad in wanted.items():
        assert_same_but_rounding(hooked.cache[path], grad)  # the copies of output_gradients lie otherwise in memory


def test_generate_gives_one_entry_per_step(model, ids):
    with ActivationCaching(r"lm_head|transformer\.h\.\d+\.mlp", reducer=Stack(), index=(slice(None), -1)).prepare(
        model
    ) as hooked:
        generated = generate(model, ids)
    assert generated.shape == (2, 9)
    assert hooked.cache["lm_head"].shape == (4, 2, 20)
    assert hooked.cache["transformer.h.1.mlp"].shape == (4, 2, 8)
    assert torch.equal(hooked.cache["lm_head"].argmax(-1).T[:, -1], generated[:, -1])
    by_step = by_hand(model, ["transformer.h.0.mlp"], lambda: generate(model, ids))["transformer.h.0.mlp"]
    assert torch.equal(hooked.cache["transformer.h.0.mlp"], torch.stack([value[:, -1] for value in by_step]))


def test_steps_of_different_length_are_numbered(model, ids):
    with ActivationCaching(r"transformer\.h\.0\.mlp", reducer=Stack()).prepare(model) as hooked:
        generate(model, ids)
    steps = hooked.cache["transformer.h.0.mlp"]
    assert [tuple(steps[str(number)].shape) for number in range(4)] == [(2, 5, 8)] + 3 * [(2, 1, 8)]


def test_concatenating_over_steps_gives_the_whole_sequence(model, ids):
    with ActivationCaching(r"transformer\.h\.\d+", reducer=Concatenate(dim=1)).prepare(model) as hooked:
        generated = generate(model, ids)
    with ActivationCaching(r"transformer\.h\.\d+").prepare(model) as whole, torch.no_grad():
        whole(generated[:, :-1])  # the last token is never an input
    for block in BLOCKS:
        assert hooked.cache[block].shape == (2, 8, 8)
        # With the key-value cache attention is computed row by row: rounding of single precision.
        torch.testing.assert_close(hooked.cache[block], whole.cache[block], rtol=1e-4, atol=1e-5)


def test_every_step_replaces_the_entry_of_the_one_before_by_default(model, ids):
    with ActivationCaching("lm_head").prepare(model) as hooked:
        generated = generate(model, ids)
    assert hooked.cache["lm_head"].shape == (2, 1, 20)
    assert torch.equal(hooked.cache["lm_head"][:, 0].argmax(-1), generated[:, -1])
