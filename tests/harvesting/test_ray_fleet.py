"""Harvesting on a local Ray: actors write, numbers come back. Skipped where Ray is not installed."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from store.faulty_files import contents
from tdcache import harvest
from tdcache.errors import StoreError
from tdcache.harvesting import harvest_with_ray

TESTS = Path(__file__).resolve().parents[1]
OPTIONS = {"select": "0|1", "batch_size": 4}


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    return model, torch.utils.data.TensorDataset(torch.arange(400.0).view(100, 4))


def fragile(marker):
    """Like ``make``, but the first actor that gets here dies."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return make()
    os.kill(os.getpid(), 9)
    return None


class Fragile:
    def __init__(self, marker):
        self.marker = marker

    def __call__(self):
        return fragile(self.marker)


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
        object_store_memory=1 << 27,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(StoreError, match=r"needs it: pip install 'tdcache\[ray\]'"):
        harvest_with_ray(make, tmp_path / "a.acts", **OPTIONS)


@pytest.mark.filterwarnings("ignore")
def test_actors_write_the_bytes_of_one_process(local_ray, tmp_path):
    harvest(*make(), tmp_path / "golden.acts", **OPTIONS)
    dataset = harvest_with_ray(make, tmp_path / "a.acts", workers=2, **OPTIONS)
    assert dataset.complete
    assert contents(tmp_path / "a.acts") == contents(tmp_path / "golden.acts")


@pytest.mark.filterwarnings("ignore")
def test_the_units_of_a_dead_actor_are_run_by_another(local_ray, tmp_path):
    dataset = harvest_with_ray(Fragile(tmp_path / "died"), tmp_path / "a.acts", workers=2, **OPTIONS)
    assert (tmp_path / "died").exists()
    assert len(dataset) == 100
    dataset.verify()
