"""A second thread enters while the first is at any point of its block: it sees none of the first's hooks."""

import threading

import pytest
import torch
from torch import nn

from small_models import MLP, Replicated
from tdcache import (
    ActivationCaching,
    Concatenate,
    HookFactory,
    HookingContextFactory,
    MultiHookManager,
    SteeringVectors,
    cache_activations,
)
from tdcache.contexts.context import HookingContext


@pytest.fixture
def model():
    return MLP()


@pytest.fixture
def x():
    return torch.randn(3, 4)


def in_another_thread(work):
    """What ``work()`` returns when another thread carries it out; raises what it raised."""
    outcome = {}

    def run():
        try:
            outcome["result"] = work()
        except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Meanwhile:
    """Lets another thread enter the model, run it and leave; keeps what that thread saw."""

    def __init__(self, model, x):
        self.model, self.x, self.seen = model, x, []

    def __call__(self):
        def work():
            with cache_activations(self.model, r"layers\.0") as cache:
                self.model(self.x)
            return cache["layers.0"]

        self.seen.append(in_another_thread(work))

    remove = __call__  # so that a handle calls it when it is removed


class Doubling(HookingContextFactory):
    """Doubles the output of the first layer; ``meanwhile`` is called while it is being installed, or removed."""

    def __init__(self, installing=None, removing=None):
        super().__init__()
        self.installing, self.removing = installing, removing

    def _hook_module(self, module):
        hook = HookFactory.make_setting_hook(None, callback=lambda output, **rest: 2 * output)
        handle = MultiHookManager(r"layers\.0").register_hook(
            module, lambda path: hook, relative_path=module.relative_path
        )
        if self.removing is not None:
            handle.add(self.removing)  # handles are removed last first
        if self.installing is not None:
            self.installing()
        return handle


def test_while_the_first_thread_is_installing(model, x):
    meanwhile, wanted = Meanwhile(model, x), model.layers[0](x)
    with Doubling(installing=meanwhile).prepare(model), cache_activations(model, r"layers\.0") as cache:
        model(x)
        assert torch.equal(cache["layers.0"], 2 * wanted)  # the same product, once by hand
    assert torch.equal(meanwhile.seen[0], wanted)


def test_when_the_first_thread_has_installed_and_its_handle_is_not_yet_known(model, x):
    meanwhile, wanted = Meanwhile(model, x), model.layers[0](x)

    class Interrupted(HookingContext):
        def _hook(self, hooked):
            handle = super()._hook(hooked)
            meanwhile()
            return handle

    with Interrupted(Doubling(), model):
        pass
    assert torch.equal(meanwhile.seen[0], wanted)


def test_while_the_first_thread_is_leaving(model, x):
    meanwhile, wanted = Meanwhile(model, x), model.layers[0](x)
    with Doubling(removing=meanwhile).prepare(model):
        model(x)
    assert torch.equal(meanwhile.seen[0], wanted)
    assert not model.layers[0]._forward_hooks


def test_while_the_hooks_of_the_first_thread_are_muted(model, x):
    meanwhile, wanted = Meanwhile(model, x), model.layers[0](x)
    with Doubling().prepare(model) as hooked:
        with hooked.paused():
            meanwhile()
        meanwhile()
    assert all(torch.equal(each, wanted) for each in meanwhile.seen)


def test_the_second_thread_enters_with_gradients(model, x):
    def gradients():
        with ActivationCaching(r"layers\.0", directions=["bwd"]).prepare(model) as hooked:
            hooked(x).sum().backward()
        return hooked.cache["layers.0"]

    wanted = gradients()
    edit = HookFactory.make_setting_hook(None, direction="bwd", callback=lambda grad_output, **rest: 2 * grad_output)

    class DoublingGradients(HookingContextFactory):
        def _hook_module(self, module):
            manager = MultiHookManager(r"layers\.0")
            handle = manager.register_hook(
                module, lambda path: edit, direction="bwd", relative_path=module.relative_path
            )
            self.seen = in_another_thread(gradients)
            return handle

    factory = DoublingGradients()
    with factory.prepare(model):
        pass
    assert torch.equal(factory.seen, wanted)


@pytest.mark.parametrize("entered_before", [False, True])
def test_verbs_of_the_first_thread(model, x, entered_before):
    meanwhile, wanted = Meanwhile(model, x), model.layers[0](x)
    if entered_before:
        meanwhile()
    with ActivationCaching(r"layers\.1").prepare(model) as hooked:
        hooked.set("layers.0", torch.zeros_like(wanted))
        hooked.register_submodule_hook("layers.0", lambda module, args, output: output - 1)
        meanwhile()
        with hooked.run(x, run_callback=lambda run, data: (meanwhile(), run(data))[1]) as run:
            run.set("layers.0", torch.ones_like(wanted))
            run.get("layers.0")
        assert torch.equal(run.cache["layers.0_output"], torch.ones_like(wanted))
    assert all(torch.equal(each, wanted) for each in meanwhile.seen)


def test_an_edit_of_the_second_thread_is_none_of_the_first(model, x):
    wanted = model.layers[0](x)
    with ActivationCaching(r"layers\.0").prepare(model) as hooked:

        def edit():
            with SteeringVectors(r"layers\.0", torch.ones(wanted.shape[-1])).prepare(model) as steered:
                in_another_thread(lambda: model(x))  # a third one, which opens nothing
                return steered(x)

        hooked(x)
        in_another_thread(edit)
        assert torch.equal(hooked.cache["layers.0"], wanted)


def test_a_context_that_was_open_in_one_thread_acts_in_the_next_one(model, x):
    context = ActivationCaching(r"layers\.0").prepare(model)
    with context as hooked:
        Meanwhile(model, x)()
        hooked(x)

    def enter():
        with context as hooked:
            hooked(2 * x)
        return hooked.cache["layers.0"]

    assert torch.equal(in_another_thread(enter), model.layers[0](2 * x))


def test_a_thread_that_is_given_the_number_of_one_that_ended_is_not_fenced_off():
    model = Replicated(nn.Linear(4, 3))
    x = torch.randn(6, 4)

    def open_once():
        with cache_activations(model, "inner", allow_empty=True):
            model.inner(x)

    in_another_thread(open_once)
    with torch.no_grad(), cache_activations(model, "inner", reducer=Concatenate()) as cache:
        y = model(x)  # each replica in a thread of its own
    assert torch.equal(cache["inner"], y)


def test_what_is_behind_a_fence_does_not_grow_with_the_runs_of_a_block(model, x):
    with ActivationCaching(r"layers\.0").prepare(model) as hooked:
        for _ in range(300):
            hooked.set("layers.1", 0.0).remove()
        assert len(hooked.hooking_context.fence.placed) < 100
