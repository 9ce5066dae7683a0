"""Several writers and one cache: final keys are compared when a context is entered, and a clash is refused."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from model_state import state_of
from small_models import MLP
from tdcache import ActivationCaching, CacheWriteError, CompositeHookingContextFactory, First, Mean, Stack

Composite = CompositeHookingContextFactory


class OddNames(nn.Module):
    """Has a module of the name of a direction."""

    def __init__(self):
        super().__init__()
        self.fwd, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.fwd(x))


@pytest.mark.parametrize(
    ("factory", "key", "model"),
    [
        (Composite(Composite(ActivationCaching("head")), ActivationCaching("head")), "head", MLP),
        (Composite(ActivationCaching("act"), Composite(ActivationCaching("head|act"))), "act", MLP),
        (
            Composite(
                ActivationCaching(r"layers\.(?P<at>0)", stack_by="at"),
                ActivationCaching(r"layers\.(?P<at>[12])", stack_by="at"),
            ),
            r"layers\.\*",
            MLP,
        ),
        (Composite(ActivationCaching("fwd"), ActivationCaching("other", use_nested_keys=True)), "other", OddNames),
        (Composite(ActivationCaching("other", use_nested_keys=True), ActivationCaching("fwd")), "fwd", OddNames),
    ],
    ids=["nested", "nested second", "stacked", "a module named fwd", "a module named fwd, second"],
)
def test_children_whose_entries_meet_are_refused(factory, key, model):
    model = model()
    before = state_of(model)
    with pytest.raises(CacheWriteError, match=f"children 0 and 1 of the composite both cache '{key}'"):
        factory.prepare(model).__enter__()
    assert state_of(model) == before


def test_two_open_contexts_that_would_write_one_entry_are_refused():
    model, cache = MLP(), TensorDict()
    with ActivationCaching("head", cache=cache).prepare(model) as hooked:
        before = state_of(model)
        with (
            pytest.raises(CacheWriteError, match="two open contexts would both write 'head' of one cache") as caught,
            ActivationCaching("head", cache=cache, reducer=Stack()).prepare(model),
        ):
            pass
        assert caught.value.paths == ("head",)
        assert state_of(model) == before
        y = hooked(torch.ones(1, 4))
    assert torch.equal(cache["head"], y)


def test_one_cache_may_be_written_by_contexts_that_do_not_meet():
    model, cache = MLP(), TensorDict()
    with ActivationCaching("head", cache=cache).prepare(model), ActivationCaching("act", cache=cache).prepare(model):
        model(torch.ones(1, 4))
    assert sorted(cache.keys()) == ["act", "head"]
    with ActivationCaching("head", cache=cache).prepare(model) as hooked:  # one after the other
        hooked(torch.ones(1, 4))
    assert sorted(cache.keys()) == ["head"]


@pytest.mark.parametrize("options", [{}, {"use_nested_keys": True}, {"directions": ["fwd", "fwd_pre"]}])
def test_data_that_is_the_cache_keeps_its_inputs_on_entry(options):
    model, x = MLP(), torch.ones(1, 4)
    data = TensorDict({"input": x, "label": torch.zeros(1)})
    context = ActivationCaching("head", cache=data, **options).prepare(model)
    for _ in range(2):
        with context as hooked:
            assert hooked(data) is data
    assert {"input", "label", "output"} <= set(data.keys())
    assert torch.equal(data["fwd", "head"] if options else data["head"], data["output"])


def test_entries_of_the_block_before_are_dropped_from_data_that_is_the_cache():
    data = TensorDict({"input": torch.ones(1, 4)})
    context = ActivationCaching("head", cache=data).prepare(MLP())
    with context as hooked:
        hooked(data)
    with context:
        assert sorted(data.keys()) == ["input", "output"]


@pytest.mark.parametrize(
    ("reducer", "gathered"),
    [(Stack(), lambda values: torch.stack(values)), (First(), lambda values: values[0]), (Mean(), None)],
    ids=["stack", "first", "mean"],
)
@pytest.mark.parametrize("composite", [False, True])
def test_a_context_that_is_not_cleared_goes_on_gathering(reducer, gathered, composite):
    model = nn.Sequential(nn.Linear(3, 2))
    factory = ActivationCaching("0", reducer=reducer, clear_cache=False)
    context = (CompositeHookingContextFactory(factory) if composite else factory).prepare(model)
    values = []
    for _ in range(3):
        with context as hooked, torch.no_grad():
            y = hooked(torch.randn(4, 3))
        values.append(y.clone())
        y.zero_()  # what is carried on is what was seen
    wanted = torch.cat(values).mean(0) if gathered is None else gathered(values)
    torch.testing.assert_close(context.cache["0"], wanted, atol=1e-6, rtol=1e-5)  # a mean is summed in another order


def test_a_context_that_is_cleared_begins_anew():
    context = ActivationCaching("0", reducer=Stack()).prepare(nn.Sequential(nn.Linear(3, 2)))
    for _ in range(2):
        with context as hooked:
            hooked(torch.randn(4, 3))
    assert context.cache["0"].shape == (1, 4, 2)
