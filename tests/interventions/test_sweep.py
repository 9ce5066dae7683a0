"""Sweeps: the same numbers as a plain loop over sites, positions and heads."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import tiny_transformers as tiny
from interventions.hand import sweep, values
from model_state import state_of
from small_models import MLP, Residual, Tied
from tdcache import ActivationPatching, EditError, SteeringVectors, TdcacheWarning, cache_activations

TOLERANCE = {"rtol": 0, "atol": 1e-10}  # float64: rows of one matrix product may be summed in another order


def gpt2():
    return tiny.gpt2(n_layer=3)[0].double()


def llama():
    return tiny.llama(num_hidden_layers=3)[0].double()


def logit(data):
    return data["logits"][:, -1, 3].mean()


@pytest.fixture
def ids():
    return torch.randint(2, 20, (2, 2, 5))


def run(model, recipe, clean, corrupted):
    with recipe.prepare(model, in_keys={"ids": "input_ids"}, out_keys=["logits"]) as hooked:
        return hooked(TensorDict({"ids": clean, "patched": {"ids": corrupted}}))


def paths_of(model, pattern):
    import re

    return [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]


def compare(found, expected, atol=TOLERANCE["atol"]):
    assert list(found.keys()) == list(expected)
    for path, numbers in expected.items():
        torch.testing.assert_close(found[path].reshape(-1), numbers, rtol=0, atol=atol)


GPT2_SITES = r"transformer\.h\.\d+(\.attn|\.mlp|\.ln_1)?|transformer\.(wte|ln_f)|lm_head"
LLAMA_SITES = r"model\.layers\.\d+(\.self_attn|\.mlp)?|model\.(embed_tokens|norm)"


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 4}, {"replay": False}, {"chunk": 4, "replay": False}])
@pytest.mark.parametrize(
    ("make", "pattern", "atol"),
    [
        (gpt2, GPT2_SITES, TOLERANCE["atol"]),
        (llama, LLAMA_SITES, 1e-7),  # LlamaRMSNorm computes in float32, whatever the model's dtype is
    ],
)
def test_one_site_at_a_time_equals_a_plain_loop(make, pattern, atol, options, ids):
    model, (clean, corrupted) = make(), ids
    found = run(model, ActivationPatching(pattern, sweep=True, metric=logit, **options), clean, corrupted)
    paths = paths_of(model, pattern)
    source = values(model, paths, lambda: model(clean))
    expected = sweep(model, paths, source, lambda: model(corrupted), logit, [...])
    compare(found, expected, atol)
    assert len({round(float(value), 5) for value in found.values()}) >= 6  # they differ, and by more than atol


@pytest.mark.parametrize("chunk", [3, 32])
def test_one_position_at_a_time_equals_a_plain_loop(chunk, ids):
    model, (clean, corrupted) = gpt2(), ids
    recipe = ActivationPatching(GPT2_SITES, sweep="position", metric=logit, chunk=chunk)
    found = run(model, recipe, clean, corrupted)
    paths = paths_of(model, GPT2_SITES)
    source = values(model, paths, lambda: model(clean))
    indices = [(slice(None), [position]) for position in range(5)]
    compare(found, sweep(model, paths, source, lambda: model(corrupted), logit, indices))
    assert found["transformer.h.1"].shape == (5,)


def test_positions_choose_what_is_swept(ids):
    model, (clean, corrupted) = gpt2(), ids
    every = run(model, ActivationPatching(r"transformer\.h\.\d", sweep="position", metric=logit), clean, corrupted)
    for positions, index in (([1, 4], [1, 4]), (slice(2, None), slice(2, None)), (3, [3])):
        recipe = ActivationPatching(r"transformer\.h\.\d", sweep="position", metric=logit, positions=positions)
        some = run(model, recipe, clean, corrupted)
        for path, numbers in some.items():
            torch.testing.assert_close(numbers, every[path][index], **TOLERANCE)


def test_one_head_at_a_time_equals_a_plain_loop(ids):
    model, (clean, corrupted) = gpt2(), ids
    pattern = r"transformer\.h\.\d+\.attn\.c_proj"
    recipe = ActivationPatching(pattern, sweep="head", heads=2, metric=logit, direction="fwd_pre", chunk=4)
    found = run(model, recipe, clean, corrupted)
    paths = paths_of(model, pattern)
    source = values(model, paths, lambda: model(clean), inputs=True)
    indices = [(..., slice(0, 4)), (..., slice(4, 8))]
    compare(found, sweep(model, paths, source, lambda: model(corrupted), logit, indices, inputs=True))


def test_positions_and_heads_together(ids):
    model, (clean, corrupted) = gpt2(), ids
    pattern = r"transformer\.h\.1\.attn\.c_proj"
    recipe = ActivationPatching(
        pattern, sweep=("head", "position"), heads=2, metric=logit, direction="fwd_pre", stack_by=None
    )
    found = run(model, recipe, clean, corrupted)
    paths = paths_of(model, pattern)
    source = values(model, paths, lambda: model(clean), inputs=True)
    indices = [(slice(None), [at], slice(4 * head, 4 * head + 4)) for at in range(5) for head in range(2)]
    compare(found, sweep(model, paths, source, lambda: model(corrupted), logit, indices, inputs=True))
    assert found["transformer.h.1.attn.c_proj"].shape == (5, 2)  # positions come first


def test_a_named_group_becomes_a_leading_axis(ids):
    model, (clean, corrupted) = gpt2(), ids
    pattern = r"transformer\.h\.(?P<layer>\d+)\.(?P<kind>attn|mlp)"
    recipe = ActivationPatching(pattern, sweep="position", metric=logit, stack_by="layer")
    stacked = run(model, recipe, clean, corrupted)
    apart = run(model, ActivationPatching(pattern, sweep="position", metric=logit), clean, corrupted)
    assert sorted(stacked.keys()) == ["attn", "mlp"]
    assert torch.equal(stacked["mlp"], torch.stack([apart[f"transformer.h.{layer}.mlp"] for layer in range(3)]))


def test_a_metric_may_give_more_than_a_number(ids):
    model, (clean, corrupted) = gpt2(), ids
    recipe = ActivationPatching(r"transformer\.h\.\d", sweep="position", metric=lambda data: data["logits"][:, -1])
    assert run(model, recipe, clean, corrupted)["transformer.h.0"].shape == (5, 2, 20)
    recipe = ActivationPatching(r"transformer\.h\.\d", sweep=True, metric=lambda data: float(logit(data)))
    assert run(model, recipe, clean, corrupted)["transformer.h.0"].shape == ()


def test_the_metric_sees_the_inputs_the_outputs_and_what_else_there_is(ids):
    model, (clean, corrupted), seen = gpt2(), ids, []

    def metric(data):
        seen.append((data["ids"].clone(), data["answer"].clone(), data["logits"].shape))
        return 0.0

    with ActivationPatching("lm_head", sweep=True, metric=metric).prepare(
        model, {"ids": "input_ids"}, ["logits"]
    ) as hooked:
        data = TensorDict({"ids": clean, "answer": torch.tensor([7, 8]), "patched": {"ids": corrupted}}, batch_size=2)
        hooked(data)
    ((inputs, answer, shape),) = seen
    assert torch.equal(inputs, corrupted)
    assert answer.tolist() == [7, 8]
    assert shape == (2, 5, 20)
    assert sorted(data.keys()) == ["answer", "ids", "patched"]  # the caller's own is left alone


def test_a_cache_is_a_source_too(ids):
    model, (clean, corrupted) = gpt2(), ids
    with cache_activations(model, GPT2_SITES) as cache, torch.no_grad():
        model(clean)
    recipe = ActivationPatching(GPT2_SITES, source=cache, sweep="position", metric=logit)
    with recipe.prepare(model, {"ids": "input_ids"}, ["logits"]) as hooked:
        found = hooked(TensorDict({"ids": corrupted}))
    by_input = run(model, ActivationPatching(GPT2_SITES, sweep="position", metric=logit), clean, corrupted)
    for path, numbers in by_input.items():
        assert torch.equal(found[path], numbers)


def test_patch_fn_gets_one_row_block_at_a_time_and_the_right_path(ids):
    model, (clean, corrupted), seen = gpt2(), ids, []

    def halfway(module_key, output, output_to_patch):
        seen.append((module_key, tuple(output.shape)))
        return (output + output_to_patch) / 2

    paths = paths_of(model, r"transformer\.h\.\d+\.mlp")
    found = run(model, ActivationPatching(paths, patch_fn=halfway, sweep=True, metric=logit), clean, corrupted)
    assert sorted(set(seen)) == [(path, (2, 5, 8)) for path in paths]
    assert len(seen) == len(paths) + 1  # one trial is run again alone
    source, old = (values(model, paths, lambda data=data: model(data)) for data in (clean, corrupted))
    half = {path: (source[path] + old[path]) / 2 for path in paths}
    compare(found, sweep(model, paths, half, lambda: model(corrupted), logit, [...]))


def test_layers_in_front_of_a_patch_do_not_run_again(ids):
    model, (clean, corrupted), calls = gpt2(), ids, []
    for layer, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda *args, layer=layer: calls.append(layer))
    recipe = ActivationPatching(r"transformer\.h\.\d", sweep=True, metric=logit, chunk=1)
    run(model, recipe, clean, corrupted)
    # The run that gives, the run that receives, the layers after the first patch, that trial in full, and two more.
    assert calls == [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 2]


@pytest.mark.parametrize("make", [MLP, Residual, Tied])
def test_other_models_sweep_too(make):
    model, x, y = make().double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    paths = [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)]
    paths = [path for path in paths if path != "relu"]
    if make is Tied:
        paths = ["encode"]

    def metric(data):
        return data["output"].sum()

    with ActivationPatching(paths, sweep="head", heads=2, metric=metric, chunk=5).prepare(model) as hooked:
        found = hooked(TensorDict({"input": x, "patched": {"input": y}}))
    for path in paths:
        for head in range(2):
            width = 1 if path == "head" else 2
            units = slice(head * width, (head + 1) * width)
            with ActivationPatching(path, units=units).prepare(model) as hooked:
                alone = hooked(TensorDict({"input": x, "patched": {"input": y}}))["patched", "output"].sum()
            torch.testing.assert_close(found[path][head], alone.detach(), **TOLERANCE)


class WritesIntoItsInput(nn.Module):
    """A chain whose second member changes what the first one returned, which is used again at the end."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)])

    def forward(self, x):
        first = self.steps[0](x)
        return self.steps[2](self.steps[1](first)) + first


