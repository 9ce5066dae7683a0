"""A run's verbs: in their own run alone, in some steps, on part of a value; skipped modules. Against plain hooks."""

import pytest
import torch
from torch import nn

import tiny_transformers as tiny
from model_state import state_of
from small_models import MLP, Pair
from tdcache import (
    CaptureError,
    ContextError,
    EditError,
    HookedModule,
    InplaceModificationError,
    PathError,
    RepeatedCallWarning,
    SelectionError,
    UnfiredSiteWarning,
)
from tdcache.reducers import Last, Mean, Stack

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def gpt2():
    return *tiny.gpt2(), "attn"


def llama():
    return *tiny.llama(num_attention_heads=2, num_key_value_heads=1), "self_attn"


@pytest.fixture(params=[gpt2, llama])
def built(request):
    return request.param()


def generate(hooked, data):
    return hooked.generate(
        data, attention_mask=torch.ones_like(data), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    ).logits  # fmt: skip


def with_hook(model, path, hook, call):
    """What ``call()`` gives with a plain hook ``(number of the call, output) -> new output`` at ``path``."""
    numbers = iter(range(100))
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: hook(next(numbers), output))
    try:
        with torch.no_grad():
            return call()
    finally:
        handle.remove()


def outputs(model, path, call):
    seen = []
    with_hook(model, path, lambda number, output: seen.append(output.clone()), call)
    return seen


# In their own run alone


def test_neither_another_run_nor_a_plain_call_sees_the_edit_of_an_open_run(x):
    model = MLP()
    hooked, plain = HookedModule.from_module(model), model(x)
    before = state_of(model)
    with hooked.run(x) as outer:
        outer.set("head", torch.zeros(5, 2))
        outer.stop("head")
        outer.skip("layers.0", x)
        outer.get("layers.1")
        assert state_of(model) == before
        assert torch.equal(model(x), plain)
        with hooked.run(x) as inner:
            inner.get("head")
        assert torch.equal(inner.result, plain)
        assert list(outer.cache.keys()) == []
    assert outer.result is None
    assert state_of(model) == before


def test_a_path_that_does_not_exist_is_refused_at_the_verb(x):
    model = MLP()
    hooked, before = HookedModule.from_module(model), state_of(model)
    for verb in ("get", "save", "stop"):
        with hooked.run(x) as run, pytest.raises(PathError, match=r"'layer\.0'"):
            getattr(run, verb)("layer.0")
    with hooked.run(x) as run, pytest.raises(PathError, match=r"'layer\.0'"):
        run.skip("layer.0", x)
    assert state_of(model) == before


def test_a_run_that_fails_leaves_no_hook(x):
    model = MLP()
    hooked, before = HookedModule.from_module(model), state_of(model)
    with pytest.raises(EditError, match="has no value yet"), hooked.run(x) as run:
        run.get("layers.0", steps="prefill", positions=0), run.skip("layers.0", run.get("layers.2"))
    assert state_of(model) == before
    assert "forward" not in model.layers[0].__dict__


# Steps


def test_get_keeps_every_step_with_stack_and_warns_when_it_keeps_the_last(built):
    model, path, _ = built
    name = f"{path}.mlp"
    hooked = HookedModule.from_module(model)
    expected = outputs(model, name, lambda: generate(model, IDS))
    with hooked.run(IDS, run_callback=generate) as run:
        every = run.get(name, reducer=Stack())
        chosen = run.get(name, cache_key="last", reducer=Last())
        assert every.resolve() is None
    assert [torch.equal(every.value[str(at)], each) for at, each in enumerate(expected)] == [True] * 4
    assert torch.equal(chosen.value, expected[-1])
    with (
        pytest.warns(RepeatedCallWarning, match=rf"'{name}' ran more than once in this run, as in generate\(\)"),
        hooked.run(IDS, run_callback=generate) as run,
    ):
        run.get(name)
    assert torch.equal(run.cache[f"{name}_output"], expected[-1])


@pytest.mark.parametrize(
    ("steps", "due"),
    [("prefill", [0]), ("decode", [1, 2, 3]), (lambda step: step.decoded == 2, [2])],
)
def test_verbs_act_in_their_steps(built, steps, due):
    model, path, _ = built
    name = f"{path}.mlp"
    hooked = HookedModule.from_module(model)

    def edit(number, output):
        return torch.zeros_like(output) if number in due else None

    expected = with_hook(model, name, edit, lambda: generate(model, IDS))
    seen = outputs(model, name, lambda: generate(model, IDS))
    with hooked.run(IDS, run_callback=generate) as run:
        got = run.get(name, prepend=True, steps=steps, reducer=Stack())
    assert torch.equal(got.value, torch.stack([seen[at] for at in due]))
    with hooked.run(IDS, run_callback=generate) as run:
        run.set(name, callback=lambda *, output, **rest: torch.zeros_like(output), steps=steps)
    assert all(torch.equal(one, other) for one, other in zip(run.result, expected, strict=True))


