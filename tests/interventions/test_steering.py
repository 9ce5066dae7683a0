"""Steering vectors, and activation addition."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, values
from model_state import state_of
from small_models import MLP, Pair, Tied
from tdcache import (
    ActivationAddition,
    ActivationCaching,
    CompositeHookingContextFactory,
    ContextError,
    EditError,
    SteeringVectors,
)


def test_one_vector_for_all_sites(model, x):
    vector = torch.randn(4)
    with SteeringVectors(r"layers\.[01]", vector, coefficient=2.5).prepare(model) as hooked:
        found = hooked(x)
    add = lambda output: output + 2.5 * vector  # noqa: E731
    with edited(model, "layers.0", add), edited(model, "layers.1", add):
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("kind", [dict, TensorDict])
def test_a_vector_for_each_site(model, x, kind):
    vectors = {"layers.0": torch.randn(4), "layers.2": torch.randn(4)}
    with SteeringVectors(r"layers\.[02]", kind(vectors)).prepare(model) as hooked:
        found = hooked(x)
    with (
        edited(model, "layers.0", lambda output: output + vectors["layers.0"]),
        edited(model, "layers.2", lambda output: output + vectors["layers.2"]),
    ):
        torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_steering_by_zero_changes_no_bit(x, direction):
    for model in (MLP(), Pair()):
        plain = model(x)
        paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        for options in ({"vectors": torch.randn(4), "coefficient": 0}, {"vectors": torch.zeros(1)}):
            with SteeringVectors(paths, direction=direction, **options).prepare(model):
                assert torch.equal(model(x), plain)


def test_positions_and_units_choose_where_it_is_added():
    model, x = nn.Sequential(nn.Identity()), torch.randn(2, 5, 4)
    with SteeringVectors("0", torch.tensor([10.0, 20.0]), positions=[1, -1], units=[0, 3]).prepare(model):
        change = model(x) - x
    expected = torch.zeros(2, 5, 4)
    expected[:, [1, 4], 0], expected[:, [1, 4], 3] = 10, 20
    torch.testing.assert_close(change, expected)


def test_the_vector_is_cast_to_the_value(x):
    model = MLP().bfloat16()
    with SteeringVectors("layers.0", torch.ones(4)).prepare(model) as hooked:
        assert hooked(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_flow_to_the_vector(model, x):
    vector = torch.zeros(4, requires_grad=True)
    with SteeringVectors("layers.2", vector).prepare(model) as hooked:
        hooked(x).sum().backward()
    hidden = model.layers[2](nn.functional.gelu(model.layers[1](nn.functional.gelu(model.layers[0](x)))))
    hidden = hidden.detach().requires_grad_()
    model.head(model.act(nn.functional.gelu(hidden))).sum().backward()
    torch.testing.assert_close(vector.grad, hidden.grad.sum(0))


def test_steer_fn_gets_the_path_of_each_of_several_sites(model, x):
    seen = []

    def steer_fn(module_key, output):
        seen.append(module_key)
        output[:, 0] = 0
        return output

    paths = ["layers.0", "layers.2"]
    plain = values(model, paths, lambda: model(x))
    before = ActivationCaching(paths, prepend=True, cache=TensorDict())
    composite = CompositeHookingContextFactory(SteeringVectors(paths, steer_fn), before)
    with composite.prepare(model) as hooked:
        found = hooked(x)
    assert seen == paths

    def zero_first(output):
        return torch.cat([torch.zeros(5, 1), output[:, 1:]], -1)

    with edited(model, "layers.0", zero_first), edited(model, "layers.2", zero_first):
        assert torch.equal(found, model(x))
    assert torch.equal(hooked.hooking_context.caches[1]["layers.0"], plain["layers.0"])  # it wrote into a copy


def test_steer_fn_may_return_none(model, x):
    with SteeringVectors("head", steer_fn=lambda module_key, output: None).prepare(model) as hooked:
        assert torch.equal(hooked(x), model(x))


@pytest.mark.parametrize(
    ("returned", "message"),
    [(torch.zeros(1), r"(?s)does not fit.*shape \(5, 2\).*shape \(1,\)"), ("text", "cannot be replaced by str")],
)
def test_what_steer_fn_returns_has_to_fit(model, x, returned, message):
    before = state_of(model)
    with (
        pytest.raises(EditError, match=message),
        SteeringVectors("head", steer_fn=lambda module_key, output: returned).prepare(model) as hooked,
    ):
        hooked(x)
    assert state_of(model) == before


def test_a_vector_that_does_not_fit_is_an_error_that_names_both(model, x):
    with (
        SteeringVectors("head", torch.zeros(3)).prepare(model) as hooked,
        pytest.raises(EditError, match=r"vector of shape \(3,\) cannot be added at 'head'.*shape \(5, 2\)"),
    ):
        hooked(x)


def test_steering_needs_one_of_vectors_and_steer_fn():
    for arguments in ({}, {"vectors": torch.zeros(1), "steer_fn": lambda **kwargs: None}):
        with pytest.raises(EditError, match=r"either vectors .* or steer_fn="):
            SteeringVectors("head", **arguments)


def contrast(positive, negative, **entries):
    return TensorDict({"positive": {"input": positive}, "negative": {"input": negative}, **entries})


def test_addition_takes_the_difference_of_means_and_applies_it(model, x):
    positive, negative = torch.randn(6, 4), torch.randn(3, 4)
    paths = ["layers.0", "layers.2"]
    data = contrast(positive, negative, input=x)
    with ActivationAddition(paths, coefficient=1.5).prepare(model) as hooked:
        found = hooked(data)
    high, low = (values(model, paths, lambda data=data: model(data)) for data in (positive, negative))
    vectors = {path: high[path].mean(0) - low[path].mean(0) for path in paths}
    for path in paths:
        torch.testing.assert_close(found["steer", path], vectors[path])
    with (
        edited(model, "layers.0", lambda output: output + 1.5 * vectors["layers.0"]),
        edited(model, "layers.2", lambda output: output + 1.5 * vectors["layers.2"]),
    ):
        torch.testing.assert_close(found["output"], model(x))
    assert torch.equal(data["output"], found["output"])


def test_addition_without_an_input_of_its_own_gives_the_vectors(model):
    data = contrast(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    data = TensorDict(data.to_dict(), batch_size=2)
    with ActivationAddition(["layers.0"]).prepare(model) as hooked:
        found = hooked(data)
    assert found["steer", "layers.0"].shape == (4,)
    assert "output" not in found
    assert sorted(data.keys()) == ["negative", "positive"]


def test_the_vectors_go_on_steering_until_the_block_ends(model, x):
    positive, negative = torch.randn(6, 4), torch.randn(3, 4)
    with ActivationAddition("layers.1").prepare(model) as hooked:
        vector = hooked(contrast(positive, negative))["steer", "layers.1"]
        again = model(x)
        by_call = hooked(TensorDict({"input": x}))["output"]
    with SteeringVectors("layers.1", vector).prepare(model):
        assert torch.equal(again, model(x))
    assert torch.equal(by_call, again)
    plain = model(x)
    with ActivationAddition("layers.1").prepare(model) as hooked:
        assert torch.equal(model(x), plain)  # nothing is known of the block before
        with pytest.raises(ContextError, match="needs a second input"):
            hooked(TensorDict({"input": x}))


def test_a_second_contrast_is_not_steered_by_the_first(model):
    one, other = (torch.randn(6, 4), torch.randn(6, 4)), (torch.randn(6, 4), torch.randn(6, 4))
    with ActivationAddition("layers.1").prepare(model) as hooked:
        hooked(contrast(*one))
        second = hooked(contrast(*other))["steer", "layers.1"]
    with ActivationAddition("layers.1").prepare(model) as hooked:
        assert torch.equal(second, hooked(contrast(*other))["steer", "layers.1"])


@pytest.mark.parametrize(
    ("pool", "reference"),
    [
        ("tokens", lambda value: value.mean((0, 1))),
        ("last", lambda value: value[:, -1].mean(0)),
        ("batch", lambda value: value.mean(0)),
    ],
)
def test_values_of_sequences_are_pooled(pool, reference):
    model = nn.Sequential(nn.Linear(4, 3))
    positive, negative = torch.randn(2, 5, 4), torch.randn(3, 5, 4)
    with ActivationAddition("0", pool=pool).prepare(model) as hooked:
        found = hooked(contrast(positive, negative))["steer", "0"]
    torch.testing.assert_close(found, reference(model(positive)) - reference(model(negative)))


def test_padding_is_left_out_by_a_mask():
    model = nn.Sequential(nn.Linear(4, 3))
    inputs, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    side = TensorDict({"input": inputs, "mask": mask})
    other = TensorDict({"input": inputs + 1, "mask": mask})
    with ActivationAddition("0", mask_key="mask").prepare(model) as hooked:
        found = hooked(TensorDict({"positive": side, "negative": other}))["steer", "0"]
    rows = mask.bool()
    torch.testing.assert_close(found, model(inputs)[rows].mean(0) - model(inputs + 1)[rows].mean(0))


def test_an_unknown_pool_is_refused():
    with pytest.raises(EditError, match="pool is one of 'tokens', 'last', 'batch', got 'max'"):
        ActivationAddition("0", pool="max")


def test_a_module_of_two_names_is_steered_once(x):
    model, vector = Tied(), torch.randn(4)
    once = lambda value: model.encode(value) + vector  # noqa: E731
    expected = once(torch.tanh(once(x)))
    with SteeringVectors("encode|decode", vector).prepare(model) as hooked:
        torch.testing.assert_close(hooked(x), expected)


def test_a_cast_vector_that_learns_gets_its_gradient_in_every_step(x):
    model, vector = MLP().double(), torch.zeros(4, requires_grad=True)
    with SteeringVectors("layers.2", vector).prepare(model) as hooked:
        for _ in range(2):
            before = hooked(x.double())
            before.sum().backward()
            with torch.no_grad():
                vector -= vector.grad
                vector.grad = None
        assert not torch.equal(hooked(x.double()), before)


def test_a_cast_vector_that_is_written_to_is_cast_again(x):
    model, vector = MLP().double(), torch.zeros(4)
    with SteeringVectors("layers.2", vector).prepare(model) as hooked:
        plain = hooked(x.double())
        vector += 1
        assert not torch.equal(hooked(x.double()), plain)


def test_a_vector_that_was_cast_in_inference_mode_serves_in_training(x):
    model, vector, factor = MLP().double(), torch.ones(4), torch.ones((), dtype=torch.float64, requires_grad=True)
    with SteeringVectors("layers.2", vector, coefficient=factor).prepare(model) as hooked:
        with torch.inference_mode():
            first = hooked(x.double())
        second = hooked(x.double())
        second.sum().backward()
    assert torch.equal(second, first)
    assert factor.grad != 0


def test_what_steer_fn_returns_is_not_written_to(x):
    model, mine = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), -torch.ones(5, 4)
    with SteeringVectors("0", steer_fn=lambda module_key, output: mine).prepare(model) as hooked:
        assert torch.equal(hooked(x), torch.zeros(5, 4))
    assert torch.equal(mine, -torch.ones(5, 4))


def test_channels_are_pooled_along_their_own_axis():
    model, mask = nn.Sequential(nn.Identity()), torch.rand(2, 5, 6) > 0.5
    positive, negative, x = torch.randn(3, 2, 3, 5, 6).unbind(0)
    for mask_key in (None, "mask"):
        data = contrast(positive, negative, input=x)
        data["positive", "mask"] = data["negative", "mask"] = mask
        with ActivationAddition("0", unit_dim=-3, mask_key=mask_key).prepare(model) as hooked:
            found = hooked(data)

        def mean(value, masked=mask_key is not None):
            return torch.stack([value[:, c][mask].mean() if masked else value[:, c].mean() for c in range(3)])

        vector = (mean(positive) - mean(negative)).reshape(3, 1, 1)
        torch.testing.assert_close(found["steer", "0"], vector)
        torch.testing.assert_close(found["output"], x + vector)


def test_the_last_position_is_pooled_where_features_come_first():
    model, (positive, negative, x) = nn.Sequential(nn.Identity()), torch.randn(3, 2, 4, 5).unbind(0)
    recipe = ActivationAddition("0", pool="last", position_dim=2, unit_dim=-2)
    with recipe.prepare(model) as hooked:
        found = hooked(contrast(positive, negative, input=x))
    vector = positive[..., -1].mean(0) - negative[..., -1].mean(0)
    torch.testing.assert_close(found["output"], x + vector[:, None])


@pytest.mark.parametrize("units", [[0, 3], slice(1, 3), torch.tensor([True, False, False, True])])
def test_addition_to_some_units_takes_those_of_the_vector(units):
    model, (positive, negative, x) = nn.Sequential(nn.Identity()), torch.randn(3, 2, 5, 4).unbind(0)
    with ActivationAddition("0", units=units).prepare(model) as hooked:
        found = hooked(contrast(positive, negative, input=x))
    expected = x.clone()
    expected[..., units] += (positive.mean((0, 1)) - negative.mean((0, 1)))[units]
    torch.testing.assert_close(found["output"], expected)
