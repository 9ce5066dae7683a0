"""The validator's short form: tdcache beside hooks by hand; and that it would show a library that is wrong."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from validator import by_hand, by_tdcache
from validator.answers import Answer, Answers, ask, asked_of, read, write
from validator.compare import verdict
from validator.page import page
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
