"""A compiled model that was traced before the hooks came runs eagerly for as long as they are there."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from tdcache.hooks.compiled import eager_where_stale


class Doubled(nn.Module):
    """A class of its own, so that no other test has traced it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * 2


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_late_hooks_are_called_until_the_stack_closes_and_the_graph_is_used_again(compiled):
    torch._dynamo.reset()
    inner = Doubled()
    model, called = compiled(inner), []
    attributes = [dict(module.__dict__) for module in (model, inner)]
    model(torch.ones(1))
    handle = inner.inner.register_forward_hook(lambda *args: called.append(True))
    model(torch.ones(1))
    assert called == []  # what this is for: the graph has no hook in it
    with ExitStack() as undo:
        assert eager_where_stale(model, undo)
        assert model(torch.ones(1)).item() == 2
    assert called == [True]
    model(torch.ones(1))
    assert called == [True]
    handle.remove()
    assert [dict(module.__dict__) for module in (model, inner)] == attributes
    torch._dynamo.reset()


def test_a_model_that_was_not_traced_is_left_alone():
    torch._dynamo.reset()
    model = wrapped(Doubled())
    before = dict(model.__dict__)
    with ExitStack() as undo:
        assert not eager_where_stale(model, undo)
        assert model.__dict__ == before