def test_one_step_alone_needs_no_reducer(built):
    model, path, _ = built
    hooked = HookedModule.from_module(model)
    expected = outputs(model, f"{path}.mlp", lambda: generate(model, IDS))
    with hooked.run(IDS, run_callback=generate) as run:
        saved = run.save(f"{path}.mlp", steps="prefill")
    assert torch.equal(saved.value, expected[0])


def test_steps_that_never_came_are_reported(built):
    model, path, _ = built
    with (
        pytest.warns(UnfiredSiteWarning, match="steps= left out every forward in which it ran"),
        HookedModule.from_module(model).run(IDS) as run,
    ):
        run.get(path, steps="decode")


def test_steps_and_reducers_that_are_none_are_refused(x):
    with HookedModule.from_module(MLP()).run(x) as run:
        with pytest.raises(SelectionError, match="steps is 'prefill', 'decode', a predicate of a Step"):
            run.get("head", steps="last")
        with pytest.raises(ValueError, match=r"reducer= is a Reducer such as Stack\(\), got 'stack'"):
            run.get("head", reducer="stack")


def test_what_a_reducer_gathers_is_guarded_against_writes(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    hooked = HookedModule.from_module(model)
    with pytest.raises(InplaceModificationError, match="'0' was overwritten"), hooked.run(x) as run:
        run.get("0", reducer=Stack())
    with hooked.run(x) as run:
        run.get("0", reducer=Mean(), hold="snapshot")
    torch.testing.assert_close(run.cache["0_output"], model[0](x).mean(0))


def test_the_reducer_that_was_given_keeps_nothing(x):
    hooked, reducer = HookedModule.from_module(MLP()), Stack()
    for _ in range(2):
        with hooked.run(x) as run:
            run.get("head", reducer=reducer)
        assert run.cache["head_output"].shape == (1, 5, 2)
    assert reducer.empty


# Part of a value


@pytest.mark.parametrize("mask", [LEFT, RIGHT, None])
@pytest.mark.parametrize(("positions", "units"), [(-1, None), (0, 3), ([0, -1], [1, 5]), (None, slice(2, 6))])
def test_part_of_a_value_is_read_and_replaced(built, mask, positions, units):
    model, path, _ = built
    name = f"{path}.mlp"
    hooked = HookedModule.from_module(model)
    data = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": mask}
    real = torch.ones_like(IDS) if mask is None else mask
    columns = [row.nonzero()[:, 0] for row in real]
    chosen = [slice(None) if positions is None else row[positions] for row in columns]
    features = slice(None) if units is None else units

    def part(output):
        return torch.stack([each[at][..., features] for each, at in zip(output, chosen, strict=True)])

    def edit(number, output):
        new = output.clone()
        for row, at in enumerate(chosen):
            value = new[row][at]
            value[..., features] = 7.0
            new[row][at] = value
        return new

    (whole,) = outputs(model, name, lambda: model(**data))
    expected = with_hook(model, name, edit, lambda: model(**data).logits)
    with hooked.run(data) as run:
        got = run.get(name, positions=positions, units=units)
    assert torch.equal(got.value, part(whole))
    with hooked.run(data) as run:
        run.set(name, torch.full_like(got.value, 7.0), positions=positions, units=units)
    assert torch.equal(run.result.logits, expected)
    with hooked.run(data) as run:
        run.set(name, got, positions=positions, units=units)
        again = run.get(name)
    assert torch.equal(again.value, whole)


def test_a_part_with_the_axis_of_its_single_number_fits_as_well(built):
    model, path, _ = built
    hooked = HookedModule.from_module(model)
    with hooked.run(IDS) as one:
        one.set(f"{path}.mlp", torch.zeros(2, 8), positions=-1)
    with hooked.run(IDS) as other:
        other.set(f"{path}.mlp", torch.zeros(2, 1, 8), positions=-1)
    assert torch.equal(one.result.logits, other.result.logits)


def test_a_slice_of_real_tokens_that_rows_have_alike_is_a_tensor_and_others_are_refused(built):
    model, path, _ = built
    hooked = HookedModule.from_module(model)
    data = {"input_ids": IDS, "attention_mask": LEFT}
    with hooked.run(data) as run:
        whole, got = run.get(path), run.get(path, cache_key="two", positions=slice(0, 2))
    assert torch.equal(got.value, torch.stack([whole.value[0, 2:4], whole.value[1, 0:2]]))
    with hooked.run(data) as run:
        run.set(path, got, positions=slice(0, 2))
        again = run.get(path)
    assert torch.equal(again.value, whole.value)
    message = rf"mean 2 to 4 tokens of a row at '{path}', which make no tensor"
    with pytest.raises(CaptureError, match=message), hooked.run(data) as run:
        run.get(path, positions=slice(None))


def test_part_of_a_gradient_is_read_and_replaced():
    model, x = MLP(), torch.randn(5, 4, requires_grad=True)
    hooked = HookedModule.from_module(model)

    def backward(hooked, data):
        hooked(data).sum().backward()

    with hooked.run(x, run_callback=backward) as run:
        whole = run.get_grad_output("layers.1")
        part = run.get_grad_output("layers.1", cache_key="part", units=[1, 2])
    assert torch.equal(part.value, whole.value[:, [1, 2]])
    with hooked.run(x, run_callback=backward) as run:
        run.set_grad_output("layers.1", torch.zeros(5, 2), units=[1, 2])
        after = run.get_grad_output("layers.1")
    expected = whole.value.clone()
    expected[:, [1, 2]] = 0
    assert torch.equal(after.value, expected)


def test_parts_that_cannot_be_used_are_refused(x):
    hooked = HookedModule.from_module(MLP())
    with hooked.run(x) as run:
        for verb in (run.get, run.set):
            with pytest.raises(EditError, match="callback= at 'head' sees the whole value, and positions= or units="):
                verb("head", callback=lambda **kwargs: None, units=0)
        run.get("head", units=0)
        with pytest.raises(ContextError, match="writes another value to 'head_output' already"):
            run.get("head", units=1)
    with pytest.raises(EditError, match="units=9 means nothing at 'head'"), hooked.run(x) as run:
        run.get("head", units=9)
    with pytest.raises(EditError, match=r"(?s)'head'.*shape \(5, 1\).*shape \(4, 1\)"), hooked.run(x) as run:
        run.set("head", torch.zeros(4, 1), units=0)
    message = "positions= and units= replace part of a tensor at 'head' by a tensor, got float"
    with pytest.raises(EditError, match=message), hooked.run(x) as run:
        run.set("head", 0.0, units=0)


# Skipping


def test_a_skipped_module_does_not_run_and_its_value_is_what_its_hooks_see(built):
    model, path, _ = built
    hooked = HookedModule.from_module(model)
    expected = with_hook(
        model, f"{path}.mlp", lambda number, output: torch.zeros_like(output), lambda: model(IDS).logits
    )
    called = []
    handle = next(model.get_submodule(f"{path}.mlp").children()).register_forward_hook(lambda *args: called.append(1))
    with hooked.run(IDS) as run:
        run.skip(f"{path}.mlp", torch.zeros(2, 4, 8))
        got = run.get(f"{path}.mlp")
    handle.remove()
    assert called == []
    assert torch.equal(run.result.logits, expected)
    assert torch.equal(got.value, torch.zeros(2, 4, 8))
    assert model(IDS).logits.shape == (2, 4, 20)
    assert not torch.equal(model(IDS).logits, expected)


def test_a_tuple_with_a_proxy_in_it_stands_for_an_attention_module(built):
    model, path, attention = built
    hooked = HookedModule.from_module(model)
    with hooked.run(IDS) as clean:
        value = clean.get(f"{path}.{attention}")
    with hooked.run(IDS) as run:
        run.skip(f"{path}.{attention}", (value, None))
    assert torch.equal(run.result.logits, clean.result.logits)


def test_a_function_stands_for_the_module_and_a_fixed_value_is_copied(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    hooked, new = HookedModule.from_module(model), torch.randn(5, 4)
    before = new.clone()
    with hooked.run(x) as run:
        run.skip("0", lambda value: value + 1)
    assert torch.equal(run.result, torch.relu(x + 1))
    with hooked.run(x) as run:
        run.skip("0", new)
    assert torch.equal(run.result, torch.relu(before))
    assert torch.equal(new, before)


def test_a_skipped_value_may_be_a_tuple_of_tensors(x):
    hooked = HookedModule.from_module(Pair(tuple))
    with hooked.run(x) as run:
        run.skip("inner", (x, 2 * x))
    assert torch.equal(run.result, 3 * x)


def test_what_lies_below_a_skipped_module_is_reported_with_the_reason(x):
    hooked = HookedModule.from_module(Pair(tuple))
    message = r"no value at 'inner.left \(output\)'.*'inner' did not run: skip"
    with pytest.warns(UnfiredSiteWarning, match=message), hooked.run(x) as run:
        run.skip("inner", (x, x)), run.get("inner.left")
    with pytest.warns(UnfiredSiteWarning, match=r"no value at 'inner.left \(skip\)'"), hooked.run(x) as run:
        run.skip("inner", (x, x)), run.skip("inner.left", x)


def test_skip_outside_the_block_is_an_error(x):
    run = HookedModule.from_module(MLP()).run(x)
    with pytest.raises(ContextError, match=r"skip is for inside the block.*skip_module\(module, value\)"):
        run.skip("head", x)
