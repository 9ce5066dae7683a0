"""Interventions in ``generate()``: every step, prompts only, added tokens only, or by a predicate."""

import pytest
import torch
from tensordict import TensorDict

from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    HookedModule,
    Stack,
    SteeringVectors,
    cache_activations,
)
from tdcache.reducers import Last
from tiny_transformers import gpt2, llama


@pytest.fixture(params=[gpt2, llama])
def built(request):
    return request.param()


@pytest.fixture
def ids():
    return torch.randint(2, 20, (2, 5))


def generate(model, ids, steps=4, **options):
    return model.generate(
        ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0,
        attention_mask=torch.ones_like(ids), **options,
    )  # fmt: skip


def changes(model, path, ids, **options):
    """By how much the output at ``path`` is moved in each forward of a generation."""
    vector = torch.full((8,), 10.0)
    kept = []
    for prepend in (True, False):
        caching = ActivationCaching(path, reducer=Stack(), prepend=prepend, index=(slice(None), -1))
        kept.append(caching)
    with (
        SteeringVectors(path, vector, **options).prepare(model),
        kept[0].prepare(model) as before,
        kept[1].prepare(model) as after,
    ):
        generate(model, ids)
    return (after.cache[path] - before.cache[path]).mean((1, 2)).round().tolist()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [10, 10, 10, 10]),
        ("prefill", [10, 0, 0, 0]),
        ("decode", [0, 10, 10, 10]),
        (lambda step: step.decoded == 2, [0, 0, 10, 0]),
        (lambda step: step.past >= 6, [0, 0, 10, 10]),
        (lambda step: step.forward % 2 == 0, [10, 0, 10, 0]),
    ],
)
def test_steps_choose_the_forwards(built, ids, steps, expected):
    assert changes(*built, ids, steps=steps) == expected


def test_a_second_generation_begins_with_a_prefill_again(built, ids):
    model, path = built
    caching = ActivationCaching(path, reducer=Stack(), index=(slice(None), -1))
    with Ablation(path, steps="prefill").prepare(model), caching.prepare(model) as hooked:
        generate(model, ids, 3)
        generate(model, ids, 2)
    zeroed = [not bool(value.any()) for value in hooked.cache[path]]
    assert zeroed == [True, False, False, True, False]


@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_without_a_key_value_cache_steps_are_told_by_the_ids_that_grow(built, ids, steps):
    model, path = built
    caching = ActivationCaching(path, reducer=Stack(), index=(slice(None), -1))
    with Ablation(path, steps=steps).prepare(model), caching.prepare(model) as hooked:
        generate(model, ids, 3, use_cache=False)
    zeroed = [not bool(value.any()) for value in hooked.cache[path]]
    assert zeroed == [True, False, False] if steps == "prefill" else [False, True, True]


def test_steering_by_zero_generates_the_same(built, ids):
    model, path = built
    plain = generate(model, ids)
    with SteeringVectors(path, torch.ones(8), coefficient=0).prepare(model):
        assert torch.equal(generate(model, ids), plain)


def test_a_prompt_is_patched_in_the_prefill(built, ids):
    model, path = built
    other = torch.randint(2, 20, (2, 5))
    with cache_activations(model, path.replace("0", r"\d")) as cache, torch.no_grad():
        model(ids)
    last = path.replace("0", "1")
    with ActivationPatching(last, source=cache, steps="prefill").prepare(model):
        patched = generate(model, other, 1)
    assert torch.equal(patched[:, -1], generate(model, ids, 1)[:, -1])
    with ActivationPatching(last, source=cache, positions=4, steps="prefill").prepare(model):
        expected = generate(model, other)
    with ActivationPatching(last, source=cache, positions=4).prepare(model):
        assert torch.equal(generate(model, other), expected)  # token 4 is cached when others are added


def test_an_addition_that_was_fitted_steers_the_generation(built, ids):
    model, path = built
    sides = {"positive": {"ids": ids}, "negative": {"ids": torch.randint(2, 20, (3, 5))}}
    with ActivationAddition(path, coefficient=50.0, steps="decode").prepare(
        model, {"ids": "input_ids"}, ["logits"]
    ) as hooked:
        vector = hooked(TensorDict(sides))["steer", path]
        steered = generate(model, ids)
    with SteeringVectors(path, vector, coefficient=50.0, steps="decode").prepare(model):
        assert torch.equal(generate(model, ids), steered)
    assert vector.shape == (8,)


def test_a_run_generates_too(built, ids):
    model, path = built
    hooked = HookedModule.from_module(model)
    with hooked.run(ids, run_callback=lambda hooked, data: generate(model, data)) as run:
        run.set(path, callback=lambda *, output, **rest: torch.zeros_like(output))
        run.get(path, reducer=Last())
    with Ablation(path).prepare(model):
        assert torch.equal(run.result, generate(model, ids))
    assert run.cache[f"{path}_output"].shape == (2, 1, 8)  # the last step's
