"""Captures in ``generate()``: encoders that it calls by themselves, and wrappers whose forward never runs."""

import pytest
import torch
from torch import nn

from small_models import Wrapper
from tdcache import Ablation, Stack, cache_activations
from tdcache.errors import InplaceModificationError, SelectionError

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 6, 7, 8, 0, 0], [3, 4, 5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
ENDS = ([0, 1], [3, 5])


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 2}
    layers = {"decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=20, **sizes, **layers))
    return model.eval(), "model.encoder.layers.0"


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 8, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, **sizes)
    ).eval(), "encoder.block.0"


def generate(model):
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def seen_by_a_hook(model, site):
    seen = []
    handle = model.get_submodule(site).register_forward_hook(
        lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    generate(model)
    handle.remove()
    (value,) = seen
    return value


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("options", [{}, {"steps": "prefill"}])
def test_what_an_encoder_gave_is_there_after_the_decoder_has_run(make, options):
    model, site = make()
    expected = seen_by_a_hook(model, site)
    with cache_activations(model, site.replace(".", r"\."), **options) as cache:
        generate(model)
    assert torch.equal(cache[site], expected)
    with cache_activations(model, site.replace(".", r"\."), positions=-1, **options) as cache:
        generate(model)
    assert torch.equal(cache[site], expected[ENDS])


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("options", [{}, {"steps": "prefill"}])
def test_the_last_token_of_an_encoder_is_edited_and_no_padding(make, options):
    model, site = make()
    expected = seen_by_a_hook(model, site).clone()
    expected[ENDS] = 0
    with Ablation(site.replace(".", r"\."), positions=-1, **options).prepare(model):
        assert torch.equal(seen_by_a_hook(model, site), expected)


def test_positions_are_those_of_the_model_that_a_wrapper_calls():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    inner = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=20, num_key_value_heads=1, **sizes))
    model, ids, mask = Wrapper(inner.eval()), IDS.flip(1), MASK.flip(1)
    run = lambda: inner.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)  # noqa: E731
    site = r"inner\.model\.layers\.0\.mlp"
    with cache_activations(model, site, reducer=Stack()) as cache:
        inner.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    prompt = cache["inner.model.layers.0.mlp"][0]
    with cache_activations(model, site, positions=0, reducer=Stack()) as cache:
        run()
    assert torch.equal(cache["inner.model.layers.0.mlp"], prompt[[0, 1], [2, 0]][None])
    with cache_activations(model, site, positions=-1, reducer=Stack()) as cache:
        run()
    assert torch.equal(cache["inner.model.layers.0.mlp"][0], prompt[:, -1])
    assert len(cache["inner.model.layers.0.mlp"]) == 3


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(x)


def test_a_part_that_ran_alone_keeps_its_value_until_it_runs_again():
    model, x = Half(), torch.randn(2, 4)
    with torch.no_grad(), cache_activations(model, "first|second") as cache:
        hidden = model.first(x)
        expected = hidden.clone()
        model(hidden)
        hidden.add_(1)  # the cache has its own copy by now
        assert torch.equal(cache["first"], expected)
        assert torch.equal(cache["second"], model.second(expected))
        model.first(2 * x)
    assert torch.equal(cache["first"], model.first(2 * x))


def test_a_part_that_is_overwritten_before_the_model_runs_is_noticed():
    model, x = Half(), torch.randn(2, 4)
    with (
        torch.no_grad(),
        pytest.raises(InplaceModificationError, match="'first'"),
        cache_activations(model, "first|second"),
    ):
        model(model.first(x).add_(1))


def test_a_part_that_is_called_alone_has_no_mask_to_count_by():
    model = Half()
    with (
        pytest.raises(SelectionError, match=r"'first' ran outside of one; call the model itself, or .* mask_key=None"),
        Ablation("first", positions=-1).prepare(model),
    ):
        model.first(torch.randn(2, 3, 4))
    with Ablation("first", positions=-1, mask_key=None).prepare(model):
        assert not model.first(torch.randn(2, 3, 4))[:, -1].any()
