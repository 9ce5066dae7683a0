"""Captures under ``torch.func``: what a Python loop would give, or a refusal."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tdcache import ActivationCaching, CaptureError, Last, Mean, Stack


@pytest.fixture
def xs():
    return torch.randn(3, 2, 4)


def by_loop(model, xs, direction):
    """The values of each sample, from a context and a backward of its own."""
    found = []
    for x in xs:
        with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
            hooked(x).square().sum().backward()
        found.append(hooked.cache[direction, "head"])
    return torch.stack(found)


def close(one, other):
    # One product over the batch rounds differently from one per sample.
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_under_vmap_the_mapped_axis_is_in_front(model, xs):
    with ActivationCaching("head").prepare(model) as hooked:
        vmap(model)(xs)
        close(hooked.cache["head"], by_loop(model, xs, "fwd"))
    assert hooked.cache["head"].sum().isfinite()


def test_the_mapped_axis_may_be_any(model, xs):
    with ActivationCaching("head", reducer=Stack()).prepare(model) as hooked:
        vmap(model, in_dims=1)(xs.movedim(0, 1))
    close(hooked.cache["head"], by_loop(model, xs, "fwd")[None])


def test_nested_vmaps_give_an_axis_each_the_outer_first(model):
    xs = torch.randn(3, 5, 2, 4)
    with ActivationCaching("head", directions=["fwd", "fwd_pre"]).prepare(model) as hooked:
        y = vmap(vmap(model, in_dims=1), in_dims=0)(xs.movedim(1, 2))
    close(hooked.cache["fwd", "head"], y)
    assert hooked.cache["fwd_pre", "head"].shape == (3, 5, 2, 4)


def test_under_grad_the_value_is_plain(model, xs):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        grad(lambda x: model(x).square().sum())(xs[0])
    close(hooked.cache["fwd", "head"], model(xs[0]).detach())
    close(hooked.cache["bwd", "head"], by_loop(model, xs, "bwd")[0])


def test_gradients_per_sample_are_those_of_a_loop(model, xs):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        vmap(grad(lambda x: model(x).square().sum()))(xs)
    for direction in ("fwd", "bwd"):
        close(hooked.cache[direction, "head"], by_loop(model, xs, direction))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when jvp is first used
def test_under_jvp_the_value_is_the_primal(model, xs):
    with ActivationCaching("head").prepare(model) as hooked:
        y, _ = torch.func.jvp(model, (xs,), (xs,))
    assert torch.equal(hooked.cache["head"], y)


def test_an_ensemble_of_parameters_has_an_axis(model, xs):
    twice = {name: torch.stack([value, 2 * value]).detach() for name, value in model.named_parameters()}
    with ActivationCaching("head").prepare(model) as hooked:
        y = vmap(lambda parameters: functional_call(model, parameters, (xs,)))(twice)
    assert torch.equal(hooked.cache["head"], y)


class Partly(nn.Module):
    """Has a part that does not depend on the sample."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.part(torch.ones(4))


def test_a_value_that_does_not_depend_on_the_sample_is_repeated(xs):
    model = Partly()
    with ActivationCaching("part").prepare(model) as hooked:
        vmap(model)(xs)
    assert torch.equal(hooked.cache["part"], model.part(torch.ones(4)).detach().expand(3, 4))


class Inside(nn.Module):
    """Uses vmap in its own forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return vmap(self.linear)(x)


def test_a_value_of_a_transform_that_has_ended_is_refused_by_name(xs):
    with (
        pytest.raises(CaptureError, match=r"'linear' ran inside a torch.func transform .* hold='snapshot'") as caught,
        ActivationCaching("linear").prepare(Inside()) as hooked,
    ):
        hooked(xs)
    assert caught.value.paths == ("linear",)


def test_a_copy_is_taken_inside_the_transform(xs):
    with ActivationCaching("linear", hold="snapshot").prepare(Inside()) as hooked:
        y = hooked(xs)
    assert torch.equal(hooked.cache["linear"], y.detach())


@pytest.mark.parametrize("reducer", [Last(), Stack(), Mean()], ids=repr)
@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_gradients_that_are_asked_for_as_a_batch_are_those_of_a_loop(direction, reducer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    batch = torch.stack([number * torch.ones(2, 2, dtype=torch.float64) for number in (1, 2, 3)])
    singles = []
    for each in batch:
        with ActivationCaching("1", directions=[direction]).prepare(model) as hooked:
            torch.autograd.grad(hooked(x), x, each)
        singles.append(hooked.cache["1"])
    expected = {"Last": torch.stack(singles), "Stack": torch.stack(singles)[None], "Mean": torch.stack(singles).mean(0)}
    with ActivationCaching("1", directions=[direction], reducer=reducer).prepare(model) as hooked:
        torch.autograd.grad(hooked(x), x, batch, is_grads_batched=True)
    # A batched product may add in another order than those of the loop.
    torch.testing.assert_close(hooked.cache["1"], expected[type(reducer).__name__], rtol=1e-12, atol=1e-12)


def test_a_vectorised_jacobian_leaves_the_batch_of_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.ones(1, 4, dtype=torch.float64)
    with ActivationCaching("2", directions=["fwd", "bwd"]).prepare(model) as hooked:
        torch.autograd.functional.jacobian(hooked, x, vectorize=True)
    assert torch.equal(hooked.cache["bwd", "2"], torch.eye(2, dtype=torch.float64).reshape(2, 1, 2))
