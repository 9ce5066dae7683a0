"""Axioms of the path methods, in double precision."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet, Transformer
from tdcache import AttributionError
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    LRP,
    AttributionPatching,
    Conductance,
    DeepLift,
    Epsilon,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    Saliency,
    SmoothGrad,
    quadrature,
)
from tdcache.attribution.quadrature import METHODS


def run(factory, model, data, rows=None):
    with factory.prepare(model) as hooked:
        return hooked(TensorDict(data, batch_size=[] if rows is None else [rows]))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_weights_of_a_quadrature_sum_to_one_and_its_nodes_rise(method):
    nodes, weights = zip(*quadrature(method, 7), strict=True)
    assert sum(weights) == pytest.approx(1, abs=1e-14)
    assert list(nodes) == sorted(nodes)
    assert min(nodes) >= 0
    assert max(nodes) <= 1


@pytest.mark.parametrize(
    ("method", "steps", "degree"), [("gausslegendre", 3, 5), ("trapezoid", 2, 1), ("middle", 1, 1)]
)
def test_a_quadrature_is_exact_up_to_its_degree_and_not_beyond(method, steps, degree):
    def error(power):
        return abs(sum(weight * node**power for node, weight in quadrature(method, steps)) - 1 / (power + 1))

    assert max(error(power) for power in range(degree + 1)) < 1e-14
    assert error(degree + 1) > 1e-4


class Cubic(nn.Module):
    def forward(self, x):
        return (x**3).sum(-1) + x[:, 0] * x[:, 1]


def test_integrated_gradients_are_exact_for_polynomials_within_the_degree():
    x = torch.randn(4, 3, dtype=torch.float64)
    td = run(IntegratedGradients(n_steps=2), Cubic(), {"input": x}, 4)
    wanted = x**3 + torch.stack([x[:, 0] * x[:, 1] / 2, x[:, 0] * x[:, 1] / 2, 0 * x[:, 0]], dim=1)
    torch.testing.assert_close(td["attr", "input"], wanted, rtol=1e-12, atol=1e-12)
    assert td["gap", "input"].abs().max() < 1e-12


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.b, self.u, self.c = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)

    def forward(self, x):
        return self.c(self.u(self.b(self.t(self.a(x)))))


def test_integrated_gradients_sum_to_the_difference_at_the_inputs_and_at_every_cut():
    model, x, start = Smooth().double(), *torch.randn(2, 6, 4, dtype=torch.float64)
    stack = Together(IntegratedGradients(target=1, n_steps=40), IntegratedGradients("a|t|b|u", target=1, n_steps=40))
    td = run(stack, model, {"input": x, "baseline": {"input": start}}, 6)
    wanted = (model(x) - model(start))[:, 1].detach()
    for key in ("input", "a", "t", "b", "u"):
        torch.testing.assert_close(td["attr", key].sum(-1), wanted, rtol=0, atol=1e-8)
        assert td["gap", key].abs().max() < 1e-8


def test_at_a_branch_integrated_gradients_sum_to_the_effect_of_that_branch_alone():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.tanh(self.left(x) * self.right(x)))

    model, x, start = Branches().double(), *torch.randn(2, 5, 3, dtype=torch.float64)
    td = run(IntegratedGradients("left", n_steps=40), model, {"input": x, "baseline": {"input": start}}, 5)
    patched = model.head(torch.tanh(model.left(start) * model.right(x)))
    torch.testing.assert_close(td["attr", "left"].sum(-1), (model(x) - patched)[:, 0].detach(), rtol=0, atol=1e-8)
    assert td["gap", "left"].abs().max() < 1e-8


def conductance(*args, **options):
    return Conductance(*args, target=0, method="trapezoid", **options)


def test_conductance_sums_to_the_difference_and_influence_is_the_mean_gradient():
    model, x = Smooth().double(), torch.randn(6, 4, dtype=torch.float64)
    stack = Together(conductance("a|u", n_steps=200), InternalInfluence("u", target=0, name="i", n_steps=9))
    td = run(stack, model, {"input": x}, 6)
    wanted = (model(x) - model(torch.zeros_like(x)))[:, 0].detach()
    for site in ("a", "u"):
        torch.testing.assert_close(td["attr", site].sum(-1), wanted, rtol=0, atol=1e-4)  # second order in 1 / 200
    torch.testing.assert_close(td["attr", "i", "u"], model.c.weight[0].detach().expand(6, 5))


def conductance_by_loop(model, x, start, site, nodes):
    """The sum of the paper, one point at a time."""
    total, before = 0, None
    for node in nodes:
        at = model.get_submodule(site)
        seen = []
        handle = at.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        value = model(start + node * (x - start))[:, 0].sum()
        handle.remove()
        (grad,) = torch.autograd.grad(value, seen[0])
        if before is not None:
            total = total + (before[1] + grad) / 2 * (seen[0] - before[0])
        before = (seen[0], grad)
    return total.detach()


def test_conductance_takes_gauss_legendre_nodes_by_default_and_its_gap_shrinks_with_the_step():
    model, (x, start) = Smooth().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    data = {"input": x, "baseline": {"input": start}}
    default = run(Conductance("t", target=0), model, data, 3)
    named = run(Conductance("t", target=0, method="gausslegendre", n_steps=50), model, data, 3)
    assert torch.equal(default["attr", "t"], named["attr", "t"])
    wanted = (model(x) - model(start))[:, 0].detach()
    torch.testing.assert_close(default["attr", "t"].sum(-1) - wanted, default["gap", "t"])
    finer = run(Conductance("t", target=0, n_steps=400), model, data, 3)
    assert 0 < finer["gap", "t"].abs().max() < default["gap", "t"].abs().max() / 4


def test_conductance_equals_the_loop_over_points():
    model, x, start = Smooth().double(), *torch.randn(2, 3, 4, dtype=torch.float64)
    td = run(conductance("t", n_steps=5, chunk=2), model, {"input": x, "baseline": {"input": start}}, 3)
    wanted = conductance_by_loop(model, x, start, "t", [0, 0.2, 0.4, 0.6, 0.8, 1])
    torch.testing.assert_close(td["attr", "t"], wanted, rtol=1e-12, atol=1e-14)


@given(st.integers(0, 10_000))
def test_for_linear_models_all_these_methods_coincide(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    x = draw(3, 4)
    wanted = (model[1].weight @ model[0].weight)[2] * x
    stack = Together(
        IntegratedGradients(target=2, n_steps=2, name="ig"),
        InputXGradient(target=2, name="ixg"),
        DeepLift(target=2, name="deeplift"),
        LRP(target=2, rules=Epsilon(0.0), name="lrp"),
    )
    td = run(stack, model, {"input": x}, 3)
    for name in ("ig", "ixg", "deeplift", "lrp"):
        torch.testing.assert_close(td["attr", name, "input"], wanted.detach(), rtol=1e-9, atol=1e-10)
    patch = run(AttributionPatching("0", target=2, reduce=-1), model, {"input": x, "corrupt": {"input": 0 * x}}, 3)
    torch.testing.assert_close(-patch["attr", "0"], wanted.sum(-1).detach(), rtol=1e-9, atol=1e-10)


def test_deeplift_sums_to_the_difference_of_a_relu_net():
    model, x, start = ConvNet(inplace=True).double(), *torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    td = run(DeepLift(target=1), model, {"input": x, "baseline": {"input": start}}, 3)
    wanted = (model(x) - model(start))[:, 1].detach()
    torch.testing.assert_close(td["attr", "input"].flatten(1).sum(1), wanted, rtol=0, atol=1e-10)
    assert td["gap", "input"].abs().max() < 1e-10


POOLS = {
    "1d": (nn.Conv1d(2, 3, 3), nn.MaxPool1d(3, stride=2, padding=1), (2, 9)),
    "2d": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, stride=1, dilation=2, ceil_mode=True), (2, 8, 7)),
    "3d": (nn.Conv3d(2, 3, 2), nn.MaxPool3d(2), (2, 5, 5, 6)),
    "indices": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, return_indices=True), (2, 8, 8)),
}


class Pooled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.pool, _ = POOLS[kind]
        self.relu, self.head, self.softmax = nn.ReLU(), nn.LazyLinear(4), nn.Softmax(-1)

    def forward(self, x):
        pooled = self.pool(self.relu(self.conv(x)))
        return self.softmax(self.head((pooled[0] if isinstance(pooled, tuple) else pooled).flatten(1)))


@pytest.mark.parametrize("kind", sorted(POOLS))
def test_deeplift_sums_to_the_difference_through_max_pools_and_softmax(kind):
    model, (x, start) = Pooled(kind).double(), torch.randn(2, 3, *POOLS[kind][2], dtype=torch.float64)
    wanted = (model(x) - model(start))[:, 1].detach()
    stack = Together(DeepLift(target=1), Saliency(target=1, name="beside"))
    td = run(stack, model, {"input": x, "baseline": {"input": start}}, 3)
    torch.testing.assert_close(td["attr", "input"].flatten(1).sum(1), wanted, rtol=0, atol=1e-10)
    assert wanted.abs().min() > 1e-6


def test_deeplift_of_a_softmax_is_complete_where_a_logit_stays_and_where_one_is_masked():
    x = torch.tensor([[1.0, 2.0, 0.5, -torch.inf]], dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0, 1.5, -torch.inf]], dtype=torch.float64)
    model = nn.Sequential(nn.Softmax(-1))
    td = run(DeepLift(target=0), model, {"input": x, "baseline": {"input": start}}, 1)
    found = td["attr", "input"].sum()
    torch.testing.assert_close(found, (model(x) - model(start))[0, 0], rtol=0, atol=1e-12)


def test_smoothgrad_is_the_mean_of_gradients_at_noisy_inputs():
    class Square(nn.Module):
        def forward(self, x):
            return (x**2).sum(-1)

    x = torch.tensor([[1.0, 2.0, 5.0]])
    td = run(SmoothGrad(n_samples=2000, scale=0.5), Square(), {"input": x}, 1)
    # Noise of standard deviation 2 doubled by the gradient, over 2000 samples: 4 / sqrt(2000) = 0.09 to one sigma.
    torch.testing.assert_close(td["attr", "input"], 2 * x, rtol=0, atol=0.4)
    again = run(SmoothGrad(n_samples=2000, scale=0.5, chunk=13), Square(), {"input": x}, 1)
    torch.testing.assert_close(td["attr", "input"], again["attr", "input"], rtol=1e-5, atol=1e-5)


def test_a_baseline_may_be_a_number_a_tensor_a_callable_or_an_entry():
    model, x = Smooth(), torch.randn(3, 4)
    one = torch.ones_like(x)
    given = run(IntegratedGradients(target=0), model, {"input": x, "baseline": {"input": one}}, 3)
    for baseline in (1.0, one, torch.ones(4), torch.ones_like, {"input": 1.0}):
        td = run(IntegratedGradients(target=0, baseline=baseline), model, {"input": x}, 3)
        torch.testing.assert_close(td["attr", "input"], given["attr", "input"])


def test_integer_inputs_are_explained_at_their_embeddings_from_zeros_by_default():
    model, ids = Transformer().double(), torch.arange(6).reshape(2, 3)
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    td = run(IntegratedGradients("embed", target=target, n_steps=60), model, {"input": ids}, 2)
    assert td["attr", "embed"].shape == (2, 3, 8)
    assert td["gap", "embed"].abs().max() < 1e-6
    with pytest.raises(AttributionError, match="integers and have no gradient; explain the embeddings"):
        run(IntegratedGradients(target=target), model, {"input": ids}, 2)


def test_memory_grows_with_the_chunk_and_not_with_the_steps():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = []

        def forward(self, x):
            self.rows.append(len(x))
            return x.sum(-1)

    for steps in (8, 64):
        model = Wide()
        run(IntegratedGradients(n_steps=steps, chunk=4), model, {"input": torch.randn(3, 4)}, 3)
        assert max(model.rows) == 12


class Thrice(nn.Module):
    """One module that runs three times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x):
        return self.layer(self.layer(self.layer(x))).sum(-1)


