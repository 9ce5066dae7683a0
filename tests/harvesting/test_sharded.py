"""Models that two processes hold together: what is stored is the single-process value, or it is refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from harvesting.test_processes import TESTS, free_port
from tdcache.harvesting.sharding import whole_tensor

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-W", "ignore", str(TESTS / "harvesting" / "sharded_worker.py"), str(folder)]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out) for out, _ in outputs]


@pytest.mark.parametrize("case", ["row-parallel", "column-parallel, DTensor", "hooks first", "fsdp"])
def test_a_value_that_can_be_made_whole_is_stored_as_a_single_process_would(answers, case):
    assert [each[case] for each in answers] == ["equal", "equal"]


def test_the_bare_shard_of_a_column_parallel_layer_is_refused_by_name(answers):
    for each in answers:
        assert each["column-parallel"].startswith(
            "CaptureError: 'up' has 8 features here and 16 in all: this rank sees"
        )


def test_a_shard_that_shows_no_trace_of_being_one_is_refused_by_name(answers):
    for each in answers:
        assert each["between them"].startswith("CaptureError: 'act' has other values on other ranks")


@pytest.mark.parametrize("case", ["own share, parallel", "own share, fsdp"])
def test_shares_of_a_model_that_the_ranks_hold_together_are_refused(answers, case):
    for each in answers:
        assert each[case].startswith("CaptureError: the ranks 0, 1 hold this model together and must run the same")
        assert "leave rank= and world= out" in each[case]


def test_a_share_that_was_asked_for_waits_for_no_other_rank(answers):
    assert [each["alone"] for each in answers] == ["done", "done"]


def test_without_processes_a_value_is_itself():
    tensor = torch.ones(2)
    assert whole_tensor(tensor, nn.Linear(2, 2), "a") is tensor
