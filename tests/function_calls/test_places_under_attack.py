"""Places that hooks are registered at, under everything that goes on around a forward: what stays is nothing."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.checkpoint import checkpoint

from call_twins import Net, data, inputs, pair, twin_name
from model_state import state_of
from tdcache import Ablation, ActivationCaching, ContextError, EditError, HookedModule, SelectionError
from tdcache.attribution import GradientXActivation
from tdcache.function_calls.stand_in import CallModule, resolve_site, select_sites
from tdcache.hooks import attach
from tdcache.hooks.on_demand import OnDemandPlace
from tdcache.introspect import function_mode_count
from tdcache.pipeline import attach as attach_pipeline

NAME = r"layers\.\d::gelu"


def halves(x):
    return x * 0.5


def by_hand(model, x):
    """The model with halves after every GELU, by a patched twin."""
    twin = pair()[1]
    for layer in twin.layers:
        layer.gelu.register_forward_hook(lambda module, args, output: output * 0.5)
    return twin(x)


def close(mine, its):
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)  # the kernel sums in another order than the twin


def test_another_threads_forward_is_edited_as_it_is_at_modules():
    found = []
    for model, at in zip(pair(), (NAME, r"layers\.\d\.gelu"), strict=True):
        with attach_pipeline(model, at, halves):
            thread = threading.Thread(target=lambda model=model: found.append(model(inputs()).detach()))
            thread.start()
            thread.join()
    close(*found)


def test_contexts_of_two_threads_on_one_model_edit_their_own_forwards():
    model, _ = pair()
    barrier, found = threading.Barrier(2), {}
    x = inputs()  # once: its seed is that of both threads

    def work(factor):
        with attach_pipeline(model, NAME, lambda x: x * factor):
            barrier.wait()
            for _ in range(5):
                found.setdefault(factor, []).append(model(x).detach())
            barrier.wait()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (0.5, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor, outputs in found.items():
        with attach_pipeline(model, NAME, lambda x, factor=factor: x * factor):
            expected = model(x).detach()
        assert all(torch.equal(output, expected) for output in outputs)


class Checkpointed(nn.Module):
    def __init__(self, inner, *, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        x = self.inner.embed(x)
        for layer in self.inner.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.inner.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(reentrant):
    grads = []
    for wrap in (lambda model: model, lambda model: Checkpointed(model, reentrant=reentrant)):
        model = wrap(pair()[0])
        x = inputs().requires_grad_()
        prefix = "" if isinstance(model, Net) else r"inner\."
        with attach_pipeline(model, prefix + NAME, halves):
            model(x)[:, -1, 0].sum().backward()
        grads.append(x.grad)
    close(*grads)


def test_a_gradient_under_checkpointing_is_captured_once():
    model, calls = Checkpointed(pair()[0], reentrant=False), []
    hooked = HookedModule.from_module(model)
    handle = hooked.register_submodule_hook(
        "inner.layers.1::gelu", lambda module, grad_output: calls.append(grad_output[0]), "bwd_pre"
    )
    model(inputs())[:, -1, 0].sum().backward()
    handle.remove()
    plain = pair()[0]
    with ActivationCaching(r"layers\.1::gelu", directions=["bwd"]).prepare(plain) as other:
        other(inputs())[:, -1, 0].sum().backward()
    assert len(calls) == 1
    close(calls[0], other.cache["layers.1::gelu"])


class OwnCheckpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda y: torch.relu(self.lin(y)) * 2, x, use_reentrant=False)


def test_an_edit_in_code_that_a_module_checkpoints_itself_is_refused():
    model, x = OwnCheckpoint(), torch.randn(2, 4, requires_grad=True)
    before = state_of(model)
    with pytest.raises(EditError, match="checkpoints its own code"), attach_pipeline(model, "::relu", halves):
        model(x)
    with (
        pytest.raises(EditError, match="checkpoints its own code"),
        HookedModule.from_module(model).run(x) as run,
    ):
        run.skip("::relu", lambda y: y)
    assert state_of(model) == before
    seen = []
    handle = HookedModule.from_module(model).register_submodule_hook(
        "::relu", lambda module, args, output: seen.append(output), "fwd"
    )
    model(x).sum().backward()
    handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torch_around_a_place(around):
    model, twin = pair()
    with around():
        with attach_pipeline(model, NAME, halves):
            mine = model(inputs())
        handles = [layer.gelu.register_forward_hook(lambda module, args, output: output * 0.5) for layer in twin.layers]
        its = twin(inputs())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(mine.float(), its.float(), rtol=2e-2, atol=2e-2)  # bfloat16 under autocast


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for the kernel under vmap
def test_transforms_of_torch_func_run_through_a_place():
    model, _ = pair()
    with attach_pipeline(model, NAME, halves):
        single = torch.stack([model(row[None])[0] for row in inputs()])
        mapped = torch.func.vmap(lambda row: model(row[None])[0])(inputs())
        gradient = torch.func.grad(lambda x: model(x)[:, -1, 0].sum())(inputs())
        called = torch.func.functional_call(model, dict(model.named_parameters()), (inputs(),))
        x = inputs().requires_grad_()
        model(x)[:, -1, 0].sum().backward()
    close(mapped, single)
    close(gradient, x.grad)
    close(called, model_with_halves(model))


def model_with_halves(model):
    with attach_pipeline(model, NAME, halves):
        return model(inputs())


def test_foreign_hooks_and_a_foreign_forward_stay_where_they_are():
    model, _ = pair()
    seen, own = [], model.layers[0].forward
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append("hook"))
    model.layers[0].forward = lambda x: (seen.append("forward"), own(x))[1]
    before = state_of(model)
    with attach_pipeline(model, NAME, halves):
        model(inputs())
    assert seen == ["forward", "hook"]
    assert state_of(model) == before


def test_a_copy_made_meanwhile_has_no_places():
    model, _ = pair()
    plain = model(inputs()).detach()
    with attach_pipeline(model, NAME, halves), ActivationCaching(r"layers\.0::add").prepare(model):
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for each in (loaded, twin, model):
        assert torch.equal(each(inputs()), plain)
        assert all("forward" not in module.__dict__ for module in each.modules())


def test_an_exception_at_any_call_leaves_nothing():
    model, _ = pair()
    before, plain = state_of(model), model(inputs()).detach()
    for number in range(1, 25):
        left = [number]

        def count(x, left=left):
            left[0] -= 1
            if not left[0]:
                raise ZeroDivisionError
            return x

        context = attach_pipeline(model, [NAME, r"layers\.\d::(add|add\.1)", r"layers\.\d\.attn::(q|pattern|z)"], count)
        if number <= 18:
            with pytest.raises(ZeroDivisionError), context:
                model(inputs())
        else:
            with context:
                model(inputs())
        assert function_mode_count() == 0
    assert state_of(model) == before
    assert torch.equal(model(inputs()), plain)


def test_entering_is_all_or_nothing():
    model, _ = pair()
    before = state_of(model)
    with pytest.raises(SelectionError, match="matches none"):
        attach_pipeline(model, [NAME, r"no\.such::gelu"], halves).open()
    assert state_of(model) == before


def test_places_of_one_call_are_one_and_go_with_the_model():
    model, _ = pair()
    (site,) = select_sites(model, r"layers\.0::gelu")
    assert site.module is resolve_site(model, "layers.0::gelu")[1]
    assert site.module is resolve_site(model, "layers[0]::gelu")[1]
    assert isinstance(site.module, CallModule)
    assert repr(site.module) == "CallModule(layers.0::gelu)"
    alive = weakref.ref(site.module)
    handle = attach(site.module, lambda module, args, output: None)
    assert "forward" in model.layers[0].__dict__
    handle.remove()
    assert "forward" not in model.layers[0].__dict__
    del model, site, handle
    gc.collect()
    assert alive() is None


def test_hooks_at_one_call_run_with_edits_of_interventions_first_and_captures_last():
    model, _ = pair()
    seen = {}
    with (
        ActivationCaching(r"layers\.0::gelu", hold="snapshot").prepare(model) as hooked,
        attach_pipeline(model, r"layers\.0::gelu", lambda x: seen.setdefault("piped", x) + 1),
        Ablation(r"layers\.0::gelu", units=[0]).prepare(model),
    ):
        model(inputs())
    assert not seen["piped"][..., 0].any()
    assert torch.equal(hooked.cache["layers.0::gelu"], seen["piped"] + 1)


def test_attribution_while_another_context_looks_on():
    model, twin = pair()
    found = []
    for each, at in ((model, str), (twin, twin_name)):
        method = GradientXActivation(at(r"layers.1::gelu"), target=lambda out: out["output"][:, -1, 0])
        with ActivationCaching(at("layers.2::gelu")).prepare(each) as outer, method.prepare(outer) as hooked:
            scores = hooked(data())["attr", at("layers.1::gelu")]
        assert isinstance(outer.cache, TensorDict)
        found.append((scores, outer.cache[at("layers.2::gelu")]))
    for mine, its in zip(*found, strict=True):
        close(mine, its)


def test_data_parallel_on_one_device_runs_the_replicas_own_forward():
    model, _ = pair()
    wrapped = nn.DataParallel(model)
    with attach_pipeline(wrapped, r"module\." + NAME, halves):
        edited = wrapped(inputs())
    close(edited, by_hand(model, inputs()))


def test_a_place_outlives_its_model_only_to_say_so():
    model, _ = pair()
    place = select_sites(model, r"layers\.0::gelu")[0].module
    del model
    gc.collect()
    with pytest.raises(ContextError, match=r"the model in whose forward 'layers.0::gelu' is called is gone"):
        attach(place, lambda module, args, output: None)
    assert not place._forward_hooks


def test_a_kind_of_place_says_where_its_hooks_are_called():
    with pytest.raises(NotImplementedError, match="OnDemandPlace does not say where its hooks are called"):
        attach(OnDemandPlace(), lambda module, args, output: None)
