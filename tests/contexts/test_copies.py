"""A copy of the model that is made inside a block has no hook of ours, and holds nothing of the context."""

import copy
import io
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from stable_ids import stable_id
from tdcache import (
    Ablation,
    ActivationCaching,
    ActivationPatching,
    HookedModule,
    HookingContextFactory,
    Mean,
    MultiHookManager,
    Splice,
    SteeringVectors,
    resume_from,
)
from tdcache.attribution import GradDrop, RelevanceRules, ScaleGradient, StopGradient, epsilon_plus
from tdcache.pipeline import AttachedPipeline


def hooks_of(model):
    """Every entry of the hook dicts of every module."""
    names = [f"_forward{kind}hooks{extra}" for kind in ("_", "_pre_") for extra in ("", "_with_kwargs")]
    names.append("_forward_hooks_always_called")
    return [entry for module in model.modules() for name in names for entry in getattr(module, name).items()]


def changed(model):
    """What stands on the modules of a copy that was not there, or is among them and was not."""
    forwards = [path for path, module in model.named_modules() if "forward" in module.__dict__]
    return hooks_of(model) + forwards + [path for path, _ in model.named_modules() if "sae" in path]


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_saving(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copied = pytest.mark.parametrize("twin_of", [copy.deepcopy, by_pickle, by_saving])


class Doubling(HookingContextFactory):
    """A user's recipe with gradient hooks as well."""

    def _hook_module(self, module):
        manager, path = MultiHookManager(r"\d"), module.relative_path
        handle = manager.register_hook(module, lambda path: twice, relative_path=path)
        return handle + manager.register_hook(module, lambda path: nothing, direction="bwd", relative_path=path)


def twice(module, args, output):
    return 2 * output


def nothing(module, grad_input, grad_output):
    return None


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


@copied
@pytest.mark.parametrize("options", [{}, {"reducer": "mean"}, {"callback": "callback"}, {"stop_early": True}])
def test_a_copy_of_a_model_that_is_captured_is_clean(model, twin_of, options):
    directions = ["fwd", "fwd_pre"] if "stop_early" in options else ["fwd", "bwd", "grad_in", "fwd_pre"]
    if "reducer" in options:
        options = {"reducer": Mean()}
    if "callback" in options:
        options = {"callback": lambda key, **rest: torch.ones(1)}
    with ActivationCaching(r"\d", directions=directions, **options).prepare(model) as hooked:
        result = hooked(torch.ones(1, 3, requires_grad=True))
        if result is not None:
            result.sum().backward()
        twin = twin_of(model)
        assert hooks_of(twin) == []
        assert len(hooks_of(model)) > 0
    assert twin(torch.ones(1, 3)).shape == (1, 3)


@copied
def test_a_copy_of_an_edited_model_is_not_edited(model, twin_of):
    x = torch.ones(1, 3)
    plain = model(x)
    with Doubling().prepare(model):
        twin, part = twin_of(model), twin_of(model[0])
        assert hooks_of(twin) == hooks_of(part) == []
        assert torch.equal(twin(x), plain)
        assert torch.equal(part(x), model[0](x) / 2)


@copied
def test_the_users_own_hooks_go_with_the_copy(model, twin_of):
    model[0].register_forward_hook(twice)
    with ActivationCaching(r"\d").prepare(model):
        twin = twin_of(model)
    assert [hook for _, hook in hooks_of(twin)] == [twice]


@copied
def test_a_copy_of_a_paused_model_is_clean(model, twin_of):
    with Doubling().prepare(model) as hooked, hooked.paused():
        assert hooks_of(twin_of(model)) == []


@copied
def test_hooks_of_the_verbs_stay_behind(model, twin_of):
    hooked = HookedModule.from_module(model)
    with hooked.run(torch.ones(1, 3)) as run:
        run.set("0", torch.zeros(1, 3))
        run.get("1")
        assert hooks_of(twin_of(model)) == []


def halved(x):
    return x / 2


METHODS = [
    Ablation("0", units=0),
    Ablation("0", calls=0),
    SteeringVectors("1", torch.ones(3), steps="prefill"),
    ActivationPatching("0", TensorDict({"0": torch.zeros(1, 3)})),
    ActivationCaching("0", steps="prefill"),
    ActivationCaching("0", positions=0, mask_key=None),
    StopGradient("0"),
    ScaleGradient("0", 2.0),
    GradDrop(["0"]),
    RelevanceRules(epsilon_plus()),
    AttachedPipeline("0", halved),
    Splice("0", (halved, torch.neg)),
    Splice("1", (halved, torch.neg), reads="input"),
    Ablation("::gelu"),
]


class Functional(nn.Sequential):
    def forward(self, x):
        return nn.functional.gelu(super().forward(x))


@copied
@pytest.mark.parametrize("recipe", METHODS, ids=stable_id)
@pytest.mark.filterwarnings("ignore::tdcache.UnfiredSiteWarning")  # the model does not run in the block
def test_a_copy_of_a_model_under_any_method_is_clean(recipe, twin_of):
    model, x = Functional(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3)
    plain = model(x)
    with recipe.prepare(model):
        twin = twin_of(model)
        assert changed(twin) == []
        assert changed(model)
        assert torch.equal(twin(x), plain)
    assert changed(model) == []


@copied
def test_a_copy_of_a_model_that_skips_modules_skips_none(model, twin_of):
    x, twins = torch.ones(1, 3), []
    plain = model(x)
    with resume_from(model, "1", torch.zeros(1, 3)):
        twins.append(twin_of(model))
    hooked = HookedModule.from_module(model)

    def copying(hooked, x):
        twins.append(twin_of(model))
        return hooked(x)

    with hooked.run(x, run_callback=copying) as run:
        run.skip("0", torch.zeros(1, 3))
        run.stop("1")
    handle = hooked.stop("0")
    twins.append(twin_of(model))
    handle.remove()
    for twin in twins:
        assert changed(twin) == []
        assert torch.equal(twin(x), plain)


def always_zero(x):
    return torch.zeros_like(x)


@copied
def test_a_forward_that_the_user_replaced_stays_replaced_in_a_copy(model, twin_of):
    model[0].forward = always_zero
    with resume_from(model, "0", torch.ones(1, 3)):
        twin = twin_of(model)
    assert twin[0].forward is always_zero
    assert not twin(torch.ones(1, 3)).any()
