"""Activation patching against hand-written hooks."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, pasted, values
from model_state import state_of
from small_models import MLP, Pair, Residual, Tied
from tdcache import (
    ActivationCaching,
    ActivationPatching,
    CompositeHookingContextFactory,
    ContextError,
    EditError,
    HookedModule,
    SelectionError,
    cache_activations,
)


@pytest.fixture
def y():
    return torch.randn(5, 4)


def both(x, y, **options):
    return TensorDict({"input": x, "patched": {"input": y}}, **options)


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 2))


def test_a_second_input_is_patched_with_the_activations_of_the_first(model, x, y):
    data = both(x, y, batch_size=5)
    with ActivationPatching("layers.1").prepare(model) as hooked:
        assert hooked(data) is data
    source = values(model, ["layers.1"], lambda: model(x))["layers.1"]
    with edited(model, "layers.1", lambda output: source):
        expected = model(y)
    assert torch.equal(data["output"], model(x))
    assert torch.equal(data["patched", "output"], expected)
    assert sorted(data.keys()) == ["input", "output", "patched"]
    assert sorted(data["patched"].keys()) == ["input", "output"]


def test_denoising_and_noising_are_the_two_ways_round(model, x, y):
    results = []
    for clean, corrupted in ((x, y), (y, x)):
        with ActivationPatching("layers.0", units=[0, 1]).prepare(model) as hooked:
            results.append(hooked(both(clean, corrupted))["patched", "output"])
    for result, (given, into) in zip(results, ((x, y), (y, x)), strict=True):
        source = values(model, ["layers.0"], lambda given=given: model(given))["layers.0"]
        with edited(model, "layers.0", lambda output, source=source: pasted(output, source, (..., [0, 1]))):
            assert torch.equal(result, model(into))


def test_a_cache_is_pasted_into_every_forward(model, x, y):
    with cache_activations(model, r"layers\.\d") as cache:
        model(x)
    with ActivationPatching(r"layers\.[02]", source=cache).prepare(model) as hooked:
        results = hooked(y), model(y), hooked(TensorDict({"input": y}))["output"]
    for result in results:
        assert torch.equal(result, model(x))


def test_nested_keys_and_the_keys_of_a_run_are_understood(model, x, y):
    with ActivationCaching("head", use_nested_keys=True).prepare(model) as nested:
        model(x)
    hooked = HookedModule.from_module(model)
    with hooked.run(x) as run:
        run.get("head")
        run.get_input("head")
    for source, direction in ((nested.cache, "fwd"), (run.cache, "fwd"), (run.cache, "fwd_pre")):
        with ActivationPatching("head", source=source, direction=direction).prepare(model) as patched:
            assert torch.equal(patched(y), model(x))


def test_a_proxy_of_a_run_is_a_source(model, x, y):
    with HookedModule.from_module(model).run(x) as run:
        proxy = run.get("layers.2")
    for source in (proxy, {"layers.2": proxy}, {"layers.2": proxy.resolve()}):
        with ActivationPatching("layers.2", source=source).prepare(model) as hooked:
            assert torch.equal(hooked(y), model(x))


def test_patching_a_run_with_its_own_cache_changes_no_bit(x):
    for model in (MLP(), Residual(), Pair(), cnn()):
        data = torch.randn(2, 2, 8, 8) if isinstance(model, nn.Sequential) else x
        paths = [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)]
        selector = [path for path in paths if path != "relu"]  # it runs twice, and a cache has one value
        with cache_activations(model, selector, hold="snapshot") as cache:
            plain = model(data)
        with ActivationPatching(selector, source=cache).prepare(model):
            assert torch.equal(model(data), plain)
        with ActivationPatching(selector).prepare(model) as hooked:
            twice = hooked(both(data, data))
        assert torch.equal(twice["patched", "output"], plain)


def test_modules_that_are_called_twice_get_each_call_its_own_value(x, y):
    for model, path in ((Tied(), "encode"), (Residual(), "relu")):
        with ActivationPatching(path).prepare(model) as hooked:
            data = hooked(both(x, y))
        assert torch.equal(data["output"], model(x))
        if path == "encode":
            assert torch.equal(data["patched", "output"], model(x))  # the second call's value decides alone
        source = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda *args, kept=source: kept.append(args[2].clone())
        )
        model(x)
        handle.remove()
        calls = iter(source)
        with edited(model, path, lambda output, calls=calls: next(calls)):
            assert torch.equal(data["patched", "output"], model(y))


@pytest.mark.parametrize("batch_size", [[], [5], [2, 3]])
def test_any_batch_shape_passes(model, batch_size):
    shape = (*batch_size, 4) if batch_size else (7, 4)
    x, y = torch.randn(shape), torch.randn(shape)
    with ActivationPatching("layers.1").prepare(model) as hooked:
        data = hooked(both(x, y, batch_size=batch_size))
    torch.testing.assert_close(data["patched", "output"], model(x))


def test_in_place_modules_behind_a_patch_write_neither_into_the_source_nor_into_the_other_run(x, y):
    model = Residual()
    with cache_activations(model, "first", hold="snapshot") as cache:
        model(x)
    before = cache["first"].clone()
    with ActivationPatching("first", source=cache).prepare(model):
        model(y), model(y)
    assert torch.equal(cache["first"], before)
    with ActivationPatching("first").prepare(model) as hooked:
        data = hooked(both(x, y))
    assert torch.equal(data["output"], model(x))
    with edited(model, "first", lambda output: before.clone()):
        assert torch.equal(data["patched", "output"], model(y))


def test_positions_and_units_choose_what_is_patched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    x, y = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    cases = [
        ({"positions": 2}, (slice(None), 2)),
        ({"positions": -1}, (slice(None), -1)),
        ({"positions": slice(1, 4)}, (slice(None), slice(1, 4))),
        ({"positions": [0, 5]}, (slice(None), [0, 5])),
        ({"positions": torch.tensor([[0, 1], [4, 5]])}, (torch.tensor([[0], [1]]), torch.tensor([[0, 1], [4, 5]]))),
        ({"positions": mask}, mask),
        ({"units": slice(0, 2)}, (..., slice(0, 2))),
        ({"units": [3]}, (..., [3])),
        ({"positions": range(3), "units": 1}, (slice(None), slice(0, 3), 1)),
        ({"positions": [0, 5], "units": [1, 3]}, (slice(None), torch.tensor([[0], [5]]), torch.tensor([[1, 3]]))),
    ]
    for options, index in cases:
        with ActivationPatching("0", **options).prepare(model) as hooked:
            found = hooked(both(x, y))["patched", "output"]
        assert torch.equal(found, pasted(model(y), model(x), index)), options


def test_channels_of_a_convolution_are_units_with_another_axis():
    model, x, y = cnn(), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    with ActivationPatching("0", units=1, unit_dim=-3).prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    source = values(model, ["0"], lambda: model(x))["0"]
    with edited(model, "0", lambda output: pasted(output, source, (slice(None), 1))):
        assert torch.equal(found, model(y))


def test_inputs_are_patched_with_another_direction(model, x, y):
    with ActivationPatching("head", direction="fwd_pre", units=slice(2)).prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    source = values(model, ["head"], lambda: model(x), inputs=True)["head"]
    with edited(model, "head", lambda old: pasted(old, source, (..., slice(2))), inputs=True):
        assert torch.equal(found, model(y))


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_of_a_structured_value_one_tensor_is_patched_and_the_rest_kept(kind, x, y):
    model = Pair(kind)
    pick = "right" if kind is dict else 1
    with ActivationPatching("inner", pick=pick).prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    torch.testing.assert_close(found, model.inner.left(y) + model.inner.right(x))


def test_patch_fn_gets_the_path_of_each_of_several_sites_and_the_value_there(model, x, y):
    seen = []

    def patch_fn(module_key, output, output_to_patch):
        seen.append(module_key)
        output[:, 0] = output_to_patch[:, 0]
        return output

    paths = ["layers.0", "layers.2"]
    with ActivationPatching(paths, patch_fn=patch_fn).prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    source = values(model, paths, lambda: model(x))
    assert seen == paths
    with (
        edited(model, "layers.0", lambda output: pasted(output, source["layers.0"], (slice(None), 0))),
        edited(model, "layers.2", lambda output: pasted(output, source["layers.2"], (slice(None), 0))),
    ):
        assert torch.equal(found, model(y))


def test_patch_fn_may_leave_the_sources_value_and_write_into_what_it_gets(model, x, y):
    with cache_activations(model, "layers.0") as cache:
        model(x)
    before = cache["layers.0"].clone()

    def spoil(module_key, output, output_to_patch):
        output.zero_()
        output_to_patch.mul_(2)

    with ActivationPatching("layers.0", source=cache, patch_fn=spoil).prepare(model) as hooked:
        found = hooked(y)
    assert torch.equal(cache["layers.0"], before)
    with edited(model, "layers.0", lambda output: before * 2):
        assert torch.equal(found, model(y))


def test_patch_fn_sees_only_the_region(model, x, y):
    shapes = []

    def patch_fn(module_key, output, output_to_patch):
        shapes.append((output.shape, output_to_patch.shape))

    with ActivationPatching("layers.0", units=[1, 2], patch_fn=patch_fn).prepare(model) as hooked:
        hooked(both(x, y))
    assert shapes == [((5, 2), (5, 2))]


def test_the_values_before_and_after_a_patch_are_cached_in_the_same_pass(model, x, y):
    with cache_activations(model, "layers.1") as source:
        model(x)
    before = ActivationCaching("layers.1", prepend=True, cache=TensorDict())
    after = ActivationCaching("layers.1", cache=TensorDict())
    composite = CompositeHookingContextFactory(after, ActivationPatching("layers.1", source=source), before)
    with composite.prepare(model) as hooked:
        hooked(y)
    plain = values(model, ["layers.1"], lambda: model(y))["layers.1"]
    first, _, last = hooked.hooking_context.caches
    assert torch.equal(first["layers.1"], source["layers.1"])
    assert torch.equal(last["layers.1"], plain)


def test_a_cache_that_fills_while_it_is_the_source_gives_what_it_held_before(model, x, y):
    with ActivationCaching("layers.1").prepare(model) as outer:
        outer(x)
        with ActivationPatching("layers.1", source=outer.cache).prepare(model):
            assert torch.equal(model(y), model(y))
            result = model(y)
    assert torch.equal(result, model(x))


def test_patches_nest(model, x, y):
    with cache_activations(model, r"layers\.\d") as cache:
        model(x)
    outer = ActivationPatching("layers.0", source=cache, units=[0])
    inner = ActivationPatching("layers.0", source=cache, units=[1])
    with outer.prepare(model), inner.prepare(model):
        found = model(y)
    with edited(model, "layers.0", lambda output: pasted(output, cache["layers.0"], (..., [0, 1]))):
        assert torch.equal(found, model(y))


def test_gradients_flow_through_what_is_pasted(model, x, y):
    x.requires_grad_()
    with ActivationPatching("layers.2").prepare(model) as hooked:
        hooked(both(x, y))["patched", "output"].sum().backward()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_what_the_patched_input_lacks_is_taken_from_the_first(x, y):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.inner(x) * mask

    model, mask = Masked(), torch.ones(5, 1)
    data = TensorDict({"x": x, "mask": mask, "patched": {"x": y}})
    with ActivationPatching("inner", units=0).prepare(model, in_keys=["x", "mask"]) as hooked:
        data = hooked(data)
    assert torch.equal(data["patched", "output"], pasted(model(y, mask), model(x, mask), (..., 0)))
    assert "mask" not in data["patched"]


def test_a_missing_second_input_is_an_error_that_names_its_key(model, x):
    with ActivationPatching("head").prepare(model) as hooked:
        with pytest.raises(ContextError, match=r"needs a second input: give \[\('patched', 'input'\)\]"):
            hooked(TensorDict({"input": x}))
        with pytest.raises(ContextError, match="needs a TensorDict"):
            hooked(x)


def test_the_key_of_the_second_input_can_be_chosen(model, x, y):
    data = TensorDict({"input": x, "corrupted": {"input": y}})
    with ActivationPatching("head", patch_key="corrupted").prepare(model) as hooked:
        assert torch.equal(hooked(data)["corrupted", "output"], model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selector": "nowhere"}, SelectionError, "'nowhere' matches none"),
        (
            {"source": TensorDict({"layers.0": torch.zeros(5, 4)})},
            EditError,
            "no entry for the site 'layers.1'.*'layers.0'",
        ),
        ({"source": torch.zeros(5, 4), "selector": r"layers\.\d"}, EditError, "one source for 3 sites"),
        ({"source": {"layers.1": "text"}}, EditError, "tensor or a proxy of a run, got str"),
    ],
)
def test_what_cannot_be_patched_is_refused_on_entering(model, options, error, message):
    before = state_of(model)
    context = ActivationPatching(**{"selector": "layers.1", **options}).prepare(model)
    with pytest.raises(error, match=message), context:
        pass
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "first"}, "positions is an int, a slice"),
        ({"units": [0.5]}, "units is an int, a slice"),
        ({"unit_dim": 1}, "unit_dim counts from the end"),
        ({"direction": "bwd"}, "changes outputs"),
        ({"pick": "all"}, "cannot say where to put a new value"),
        ({"steps": "first"}, "steps is 'prefill', 'decode'"),
    ],
)
def test_unusable_options_are_refused_at_once(options, message):
    with pytest.raises((EditError, ValueError), match=message):
        ActivationPatching("layers.0", **options)


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({}, torch.zeros(4, 4), r"(?s)does not fit.*there: shape \(5, 4\).*given: shape \(4, 4\)"),
        ({}, torch.zeros(5, 4).double(), "float32.*\n.*float64"),
        ({"units": 4}, torch.zeros(5, 4), r"units=4 means nothing at 'layers.1', whose value has 4 along axis 1"),
        ({"units": [0, 7]}, torch.zeros(5, 4), r"units=\[0, 7\] means nothing"),
        ({"positions": slice(9, 11)}, torch.zeros(5, 4), "positions=slice.*means nothing.*steps='prefill'"),
        ({"positions": 0, "position_dim": 3}, torch.zeros(5, 4), "no axis 3 for positions=0"),
        ({"positions": torch.tensor([[0]])}, torch.zeros(5, 4), r"positions of shape \(1, 1\) choose per row"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_both(model, x, options, source, message):
    before = state_of(model)
    with (
        pytest.raises(EditError, match=message),
        ActivationPatching("layers.1", source={"layers.1": source}, **options).prepare(model) as hooked,
    ):
        hooked(x)
    assert state_of(model) == before


def test_a_proxy_without_a_value_is_an_error_when_it_is_needed(model, x):
    with HookedModule.from_module(model).run(x) as run:
        proxy = run.get("head")
        with (
            ActivationPatching("layers.0", source=proxy).prepare(model) as hooked,
            pytest.raises(EditError, match=r"has no tensor to paste when 'layers.0' needs it"),
        ):
            hooked(x)


def test_an_exception_in_patch_fn_is_seen_and_leaves_nothing(model, x, y):
    before = state_of(model)

    def fails(**kwargs):
        raise ZeroDivisionError("in patch_fn")

    with (
        pytest.raises(ZeroDivisionError, match="in patch_fn"),
        ActivationPatching("head", patch_fn=fails).prepare(model) as hooked,
    ):
        hooked(both(x, y))
    assert state_of(model) == before


def test_pausing_takes_the_patch_off(model, x, y):
    with cache_activations(model, "head") as cache:
        model(x)
    with ActivationPatching("head", source=cache).prepare(model) as hooked:
        with hooked.paused():
            assert torch.equal(hooked(y), model(y))
        assert torch.equal(hooked(y), cache["head"])


def test_a_checkpoint_that_runs_again_in_the_backward_is_refused_where_it_cannot_be_told(x, y):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    model = Checkpointed()
    data = both(x.requires_grad_(), y.requires_grad_())
    with ActivationPatching("inner.0", units=0).prepare(model) as hooked:
        hooked(data)
        with pytest.raises(EditError, match=r"activation checkpointing runs 'inner.0' again"):
            data["patched", "output"].sum().backward()


def test_the_recipe_shows_what_it_was_made_with():
    source = TensorDict({"layers.0": torch.zeros(2)})
    assert repr(ActivationPatching("layers.0")) == "ActivationPatching('layers.0')"
    shown = repr(ActivationPatching("layers.0", source=source, positions=[1, 2], direction="fwd_pre"))
    assert shown == "ActivationPatching('layers.0', source=TensorDict of 1, positions=[1, 2], direction='fwd_pre')"


def test_what_patch_fn_returns_is_not_written_to(x):
    model, mine = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), -torch.ones(5, 4)
    recipe = ActivationPatching("0", source=torch.ones(5, 4), patch_fn=lambda **named: mine)
    with recipe.prepare(model) as hooked:
        assert torch.equal(hooked(x), torch.zeros(5, 4))
    assert torch.equal(mine, -torch.ones(5, 4))
