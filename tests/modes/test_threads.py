"""Two threads, two models, two contexts: neither sees the other."""

import threading

import pytest
import torch

from small_models import MLP, Residual
from tdcache import ActivationCaching, Stack


def in_two_threads(work):
    """Run ``work(number, barrier)`` in two threads that take turns at the barrier; re-raise what either raised."""
    barrier, failures = threading.Barrier(2, timeout=30), []

    def run(number):
        try:
            work(number, barrier)
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


@pytest.mark.parametrize("shared_factory", [True, False])
def test_two_contexts_of_two_models_in_two_threads(shared_factory):
    factory = ActivationCaching("head", directions=["fwd", "bwd"])
    models = [MLP(), MLP()]
    inputs = torch.randn(2, 10, 5, 4)
    checked = []

    def work(number, barrier):
        mine = factory if shared_factory else ActivationCaching("head", directions=["fwd", "bwd"])
        with mine.prepare(models[number]) as hooked:
            for step in range(10):
                barrier.wait()
                y = hooked(inputs[number, step])
                barrier.wait()
                assert torch.equal(hooked.cache["fwd", "head"], y)
                ((number + 1) * y).sum().backward()
                barrier.wait()
                assert torch.equal(hooked.cache["bwd", "head"], torch.full((5, 2), number + 1.0))
        assert not models[number].head._forward_hooks
        checked.append(number)

    in_two_threads(work)
    assert sorted(checked) == [0, 1]


def test_a_backward_in_one_thread_does_not_hide_a_forward_in_the_other():
    models = [MLP(), MLP()]
    x = torch.randn(5, 4)
    steps = []

    def work(number, barrier):
        with ActivationCaching("head", reducer=Stack()).prepare(models[number]) as hooked:
            if number == 0:
                y = models[0](x)
                y.register_hook(lambda grad: (barrier.wait(), barrier.wait(), None)[-1])  # the backward is held up here
                y.sum().backward()
            else:
                barrier.wait()
                hooked(x)
                barrier.wait()
            steps.append(hooked.cache["head"].shape[0])

    in_two_threads(work)
    assert steps == [1, 1]


def test_grad_mode_is_each_threads_own():
    models = [Residual(), Residual()]
    x = torch.randn(5, 4)
    needed = {}

    def work(number, barrier):
        with (
            torch.set_grad_enabled(number == 0),
            ActivationCaching("first", hold="live", dtype=torch.float64).prepare(models[number]) as hooked,
        ):
            barrier.wait()
            hooked(x)
            barrier.wait()
        needed[number] = hooked.cache["first"].requires_grad

    in_two_threads(work)
    assert needed == {0: True, 1: False}
