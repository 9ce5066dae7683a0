"""Real processes: killed at random, several at once, one of several dead."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harvesting.worker import COUNT, Slow, data, run
from store.faulty_files import contents
from tdcache import ActivationDataset, harvest

TESTS = Path(__file__).resolve().parents[1]


def start(folder, *options, **environment):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(TESTS / "harvesting" / "worker.py"), str(folder), *options],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "a.acts"
    dataset = run(folder)
    assert len(dataset) == COUNT * 4
    return contents(folder)


def test_killed_at_random_instants_nothing_is_lost_and_the_bytes_are_those_of_one_run(tmp_path, golden):
    folder, chooser = tmp_path / "a.acts", random.Random(0)
    done = [0]
    for _ in range(3):
        process = start(folder, "seconds=0.02")
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1 + 0.3 * chooser.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        there = contents(folder)
        assert all(golden[name] == bytes_ for name, bytes_ in there.items())
        dataset = ActivationDataset.open(folder)
        dataset.verify()
        done.append(len(dataset))
    assert done == sorted(done)
    assert 0 < done[-1] < COUNT * 4
    run(folder)
    assert contents(folder) == golden


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(folder, world, *options):
    """Start as torchrun would."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    return [
        start(folder, *options, **address, RANK=str(rank), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
        for rank in range(world)
    ]


def test_two_gloo_processes_write_the_bytes_of_one(tmp_path, golden):
    processes = ranks(tmp_path / "a.acts", 2, "group=gloo")
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split()[-2:] == [str(COUNT * 4), "True"]
    assert contents(tmp_path / "a.acts") == golden


def test_a_dead_rank_costs_its_units_only_and_another_number_of_processes_fills_them_in(tmp_path, golden):
    folder = tmp_path / "a.acts"
    dying, living = ranks(folder, 2, "group=gloo", "dies=0", "seconds=0.02")
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGKILL
    living.communicate(timeout=120)
    dataset = ActivationDataset.open(folder)
    dataset.verify()
    odd = {unit for unit in range(15) if unit % 2}
    assert odd <= {shard.info.unit for shard in dataset.shards}  # the living rank came to the end of its share
    assert not dataset.complete
    model = Slow()
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    for rank in range(3):
        harvest(model, data(), folder, select=r"layers\.[02]", batch_size=4, dtype=torch.bfloat16, rank=rank, world=3)
    handle.remove()
    assert contents(folder) == golden
    assert len(calls) <= COUNT // 2


def test_without_a_process_group_the_variables_of_torchrun_are_enough(tmp_path, golden, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        dataset = run(tmp_path / "a.acts")
    assert dataset.complete
    assert contents(tmp_path / "a.acts") == golden


def test_memory_is_the_same_over_one_ten_and_a_hundred_times_the_data(tmp_path):
    script = (
        "import gc, sys, torch\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from tdcache import harvest\n"
        "torch.set_num_threads(1)\n"
        "def field(name):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name))\n"
        "model, batch = nn.Sequential(nn.Identity()), torch.ones(64, 1024)  # 256 KiB a batch\n"
        "for times in (1, 1, 10, 100):\n"
        "    data = (batch for _ in range(4 * times))\n"
        "    gc.collect(); Path('/proc/self/clear_refs').write_text('5'); before = field('VmRSS')\n"
        "    harvest(model, data, f'{sys.argv[1]}/{times}-{before}', select='0', shard_bytes=1 << 20)\n"
        "    print(field('VmHWM') - before)\n"
        "from tdcache.harvesting import extract_representations\n"
        "data = torch.utils.data.TensorDataset(torch.ones(1, 1024).expand(1 << 14, -1))  # 64 MiB of results\n"
        "gc.collect(); Path('/proc/self/clear_refs').write_text('5'); before = field('VmRSS')\n"
        "found = extract_representations(model, data, ['0'], 'cpu')\n"
        "print(field('VmHWM') - before)\n"
    )
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "MALLOC_ARENA_MAX": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # freed blocks go back to the system
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    _, one, ten, hundred, extracted = map(int, run.stdout.split())  # KiB; the first run loads code
    assert ten < one + 2048
    assert hundred < one + 4096  # 100 MiB went through
    assert extracted < 1.2 * (1 << 16)  # in memory: the result once, and not twice at the end
