"""Sweeps and resuming in models whose rows mix, whose layers share state, that draw random numbers, or hold entries."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from interventions.hand import edited, sweep, values
from small_models import MLP
from tdcache import (
    ActivationAddition,
    ActivationPatching,
    CausalTracing,
    EditError,
    PathPatching,
    TdcacheWarning,
    resume_from,
)

WARNING = "the sweep goes on one trial at a time and in full"


def metric(data):
    return (data["output"] * torch.arange(data["output"].shape[-1])).square().sum()


def swept(model, pattern, x, y, **options):
    with ActivationPatching(pattern, sweep=True, metric=metric, **options).prepare(model) as hooked:
        return hooked(TensorDict({"input": x, "patched": {"input": y}}))


def by_hand(model, paths, x, y):
    source = values(model, paths, lambda: model(x))
    return sweep(model, paths, source, lambda: model(y), lambda output: metric({"output": output}), [...])


class SequenceFirst(nn.Module):
    """A transformer encoder in torch's default layout, (sequence, batch, features)."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


class Normed(nn.Module):
    """Batch normalisation between layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        for layer in self.layers:
            x = self.norm(layer(x)).tanh()
        return x


class Layer(nn.Module):
    """Writes to a dict that the layers share, or adds what the first one wrote."""

    def __init__(self, shared, first):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shared, self.first = shared, first

    def forward(self, x):
        if self.first:
            self.shared["value"] = self.linear(x)
            return x + self.shared["value"].tanh()
        return (x + self.linear(x)).tanh() + self.shared["value"]


class ValueResidual(nn.Module):
    """Every layer adds a value that the first one left on the side."""

    def __init__(self):
        super().__init__()
        shared = {}
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Layer(shared, first=at == 0) for at in range(4))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_sequence_first_model_is_swept_one_at_a_time_and_says_so_once():
    model, (x, y) = SequenceFirst().eval().double(), torch.randn(2, 5, 3, 8).double()
    paths = [f"encoder.layers.{layer}" for layer in range(3)]
    with pytest.warns(
        TdcacheWarning, match=f"{WARNING}, for the trial at 'encoder.layers.*gives another 'output'"
    ) as told:
        found = swept(model, r"encoder\.layers\.\d", x, y)
    assert len(told) == 1
    for path, expected in by_hand(model, paths, x, y).items():
        # float64; the same products in the same order, but for the fused path that hooks switch off
        torch.testing.assert_close(found[path].reshape(1), expected, rtol=0, atol=1e-9)


def test_position_dim_0_is_not_stacked():
    with pytest.raises(EditError, match=r"position_dim=0 says that axis 0 is no batch, and chunk=32 stacks.*chunk=1"):
        ActivationPatching("0", sweep=True, metric=metric, position_dim=0)
    model, (x, y) = SequenceFirst().eval().double(), torch.randn(2, 5, 3, 8).double()
    found = swept(model, r"encoder\.layers\.\d", x, y, position_dim=0, chunk=1)
    for path, expected in by_hand(model, list(found.keys()), x, y).items():
        torch.testing.assert_close(found[path].reshape(1), expected, rtol=0, atol=1e-9)


def test_batch_normalisation_in_training_mode_is_swept_one_at_a_time():
    model, (x, y) = Normed().double().train(), torch.randn(2, 6, 4).double()
    with pytest.warns(TdcacheWarning, match=WARNING):
        found = swept(model, r"layers\.\d", x, y)
    for path, expected in by_hand(model, list(found.keys()), x, y).items():
        torch.testing.assert_close(found[path].reshape(1), expected, rtol=0, atol=1e-9)


def test_what_is_known_to_mix_needs_no_check():
    model, (x, y) = Normed().double().train(), torch.randn(2, 6, 4).double()
    found = swept(model, r"layers\.\d", x, y, chunk=1, replay=False)  # warnings are errors here
    for path, expected in by_hand(model, list(found.keys()), x, y).items():
        torch.testing.assert_close(found[path].reshape(1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 32])
def test_a_layer_that_leaves_a_value_on_the_side_always_runs(chunk):
    model, (x, y) = ValueResidual().double(), torch.randn(2, 3, 4).double()
    paths = ["embed", *(f"layers.{layer}" for layer in range(4)), *(f"layers.{layer}.linear" for layer in range(4))]
    found = swept(model, paths, x, y, chunk=chunk)
    for path, expected in by_hand(model, paths, x, y).items():
        torch.testing.assert_close(found[path].reshape(1), expected, rtol=0, atol=1e-9)


def test_what_other_layers_leave_out_is_still_not_run_again():
    model, (x, y), calls = ValueResidual(), torch.randn(2, 3, 4), []
    for at, layer in enumerate(model.layers):
        layer.linear.register_forward_hook(lambda *args, at=at: calls.append(at))
    swept(model, r"layers\.3", x, y, chunk=1)
    # Two whole runs; then the trial, with the layer that the others read from; then the trial in full.
    assert calls == [0, 1, 2, 3] * 2 + [0] + [0, 1, 2, 3]


def test_resuming_after_a_layer_that_leaves_a_value_on_the_side_is_an_error():
    model, x = ValueResidual(), torch.randn(3, 4)
    model(x)
    for _ in range(2):  # what was found out at the first use holds at the second
        with (
            pytest.raises(
                EditError, match=r"resuming after 'layers.1' leaves 'layers.0' out, but later layers read more"
            ),
            resume_from(model, "layers.1", torch.randn(3, 4)),
        ):
            model(x)


def test_the_check_of_resuming_runs_once_for_a_model_and_changes_nothing():
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)).train(),
        torch.randn(6, 4),
    )
    calls = []
    inner = model[3].forward
    model[3].forward = lambda value: calls.append(None) or inner(value)
    value, before = torch.randn(6, 4), copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = inner(nn.functional.dropout(value, 0.5))
    torch.manual_seed(3)
    with resume_from(model, "1", value):
        assert torch.equal(model(x), expected)
        model(x)
    assert len(calls) == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def dictionary_model():
    layers = [TensorDictModule(nn.Linear(4, 4), [f"h{at}"], [f"h{at + 1}"]) for at in range(3)]
    return TensorDictSequential(*layers, TensorDictModule(nn.Tanh(), ["h3"], ["output"]))


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 2}, {"replay": False}])
def test_tensordict_modules_are_swept(options):
    model = dictionary_model().double()
    x, y = torch.randn(2, 5, 4).double()
    recipe = ActivationPatching(r"module\.\d", sweep=True, metric=metric, **options)
    with recipe.prepare(model) as hooked:
        found = hooked(TensorDict({"h0": x, "patched": TensorDict({"h0": y}, [5])}, []))
    layers = [module.module for module in model.module]
    for at in range(4):
        value = x
        for layer in layers[: at + 1]:
            value = layer(value)
        for layer in layers[at + 1 :]:
            value = layer(value)
        torch.testing.assert_close(found[f"module.{at}"], metric({"output": value}).detach(), rtol=0, atol=1e-9)
        if at == 0:
            assert found["module.0"] != metric(model(TensorDict({"h0": y}, [5])))


@pytest.mark.parametrize("source", ["tensor", "entries"])
def test_tensordict_modules_are_resumed(source):
    model, x, value = dictionary_model(), torch.randn(5, 4), torch.randn(5, 4)
    calls = []
    for at, module in enumerate(model.module):
        module.module.register_forward_hook(lambda *args, at=at: calls.append(at))
    expected = model.module[3].module(model.module[2].module(value))
    data = model(TensorDict({"h0": x}, [5]))  # with what an earlier run has left
    model(data)
    calls.clear()
    given = value if source == "tensor" else {"module.1": TensorDict({"h2": value}, [5])}
    with resume_from(model, "module.1", given):
        model(data)
        calls.clear()
        model(data)
    assert calls == [2, 3]
    assert torch.equal(data["output"], expected)
    assert "h1" not in data  # no value of another run


def test_resuming_with_too_few_entries_is_an_error():
    model = TensorDictSequential(
        TensorDictModule(lambda x: (x, x), ["a"], ["b", "c"]), TensorDictModule(torch.add, ["b", "c"], ["d"])
    )
    with (
        pytest.raises(EditError, match=r"'module.0' writes \['b', 'c'\], and source= has no 'c'"),
        resume_from(model, "module.0", {"module.0": TensorDict({"b": torch.ones(2)})}),
    ):
        model(TensorDict({"a": torch.ones(2)}))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_clean_and_patched_run_draw_the_same_masks():
    model, x = Dropping().train(), torch.randn(5, 4)
    with ActivationPatching(r"layers\.1").prepare(model) as hooked:
        found = hooked(TensorDict({"input": x, "patched": {"input": x.clone()}}))
    assert torch.equal(found["output"], found["patched", "output"])


def test_the_generator_is_left_as_one_run_leaves_it():
    model, x, y = Dropping().train(), torch.randn(5, 4), torch.randn(5, 4)
    torch.manual_seed(5)
    model(x)
    expected = torch.rand(3)
    both = TensorDict({"input": x, "patched": {"input": y}})
    sides = TensorDict({"positive": {"input": x}, "negative": {"input": y}})
    recipes = {
        "patching": (ActivationPatching(r"layers\.1"), both),
        "paths": (PathPatching(r"layers\.0", r"layers\.2", freeze=r"layers\.1"), both),
        "addition": (ActivationAddition(r"layers\.1"), sides),
        "sweep": (ActivationPatching(r"layers\.\d", sweep=True, metric=metric, chunk=1, replay=False), both),
        "tracing": (CausalTracing(r"layers\.[12]", r"layers\.0\.0", subject=1, metric=metric, chunk=1, samples=1,
                                  sweep=True, replay=False), TensorDict({"input": x})),
    }  # fmt: skip
    for name, (recipe, data) in recipes.items():
        torch.manual_seed(5)
        with recipe.prepare(model) as hooked:
            hooked(data.copy())
        assert torch.equal(torch.rand(3), expected), name


def test_equal_sweeps_are_equal_in_training_mode_and_a_patch_by_itself_changes_nothing():
    model, x = Dropping().train(), torch.randn(5, 4)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(swept(model, r"layers\.\d", x, x.clone(), chunk=1, replay=False))
    torch.manual_seed(7)
    plain = metric({"output": model(x)})
    for path in ("layers.0", "layers.1", "layers.2"):
        assert torch.equal(found[0][path], found[1][path])
        assert torch.equal(found[0][path], plain.detach())


def test_dropout_in_stacked_trials_is_noticed():
    model, (x, y) = Dropping().train(), torch.randn(2, 5, 4)
    torch.manual_seed(7)
    with pytest.warns(TdcacheWarning, match=WARNING):
        found = swept(model, r"layers\.\d", x, y)
    torch.manual_seed(7)
    alone = swept(model, r"layers\.\d", x, y, chunk=1, replay=False)
    for path in alone.keys():  # noqa: SIM118  a TensorDict
        assert torch.equal(found[path], alone[path])


def test_the_check_costs_one_trial():
    model, (x, y), calls = MLP(), torch.randn(2, 5, 4), []
    model.head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    swept(model, r"layers\.\d", x, y)
    assert calls == [5, 5, 15, 5]  # the source, the run without a patch, three trials at once, one of them alone


def test_an_error_of_a_trial_itself_is_the_one_that_is_seen():
    model, (x, y) = MLP(), torch.randn(2, 5, 4)

    def broken(**rest):
        raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="of the user's own"):
        swept(model, r"layers\.\d", x, y, patch_fn=broken)


def test_rows_positions_and_calls_hold_in_a_sweep_too():
    model, (x, y) = MLP().double(), torch.randn(2, 3, 5, 4).double()
    found = swept(model, r"layers\.\d", x, y, rows=[0, 2], positions=[-1])
    source = values(model, list(found.keys()), lambda: model(x))
    for path, value in source.items():

        def paste(old, value=value):
            new = old.clone()
            new[[0, 2], -1] = value[[0, 2], -1]
            return new

        with edited(model, path, paste):
            expected = metric({"output": model(y)})
        torch.testing.assert_close(found[path], expected.detach(), rtol=0, atol=1e-9)
    none = swept(model, r"layers\.\d", x, y, calls=[1])  # each module runs once, which is call 0
    for path in source:
        torch.testing.assert_close(none[path], metric({"output": model(y)}).detach(), rtol=0, atol=1e-9)
