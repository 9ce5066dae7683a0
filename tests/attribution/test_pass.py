"""One forward and one backward for a stack of methods, and right numbers whatever the model and the caller do."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet, Counter, Transformer
from model_state import state_of
from rounding import assert_same_but_rounding
from small_models import MLP, Pair, Residual, Tied
from stable_ids import stable_id
from tdcache import ActivationCaching, AttributionError, First, HookingContextFactory, Mean, MultiHookManager, Stack
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    LRP,
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
    SmoothGrad,
    StopGradient,
    epsilon_plus,
)


def run(factory, model, data, batch_size=None, **keys):
    td = TensorDict(data if isinstance(data, dict) else {"input": data}, batch_size=batch_size)
    with factory.prepare(model, **keys) as hooked:
        return hooked(td)


def images(rows=4):
    return torch.randn(rows, 1, 8, 8)


STACK = (
    Saliency(target=1, name="saliency"),
    InputXGradient(target=1, name="ixg"),
    GradientXActivation(r"c\d|r\d", target=1, name="gxa"),
    GradCAM("c2", target=1, name="cam"),
    GuidedBackpropagation(target=1, name="guided"),
    LRP(target=1, rules=epsilon_plus(), name="lrp"),
    IntegratedGradients(target=1, n_steps=4, name="ig"),
    InternalInfluence("c1", target=1, n_steps=4, name="influence"),
    Conductance("c1", target=1, n_steps=4, name="conductance"),
    DeepLift(target=1, name="deeplift"),
    SmoothGrad(target=1, n_samples=3, name="smooth"),
)


def test_eleven_methods_share_their_points_and_two_backwards(monkeypatch):
    model, x = ConvNet().eval(), images()
    apart = [run(method, model, x, [4]) for method in STACK]
    counter = Counter(model, monkeypatch)
    td = run(Together(*STACK), model, x, [4])
    # A few rows show where rows are, points without a backward need no graph where there are many, and DeepLift's rules
    # need what was seen of the reference.
    assert counter.counts == (4, 2)
    for method, alone in zip(STACK, apart, strict=True):
        for key in alone["attr", method.name].keys(include_nested=True, leaves_only=True):
            torch.testing.assert_close(td["attr", method.name][key], alone["attr", method.name][key])


@pytest.mark.parametrize("method", [*STACK, Together(STACK[5], STACK[4])], ids=lambda method: type(method).__name__)
def test_each_method_alone_takes_one_backward_and_as_few_forwards_as_it_can(method, monkeypatch):
    model, x = ConvNet().eval(), images()
    counter = Counter(model, monkeypatch)
    td = run(method, model, x, [4])
    forwards = 2 if isinstance(method, DeepLift) else 1  # the reference comes first
    tried = isinstance(method, Conductance | InternalInfluence | Together)  # a few rows show where rows are, once
    assert counter.counts == (forwards + tried, 1)
    torch.testing.assert_close(td["output"], model(x).detach())
    before = counter.forwards
    run(method, model, x, [4])
    assert counter.counts == (before + forwards, 2)


def test_nested_contexts_share_the_pass_and_all_write_their_scores(monkeypatch):
    model, x = ConvNet().eval(), images()
    counter = Counter(model, monkeypatch)
    with GradientXActivation("c1", target=0).prepare(model) as outer:
        with Saliency(target=0).prepare(outer) as inner:
            td = inner(TensorDict({"input": x}, batch_size=[4]))
        assert counter.counts == (1, 1)
        assert {"c1", "input"} == set(td["attr"].keys())
        alone = outer(TensorDict({"input": x}, batch_size=[4]))
    assert set(alone["attr"].keys()) == {"c1"}


def test_contexts_opened_side_by_side_on_one_model_share_the_pass(monkeypatch):
    model, x = ConvNet().eval(), images()
    counter = Counter(model, monkeypatch)
    with GradientXActivation("c1", target=0).prepare(model), Saliency(target=0).prepare(model) as hooked:
        td = hooked(TensorDict({"input": x}, batch_size=[4]))
    assert counter.counts == (1, 1)
    assert {"c1", "input"} == set(td["attr"].keys())


def test_plain_caching_takes_part_and_keeps_the_users_rows(monkeypatch):
    model, x = ConvNet().eval(), images()
    counter = Counter(model, monkeypatch)
    caching = ActivationCaching("c1|c2", directions=["fwd", "bwd"], use_nested_keys=True)
    with Together(caching, GradientXActivation("c1", target=0), Saliency(target=0)).prepare(model) as hooked:
        td = hooked(TensorDict({"input": x}, batch_size=[4]))
    assert counter.counts == (1, 1)
    assert torch.equal(hooked.cache["fwd", "c1"] * hooked.cache["bwd", "c1"], td["attr", "c1"])
    assert hooked.cache["bwd", "c2"].shape == (4, 6, 4, 4)


def test_beside_caching_a_path_runs_apart_and_the_cache_holds_the_users_rows_last():
    model, x = ConvNet().eval(), images()
    alone = run(IntegratedGradients(target=0, n_steps=3), model, x, [4])
    with Together(ActivationCaching("c1"), IntegratedGradients(target=0, n_steps=3)).prepare(model) as hooked:
        td = hooked(TensorDict({"input": x}, batch_size=[4]))
    torch.testing.assert_close(td["attr", "input"], alone["attr", "input"])
    torch.testing.assert_close(hooked.cache["c1"], model.c1(x).detach())


@pytest.mark.parametrize("factory", [IntegratedGradients(target=0, n_steps=3), LRP("c1", target=0)], ids=type)
def test_reducers_of_a_cache_count_the_users_rows_once(factory):
    model, x = ConvNet().eval(), images()
    seen = []
    caches = [ActivationCaching("c1", reducer=Mean()), ActivationCaching("head", reducer=Stack())]
    first = ActivationCaching("c2", reducer=First())
    with first.prepare(model) as outer, Together(*caches, factory).prepare(model) as hooked:
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        hooked(TensorDict({"input": x}, batch_size=[4]))
        handle.remove()
    value = model.c1(x).detach()
    # One mean over 576 numbers in float64, rounded once.
    torch.testing.assert_close(hooked.cache["c1"], value.mean(0), rtol=0, atol=1e-6)
    assert torch.equal(hooked.cache["head"], model(x).detach()[None])
    assert torch.equal(outer.cache["c2"], model.c2(model.r1(value)).detach())
    assert len(seen) > 1
    assert torch.equal(seen[-1], model(x))  # a hook of the user's sees every forward, that of the rows last


class AddOne(HookingContextFactory):
    def _hook_module(self, module):
        manager = MultiHookManager("c1")
        return manager.register_hook(
            module, lambda path: lambda module, args, output: output + 1, relative_path=module.relative_path
        )


def test_edits_come_before_what_is_explained():
    model, x = ConvNet().eval(), images()
    td = run(Together(GradientXActivation("c1", target=0), AddOne()), model, x, [4])
    edited = (model.c1(x) + 1).detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        model.head(model.flat(model.pool(model.r2(model.c2(model.r1(edited))))))[:, 0].sum(), edited
    )
    torch.testing.assert_close(td["attr", "c1"], (grad * edited).detach())


def test_a_modifier_in_a_composite_means_everything_and_one_in_a_method_only_its_rows():
    model, x = ConvNet().eval(), images()
    stopped = run(Together(StopGradient("r2"), GradientXActivation("c2", target=0)), model, x, [4])
    assert stopped["attr", "c2"].abs().sum() == 0
    td = run(
        Together(
            GradientXActivation("c2", target=0, modifiers=[StopGradient("r2")], name="stopped"),
            GradientXActivation("c2", target=0, name="plain"),
        ),
        model,
        x,
        [4],
    )
    assert td["attr", "stopped", "c2"].abs().sum() == 0
    alone = run(GradientXActivation("c2", target=0), model, x, [4])
    assert_same_but_rounding(td["attr", "plain", "c2"], alone["attr", "c2"])  # rows of a larger batch


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, None])
def test_every_chunk_size_gives_the_same_numbers(chunk):
    model, x = ConvNet().double().eval(), images().double()
    stack = [
        IntegratedGradients(target=1, n_steps=6, chunk=chunk),
        IntegratedGradients("c2|r1", target=1, n_steps=6, chunk=chunk),
        Conductance("c1", target=1, n_steps=6, chunk=chunk),
    ]
    whole = [
        run(type(f)(*(() if f.selector is None else (f.selector,)), target=1, n_steps=6), model, x, [4])
        for f in stack[:2]
    ]
    td = run(Together(*stack), model, x, [4])
    for one in whole:
        for key, value in one["attr"].items():
            torch.testing.assert_close(td["attr", key], value, rtol=1e-12, atol=1e-14)


def test_a_batch_equals_its_rows_one_by_one():
    model, x = ConvNet().double().eval(), images(3).double()
    stack = Together(*STACK)
    whole = run(stack, model, x, [3])["attr"]
    for row in range(3):
        alone = run(stack, model, x[row : row + 1], [1])["attr"]
        for key in alone.keys(include_nested=True, leaves_only=True):
            torch.testing.assert_close(alone[key][0], whole[key][row], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_any_batch_shape_gives_the_scores_of_the_rows(shape):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(*shape, 4)
    stack = Together(Saliency(target=1, name="s"), GradientXActivation("1", target=1), IntegratedGradients(target=1))
    td = run(stack, model, x, list(shape))
    rows = run(stack, model, x.reshape(-1, 4), [x.numel() // 4])
    assert td["attr", "1"].shape == (*shape, 5)
    for key in rows["attr"].keys(include_nested=True, leaves_only=True):
        torch.testing.assert_close(td["attr"][key].reshape(rows["attr"][key].shape), rows["attr"][key])


def test_without_a_batch_size_any_layout_is_right():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, x):  # (time, batch, features)
            return self.head(self.rnn(x)[0][-1])

    model, x = SequenceFirst(), torch.randn(5, 7, 3)
    td = run(Together(GradientXActivation("rnn", target=0), IntegratedGradients(target=0, n_steps=3)), model, x)
    for row in range(7):
        alone = run(IntegratedGradients(target=0, n_steps=3), model, x[:, row : row + 1])
        torch.testing.assert_close(alone["attr", "input"][:, 0], td["attr", "input"][:, row])
    assert td["attr", "rnn"].shape == (5, 7, 4)


def expected_at(model, site, x, call=0):
    """Gradient times activation by a hook that hands on a copy."""
    seen = []

    def keep(module, args, output):
        seen.append(output)
        return output.clone()

    handle = model.get_submodule(site).register_forward_hook(keep)
    total = model(x)[..., 0].sum()
    handle.remove()
    (grad,) = torch.autograd.grad(total, seen[call])
    return (grad * seen[call]).detach()


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activations_change_neither_value_nor_gradient(inplace):
    model, x = ConvNet(inplace), images()
    td = run(GradientXActivation("c1|r1|c2", target=0), model, x, [4])
    for site in ("c1", "r1", "c2"):
        torch.testing.assert_close(td["attr", site], expected_at(model, site, x), rtol=0, atol=0)


def test_an_in_place_operation_outside_modules_is_an_error_that_names_the_remedy():
    class AddsInPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x)
            h += 1
            return self.second(h)

    model, x = AddsInPlace(), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"value kept at 'first' was overwritten .* snapshot=True"):
        run(GradientXActivation("first", target=0), model, x, [2])
    td = run(GradientXActivation("first", target=0, snapshot=True), model, x, [2])
    torch.testing.assert_close(td["attr", "first"], expected_at(model, "first", x))


def test_a_module_that_runs_twice_needs_a_choice():
    model, x = Residual(), torch.randn(3, 4)
    with pytest.raises(AttributionError, match="'relu' ran 2 times in one forward; choose one call with call=0"):
        run(GradientXActivation("relu", target=0), model, x, [3])
    for call in (0, 1):
        td = run(GradientXActivation("relu", target=0, call=call), model, x, [3])
        torch.testing.assert_close(td["attr", "relu"], expected_at(model, "relu", x, call))


def test_a_tied_module_answers_to_each_of_its_names():
    td = run(GradientXActivation("encode|decode", target=0, call=0), Tied(), torch.randn(3, 4), [3])
    assert torch.equal(td["attr", "encode"], td["attr", "decode"])


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_structured_outputs_are_picked_from(kind):
    model, x = Pair(kind), torch.randn(3, 4)
    pick = "right" if kind is dict else 1
    td = run(GradientXActivation("inner", target=0, pick=pick), model, x, [3])
    right = model.inner.right(x)
    expected = torch.zeros_like(right)
    expected[:, 0] = right[:, 0].detach()
    torch.testing.assert_close(td["attr", "inner"], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_callers_modes_and_frozen_parameters_change_nothing(mode, frozen):
    model, ids = Transformer().requires_grad_(not frozen), torch.arange(6).reshape(2, 3)
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    stack = Together(
        GradientXActivation(r"embed|blocks\.\d", target=target),
        IntegratedGradients("embed", target=target, name="ig", n_steps=3),
    )
    wanted = run(stack, model, ids, [2])
    with mode():
        td = run(stack, model, ids, [2])
    for key in wanted["attr"].keys(include_nested=True, leaves_only=True):
        torch.testing.assert_close(td["attr"][key], wanted["attr"][key])
        assert td["attr"][key].abs().sum() > 0


def test_frozen_and_trainable_models_give_the_same_scores():
    model, x = ConvNet(), images()
    one = run(GradientXActivation("c1|c2", target=0), model, x, [4])
    two = run(GradientXActivation("c1|c2", target=0), model.requires_grad_(False), x, [4])
    assert all(torch.equal(one["attr", site], two["attr", site]) for site in ("c1", "c2"))


def test_nothing_is_left_on_the_users_tensors_and_model():
    model = ConvNet()
    x, leaf = images(), images().requires_grad_()
    model.c1.weight.grad = torch.ones_like(model.c1.weight)
    before = state_of(model)
    for given in (x, leaf):
        td = run(Together(*STACK), model, given, [4])
        assert td["input"] is given or torch.equal(td["input"], given)
        assert not any(td["attr"][key].requires_grad for key in td["attr"].keys(include_nested=True, leaves_only=True))
    assert (x.requires_grad, x.grad, leaf.requires_grad, leaf.grad) == (False, None, True, None)
    assert torch.equal(model.c1.weight.grad, torch.ones_like(model.c1.weight))
    assert model.c2.weight.grad is None
    assert state_of(model) == before


def test_an_error_half_way_leaves_the_model_as_it_was():
    model = ConvNet()
    before = state_of(model)
    for factory in (
        GradientXActivation("c1", target=9),
        LRP(target=lambda td: td["output"]),
        GradCAM("c1", target="x", name="n"),
    ):
        with pytest.raises((AttributionError, IndexError)), factory.prepare(model) as hooked:
            hooked(TensorDict({"input": images()}, batch_size=[4]))
        assert state_of(model) == before


def test_outputs_are_those_of_the_users_rows():
    model, x = ConvNet().eval(), images()
    td = run(Together(*STACK), model, x, [4])
    torch.testing.assert_close(td["output"], model(x).detach())
    assert td.batch_size == (4,)


def test_half_precision_models_accumulate_in_single_precision():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    x = torch.randn(4, 3).bfloat16()
    stack = Together(GradientXActivation("1", target=0), IntegratedGradients(target=0, n_steps=64))
    td = run(stack, model, x, [4])
    assert td["attr", "1"].dtype == td["attr", "input"].dtype == torch.float32
    exact = run(IntegratedGradients(target=0, n_steps=64), model.float(), x.float(), [4])
    # bfloat16 has eight bits; a sum of 64 terms kept in it would be off by several per cent.
    limit = 2**-6 * exact["attr", "input"].abs().max().item()
    torch.testing.assert_close(td["attr", "input"], exact["attr", "input"], rtol=0, atol=limit)


def test_create_graph_makes_scores_differentiable():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3, requires_grad=True)
    td = run(InputXGradient(target=0, create_graph=True), model, x, [5])
    (grad,) = torch.autograd.grad(td["attr", "input"].sum(), x)
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad((first * x).sum(), x)
    torch.testing.assert_close(grad, wanted)


def test_scores_can_be_a_loss_for_the_parameters():
    model, x = MLP(), torch.randn(5, 4)
    td = run(GradientXActivation(r"layers\.1", target=0, create_graph=True), model, x, [5])
    td["attr", "layers.1"].pow(2).sum().backward()
    assert model.layers[0].weight.grad.abs().sum() > 0


def test_batch_norms_in_training_are_not_run_over_other_rows_than_the_users():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)), torch.randn(6, 3)
    td = run(
        Together(Saliency(target=0, absolute=False), IntegratedGradients(target=0, n_steps=3, name="ig")), model, x, [6]
    )
    alone = run(Saliency(target=0, absolute=False), model, x, [6])
    torch.testing.assert_close(td["attr", "input"], alone["attr", "input"])


def test_a_compiled_model_is_explained_without_its_graph():
    model, x = ConvNet().eval(), images()
    wanted = run(GradientXActivation("c1", target=0), model, x, [4])
    model.compile(backend="eager")
    td = run(GradientXActivation("c1", target=0), model, x, [4])
    assert torch.equal(td["attr", "c1"], wanted["attr", "c1"])


def test_reduce_sums_axes():
    model, x = ConvNet(), images()
    full = run(GradientXActivation("c1", target=0), model, x, [4])["attr", "c1"]
    summed = run(GradientXActivation("c1", target=0, reduce=(-1, -2)), model, x, [4])["attr", "c1"]
    torch.testing.assert_close(summed, full.sum((-1, -2)))


def test_edges_and_sites_may_stand_in_one_composite_by_name():
    model, ids = Transformer(), torch.arange(6).reshape(2, 3)
    target = lambda td: td["output"][:, -1, 2]  # noqa: E731
    edges = EdgeAttributionPatching("embed", "ln_f", target=target, name="edges")
    td = run(
        Together(edges, GradientXActivation("embed", target=target)),
        model,
        {"input": ids, "corrupt": {"input": ids + 1}},
        [2],
    )
    assert td["attr", "edges", "embed", "ln_f"].shape == (2,)
    assert td["attr", "embed"].shape == (2, 3, 8)


@pytest.mark.parametrize(
    "method",
    [
        GradientXActivation("c1", target=1),
        GradCAM("c2", target=1),
        Saliency(target=1),
        IntegratedGradients("c1", target=1, n_steps=3),
        IntegratedGradients(target=1, n_steps=3),
        DeepLift(target=1),
        LRP("c2", target=1),
    ],
    ids=stable_id,
)
def test_inputs_made_under_inference_mode_are_explained(method):
    model = ConvNet()
    with torch.inference_mode():
        x, start = torch.randn(2, 3, 1, 8, 8)
    plain = [each.clone() for each in (x, start)]
    found, wanted = (
        run(method, model, {"input": a, "baseline": {"input": b}}, [3])["attr"] for a, b in ((x, start), plain)
    )
    for key, value in wanted.items():
        assert torch.equal(found[key], value)
    assert x.is_inference()


def test_without_the_activation_the_scores_of_a_module_are_its_gradients():
    model, x = ConvNet().double(), images().double()
    td = run(GradientXActivation(r"c\d|r1", target=1, multiply_by_inputs=False), model, x, [4])
    for site in ("c1", "r1", "c2"):
        seen = []
        handle = getattr(model, site).register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        total = model(x)[:, 1].sum()
        handle.remove()
        torch.testing.assert_close(td["attr", site], torch.autograd.grad(total, seen)[0], rtol=1e-9, atol=1e-12)
