"""What every test relies on: one torch thread, fixed seeds, no network, and GPU tests skipped where there is no GPU."""

import os
import sys

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

from small_models import MLP

if os.environ.get("TDCACHE_OTHER_CPU"):
    import other_cpu

    other_cpu.install()

# Each of its files imports a library that is there only for the validator; doctests are looked for by importing.
collect_ignore = ["validator"]

# pytest-xdist runs one worker per core: with torch's default each of them would start a thread per core as well.
torch.set_num_threads(1)

# Derandomized, so that a run can be repeated; without a deadline, because the first example pays for torch's start.
hypothesis.settings.register_profile("tdcache", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("tdcache")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def no_graph_is_left():
    """Forget what a test compiled: a graph of one model's class would serve, and skip the hooks of, another's."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and list(dynamo.convert_frame.input_codes.seen):
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded():
    """Give each test the same random numbers, whichever tests ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def model():
    """The usual small model; a file of tests may have another."""
    return MLP()


@pytest.fixture
def x():
    """A batch for it."""
    return torch.randn(5, 4)
