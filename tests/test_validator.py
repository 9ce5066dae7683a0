"""The validator's short form: tdcache beside hooks by hand; and that it would show a library that is wrong."""

import sys
from importlib import import_module
from types import SimpleNamespace
from xml.etree.ElementTree import fromstring

import pytest
import torch

pytest.importorskip("transformers")

from tdcache import points
from validator import by_hand, by_tdcache
from validator.answers import Answer, Answers, ask, asked_of, read, write
from validator.compare import verdict
from validator.lens_tests import compared, outcome_of
from validator.page import page
from validator.points_in_lens import OURS, Exchanging
from validator.subject_list import SHORT, subjects
from validator.subjects import NotOfferedError

OWN = ("MLP", "CNN, ReLU in place", "LSTM", "(tensor, None)", "TensorDictSequential")


@pytest.mark.parametrize("name", [*OWN, *SHORT])
def test_tdcache_answers_every_request_as_hooks_by_hand_do(name):
    (subject,) = subjects([name])
    for request in asked_of(subject):
        wanted, found = (ask(library, subject, request) for library in (by_hand, by_tdcache))
        assert found.kind == "value", found.text
        # One operation more or less on the same tensors: the same kernels run on the same shapes.
        assert verdict(found, wanted).sign in ("same", "close"), request


def test_the_models_of_transformers_are_asked_all_six_requests():
    asked = {subject.name: asked_of(subject) for subject in subjects(["gpt2", "llama", "LSTM"])}
    assert len(asked["gpt2"]) == len(asked["llama"]) == 6
    assert asked["LSTM"] == ("cache", "gradient", "patch", "ablate")


def by_error(subject):
    raise KeyError("no such layer")


def by_refusal(subject):
    raise NotOfferedError("gradients")


def test_a_library_that_is_wrong_or_fails_is_shown_with_how_much_and_why(tmp_path):
    (subject,) = subjects(["MLP"])
    wrong = SimpleNamespace(
        cache=lambda subject: by_hand.cache(subject) * 1.5,
        gradient=by_refusal,
        patch=by_error,
        ablate=lambda subject: by_hand.ablate(subject)[:1],
    )
    hand, theirs = (
        Answers(by={"MLP": {request: ask(library, subject, request) for request in asked_of(subject)}}, version="1.0")
        for library in (by_hand, wrong)
    )
    write(theirs, tmp_path, "wrong")
    text = page(hand, {"wrong": read(tmp_path, "wrong"), "absent": read(tmp_path, "absent")}, [])
    assert "| MLP | `≠·✗≠__` |" in text
    assert "| wrong | off by 5e-01 of the largest magnitude | cache of MLP |" in text
    assert "| wrong | KeyError: 'no such layer' | patch of MLP |" in text
    assert "| wrong | shape (1, 3), not (3, 3) | ablate of MLP |" in text
    assert "| wrong | gradients | gradient of MLP |" in text
    assert "- absent was left out: its process ended before it had answered" in text


def test_rounding_is_told_from_a_difference():
    wanted = Answer(kind="value", value=torch.tensor([1.0, -4.0]))
    near, off = (Answer(kind="value", value=torch.tensor([1.0, -4.0 + by])) for by in (1e-6, 1e-3))
    assert verdict(wanted, wanted).sign == "same"
    assert verdict(near, wanted).sign == "close"
    assert verdict(off, wanted).sign == "differs"


def test_the_hook_points_of_another_library_are_exchanged_before_its_modules_take_them(tmp_path, monkeypatch):
    package = tmp_path / "transformer_lens"
    package.mkdir()
    (package / "__init__.py").write_text("from .hook_points import HookPoint\nfrom .HookedRootModule import NAME")
    (package / "hook_points.py").write_text("class HookPoint: pass\nclass LensHandle: pass")
    (package / "HookedRootModule.py").write_text("NAME = 'kept'\nclass HookedRootModule: pass")
    loaded = [name for name in sys.modules if name.partition(".")[0] == "transformer_lens"]
    for name in ("transformer_lens", *OURS, *loaded):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Exchanging(), *sys.meta_path])
    lens = import_module("transformer_lens")
    assert lens.HookPoint is points.HookPoint
    assert lens.HookedRootModule.HookedRootModule is points.HookedRootModule
    assert lens.NAME == "kept"
    for name in ("transformer_lens", *OURS):
        del sys.modules[name]


def test_tests_that_pass_with_the_other_librarys_classes_only_are_listed():
    report = "<x><testcase/><testcase><failure/></testcase><testcase><skipped/></testcase></x>"
    assert [outcome_of(case) for case in fromstring(report)] == ["passed", "failure", "skipped"]
    theirs = {"a": "passed", "b": "passed", "c": "error", "d": "skipped"}
    said, lost = compared(theirs, {"a": "passed", "b": "failure", "c": "passed"})
    assert lost == ["b"]
    assert said == (
        "1 of the 2 tests that pass with TransformerLens' hook points pass with tdcache's (not counted, as they fail "
        "with its own or were skipped: 1 error, 1 skipped)"
    )
