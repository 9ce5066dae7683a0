"""One case per family, built once: nothing here changes it."""

import functools

import pytest

from residual import hand


@functools.cache
def _case(family):
    return hand.FAMILIES[family]()


@pytest.fixture
def case():
    """A function from the name of a family to its case."""
    return _case
