"""The short form of ``python -m nox -s soak``."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tdcache import ActivationDataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_of_a_soak_comes_once_through_each_step(soak, tmp_path):
    for step in soak.STEPS.values():
        step(tmp_path, 70_000)
    assert len(ActivationDataset.open(tmp_path / "b.acts")) == 70_000


def test_a_soak_notices_a_row_that_is_lost_doubled_or_changed(soak):
    numbers = torch.arange(1000)

    def batch(seq, of=None):
        return {"seq": seq, "0": soak.features(seq if of is None else of).bfloat16()}

    soak.seen_once(numbers, [batch(numbers[500:]), batch(numbers[:500])])
    doubled = numbers.clone()
    doubled[3] = 4
    for wrong, text in (
        (batch(numbers[1:]), "a row is missing, or came twice"),
        (batch(doubled), "a row is missing, or came twice"),
        (batch(numbers, doubled), "a row is not the one that was written"),
    ):
        with pytest.raises(SystemExit, match=text):
            soak.seen_once(numbers, [wrong])
