"""The options that every intervention takes: refused when misspelt, kept as attributes, shown in the signature."""

import inspect

import pytest
import torch

from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationPatching,
    CausalTracing,
    DirectionError,
    EditError,
    EditOptions,
    Intervention,
    PathPatching,
    SelectionError,
    SteeringVectors,
)
from tdcache.interventions.options import OPTION_NAMES

MAKERS = {
    "ablation": lambda **options: Ablation("0", **options),
    "addition": lambda **options: ActivationAddition("0", **options),
    "patching": lambda **options: ActivationPatching("0", **options),
    "steering": lambda **options: SteeringVectors("0", torch.ones(2), **options),
    "paths": lambda **options: PathPatching("0", "1", freeze="2", **options),
    "tracing": lambda **options: CausalTracing("0", "1", subject=0, metric=len, **options),
}
GIVEN = {
    "positions": [1, 2], "units": slice(3), "rows": 1, "direction": "fwd_pre", "pick": 0, "mask_key": "mask",
    "match": "search", "position_dim": 2, "unit_dim": -2,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_every_option_is_an_attribute_and_in_the_repr(name):
    recipe = MAKERS[name](**GIVEN)
    for option, value in GIVEN.items():
        assert getattr(recipe, option) == value
        assert f"{option}={value!r}" in repr(recipe)
    assert recipe.options == EditOptions(**GIVEN)


@pytest.mark.parametrize("name", MAKERS)
def test_a_misspelt_option_is_refused_with_the_one_that_is_near(name):
    with pytest.raises(TypeError, match=r"\w+\(\) has no argument 'positons'; did you mean 'positions'\?"):
        MAKERS[name](positons=1)
    with pytest.raises(TypeError, match=r"has no argument 'zzzzzzzzzz'; options are .*units, .*heads"):
        MAKERS[name](zzzzzzzzzz=1)


@pytest.mark.parametrize("kind", [Ablation, ActivationAddition, ActivationPatching, SteeringVectors, Intervention])
def test_the_signature_spells_every_option_out(kind):
    parameters = inspect.signature(kind).parameters
    assert set(OPTION_NAMES) <= set(parameters)
    assert "options" not in parameters


def test_positions_and_units_of_patching_may_be_given_by_place():
    recipe = ActivationPatching("0", {"0": torch.ones(1)}, None, [1], slice(2))
    assert (recipe.positions, recipe.units) == ([1], slice(2))


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        EditOptions().positions = 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "bwd"}, DirectionError, "changes outputs.*or inputs.*got 'bwd'"),
        ({"pick": "all"}, EditError, "pick='all' cannot say where to put a new value"),
        ({"steps": "later"}, SelectionError, "steps is 'prefill', 'decode', a predicate"),
        ({"positions": 1.5}, EditError, "positions is an int, a slice.*got 1.5"),
        ({"rows": "all"}, EditError, "rows is an int, a slice.*got 'all'"),
        ({"rows": torch.ones(2, 2).long()}, EditError, r"rows has one axis, got a tensor of shape \(2, 2\)"),
        ({"unit_dim": 1}, EditError, "unit_dim counts from the end and is negative, got 1"),
        ({"heads": (0, 1)}, EditError, r"heads is \(n_heads, which\), such as \(12, \[3, 7\]\), got \(0, 1\)"),
        ({"heads": (2, 1), "units": 1}, EditError, "heads= and units= choose along the same axis"),
        ({"heads": 4}, EditError, r"heads=4 does not say which: heads=\(n_heads, which\)"),
        ({"calls": -1}, EditError, "calls= is an int, a slice or a sequence of ints from 0.*got -1"),
        ({"calls": [0, "1"]}, EditError, "calls= is an int"),
        ({"calls": slice(-2, None)}, EditError, "calls= is an int"),
    ],
)
def test_options_that_cannot_be_used_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        Ablation("0", **options)


def test_how_many_heads_is_for_a_sweep_over_heads():
    with pytest.raises(EditError, match=r"heads=4 is for sweep='head'; to patch some heads, give heads=\(n_heads"):
        ActivationPatching("0", heads=4)
    with pytest.raises(EditError, match=r"heads=4 is for sweep='head'"):
        ActivationPatching("0", heads=4, sweep=True, metric=len)


def test_methods_that_call_the_model_themselves_take_no_steps():
    with pytest.raises(EditError, match=r"path patching calls the model itself.*leave steps= and calls= out"):
        PathPatching("0", "1", freeze="2", calls=0)
    with pytest.raises(EditError, match=r"steps= is not for causal tracing"):
        CausalTracing("0", "1", subject=0, metric=len, steps="prefill")
    with pytest.raises(EditError, match=r"a sweep patches the same positions.*leave source_positions= out"):
        ActivationPatching("0", sweep=True, metric=len, source_positions=1)