def test_members_that_write_into_their_input_are_not_left_out():
    model, x, y = WritesIntoItsInput().double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    recipe = ActivationPatching("steps.2", sweep=True, metric=lambda data: data["output"].sum())
    with recipe.prepare(model) as hooked:
        found = hooked(TensorDict({"input": x, "patched": {"input": y}}))
    source = values(model, ["steps.2"], lambda: model(x))
    compare(found, sweep(model, ["steps.2"], source, lambda: model(y), torch.sum, [...]))


def test_a_model_in_inference_mode_gives_the_same(ids):
    model, (clean, corrupted) = gpt2(), ids
    plain = run(model, ActivationPatching(r"transformer\.h\.\d", sweep=True, metric=logit), clean, corrupted)
    with torch.inference_mode():
        found = run(model, ActivationPatching(r"transformer\.h\.\d", sweep=True, metric=logit), clean, corrupted)
    for path, value in plain.items():
        torch.testing.assert_close(found[path].clone(), value, **TOLERANCE)


def test_an_edit_of_another_context_counts_once(ids):
    """What is recorded for a replay is a module's own output, behind which the other context's hooks run again."""
    model, (clean, corrupted) = gpt2(), ids
    steering = SteeringVectors(r"transformer\.h\.\d", torch.ones(8).double())
    with steering.prepare(model):
        found = run(model, ActivationPatching(r"transformer\.h\.\d\.mlp", sweep=True, metric=logit), clean, corrupted)
        paths = list(found.keys())
        source = values(model, paths, lambda: model(clean))
        expected = sweep(model, paths, source, lambda: model(corrupted), logit, [...])
    compare(found, expected)


