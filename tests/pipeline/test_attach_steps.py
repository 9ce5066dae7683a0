"""`attach(..., steps=)`: a pipeline acts in the forwards of `generate()` that are meant, and in no other."""

import pytest
import torch

import tiny_transformers as tiny
from tdcache import ContextError, SelectionError
from tdcache.pipeline import attach

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
PATH = "transformer.h.0.mlp"


@pytest.fixture
def model():
    return tiny.gpt2()[0]


def generated(model):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    ).logits  # fmt: skip


def by_hand(model, due):
    """The logits where a plain hook doubles the output in the calls whose number is due."""
    calls = []

    def hook(module, args, output):
        calls.append(None)
        return output * 2 if due(len(calls) - 1) else None

    handle = model.get_submodule(PATH).register_forward_hook(hook)
    try:
        return generated(model)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("steps", "due"),
    [
        ("prefill", lambda call: call == 0),
        ("decode", lambda call: call > 0),
        (lambda step: step.decoded == 2, lambda call: call == 2),
        (None, lambda call: True),
    ],
)
def test_a_pipeline_acts_in_its_steps(model, steps, due):
    expected, plain = by_hand(model, due), generated(model)
    with attach(model, PATH, lambda x: x * 2, steps=steps):
        found = generated(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(torch.stack(found), torch.stack(plain))


def test_steps_that_are_none_are_refused(model):
    with pytest.raises(SelectionError, match="steps is 'prefill', 'decode', a predicate of a Step"):
        attach(model, PATH, lambda x: x, steps="last")


def test_a_site_outside_of_a_forward_is_an_error(model):
    with (
        attach(model, PATH, lambda x: x, steps="prefill"),
        pytest.raises(ContextError, match="fired outside of every forward that tells the step"),
    ):
        model.transformer.h[0].mlp(torch.zeros(1, 8))
