"""The values that ActivationCaching keeps: directions, callbacks, picks, casts, and reducers over several forwards."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from small_models import Pair, assert_same, by_hand, input_gradients, output_gradients
from tdcache import (
    ActivationCaching,
    CaptureError,
    Concatenate,
    First,
    Last,
    Mean,
    Stack,
    TopK,
    Variance,
)

LAYERS = ["layers.0", "layers.1", "layers.2"]
ONE_LAYER = r"layers\.\d+"


# Directions


def test_the_input_is_the_first_argument(model, x):
    with ActivationCaching(ONE_LAYER, directions=["fwd_pre"]).prepare(model) as hooked:
        hooked(x)
    first = by_hand(model, LAYERS, lambda: model(x))["layers.0"][0]
    assert torch.equal(hooked.cache["layers.0"], x)
    assert torch.equal(hooked.cache["layers.1"], nn.functional.gelu(first))


@pytest.mark.parametrize(("direction", "plain"), [("fwd_kwargs", "fwd"), ("fwd_pre_kwargs", "fwd_pre")])
def test_the_directions_with_keywords_keep_the_same_values(model, x, direction, plain):
    with ActivationCaching("head", directions=[direction, plain]).prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache[direction, "head"], hooked.cache[plain, "head"])


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre"])
def test_the_gradient_of_the_output_is_that_of_autograd(model, x, direction):
    wanted = output_gradients(model, ["head", *LAYERS], lambda: model(x).square().sum())
    with ActivationCaching(rf"head|{ONE_LAYER}", directions=[direction]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    assert_same(dict(hooked.cache.items()), wanted)


def test_the_gradient_of_the_input_is_that_of_autograd(model, x):
    x.requires_grad_()
    wanted = input_gradients(model, ["head", *LAYERS], lambda: model(x).square().sum())
    with ActivationCaching(rf"head|{ONE_LAYER}", directions=["grad_in"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    assert_same(dict(hooked.cache.items()), wanted)


@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_gradients_are_right_before_an_in_place_operation(x, direction):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Tanh())
    x.requires_grad_()
    oracle = {"bwd": output_gradients, "grad_in": input_gradients}[direction]
    outplace = nn.Sequential(model[0], nn.ReLU(), model[2], model[3])
    wanted = oracle(outplace, ["0", "2"], lambda: outplace(x).square().sum())
    with ActivationCaching("0|2", directions=[direction]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    assert_same(dict(hooked.cache.items()), wanted)


def test_the_input_gradient_is_the_modules_own_and_not_that_of_all_its_users(x):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.left(x) + self.right(x) + 3 * x

    model = Fork()
    x.requires_grad_()
    with ActivationCaching("left|right", directions=["grad_in"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    ones = torch.ones(5, 4)
    assert_same(dict(hooked.cache.items()), {"left": ones @ model.left.weight, "right": ones @ model.right.weight})


def test_gradient_times_activation_is_one_product(model, x):
    with ActivationCaching(ONE_LAYER, directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    product = hooked.cache["fwd"] * hooked.cache["bwd"]
    for path in LAYERS:
        assert torch.equal(product[path], hooked.cache["fwd", path] * hooked.cache["bwd", path])


def test_gradients_come_from_any_backward_of_the_user(model, x):
    with ActivationCaching("head", directions=["bwd"]).prepare(model) as hooked:
        y = hooked(x)
        torch.autograd.grad(y[:, 0].sum(), model.head.weight, retain_graph=True)
        assert torch.equal(hooked.cache["head"], torch.tensor([1.0, 0.0]).expand(5, 2))
        y[:, 1].sum().backward()
        assert torch.equal(hooked.cache["head"], torch.tensor([0.0, 1.0]).expand(5, 2))


def test_a_forward_drops_the_gradients_of_the_one_before(model, x):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
        assert ("bwd", "head") in hooked.cache.keys(include_nested=True)
        hooked(x)
        assert ("bwd", "head") not in hooked.cache.keys(include_nested=True)
        hooked(x).sum().backward()


def test_the_gradient_node_is_there_before_the_first_backward(model, x):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        y = hooked(x)
        assert hooked.cache["bwd"].is_empty()
        y.sum().backward()


# Callbacks


def test_a_callback_returns_what_is_kept_instead(model, x):
    def callback(module, args, output, key, direction):
        assert module is model.head
        assert (key, direction) == ("head", "fwd")
        assert isinstance(args, tuple)
        return output.sum(0)

    with ActivationCaching("head", callback=callback).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y.detach().sum(0))


CALLS = {
    "fwd": {"module", "args", "output", "key", "direction"},
    "fwd_pre": {"module", "args", "key", "direction"},
    "bwd": {"module", "grad_input", "grad_output", "key", "direction"},
    "grad_in": {"module", "grad_input", "grad_output", "key", "direction"},
    "bwd_pre": {"module", "grad_output", "key", "direction"},
    "fwd_kwargs": {"module", "args", "kwargs", "output", "key", "direction"},
    "fwd_pre_kwargs": {"module", "args", "kwargs", "key", "direction"},
}


@pytest.mark.parametrize("direction", CALLS)
def test_a_callback_is_called_by_keyword_as_its_direction_has_them(model, x, direction):
    seen = []

    def callback(**named):
        seen.append(named)
        return torch.tensor(float(len(seen)))

    with ActivationCaching("head", callback=callback, directions=[direction]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert [set(named) for named in seen] == [CALLS[direction]]
    assert (seen[0]["key"], seen[0]["direction"], seen[0]["module"]) == ("head", direction, model.head)
    assert hooked.cache["head"] == 1.0


@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_a_gradient_callback_gets_both_gradients_as_tuples(model, x, direction):
    seen = {}

    def callback(module, grad_input, grad_output, key, direction):
        seen.update(grad_input=grad_input, grad_output=grad_output, key=key)
        return grad_output[0]

    factory = ActivationCaching("head", callback=callback, directions=[direction], use_nested_keys=True)
    with factory.prepare(model) as hooked:
        hooked(x).sum().backward()
    ones = torch.ones(5, 2)
    assert seen["key"] == (direction, "head")
    assert torch.equal(seen["grad_output"][0], ones)
    assert torch.equal(seen["grad_input"][0], ones @ model.head.weight)
    assert torch.equal(hooked.cache[direction, "head"], ones)


def test_a_callback_may_return_a_tensordict(model, x):
    def callback(output, **rest):
        return TensorDict({"mean": output.mean(0), "count": torch.tensor(output.shape[0])})

    with ActivationCaching("head", callback=callback).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head", "mean"], y.detach().mean(0))
    assert hooked.cache["head", "count"] == 5


# What of a structured value


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_of_a_structure_the_first_tensor_is_kept(x, kind):
    model = Pair(kind)
    with ActivationCaching("inner").prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["inner"], model.inner.left(x))


@pytest.mark.parametrize(
    ("kind", "pick"),
    [
        (tuple, 1),
        (tuple, -1),
        (list, 1),
        (dict, "right"),
        (dict, 1),
        (tuple, (1,)),
        (dict, lambda value: value["right"]),
    ],
)
def test_pick_names_the_tensor(x, kind, pick):
    model = Pair(kind)
    with ActivationCaching("inner", pick=pick).prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["inner"], model.inner.right(x))


@pytest.mark.parametrize(("kind", "names"), [(tuple, ("0", "1")), (dict, ("left", "right"))])
def test_pick_all_keeps_every_tensor_under_nested_keys(x, kind, names):
    model = Pair(kind)
    with ActivationCaching("inner", pick="all", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    for name, side in zip(names, (model.inner.left, model.inner.right), strict=True):
        assert torch.equal(hooked.cache["fwd", "inner", name], side(x))
        assert torch.equal(hooked.cache["bwd", "inner", name], torch.ones(5, 4))


def test_pick_chooses_among_the_arguments_of_an_input():
    model = nn.Bilinear(3, 4, 2)
    left, right = torch.randn(5, 3), torch.randn(5, 4)
    wrapper = nn.ModuleDict({"inner": model})
    with ActivationCaching("inner", directions=["fwd_pre"], pick=1).prepare(wrapper) as hooked:
        wrapper["inner"](left, right)
    assert torch.equal(hooked.cache["inner"], right)


def test_pick_names_a_keyword_argument():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scale()

        def forward(self, x):
            return self.inner(x, by=torch.full((1,), 3.0))

    class Scale(nn.Module):
        def forward(self, x, by):
            return x * by

    with ActivationCaching("inner", directions=["fwd_pre"], pick="by").prepare(Scaled()) as hooked:
        hooked(torch.ones(2, 2))
    assert torch.equal(hooked.cache["inner"], torch.full((1,), 3.0))


# What is kept of a tensor


def test_dtype_casts_at_capture(model, x):
    with ActivationCaching("head", dtype=torch.float16).prepare(model) as hooked:
        y = hooked(x)
    assert hooked.cache["head"].dtype == torch.float16
    assert torch.equal(hooked.cache["head"], y.detach().half())


def test_device_moves_at_capture(model, x):
    with ActivationCaching("head", device="meta").prepare(model) as hooked:
        y = hooked(x)
    assert hooked.cache["head"].device.type == "meta"
    assert hooked.cache["head"].shape == y.shape


def test_options_reach_gradients_as_well(model, x):
    factory = ActivationCaching("head", directions=["bwd"], index=(slice(None), 0), dtype=torch.float64)
    with factory.prepare(model) as hooked:
        hooked(x).square().sum().backward()
    (wanted,) = output_gradients(model, ["head"], lambda: model(x).square().sum()).values()
    assert torch.equal(hooked.cache["head"], wanted[:, 0].double())


# Reducers over several forwards


@pytest.mark.parametrize(
    ("reducer", "of_all"),
    [
        (Stack(), lambda values: torch.stack(values)),
        (Stack(dim=1), lambda values: torch.stack(values, dim=1)),
        (Concatenate(), torch.cat),
        (Concatenate(dim=1), lambda values: torch.cat(values, dim=1)),
        (Concatenate(max_rows=7), lambda values: torch.cat(values)[:7]),
        (First(), lambda values: values[0]),
        (Last(), lambda values: values[-1]),
    ],
    ids=["stack", "stack at 1", "concatenate", "concatenate at 1", "within a budget", "first", "last"],
)
def test_a_reducer_gathers_over_forwards(model, reducer, of_all):
    batches = [torch.randn(5, 4) for _ in range(3)]
    with ActivationCaching(ONE_LAYER, reducer=reducer).prepare(model) as hooked:
        for batch in batches:
            hooked(batch)
    wanted = by_hand(model, LAYERS, lambda: [model(batch) for batch in batches])
    assert_same(dict(hooked.cache.items()), {path: of_all(values) for path, values in wanted.items()})


@pytest.mark.parametrize(
    ("reducer", "of_all"),
    [
        (Mean(), lambda rows: rows.mean(0)),
        (Variance(), lambda rows: rows.var(0)),
        (TopK(2), lambda rows: rows.topk(2, 0)[0]),
    ],
    ids=["mean", "variance", "top"],
)
def test_a_statistic_is_that_of_all_rows(model, reducer, of_all):
    batches = [torch.randn(5, 4) for _ in range(3)]
    with ActivationCaching("head", reducer=reducer).prepare(model) as hooked:
        for batch in batches:
            hooked(batch)
    found = hooked.cache["head", "values"] if isinstance(reducer, TopK) else hooked.cache["head"]
    rows = torch.cat(by_hand(model, ["head"], lambda: [model(batch) for batch in batches])["head"])
    # Sums in another order: a few units in the last place of values around one.
    torch.testing.assert_close(found, of_all(rows), rtol=1e-6, atol=1e-6)


def test_a_reducer_may_be_given_as_a_class(model, x):
    with ActivationCaching("head", reducer=Stack).prepare(model) as hooked:
        hooked(x)
        hooked(x)
    assert hooked.cache["head"].shape == (2, 5, 2)


def test_what_a_reducer_holds_can_be_read_between_forwards(model, x):
    with ActivationCaching("head", reducer=Stack()).prepare(model) as hooked:
        for calls in (1, 2, 3):
            hooked(x)
            assert hooked.cache["head"].shape == (calls, 5, 2)


def test_gradients_are_gathered_in_the_order_of_the_calls(model):
    batches = [torch.randn(2, 4) for _ in range(3)]
    with ActivationCaching("head", directions=["bwd"], reducer=Stack()).prepare(model) as hooked:
        total = sum(scale * hooked(batch).sum() for scale, batch in enumerate(batches, 1))
        total.backward()  # autograd runs the last forward's backward first
    assert torch.equal(hooked.cache["head"][:, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_two_uses_of_one_recipe_share_no_reducer(model, x):
    factory = ActivationCaching("head", reducer=Stack())
    for _ in range(2):
        with factory.prepare(model) as hooked:
            hooked(x)
        assert hooked.cache["head"].shape == (1, 5, 2)


def test_a_value_without_a_tensor_names_path_and_type(x):
    class Count(nn.Module):
        def forward(self, x):
            return x.shape[0]

    model = nn.Sequential(Count())
    with ActivationCaching("0").prepare(model) as hooked, pytest.raises(CaptureError, match=r"'0' is int") as caught:
        hooked(x)
    assert caught.value.paths == ("0",)
