"""Whose rows are cut: layouts with rows elsewhere than in front, no batch, several batch axes, batch statistics."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet, Transformer
from tdcache import AttributionError
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    LRP,
    ActivationMaximisation,
    AttributionPatching,
    Conductance,
    DeepLift,
    EdgeAttributionPatching,
    GradCAM,
    GradientXActivation,
    GuidedBackpropagation,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    Saliency,
    ScaleGradient,
    SmoothGrad,
)


def run(factory, model, data, batch_size=()):
    with factory.prepare(model) as hooked:
        return hooked(TensorDict(data, batch_size=list(batch_size)))


class SequenceFirst(nn.Module):
    """Takes (batch, time, features) and works in (time, batch, features)."""

    def __init__(self):
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.act(self.inner(x.transpose(0, 1))).mean(0))


def by_row(factory, model, data):
    """The scores of each row, run alone."""
    rows = len(data["input"])
    alone = [run(factory, model, TensorDict(data, [rows])[at : at + 1].to_dict())["attr"] for at in range(rows)]
    return TensorDict.stack(alone)


def test_rows_of_a_sequence_first_site_are_those_of_the_batch_although_the_length_divides():
    model, x, other = SequenceFirst().double(), *torch.randn(2, 4, 8, 3, dtype=torch.float64)
    data = {"input": x, "corrupt": {"input": other}}  # eight rows stacked, and a length of eight
    for factory in (
        AttributionPatching("inner", target=0, reduce=0),
        Conductance("inner", target=0, reduce=0, n_steps=4),
        IntegratedGradients("inner", target=0, reduce=0, n_steps=4),
    ):
        found = run(factory, model, data, [4])["attr", "inner"]
        torch.testing.assert_close(found, by_row(factory, model, data)["inner"][:, 0], rtol=1e-9, atol=1e-12)


def test_a_modifier_of_some_rows_changes_those_in_any_layout():
    model, x = SequenceFirst().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    plain = Saliency(target=0, absolute=False, name="plain")
    halved = Saliency(target=0, absolute=False, name="half", modifiers=[ScaleGradient("act", 0.5)])
    td = run(Together(plain, halved), model, {"input": x}, [2])  # four rows stacked, and a length of four
    x = x.requires_grad_()
    (wanted,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    torch.testing.assert_close(td["attr", "plain", "input"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(td["attr", "half", "input"], wanted / 2, rtol=1e-9, atol=1e-12)


class HeadsInFront(nn.Module):
    """Folds heads into the batch axis, heads first."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x):
        folded = x.unflatten(-1, (2, 2)).permute(1, 0, 2).flatten(0, 1)  # (heads * batch, 2)
        return self.head(self.inner(folded).unflatten(0, (2, -1)).permute(1, 0, 2).flatten(1))


