"""Over random module trees, selection is what ``named_modules`` and Python's ``re`` say."""

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
from model_state import state_of
from properties.strategies import module_trees, patterns
from tdcache.paths import resolve_all
from tdcache.selection import select, walk


@given(module_trees())
def test_a_walk_is_named_modules_without_the_root(model):
    assert list(walk(model)) == list(model.named_modules(remove_duplicate=False))[1:]


@given(module_trees(), patterns(), st.sampled_from(["full", "prefix", "search"]))
def test_a_pattern_selects_what_re_matches(model, pattern, match):
    assert list(select(model, pattern, match=match, allow_empty=True).paths) == reference.selected_paths(
        model, pattern, match
    )


@given(module_trees(), st.lists(patterns(), max_size=3))
def test_a_union_selects_what_any_of_its_members_selects(model, members):
    wanted = {path for member in members for path in reference.selected_paths(model, member)}
    assert set(select(model, members, allow_empty=True).paths) == wanted


@given(module_trees(), st.sampled_from([nn.Linear, nn.ReLU, nn.Module, nn.ModuleList]))
def test_a_class_selects_what_isinstance_says(model, kind):
    wanted = [
        (path, module)
        for path, module in list(model.named_modules(remove_duplicate=False))[1:]
        if isinstance(module, kind)
    ]
    assert [(path, module) for path, module, _ in select(model, kind, allow_empty=True)] == wanted


@given(module_trees())
def test_every_path_resolves_to_its_own_module(model):
    for path, module in walk(model):
        assert resolve_all(model, path) == (path, module)


@given(module_trees())
def test_selecting_leaves_the_model_as_it_was(model):
    before = state_of(model)
    str(select(model, ["", ".*"]))
    assert state_of(model) == before


@given(module_trees())
def test_a_copied_model_has_the_same_paths(model):
    paths = select(model, ".*", allow_empty=True).paths
    assert select(copy.deepcopy(model), ".*", allow_empty=True).paths == paths
    assert select(pickle.loads(pickle.dumps(model)), ".*", allow_empty=True).paths == paths
