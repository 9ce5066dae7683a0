"""What the comparison up to rounding lets through, and what the noise of another CPU changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rounding import assert_same_but_rounding

NOISE = """
import torch, other_cpu
from torch import nn

other_cpu.install()
torch.manual_seed(0)
linear, x = nn.Linear(8, 8), torch.randn(6, 8)
assert torch.equal(linear(x), linear(x)) and torch.equal(x @ x.T, -(-x @ x.T))
assert not torch.equal(linear(x)[:2], linear(x[:2]))
torch.testing.assert_close(linear(x)[:2], linear(x[:2]), rtol=0, atol=1e-6)
whole = torch.arange(12.0).view(3, 4)
assert torch.equal(whole @ torch.eye(4), whole) and whole.sum() == 66
"""


def test_other_rows_and_larger_differences_than_rounding_are_told_apart():
    wanted = torch.randn(5, 4)
    assert_same_but_rounding(wanted * (1 + 2e-7), wanted)
    for found in (wanted.flip(0), wanted + 1e-4, wanted.double(), wanted[:4]):
        with pytest.raises(AssertionError):
            assert_same_but_rounding(found, wanted)
    with pytest.raises(AssertionError):
        assert_same_but_rounding(torch.full((2,), 1e-9), torch.zeros(2))


def test_the_noise_of_another_cpu_repeats_and_depends_on_the_shape():
    subprocess.run([sys.executable, "-c", NOISE], cwd=Path(__file__).parent, check=True)
