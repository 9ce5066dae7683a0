"""`steps=` of a capture: what the other forwards of `generate()` show is not kept, and nothing goes stale by them."""

import pytest
import torch
from torch import nn

from tdcache import ActivationCaching, ContextError, InplaceModificationError, SelectionError, UnfiredSiteWarning
from tdcache.reducers import Stack
from tiny_transformers import gpt2, llama

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.fixture(params=[gpt2, llama])
def built(request):
    return request.param()


def generate(model, **options):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        **options,
    )  # fmt: skip


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def outputs_by_hand(model, path, call):
    """The module's output in every call, by a plain hook."""
    seen = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output).clone()))
    call()
    handle.remove()
    return seen


class Wrapped(nn.Module):
    """A wrapper whose `generate` calls an inner model, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)

    def generate(self, *args, **options):
        return self.inner.generate(*args, **options)


def test_the_prefill_outlasts_the_steps_after_it(built):
    model, path = built
    expected = outputs_by_hand(model, path, lambda: generate(model))
    with ActivationCaching(path, steps="prefill").prepare(model) as hooked:
        generate(model)
        assert torch.equal(hooked.cache[path], expected[0])
    assert torch.equal(hooked.cache[path], expected[0])


def test_every_decode_step_is_gathered_and_the_prompt_left_out(built):
    model, path = built
    expected = outputs_by_hand(model, path, lambda: generate(model))[1:]
    with ActivationCaching(path, steps="decode", reducer=Stack()).prepare(model) as hooked:
        generate(model)
    assert torch.equal(hooked.cache[path], torch.stack(expected))


def test_a_predicate_chooses_one_step_of_a_wrapped_model(built):
    inner, path = built
    expected = outputs_by_hand(inner, path, lambda: generate(inner))
    model = Wrapped(inner)
    with ActivationCaching(f"inner.{path}", steps=lambda step: step.decoded == 2).prepare(model) as hooked:
        generate(model)
    assert torch.equal(hooked.cache[f"inner.{path}"], expected[2])


@pytest.mark.parametrize(
    "options", [{"directions": ["fwd_pre"]}, {"pick": 0}, {"callback": lambda *, args, **_: args[0]}]
)
def test_inputs_picks_and_callbacks_are_gated_as_well(built, options):
    model, path = built
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    if options == {"pick": 0}:
        options = {"pick": 0, "directions": ["fwd_pre"]}
    with ActivationCaching(path, steps="prefill", **options).prepare(model) as hooked:
        generate(model)
    handle.remove()
    assert torch.equal(hooked.cache[path], seen[0])


@pytest.mark.parametrize("direction", ["bwd", "grad_in", "bwd_pre"])
def test_gradients_are_those_of_the_forward_that_counts(built, direction):
    model, path = built
    name = path + ".mlp"
    grads = []
    handle = model.get_submodule(name).register_full_backward_hook(lambda module, gi, go: grads.append((gi[0], go[0])))
    first = model(IDS, use_cache=True)
    first.logits.sum().backward(retain_graph=True)
    handle.remove()
    with ActivationCaching(name, directions=[direction], steps="prefill").prepare(model) as hooked:
        first = model(IDS, use_cache=True)
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=first.past_key_values)
        first.logits.sum().backward()
    expected = grads[0][0] if direction == "grad_in" else grads[0][1]
    torch.testing.assert_close(hooked.cache[name], expected)  # views and full backward hooks order their sums apart


def _overwrite_what_was_kept(model, path, kept):
    with ActivationCaching(path, steps="prefill").prepare(model) as hooked:
        generate(model, use_cache=True)
        with torch.inference_mode(False), torch.no_grad():
            kept[0].zero_()
        _ = hooked.cache


def test_a_kept_prefill_is_still_guarded_while_later_steps_are_left_out(built):
    model, path = built
    kept = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: kept.append(first_tensor(output))
    )
    with pytest.raises(InplaceModificationError, match="overwritten"):
        _overwrite_what_was_kept(model, path, kept)
    handle.remove()


def test_steps_that_never_came_are_reported(built):
    model, path = built
    with (
        pytest.warns(UnfiredSiteWarning, match=r"steps='decode' left out every forward of the model, 1 in number"),
        ActivationCaching(path, steps="decode").prepare(model),
    ):
        model(IDS)


def test_steps_that_are_none_are_refused():
    with pytest.raises(SelectionError, match="steps is 'prefill', 'decode', a predicate of a Step"):
        ActivationCaching("h", steps="decoding")


def test_a_site_that_fires_where_no_clock_ticks_is_an_error(built):
    model, _ = built
    with (
        pytest.raises(ContextError, match="fired outside of every forward that tells the step"),
        ActivationCaching("lm_head", steps="prefill").prepare(model),
    ):
        model.lm_head(torch.zeros(1, 8))


def test_positions_and_steps_go_together(built):
    model, path = built
    expected = outputs_by_hand(model, path, lambda: generate(model))
    with ActivationCaching(path, positions=-1, steps="prefill").prepare(model) as hooked:
        generate(model)
    assert torch.equal(hooked.cache[path], expected[0][:, -1])
