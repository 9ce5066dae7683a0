"""Which value is meant: inputs of modules, several tensors, hidden units, what a module hands on, what does not run."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from attribution.nets import ConvNet, Transformer
from small_models import MLP, Pair, Residual
from tdcache import AttributionError, DirectionError, PathError
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    LRP,
    ActivationMaximisation,
    AttributionPatching,
    Conductance,
    GradCAM,
    GradDrop,
    GradientXActivation,
    IntegratedGradients,
    InternalInfluence,
    Saliency,
    ScaleGradient,
    StopGradient,
    Unit,
)


def run(factory, model, data, rows=(), **keys):
    with factory.prepare(model, **keys) as hooked:
        return hooked(TensorDict(data if isinstance(data, dict) else {"input": data}, batch_size=list(rows)))


def plain_gradient(selector, target=0, **options):
    return GradientXActivation(selector, multiply_by_inputs=False, target=target, **options)


class TwoReaders(nn.Module):
    """One value that two modules read, one of them by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        shared = self.first(x).tanh()
        return self.left(shared) * self.right(input=shared)


def test_at_what_a_module_reads_the_gradient_is_that_of_its_own_use():
    model, x = TwoReaders().double(), torch.randn(4, 3, dtype=torch.float64)
    td = run(plain_gradient("left|right", direction="fwd_pre"), model, x, [4])
    shared = model.first(x).tanh()
    left, right = model.left(shared), model.right(shared)
    torch.testing.assert_close(td["attr", "left"], (model.left.weight[0] * right[:, :1]).detach())
    torch.testing.assert_close(td["attr", "right"], (model.right.weight[0] * left[:, :1]).detach())


@pytest.mark.parametrize("rows", [[3], []])
def test_paths_and_patches_at_what_a_module_reads_change_that_reader_alone(rows):
    model, x, start = TwoReaders().double(), *torch.randn(2, 3, 3, dtype=torch.float64)
    data = {"input": x, "baseline": {"input": start}, "corrupt": {"input": start}}
    high, low = model.first(x).tanh().detach(), model.first(start).tanh().detach()
    right = model.right(high)[:, 0]
    rise = (model.left(high) - model.left(low))[:, 0] * right
    for factory, sign in (
        (IntegratedGradients("left", target=0, n_steps=2, direction="fwd_pre"), 1),
        (AttributionPatching("left", target=0, direction="fwd_pre"), -1),
    ):
        td = run(factory, model, data, rows)  # the target is linear in what that reader gets
        torch.testing.assert_close(sign * td["attr", "left"].sum(-1), rise.detach(), rtol=1e-9, atol=1e-12)


def test_other_directions_are_refused():
    with pytest.raises(DirectionError, match="what modules return, 'fwd', or read, 'fwd_pre'; got 'bwd'"):
        GradientXActivation("left", direction="bwd")


def test_several_tensors_of_one_output_are_written_below_its_path():
    model, x = Pair(dict), torch.randn(3, 4)
    target = lambda td: td["output"][:, 0] ** 2  # noqa: E731
    td = run(plain_gradient("inner", pick=["left", "right"], target=target), model, x, [3])
    for pick in ("left", "right"):
        one = run(plain_gradient("inner", pick=pick, target=target), model, x, [3])
        assert torch.equal(td["attr", "inner", pick], one["attr", "inner"])
        assert one["attr", "inner"].abs().sum() > 0


def test_all_tensors_without_a_list_are_refused():
    with pytest.raises(ValueError, match=r"does not say how many scores there are; give a list, such as pick=\[0, 1\]"):
        GradientXActivation("inner", pick="all")


def test_two_methods_may_read_one_site_differently():
    model, x = Pair(tuple), torch.randn(2, 4)
    stack = Together(
        GradientXActivation("inner", pick=0, target=0, name="a", allow_unused=True),
        GradientXActivation("inner", pick=1, target=0, name="b", allow_unused=True),
    )
    td = run(stack, model, x, [2])
    for name, pick in (("a", 0), ("b", 1)):
        alone = run(GradientXActivation("inner", pick=pick, target=0, allow_unused=True), model, x, [2])
        assert torch.equal(td["attr", name, "inner"], alone["attr", "inner"])


