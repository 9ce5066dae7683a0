"""In a TensorDictSequential the output of a module is its own entry; a tensorclass is data as a TensorDict is."""

import pytest
import torch
from tensordict import TensorDict, lazy_stack, tensorclass
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from small_models import MLP
from tdcache import Ablation, ActivationCaching, CaptureError, HookedModule, HookFactory
from user_recipes import TwoRuns


@pytest.fixture
def model():
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["x"], ["a"]), TensorDictModule(nn.Linear(3, 3), ["a"], ["b"])
    )


@pytest.fixture
def data():
    return TensorDict({"x": torch.randn(2, 3)}, batch_size=[2])


def test_a_capture_and_a_run_see_the_modules_own_entry(model, data):
    with ActivationCaching(r"module\.\d").prepare(model) as hooked:
        out = hooked(data)
    assert torch.equal(hooked.cache["module.0"], out["a"])
    assert torch.equal(hooked.cache["module.1"], out["b"])
    with HookedModule.from_module(model).run(TensorDict({"x": data["x"]})) as run:
        second = run.get("module.1")
    assert torch.equal(second.resolve(), out["b"])


@pytest.mark.parametrize("direction", ["fwd", "fwd_kwargs"])
def test_a_setting_hook_replaces_the_modules_own_entry(model, data, direction):
    x = data["x"].clone()
    hook = HookFactory.make_setting_hook(torch.zeros(2, 3), direction=direction)
    handle = HookedModule.from_module(model).register_submodule_hook("module.1", hook, direction)
    out = model(data)
    handle.remove()
    assert torch.equal(out["b"], torch.zeros(2, 3))
    assert torch.equal(out["x"], x)
    assert torch.equal(out["a"], model.module[0].module(x))


@pytest.mark.parametrize("direction", ["fwd_pre", "fwd_pre_kwargs"])
def test_a_setting_hook_replaces_the_entry_that_a_module_reads(model, data, direction):
    x = data["x"].clone()
    hook = HookFactory.make_setting_hook(torch.zeros(2, 3), direction=direction)
    handle = HookedModule.from_module(model).register_submodule_hook("module.1", hook, direction)
    out = model(data)
    handle.remove()
    assert torch.equal(out["b"], model.module[1].module.bias.expand(2, 3))
    assert torch.equal(out["x"], x)


@pytest.mark.parametrize(("direction", "entry"), [("fwd", "b"), ("fwd_pre", "a")])
def test_a_caching_hook_keeps_the_modules_own_entry(model, data, direction, entry):
    cache = TensorDict()
    hook = HookFactory.make_caching_hook("kept", cache, direction=direction)
    handle = HookedModule.from_module(model).register_submodule_hook("module.1", hook, direction)
    out = model(data)
    handle.remove()
    assert torch.equal(cache["kept"], out[entry])


@tensorclass
class Batch:
    """Data of a user."""

    input: Tensor
    output: Tensor


@pytest.mark.parametrize(("factory", "times"), [(ActivationCaching("head"), 1), (TwoRuns(), 2)])
def test_a_tensorclass_is_data(factory, times):
    model = MLP()
    batch = Batch(input=torch.randn(2, 4), output=torch.zeros(2, 2), batch_size=[2])
    with factory.prepare(model) as hooked:
        assert hooked(batch) is batch
    assert torch.equal(batch.output, times * model(batch.input))


def test_a_tensorclass_is_data_of_a_run_and_without_a_context():
    model = MLP()
    batch = Batch(input=torch.randn(2, 4), output=torch.zeros(2, 2), batch_size=[2])
    hooked = HookedModule.from_module(model)
    with hooked.run(batch) as run:
        run.set("head", torch.ones(2, 2))
    assert run.result is batch
    assert torch.equal(batch.output, torch.ones(2, 2))
    hooked(batch)
    assert torch.equal(batch.output, model(batch.input))


def test_an_index_counts_the_modules_own_entries():
    pair = TensorDictModule(lambda x: (x + 1, {"deep": x + 2}), ["x"], ["a", "b"])
    model = TensorDictSequential(pair)
    data = TensorDict({"before": torch.zeros(2, 3), "x": torch.randn(2, 3)}, batch_size=[2])
    for pick, wanted in [(0, 1), (-2, 1), ((1, "deep"), 2), ((-1, "deep"), 2)]:
        with ActivationCaching(r"module\.0", pick=pick).prepare(model) as hooked:
            hooked(data.clone())
        assert torch.equal(hooked.cache["module.0"], data["x"] + wanted)
    with Ablation(r"module\.0", pick=0).prepare(model):
        after = model(data.clone())
    assert not after["a"].any()
    assert torch.equal(after["x"], data["x"])


def test_an_index_beyond_the_modules_own_entries_is_an_error(model, data):
    with (
        ActivationCaching(r"module\.0", pick=1).prepare(model) as hooked,
        pytest.raises(CaptureError, match=r"pick=1 finds nothing at 'module\.0': the module writes 1 entries, \['a'\]"),
    ):
        hooked(data)


@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_a_gradient_in_a_lazy_stack_is_refused_because_its_entries_are_made_when_they_are_read(model, direction):
    data = lazy_stack([TensorDict({"x": torch.randn(3, requires_grad=True)}) for _ in range(2)])
    with (
        ActivationCaching(r"module\.1", directions=[direction]).prepare(model) as hooked,
        pytest.raises(CaptureError, match=r"at 'module\.1' is made anew each time it is read .* cannot be watched"),
    ):
        hooked(data)
