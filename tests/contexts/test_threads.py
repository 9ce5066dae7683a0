"""Several threads run one model at once: what a context sees and changes is that of the thread that opened it."""

import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from small_models import MLP, Replicated
from tdcache import (
    ActivationCaching,
    CompositeHookingContextFactory,
    Concatenate,
    HookedModule,
    HookFactory,
    HookingContextFactory,
    MultiHookManager,
)
from tdcache.points import HookedRootModule, HookPoint

SITES = r"layers\.\d|head"
ROUNDS = 100


@pytest.fixture(autouse=True)
def threads_change_places_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Pointed(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.linear, self.point = nn.Linear(3, 3), HookPoint()
        self.setup()

    def forward(self, x):
        return self.point(self.linear(x))


class Scaled(HookingContextFactory):
    """Multiplies the output of the first layer."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def _hook_module(self, module):
        hook = HookFactory.make_setting_hook(None, callback=lambda output, **rest: self.factor * output)
        return MultiHookManager(r"layers\.0").register_hook(
            module, lambda path: hook, relative_path=module.relative_path
        )


def by_hand(model, x, factor):
    """The values and their gradients, computed without hooks."""
    values = {"layers.0": factor * model.layers[0](x)}
    for at in (1, 2):
        values[f"layers.{at}"] = model.layers[at](gelu(values[f"layers.{at - 1}"]))
    values["head"] = model.head(model.act(gelu(values["layers.2"])))
    grads = torch.autograd.grad(values["head"].sum(), list(values.values()))
    return {path: value.detach() for path, value in values.items()}, dict(zip(values, grads, strict=True))


def in_two_threads(work):
    """Run ``work(number)`` in two threads at once; raises what one of them raised."""
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"directions": ["fwd", "bwd"]}, (1.0, 1.0)),
        ({"directions": ["fwd", "bwd"]}, (2.0, 3.0)),
        ({"use_nested_keys": True, "stop_early": True}, (1.0, 1.0)),
        ({"use_nested_keys": True, "hold": "snapshot"}, (1.0, 3.0)),
    ],
    ids=["gradients", "edits", "stop_early", "snapshots"],
)
def test_each_thread_gets_its_own_values(options, factors):
    model = MLP()
    inputs = torch.randn(2, ROUNDS, 3, 4)
    wanted = [[by_hand(model, x, factor) for x in own] for own, factor in zip(inputs, factors, strict=True)]

    def work(number):
        for x, (values, grads) in zip(inputs[number], wanted[number], strict=True):
            factory = CompositeHookingContextFactory(Scaled(factors[number]), ActivationCaching(SITES, **options))
            with factory.prepare(model) as hooked:
                y = hooked(x)
                if "directions" in options:
                    torch.autograd.grad(y.sum(), list(model.parameters()))
            for path, value in values.items():
                # By hand the same kernels run in the same order, on the same shapes.
                assert torch.equal(hooked.cache["fwd", path], value)
                if "directions" in options:
                    assert torch.equal(hooked.cache["bwd", path], grads[path])

    in_two_threads(work)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_of_a_thread_without_a_context_is_none_of_ours():
    model, x, other = MLP(), torch.ones(2, 4), torch.zeros(2, 4)
    running = threading.Event()

    def run():
        running.set()
        for _ in range(200):
            model(other)

    with ActivationCaching(SITES).prepare(model) as hooked:
        thread = threading.Thread(target=run)
        thread.start()
        running.wait()
        for _ in range(100):
            y = hooked(x)
            assert torch.equal(hooked.cache["head"], y)
        thread.join()
    assert torch.equal(hooked.cache["head"], y)


def test_replicas_inside_the_openers_forward_are_seen():
    model = Replicated(nn.Linear(4, 3))
    x = torch.randn(6, 4)
    with ActivationCaching("inner", reducer=Concatenate()).prepare(model) as hooked, torch.no_grad():
        y = hooked(x)
    assert torch.equal(hooked.cache["inner"], y)


def test_an_edit_reaches_the_replicas_of_its_thread():
    model = Replicated(nn.Linear(4, 3))
    model.layers = nn.ModuleList([model.inner])
    with Scaled(2.0).prepare(model) as hooked, torch.no_grad():
        y = hooked(torch.ones(2, 4))
    assert torch.equal(y, 2 * model.inner(torch.ones(2, 4)[:1]).expand(2, 3))


def in_another_thread(work):
    """What ``work()`` returns in a thread of its own."""
    found, failures = [], []

    def guarded():
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again in this thread)
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found[0]


def test_runs_of_two_threads_see_and_change_their_own_values():
    model, x = MLP(), torch.ones(2, 4)
    plain = model(x)

    def other():
        with HookedModule.from_module(model).run(x) as run:
            value = run.get("head")
        return value.value, run.result

    seen = []

    def call(hooked, x):
        result = hooked(x)
        seen.append(in_another_thread(other))
        return result

    with HookedModule.from_module(model).run(x, run_callback=call) as run:
        run.set("layers.0", torch.zeros_like(model.layers[0](x)))
        mine = run.get("head")
    assert all(torch.equal(value, plain) for value in seen[0])
    assert torch.equal(mine.value, run.result)
    assert not torch.equal(run.result, plain)


def test_hooks_at_points_act_in_their_own_thread():
    model, x = Pointed(), torch.ones(2, 3)
    plain = model(x)
    with model.hooks(fwd_hooks=[("point", lambda value, hook: 0 * value)]):
        output, cache = in_another_thread(lambda: model.run_with_cache(x))
        assert not model(x).any()
    assert torch.equal(output, plain)
    assert torch.equal(cache["point"], plain)