class Skips(nn.Module):
    """Runs one of its modules for nothing, and one not at all."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, extra):
        self.idle(x)
        return self.used(x)


@pytest.mark.parametrize("rows", [[2], []])
@pytest.mark.parametrize(
    "method",
    [
        GradientXActivation("used|idle|never", target=0, allow_unused=True),
        IntegratedGradients("used|idle|never", target=0, n_steps=2, allow_unused=True),
        Conductance("used|idle|never", target=0, n_steps=2, allow_unused=True),
        InternalInfluence("used|idle", target=0, n_steps=2, allow_unused=True),
        LRP("used|idle|never", target=0, allow_unused=True),
        AttributionPatching("used|idle|never", target=0, allow_unused=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_unused_layers_have_scores_of_zero_where_that_is_allowed(method, rows):
    data = {"x": torch.randn(2, 3), "extra": torch.randn(2, 3)}
    td = run(method, Skips(), data, rows, in_keys=["x", "extra"])
    assert td["attr", "used"].abs().sum() > 0
    assert ("attr", "never") not in td
    assert torch.equal(td["attr", "idle"], torch.zeros(2, 2))


def test_unused_inputs_have_scores_of_zero_where_that_is_allowed():
    data = {"x": torch.randn(2, 3), "extra": torch.randn(2, 3)}
    with pytest.raises(AttributionError, match=r"no gradient reaches 'extra'.*allow_unused=True for scores of zero"):
        run(Saliency(target=0), Skips(), data, [2], in_keys=["x", "extra"])
    td = run(Saliency(target=0, allow_unused=True), Skips(), data, [2], in_keys=["x", "extra"])
    assert torch.equal(td["attr", "extra"], torch.zeros(2, 3))
    assert td["attr", "x"].abs().sum() > 0


def test_a_module_that_does_not_run_says_how_to_leave_it_out():
    data = {"x": torch.randn(2, 3), "extra": torch.randn(2, 3)}
    with pytest.raises(AttributionError, match=r"'never' did not run .* leave it out with allow_unused=True"):
        run(GradientXActivation("never", target=0), Skips(), data, [2], in_keys=["x", "extra"])


@pytest.mark.parametrize("rows", [[4], []])
@pytest.mark.parametrize(
    ("unit", "value"),
    [
        (Unit("c1", (2, 3, 1)), lambda seen: seen[:, 2, 3, 1]),
        (Unit("c1", lambda value: value[:, 1].mean((-1, -2))), lambda seen: seen[:, 1].mean((-1, -2))),
    ],
    ids=["index", "callable"],
)
def test_a_hidden_unit_is_a_target(unit, value, rows):
    model, x = ConvNet().double(), torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    stack = Together(Saliency(target=unit, absolute=False), IntegratedGradients(target=unit, n_steps=2, name="ig"))
    td = run(stack, model, x.detach(), rows)
    (wanted,) = torch.autograd.grad(value(model.c1(x)).sum(), x)
    torch.testing.assert_close(td["attr", "input"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(td["attr", "ig", "input"], (wanted * x).detach(), rtol=1e-9, atol=1e-12)  # linear
    assert td["gap", "ig", "input"].isfinite().all()


def test_an_input_is_moved_to_what_a_hidden_unit_likes():
    model, x = ConvNet(), torch.zeros(2, 1, 8, 8)
    unit = Unit("c2", (3, 0, 0))
    before = model.c2(model.r1(model.c1(x)))[:, 3, 0, 0]
    td = run(ActivationMaximisation(target=unit, n_steps=5, rate=0.5), model, x, [2])
    after = model.c2(model.r1(model.c1(td["attr", "input"])))[:, 3, 0, 0]
    assert (after > before + 0.1).all()


def test_a_unit_that_is_not_there_or_not_one_per_row_is_refused():
    with pytest.raises(PathError, match="did you mean 'c1'"):
        run(Saliency(target=Unit("c11", 0)), ConvNet(), torch.randn(2, 1, 8, 8), [2])
    with pytest.raises(AttributionError, match=r"Unit\('c1', 0\) gives values of shape \(2, 4, 6\), not one scalar"):
        run(Saliency(target=Unit("c1", 0)), ConvNet(), torch.randn(2, 1, 8, 8), [2])
    with pytest.raises(AttributionError, match="is read inside the model, not from its outputs; give it as target="):
        Unit("c1", 0)(TensorDict())


def test_one_call_of_a_module_is_a_target():
    model, x = Residual().double(), torch.randn(3, 4, dtype=torch.float64)
    found = [run(Saliency(target=Unit("relu", 1, call=call), absolute=False), model, x, [3]) for call in (0, 1)]
    assert not torch.equal(found[0]["attr", "input"], found[1]["attr", "input"])
    with pytest.raises(AttributionError, match="'relu' ran 2 times in one forward; choose one call"):
        run(Saliency(target=Unit("relu", 1)), model, x, [3])


def test_a_joint_path_moves_several_sites_at_once_and_their_scores_share_one_sum():
    model, ids = Transformer().double(), torch.randint(11, (3, 4))
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    td = run(IntegratedGradients("blocks.0.attn.[qkv]", target=target, n_steps=40, joint=True), model, ids, [3])
    total = sum(td["attr", f"blocks.0.attn.{name}"].sum((1, 2)) for name in "qkv")
    handles = [
        getattr(model.blocks[0].attn, name).register_forward_hook(lambda module, args, output: 0 * output)
        for name in "qkv"
    ]
    low = model(ids)[:, -1, 2]
    for handle in handles:
        handle.remove()
    rise = (model(ids)[:, -1, 2] - low).detach()
    torch.testing.assert_close(total, rise, rtol=0, atol=1e-7)
    assert all(torch.equal(td["gap", f"blocks.0.attn.{name}"], td["gap", "blocks.0.attn.q"]) for name in "qkv")
    apart = run(IntegratedGradients("blocks.0.attn.q", target=target, n_steps=40), model, ids, [3])
    assert not torch.allclose(td["attr", "blocks.0.attn.q"], apart["attr", "blocks.0.attn.q"])


class Sided(nn.Module):
    def forward(self, x, side):
        return (x**2).sum(-1) * side.sum()


@pytest.mark.parametrize(
    "factory",
    [IntegratedGradients(n_steps=3, inputs=["x"]), Conductance("", n_steps=3, inputs=["x"]), Saliency(inputs=["x"])],
)
def test_inputs_that_are_not_named_are_held_constant_whatever_their_shape(factory):
    x, side = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    td = run(factory, Sided(), {"x": x, "side": side}, in_keys=["x", "side"])
    assert ("attr", "side") not in td
    if isinstance(factory, IntegratedGradients):
        torch.testing.assert_close(td["attr", "x"], x**2 * side.sum(), rtol=1e-12, atol=1e-12)
    with pytest.raises(AttributionError, match=r"the inputs= has an entry 'sides', .* did you mean 'side'"):
        run(Saliency(inputs=["sides"]), Sided(), {"x": x, "side": side}, in_keys=["x", "side"])


class Skip(nn.Module):
    """A residual block around a module that hands its input on."""

    def __init__(self):
        super().__init__()
        self.first, self.same, self.last = nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)

    def forward(self, x):
        stream = self.first(x)
        return self.last(stream + 2 * self.same(input=stream) if self.by_name else stream + 2 * self.same(stream))


@pytest.mark.parametrize("by_name", [False, True])
def test_what_is_changed_at_a_module_that_hands_its_input_on_leaves_the_skip_path_alone(by_name):
    model, x = Skip().double(), torch.randn(2, 3, dtype=torch.float64)
    model.by_name = by_name
    through = (model.last.weight[0] @ model.first.weight).expand(2, 3).detach()
    for modifiers, share in (((), 3), ((StopGradient("same"),), 1), ((ScaleGradient("same", 0.5),), 2)):
        td = run(Saliency(target=0, absolute=False, modifiers=modifiers), model, x, [2])
        torch.testing.assert_close(td["attr", "input"], share * through, rtol=1e-12, atol=1e-14)
    td = run(plain_gradient("same"), model, x, [2])
    torch.testing.assert_close(td["attr", "same"], 2 * model.last.weight[0].expand(2, 3).detach())


def sequential():
    torch.manual_seed(0)
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["x"], ["a"]),
        TensorDictModule(nn.Tanh(), ["a"], ["b"]),
        TensorDictModule(nn.Bilinear(3, 3, 2), ["a", "b"], ["output"]),
    ).double()


@pytest.mark.parametrize("rows", [[4], []])
def test_the_output_of_a_tensordict_module_is_its_own_entry_for_scores_patches_and_modifiers(rows):
    model, x, other = sequential(), *torch.randn(2, 4, 3, dtype=torch.float64)
    a = model.module[0].module(x).detach().requires_grad_()
    b = a.tanh().detach().requires_grad_()
    grad_a, grad_b = torch.autograd.grad(model.module[2].module(a, b)[:, 0].sum(), (a, b))
    td = run(plain_gradient(r"module\.1", target=("output", 0)), model, {"x": x}, rows)
    torch.testing.assert_close(td["attr", "module.1"], grad_b)
    data = {"x": x, "corrupt": {"x": other}}
    td = run(AttributionPatching(r"module\.1", target=("output", 0)), model, data, rows)
    change = model.module[0].module(other).tanh() - b
    torch.testing.assert_close(td["attr", "module.1"], (change * grad_b).detach())
    stopped = run(
        plain_gradient(r"module\.0", target=("output", 0), modifiers=[StopGradient(r"module\.1")]),
        model,
        {"x": x},
        rows,
    )
    torch.testing.assert_close(stopped["attr", "module.0"], grad_a)  # the way past the module is open


def test_a_modifier_means_the_first_tensor_or_all_as_everywhere():
    model, x = nn.LSTM(3, 4, batch_first=True).double(), torch.randn(2, 5, 3, dtype=torch.float64)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = model

        def forward(self, x):
            output, (_, cell) = self.lstm(x)
            return output.sum((1, 2)) + cell.sum((0, 2))

    both = Both()
    first = run(Saliency(modifiers=[StopGradient("lstm")]), both, x, [2])
    every = run(Saliency(modifiers=[StopGradient("lstm", pick="all")]), both, x, [2])
    assert first["attr", "input"].abs().sum() > 0
    assert every["attr", "input"].abs().sum() == 0


def test_a_path_that_is_not_there_is_refused_with_near_misses():
    with pytest.raises(PathError, match=r"'layers\.11'.* did you mean 'layers\.1'"):
        run(Saliency(target=0, modifiers=[GradDrop(["layers.0", "layers.11"])]), MLP(), torch.randn(2, 4), [2])


def test_a_pattern_that_a_layer_called_by_keywords_returns_has_its_gradient():
    class Weighs(nn.Module):
        def forward(self, x):
            pattern = x.softmax(-1)
            return pattern * x, pattern

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attn = nn.Linear(4, 4), Weighs()

        def forward(self, x):
            return self.attn(x=self.first(x))[0].sum(-1)

    model, x = Model().double(), torch.randn(2, 4, dtype=torch.float64)
    td = run(plain_gradient("attn", pick=1, target=None), model, x, [2])
    torch.testing.assert_close(td["attr", "attn"], model.first(x).detach())


def test_a_unit_is_a_target_at_the_very_site_that_is_explained():
    td = run(GradCAM("c2", target=Unit("c2", (0, 0, 0))), ConvNet(), torch.randn(2, 1, 8, 8), [2])
    assert td["attr", "c2"].shape == (2, 1, 4, 4)
