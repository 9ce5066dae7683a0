"""Last, First and Stack: whole values of the calls that pass one site."""

import copy
import pickle

import pytest
import torch

from stable_ids import stable_id
from tdcache.errors import CaptureError
from tdcache.reducers import Concatenate, First, Last, Mean, Reducer, Stack, TopK, Variance

EVERY = [
    Last(),
    First(),
    Stack(dim=1),
    Concatenate(dim=1, max_rows=9, flatten=2),
    Mean(dim=(0, 1)),
    Variance(correction=0),
    TopK(3, largest=False),
]


def fed(reducer, *values):
    for value in values:
        reducer.update(value)
    return reducer


VALUES = [torch.full((2, 3), float(at)) for at in range(4)]


def test_the_last_value_is_kept_itself():
    assert fed(Last(), *VALUES).compute() is VALUES[-1]


def test_the_first_value_is_kept_itself():
    assert fed(First(), *VALUES).compute() is VALUES[0]


@pytest.mark.parametrize(("kind", "kept"), [(Last, 3), (First, 0)])
def test_merging_goes_on_where_the_first_run_ended(kind, kept):
    one, other = fed(kind(), *VALUES[:2]), fed(kind(), *VALUES[2:])
    one.merge(other)
    assert one.compute() is VALUES[kept]


@pytest.mark.parametrize("kind", [Last, First, Stack])
def test_merging_with_a_run_that_saw_nothing_changes_nothing(kind):
    one, late = fed(kind(), VALUES[0]), kind()
    one.merge(kind())
    late.merge(one)
    assert torch.equal(one.compute(), late.compute())


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_a_stack_of_equal_shapes_is_dense(dim):
    assert torch.equal(fed(Stack(dim=dim), *VALUES).compute(), torch.stack(VALUES, dim))


def test_a_stack_of_unequal_shapes_is_numbered():
    ragged = [torch.ones(1, 5), torch.ones(1, 1), torch.zeros(1, 1)]
    stacked = fed(Stack(), *ragged).compute()
    assert list(stacked.keys()) == ["0", "1", "2"]
    assert all(torch.equal(stacked[str(at)], value) for at, value in enumerate(ragged))


def test_a_stack_can_be_read_between_two_calls():
    stack = fed(Stack(), VALUES[0])
    assert stack.compute().shape == (1, 2, 3)
    assert fed(stack, VALUES[1]).compute().shape == (2, 2, 3)


@pytest.mark.parametrize("reducer", EVERY, ids=stable_id)
def test_a_fresh_reducer_has_the_configuration_and_its_own_state(reducer):
    used = fed(reducer.fresh(), torch.ones(2, 3, 2))
    again = used.fresh()
    assert again == used == reducer
    assert (used.empty, again.empty, reducer.empty) == (False, True, True)
    with pytest.raises(CaptureError):
        again.compute()


def as_dict(result):
    return dict(result.items()) if hasattr(result, "items") else {"": result}


@pytest.mark.parametrize(
    "copied", [lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
@pytest.mark.parametrize("reducer", EVERY, ids=stable_id)
def test_a_reducer_travels_with_its_state(reducer, copied):
    used = fed(reducer.fresh(), torch.arange(12.0).reshape(2, 3, 2))
    twin = copied(used)
    assert twin == used
    fed(used, torch.zeros(2, 3, 2))
    fed(twin, torch.zeros(2, 3, 2))
    one, other = as_dict(used.compute()), as_dict(twin.compute())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("reducer", EVERY, ids=stable_id)
def test_the_configuration_shows_and_the_state_does_not(reducer):
    assert repr(fed(reducer.fresh(), torch.ones(2, 3, 2))) == repr(reducer)
    assert repr(reducer).startswith(f"{type(reducer).__name__}(")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Last(), First()),
        (Mean(), Variance()),
        (Stack(), Stack(dim=1)),
        (Concatenate(), Concatenate(max_rows=3)),
        (Mean(), Mean(dim=1)),
        (TopK(2), TopK(3)),
    ],
    ids=stable_id,
)
def test_only_reducers_of_one_kind_and_configuration_merge(one, other):
    with pytest.raises(ValueError, match="can be merged with"):
        one.merge(other)


@pytest.mark.parametrize("reducer", EVERY, ids=stable_id)
def test_a_run_in_inference_mode_can_go_on_outside_of_it(reducer):
    reducer = reducer.fresh()
    with torch.inference_mode():
        fed(reducer, torch.ones(2, 3, 2))
        reducer.compute()
    fed(reducer, torch.zeros(2, 3, 2))
    for result in as_dict(reducer.compute()).values():
        result + 1
    assert not reducer.empty


def test_the_reducers_that_keep_an_alias_say_so():
    for reducer in EVERY:
        value = torch.ones(2, 3, 2)
        kept = as_dict(fed(reducer.fresh(), value).compute())
        value.fill_(7)
        after = any(bool((tensor == 7).any()) for tensor in kept.values())
        if not isinstance(reducer, Stack):  # stacking copies, but only when the result is asked for
            assert after is reducer.aliases
    assert Stack.aliases


def test_a_reducer_of_ones_own_needs_four_methods():
    with pytest.raises(TypeError, match="abstract"):
        Reducer()
