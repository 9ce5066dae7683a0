"""Causal tracing against plain hooks and a loop."""

import pytest
import torch
from tensordict import TensorDict

import tiny_transformers as tiny
from interventions.hand import edited, pasted, values
from model_state import state_of
from small_models import Tied
from tdcache import CausalTracing, EditError


@pytest.fixture
def model():
    return tiny.gpt2(n_layer=3)[0].double()


@pytest.fixture
def ids():
    return torch.randint(2, 20, (2, 5))


def probability(data):
    return data["logits"][:, -1].softmax(-1)[:, 3].mean()


def trace(model, ids, **options):
    recipe = CausalTracing(
        options.pop("selector", r"transformer\.h\.\d"),
        r"transformer\.wte",
        **{"subject": [1, 2], "metric": probability, "samples": 3, "seed": 7, **options},
    )
    with recipe.prepare(model, {"ids": "input_ids"}, ["logits"]) as hooked:
        return hooked(TensorDict({"ids": ids}))


def noise_by_hand(model, ids, samples=3, level=3.0):
    many = ids.repeat(samples, 1)
    embedded = model.transformer.wte(many).detach()
    drawn = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32).double()
    noise = torch.zeros_like(embedded)
    noise[:, [1, 2]] = drawn[:, [1, 2]] * level * embedded.std()
    return many, noise


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 4, "replay": False}])
def test_it_equals_a_plain_loop(model, ids, options):
    found = trace(model, ids, **options)
    many, noise = noise_by_hand(model, ids)
    paths = [f"transformer.h.{layer}" for layer in range(3)]
    clean = values(model, paths, lambda: model(many))

    def measure():
        with torch.no_grad():
            return probability({"logits": model(many).logits})

    torch.testing.assert_close(found["clean"], measure())
    with edited(model, "transformer.wte", lambda output: output + noise):
        torch.testing.assert_close(found["corrupted"], measure())
        for path in paths:
            for position in range(5):
                index = (slice(None), [position])
                with edited(model, path, lambda old, path=path, index=index: pasted(old, clean[path], index)):
                    torch.testing.assert_close(found["restored", path][position], measure(), rtol=0, atol=1e-10)
    assert found["clean"] != found["corrupted"]


def test_a_window_restores_neighbours_together(model, ids):
    found = trace(model, ids, selector=r"transformer\.h\.\d\.mlp", window=3, positions=[2, 4])
    many, noise = noise_by_hand(model, ids)
    paths = [f"transformer.h.{layer}.mlp" for layer in range(3)]
    clean = values(model, paths, lambda: model(many))
    for path, together in zip(paths, (paths[:2], paths, paths[1:]), strict=True):
        for at, position in enumerate((2, 4)):
            edits = [
                edited(model, each, lambda old, each=each, at=position: pasted(old, clean[each], (slice(None), [at])))
                for each in together
            ]
            with torch.no_grad(), edited(model, "transformer.wte", lambda output: output + noise):
                for edit in edits:
                    edit.__enter__()
                expected = probability({"logits": model(many).logits})
                for edit in edits:
                    edit.__exit__(None, None, None)
            torch.testing.assert_close(found["restored", path][at], expected, rtol=0, atol=1e-10)


def test_whole_sites_and_a_leading_axis(model, ids):
    found = trace(model, ids, selector=r"transformer\.h\.(?P<layer>\d)", sweep=True, stack_by="layer")
    (stacked,) = found["restored"].values()
    assert stacked.shape == (3,)
    # Behind the last block nothing of the noise is left to see.
    torch.testing.assert_close(stacked[-1], found["clean"], rtol=0, atol=1e-10)


def test_without_noise_nothing_is_corrupted(model, ids):
    found = trace(model, ids, noise=0.0)
    torch.testing.assert_close(found["corrupted"], found["clean"], rtol=0, atol=0)


def test_the_model_is_left_as_it_was(model, ids):
    before, plain = state_of(model), model(ids).logits
    trace(model, ids)
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("options", [{"window": 0}, {"samples": 0}])
def test_windows_and_samples_are_one_or_more(options):
    with pytest.raises(EditError, match="1 or more"):
        CausalTracing("a", "b", subject=0, metric=probability, **options)


def test_one_module_is_the_embedding(model):
    recipe = CausalTracing(r"transformer\.h\.0", r"transformer\.w.e", subject=0, metric=probability)
    with pytest.raises(EditError, match="selects 2 modules; name one"), recipe.prepare(model):
        pass


def test_an_embedding_that_runs_twice_is_named():
    recipe = CausalTracing("decode", "encode", subject=slice(None), metric=lambda data: data["output"].sum())
    with recipe.prepare(Tied()) as hooked, pytest.raises(EditError, match="'encode' ran 2 times in one forward"):
        hooked(TensorDict({"input": torch.randn(1, 3, 4)}))
