"""The report of hooks: which sit where, in which order, and whose they are."""

from functools import partial

import pytest
import torch
from torch import nn

from points.point_models import Branches
from tdcache import ActivationCaching, HookedModule, MultiHookManager
from tdcache.hooks import MultiHookHandle, register_hook_to_module
from tdcache.points import list_hooks


def doubled(tensor, hook):
    return 2 * tensor


def shown(module, args, output):
    return None


def theirs(module, *rest):
    return None


@pytest.fixture
def model():
    return Branches()


def rows(report):
    return [(row.path, row.kind, row.position, row.owner, row.name, row.permanent) for row in report]


def test_a_model_without_hooks_has_none(model):
    assert len(list_hooks(model)) == 0
    assert repr(list_hooks(model)) == "no hooks on Branches"


def test_ours_and_foreign_hooks_are_told_apart_in_the_order_they_run(model):
    model.a.register_forward_hook(theirs)
    model.a.add_hook(doubled)
    model.a.add_perma_hook(partial(doubled))
    model.a.register_forward_hook(theirs, prepend=True)
    assert rows(list_hooks(model)) == [
        ("a", "fwd", 0, "foreign", "theirs", False),
        ("a", "fwd", 1, "foreign", "theirs", False),
        ("a", "fwd", 2, "tdcache", "doubled", False),
        ("a", "fwd", 3, "tdcache", "partial(doubled, ...)", True),
    ]


def test_every_kind_of_hook_is_there(model):
    model.linear.register_forward_pre_hook(theirs)
    model.linear.register_full_backward_hook(theirs)
    model.linear.register_full_backward_pre_hook(theirs)
    model.b.add_hook(doubled, "bwd")
    model.register_forward_hook(theirs)
    assert rows(list_hooks(model)) == [
        ("", "fwd", 0, "foreign", "theirs", False),
        ("linear", "fwd_pre", 0, "foreign", "theirs", False),
        ("linear", "bwd_pre", 0, "foreign", "theirs", False),
        ("linear", "bwd", 0, "foreign", "theirs", False),
        ("b", "fwd", 0, "tdcache", "doubled (on the gradient)", False),
    ]


def test_open_contexts_and_hooks_of_the_library_go_by_name(model):
    handle = MultiHookManager("linear").register_hook(model, lambda path: shown)
    with ActivationCaching("a", directions=["fwd", "grad_in"]).prepare(model):
        report = list_hooks(model)
    assert {row.owner for row in report} == {"tdcache"}
    assert [(row.path, row.name) for row in report if row.path] == [
        ("linear", "shown"),
        ("a", "InputGradientTap('a')"),
        ("a", "OutputTap('a')"),
        ("a", "InputGradientTap('a')"),
    ]
    assert [row.name for row in report if not row.path] == ["Recorder(fwd, grad_in)"] * 2
    handle.remove()
    assert len(list_hooks(model)) == 0


def test_a_users_hook_at_one_path_goes_by_its_own_name(model):
    handle = HookedModule.from_module(model).register_submodule_hook("linear", shown)
    assert rows(list_hooks(model)) == [("linear", "fwd", 0, "tdcache", "shown", False)]
    handle.remove()


def test_halves_of_a_report_are_reports(model):
    model.a.register_forward_hook(theirs)
    model.a.add_hook(doubled)
    report = list_hooks(model)
    assert [row.name for row in report.ours] == ["doubled"]
    assert [row.name for row in report.foreign] == ["theirs"]
    assert report.foreign[0].hook is theirs
    assert len(report[:1]) == 1


def test_torchs_global_hooks_are_on_every_module():
    handle = torch.nn.modules.module.register_module_forward_hook(theirs)
    try:
        assert rows(list_hooks(nn.Linear(1, 1))) == [("(every module)", "fwd", 0, "foreign", "theirs", False)]
    finally:
        handle.remove()


def test_a_shared_module_is_listed_once():
    inner = nn.Linear(1, 1)
    inner.register_forward_hook(theirs)
    assert [row.path for row in list_hooks(nn.Sequential(inner, inner))] == ["0"]


def test_a_hook_is_never_asked_for_a_repr_of_what_it_holds(model):
    class Large:
        def __repr__(self):
            raise AssertionError("asked for its repr")

        def __call__(self, *args, **kwargs):
            return None

    def with_three(held, tensor, hook):
        return None

    model.a.add_hook(Large())
    model.a.add_hook(partial(with_three, Large()))
    model.a.register_forward_hook(Large())
    assert "Large" in repr(list_hooks(model))


def test_the_printed_report_is_a_table(model):
    model.a.add_perma_hook(doubled)
    model.sum.register_forward_pre_hook(theirs)
    assert repr(list_hooks(model)).splitlines() == [
        "2 hooks on Branches",
        "path  kind     #  owner    hook",
        "a     fwd      0  tdcache  doubled  permanent",
        "sum   fwd_pre  0  foreign  theirs",
    ]


def test_a_muted_hook_is_listed_as_the_hook_that_it_is(model):
    model.a.add_hook(doubled)
    handle = MultiHookHandle([register_hook_to_module(model.sum, lambda module, args, output: None)])
    shown = rows(list_hooks(model))
    with handle.muted():
        muted = rows(list_hooks(model))
    assert [row[:4] for row in muted] == [row[:4] for row in shown]
    assert [row[4] for row in muted] == [shown[0][4], f"{shown[1][4]} (muted)"]
    assert rows(list_hooks(model)) == shown