@pytest.mark.parametrize("call", [0, 1, 2, -1, -3])
def test_a_path_at_one_call_of_a_module_leaves_its_other_calls_alone(call):
    model, x = Thrice().double(), torch.randn(4, 3, dtype=torch.float64)
    start = torch.randn(4, 3, dtype=torch.float64)
    method = IntegratedGradients("layer", call=call, n_steps=40)
    td = run(method, model, {"input": x, "baseline": {"input": start}}, 4)
    low, after = start, x
    for _ in range(call % 3 + 1):
        low, after = model.layer(low), model.layer(after)
    scores = torch.zeros_like(x)
    for node, weight in quadrature("gausslegendre", 40):
        value = (low + node * (after - low)).detach().requires_grad_()
        out = value
        for _ in range(2 - call % 3):
            out = model.layer(out)
        scores += weight * torch.autograd.grad(out.sum(), value)[0] * (after - low).detach()
    torch.testing.assert_close(td["attr", "layer"], scores, rtol=1e-9, atol=1e-12)
    assert td["gap", "layer"].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"baseline": {"inptu": torch.ones(4, 3)}}, {}, "the baseline has an entry 'inptu', .* did you mean 'input'?"),
        ({}, {"baseline": {"inputs": 1.0}}, "the baseline has an entry 'inputs', .* did you mean 'input'?"),
        ({"baseline": {"z": torch.ones(4, 3)}}, {}, "an entry 'z', and .*; the inputs are 'input'"),
    ],
    ids=["entry", "argument", "far"],
)
def test_a_baseline_of_no_input_is_refused_with_near_misses(data, options, message):
    with pytest.raises(AttributionError, match=message):
        run(IntegratedGradients(n_steps=2, **options), Thrice(), {"input": torch.ones(4, 3), **data}, 4)


def test_a_baseline_that_names_no_input_at_all_is_refused():
    data = {"input": torch.ones(4, 3), "baseline": torch.ones(4, 3)}
    with pytest.raises(
        AttributionError, match=r"data\['baseline'\] is a tensor; say of which input, data\['baseline', 'i"
    ):
        run(IntegratedGradients(n_steps=2), Thrice(), data, 4)


@pytest.mark.parametrize(("node", "key"), [("baseline", "baselines"), ("baseline", "Base_line"), ("corrupt", "corupt")])
def test_misspelt_baselines_and_counterfactuals_do_not_count_as_zeros(node, key):
    method = IntegratedGradients(n_steps=2) if node == "baseline" else AttributionPatching("layer", call=0)
    data = {"input": torch.ones(4, 3), key: {"input": torch.ones(4, 3)}, "labels": {"input": torch.ones(4, 3)}}
    with pytest.raises(AttributionError, match=rf"entries '{key}' and none '{node}'; did you mean data\['{node}', 'i"):
        run(method, Thrice(), data, 4)
    run(method, Thrice(), {**data, node: {"input": torch.zeros(4, 3)}}, 4)  # both: one of them is meant