def test_a_model_that_mixes_its_rows_needs_one_at_a_time():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x).mean(0)

    model, x = Mixes(), torch.randn(3, 4)
    options = {"sweep": "head", "heads": 2, "metric": lambda data: data["output"].sum()}
    data = TensorDict({"input": x, "patched": {"input": x + 1}})
    with ActivationPatching("inner", chunk=1, **options).prepare(model) as hooked:
        expected = hooked(data)["inner"]
    with (
        ActivationPatching("inner", **options).prepare(model) as hooked,
        pytest.warns(
            TdcacheWarning, match=r"one trial at a time and in full, for 2 of them in one forward fail \('out"
        ),
    ):
        found = hooked(data)["inner"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep": True}, "a sweep needs metric="),
        ({"sweep": "layer", "metric": logit}, "got 'layer'"),
        ({"sweep": "head", "metric": logit}, "needs heads="),
        ({"sweep": "head", "metric": logit, "heads": 2, "units": 1}, "leave units= out"),
        ({"sweep": True, "metric": logit, "chunk": 0}, "1 or more, got 0"),
        ({"sweep": True, "metric": logit, "steps": "decode"}, "steps= is for"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(EditError, match=message):
        ActivationPatching("lm_head", **options)


def test_what_cannot_be_swept_is_an_error_that_says_why(ids):
    model, (clean, corrupted) = gpt2(), ids
    before = state_of(model)
    with pytest.raises(EditError, match=r"heads=\(3, ...\) does not divide the 8 units at 'transformer.h.0'"):
        run(model, ActivationPatching(r"transformer\.h\.0", sweep="head", heads=3, metric=logit), clean, corrupted)
    with pytest.raises(EditError, match=r"(?s)does not fit.*shape \(2, 4, 20\).*shape \(2, 5, 20\)"):
        run(model, ActivationPatching("lm_head", sweep=True, metric=logit), clean, corrupted[:, :4])
    with pytest.raises(EditError, match="1 of 1 sites did not run"):
        run(
            model,
            ActivationPatching(r"transformer\.h", sweep=True, metric=logit, source={"transformer.h": clean}),
            clean,
            corrupted,
        )
    assert state_of(model) == before


def test_a_sweep_leaves_the_model_as_it_was_also_when_the_metric_fails(ids):
    model, (clean, corrupted) = gpt2(), ids
    before = state_of(model)
    run(model, ActivationPatching(GPT2_SITES, sweep="position", metric=logit), clean, corrupted)
    assert state_of(model) == before
    with pytest.raises(ZeroDivisionError):
        run(model, ActivationPatching(GPT2_SITES, sweep=True, metric=lambda data: 1 / 0), clean, corrupted)
    assert state_of(model) == before


@pytest.mark.parametrize("positions", [torch.tensor([False, True, False, False, True]), torch.tensor([1, 4])])
def test_positions_of_a_sweep_may_be_a_mask(ids, positions):
    recipe = {"sweep": "position", "metric": logit}
    found = run(gpt2_once(), ActivationPatching(r"transformer\.h\.1", positions=positions, **recipe), *ids)
    listed = run(gpt2_once(), ActivationPatching(r"transformer\.h\.1", positions=[1, 4], **recipe), *ids)
    assert found["transformer.h.1"].shape == (2,)
    assert torch.equal(found["transformer.h.1"], listed["transformer.h.1"])


def gpt2_once():
    torch.manual_seed(3)
    return gpt2()


@pytest.mark.parametrize("shape", [(2, 5), (4,)])
def test_a_mask_that_a_sweep_cannot_go_over_is_refused(ids, shape):
    recipe = ActivationPatching(
        r"transformer\.h\.1", positions=torch.ones(shape, dtype=torch.bool), sweep="position", metric=logit
    )
    with pytest.raises(EditError, match=r"as many in every row.*mask of shape \(5,\)"):
        run(gpt2_once(), recipe, *ids)