def test_where_heads_are_folded_into_the_batch_points_run_apart():
    model, x = HeadsInFront().double(), torch.randn(3, 4, dtype=torch.float64)
    plain = Saliency(target=0, absolute=False, name="plain")
    halved = Saliency(target=0, absolute=False, name="half", modifiers=[ScaleGradient("inner", 0.5)])
    td = run(Together(plain, halved), model, {"input": x}, [3])
    wanted = torch.autograd.functional.jacobian(lambda x: model(x)[:, 0].sum(), x)
    torch.testing.assert_close(td["attr", "plain", "input"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(td["attr", "half", "input"], wanted / 2, rtol=1e-9, atol=1e-12)


def test_a_model_that_takes_only_its_own_number_of_rows_runs_its_points_apart():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Tanh(), torch.randn(3, 4, dtype=torch.float64)

        def forward(self, x):
            return (self.inner(x) * self.weight).sum(-1)

    model, (x, other) = Fixed(), torch.randn(2, 3, 4, dtype=torch.float64)
    td = run(AttributionPatching("inner"), model, {"input": x, "corrupt": {"input": other}}, [3])
    wanted = (other.tanh() - x.tanh()) * model.weight
    torch.testing.assert_close(td["attr", "inner"], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_position_embeddings_without_a_batch_axis_are_written_to_every_row(rows):
    model = Transformer(length=4).double()
    ids = torch.randint(11, (rows, 4))
    data = {"input": ids, "corrupt": {"input": ids.flip(1)}}
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    factory = EdgeAttributionPatching("embed|position", "ln_f", target=target, n_steps=3, embeddings="embed")
    stacked, apart = run(factory, model, data, [rows]), run(factory, model, data)
    assert (stacked["attr", "position", "ln_f"] == 0).all()  # they are the same for both inputs
    torch.testing.assert_close(stacked["attr", "embed", "ln_f"], apart["attr", "embed", "ln_f"], rtol=1e-9, atol=1e-12)
    both = AttributionPatching("embed|position", target=target)
    grads = run(both, model, {"input": ids}, [] if rows != 4 else [4])
    assert grads["attr", "position"].shape == (4, 8)


def test_a_path_at_a_value_that_all_rows_share_runs_its_points_apart():
    model, ids = Transformer(length=4).double(), torch.randint(11, (4, 4))
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    td = run(IntegratedGradients("position", target=target, n_steps=40), model, {"input": ids}, [4])
    start = model.position.weight.data.clone()
    high = model(ids)[:, -1, 2].sum()
    model.position.weight.data.zero_()
    low = model(ids)[:, -1, 2].sum()
    model.position.weight.data.copy_(start)
    torch.testing.assert_close(td["attr", "position"].sum(), (high - low).detach(), rtol=0, atol=1e-6)
    assert td["gap", "position"].isnan().all()  # which row gave how much cannot be told


METHODS = {
    "saliency": Saliency(target=1),
    "input x gradient": InputXGradient(target=1),
    "gradient x activation": GradientXActivation(r"c\d|r\d", target=1),
    "grad-cam": GradCAM("c2", target=1),
    "guided": GuidedBackpropagation(target=1),
    "lrp": LRP(target=1),
    "lrp at sites": LRP("c1|c2", target=1),
    "ig": IntegratedGradients(target=1, n_steps=4),
    "ig at sites": IntegratedGradients("c1|c2", target=1, n_steps=4),
    "influence": InternalInfluence("c1", target=1, n_steps=4),
    "conductance": Conductance("c1", target=1, n_steps=4),
    "deeplift": DeepLift(target=1),
    "patching": AttributionPatching("c1", target=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_without_a_batch_size_every_method_gives_the_scores_of_the_batch(name):
    model, x, other = ConvNet().double(), *torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    data = {"input": x, "corrupt": {"input": other}, "baseline": {"input": other}}
    whole, apart = run(METHODS[name], model, data, [3]), run(METHODS[name], model, data)
    for key in whole["attr"].keys(include_nested=True, leaves_only=True):
        torch.testing.assert_close(apart["attr"][key], whole["attr"][key], rtol=1e-9, atol=1e-12)
    for key, gap in whole["gap"].items() if "gap" in whole else ():
        torch.testing.assert_close(apart["gap", key], gap.sum(), rtol=1e-9, atol=1e-9)  # of all rows together


@pytest.mark.parametrize("factory", [SmoothGrad(target=1), ActivationMaximisation(target=1, n_steps=2)])
def test_without_a_batch_size_methods_that_work_on_rows_take_all_inputs_as_one(factory):
    model, x = ConvNet(), torch.randn(3, 1, 8, 8)
    td = run(factory, model, {"input": x})
    assert td["attr", "input"].shape == x.shape
    assert td["attr", "input"].isfinite().all()


def test_deeplift_pairs_rows_in_any_layout():
    model, x, start = SequenceFirst().double(), *torch.randn(2, 3, 4, 3, dtype=torch.float64)
    for size in ([3], []):
        td = run(DeepLift(target=0), model, {"input": x, "baseline": {"input": start}}, size)
        assert td["gap", "input"].abs().max() < 1e-12
        torch.testing.assert_close(
            td["attr", "input"].sum((1, 2)), (model(x) - model(start))[:, 0].detach(), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", METHODS)
def test_several_batch_axes_reach_a_convolution_as_one(name):
    model, x, other = ConvNet().double(), *torch.randn(2, 6, 1, 8, 8, dtype=torch.float64)
    split = [each.unflatten(0, (2, 3)) for each in (x, other)]
    flat, td = (
        run(METHODS[name], model, {"input": a, "corrupt": {"input": b}, "baseline": {"input": b}}, size)
        for a, b, size in ((x, other, [6]), (*split, [2, 3]))
    )
    assert td["output"].shape == (2, 3, 3)
    assert td.batch_size == (2, 3)
    assert torch.equal(td["input"], split[0])
    for key in flat["attr"].keys(include_nested=True, leaves_only=True):
        torch.testing.assert_close(td["attr"][key].flatten(0, 1), flat["attr"][key], rtol=1e-9, atol=1e-12)


def test_an_error_of_the_model_is_not_hidden_by_trying_its_rows_in_one_axis():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(Saliency(target=0), nn.Linear(3, 2), {"input": torch.ones(2, 3, 4)}, [2, 3])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "factory",
    [
        Saliency(target=0),
        IntegratedGradients(target=0, n_steps=3),
        IntegratedGradients("0", target=0, n_steps=3),
        Conductance("0", target=0, n_steps=3),
        SmoothGrad(target=0, n_samples=3),
        DeepLift(target=0),
        AttributionPatching("0", target=0, modifiers=[ScaleGradient("0", 2.0)]),
        InputXGradient(target=0, create_graph=True),
    ],
    ids=lambda factory: type(factory).__name__,
)
def test_statistics_of_a_batch_norm_in_training_are_those_of_one_forward_of_the_users_rows(factory, momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1))
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(6, 3)
    before = [id(each) for each in model.buffers()]
    td = run(factory, model, {"input": x, "corrupt": {"input": x + 1}}, [6])
    output = twin(x)
    assert torch.equal(td["output"].detach(), output.detach())  # one shape, one code path
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), twin.buffers(), strict=True))
    assert [id(each) for each in model.buffers()] == before


def test_the_rows_of_a_gap_are_not_told_from_a_length():
    model, x, start = SequenceFirst().double(), *torch.randn(2, 3, 3, 3, dtype=torch.float64)
    td = run(IntegratedGradients("inner", target=0, n_steps=30), model, {"input": x, "baseline": {"input": start}}, [3])
    assert td["attr", "inner"].shape == (3, 3, 3)  # (time, batch, features), as long as there are rows
    wanted = (model(x) - model(start))[:, 0].detach()
    torch.testing.assert_close(td["attr", "inner"].sum((0, 2)) - wanted, td["gap", "inner"], rtol=0, atol=1e-12)
    assert td["gap", "inner"].abs().max() < 1e-9


class Routed(nn.Module):
    """Two experts, each given only the tokens that its sign routes to it, as a list of rows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        mixed = tokens
        for number, expert in enumerate(self.experts):
            rows = ((tokens[:, 0] > 0) == bool(number)).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_add(0, rows, expert(tokens[rows]).tanh())
        return self.head(mixed.view_as(x).mean(1))


def routed():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(2, 3, 3, dtype=torch.float64)
    x[..., 0] = torch.tensor([[1.0, 2.0, -1.0], [1.0, -1.0, -2.0]])
    other = x.clone()
    other[..., 0] = torch.tensor([[-1.0, -2.0, -1.0], [1.0, -1.0, -2.0]])  # one token for the second expert, not three
    return model, x, other


@pytest.mark.parametrize(
    ("factory", "key"),
    [
        (AttributionPatching(r"experts\.1", target=0), "corrupt"),
        (IntegratedGradients(r"experts\.1", target=0, n_steps=4), "baseline"),
        (InternalInfluence(r"experts\.1", target=0, n_steps=4), "baseline"),
        (Conductance(r"experts\.1", target=0, n_steps=4), "baseline"),
        (EdgeAttributionPatching(r"experts\.1", "head", target=0), "corrupt"),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else each,
)
def test_an_expert_that_is_given_other_rows_is_refused_not_broadcast(factory, key):
    model, x, other = routed()
    with pytest.raises(AttributionError) as raised:
        run(factory, model, {"input": x, key: {"input": other}})
    assert str(raised.value).startswith("'experts.1' has shape (")
    assert "for others, so that its rows cannot be compared; select modules that every row passes" in str(raised.value)


@pytest.mark.parametrize(
    ("method", "key"), [(AttributionPatching, "corrupt"), (IntegratedGradients, "baseline")], ids=["patching", "path"]
)
def test_an_expert_that_some_inputs_never_reach_is_refused_where_two_runs_are_compared(method, key):
    model, x, _ = routed()
    away = x.clone()
    away[..., 0] = -1.0
    factory = method(r"experts\.1", target=0, allow_unused=True)
    with pytest.raises(AttributionError, match=r"has shape \(3, 3\) for some inputs of this method and does not run"):
        run(factory, model, {"input": x, key: {"input": away}})


def test_a_path_to_zero_at_an_expert_is_that_of_its_own_rows():
    model, x, _ = routed()
    td = run(IntegratedGradients(r"experts\.1", target=0, n_steps=40, baseline=0.0), model, {"input": x})
    kept = []
    with model.experts[1].register_forward_hook(lambda module, args, output: kept.append(output.detach())):
        with_expert = model(x)
    with model.experts[1].register_forward_hook(lambda module, args, output: torch.zeros_like(output)):
        without = model(x)
    assert td["attr", "experts.1"].shape == kept[0].shape == (3, 3)
    rise = (with_expert - without)[:, 0].sum().detach()
    torch.testing.assert_close(td["attr", "experts.1"].sum(), rise, rtol=0, atol=1e-9)  # 40 Gauss points
