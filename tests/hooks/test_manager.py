"""Registering one hook at every module that a selector and two class filters mean."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from model_state import state_of
from tdcache.errors import DirectionError, HookSignatureError, PathError, SelectionError
from tdcache.hooks import DIRECTIONS, MultiHookManager


@pytest.fixture
def model():
    return nn.Sequential(
        OrderedDict(first=nn.Linear(2, 2), act=nn.ReLU(), second=nn.Linear(2, 2), last=nn.Sequential(nn.Tanh()))
    )


def paths_of(manager, model, **options):
    """The paths for which the hook factory is asked."""
    asked = []
    manager.register_hook(model, lambda path: asked.append(path) or (lambda *args: None), **options).remove()
    return asked


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"pattern": "first|act"}, ["first", "act"]),
        ({"pattern": "last"}, ["last"]),
        ({"pattern": "last", "match": "prefix"}, ["last", "last.0"]),
        ({"pattern": ".*", "classes_to_hook": (nn.Linear, nn.Tanh)}, ["first", "second", "last.0"]),
        ({"pattern": ".*", "classes_to_skip": (nn.Linear, nn.Sequential)}, ["act", "last.0"]),
        ({"pattern": ".*", "classes_to_hook": (nn.Linear,), "classes_to_skip": (nn.ReLU,)}, ["first", "second"]),
        ({"classes_to_hook": (nn.ReLU,)}, ["act"]),
        ({"pattern": nn.Linear}, ["first", "second"]),
        ({"pattern": ""}, [""]),
        ({}, []),
    ],
)
def test_pattern_and_class_filters_say_where(model, options, paths):
    assert paths_of(MultiHookManager(**options), model) == paths


def test_the_pattern_can_be_set_between_two_uses(model):
    manager = MultiHookManager("first")
    assert paths_of(manager, model) == ["first"]
    manager.pattern = "second"
    assert manager.pattern == "second"
    assert paths_of(manager, model) == ["second"]


def test_paths_are_relative_to_where_the_model_begins(model):
    outer = nn.Module()
    outer.wrapped = nn.ModuleList([model])
    manager = MultiHookManager("first")
    for relative in ("wrapped.0", "wrapped[0]"):
        assert paths_of(manager, outer, relative_path=relative) == ["first"]
    with pytest.raises(SelectionError):
        paths_of(manager, outer)
    with pytest.raises(PathError):
        paths_of(manager, outer, relative_path="wrapped.1")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pattern": "frist"}, SelectionError),
        ({"pattern": "first", "classes_to_hook": (nn.ReLU,)}, SelectionError),
        ({"pattern": "first", "classes_to_skip": (nn.Linear,)}, SelectionError),
        ({"classes_to_hook": (nn.Conv2d,)}, SelectionError),
        ({"classes_to_hook": (nn.ReLU,), "classes_to_skip": (nn.ReLU,)}, SelectionError),
    ],
)
def test_a_selection_that_comes_out_empty_is_an_error(model, options, error):
    with pytest.raises(error):
        paths_of(MultiHookManager(**options), model)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hooks_are_called_in_every_direction_and_removed_together(model, direction):
    before, seen = state_of(model), []

    def hook_at(path):
        return lambda *args: seen.append((path, len(args)))

    with MultiHookManager("first|second").register_hook(model, hook_at, direction=direction) as handle:
        assert len(handle) == 2
        model(torch.ones(1, 2)).sum().backward()
    order = ["second", "first"] if DIRECTIONS[direction].gradient else ["first", "second"]
    assert seen == [(path, len(DIRECTIONS[direction].params)) for path in order]
    model(torch.ones(1, 2)).sum().backward()
    assert len(seen) == 2
    assert state_of(model) == before


def test_prepend_goes_in_front_of_the_hooks_that_are_there(model):
    log = []
    model.first.register_forward_hook(lambda *args: log.append("foreign"))
    manager = MultiHookManager("first")
    manager.register_hook(model, lambda path: lambda *args: log.append("behind"))
    manager.register_hook(model, lambda path: lambda *args: log.append("front"), prepend=True)
    model(torch.ones(1, 2))
    assert log == ["front", "foreign", "behind"]


def failing_at(broken):
    """A hook factory that raises at one path."""

    def make(path):
        if path == broken:
            raise ZeroDivisionError(path)
        return lambda *args: None

    return make


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_failed_registration_leaves_no_hook(model, direction):
    before = state_of(model)
    manager = MultiHookManager(".*")
    with pytest.raises(ZeroDivisionError):
        manager.register_hook(model, failing_at("last.0"), direction=direction)
    with pytest.raises(HookSignatureError):
        manager.register_hook(
            model, lambda path: (lambda: None) if path == "last.0" else (lambda *args: None), direction=direction
        )
    assert state_of(model) == before


def test_an_unknown_direction_is_refused_before_anything_is_asked(model):
    with pytest.raises(DirectionError):
        MultiHookManager(".*").register_hook(model, lambda path: pytest.fail("asked"), direction="forward")


def test_a_shared_module_is_hooked_under_each_of_its_names(model):
    model.add_module("again", model.first)
    assert paths_of(MultiHookManager("first|again"), model) == ["first", "again"]
