"""One of two processes that hold one model together; prints what each case gave."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tdcache import harvest
from tdcache.errors import TdcacheError
from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.options import HarvestOptions
from tdcache.harvesting.row_rule import RowRule


class Mlp(nn.Module):
    """Up, a function, down: the usual pair of column- and row-parallel layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def plan(**up):
    return {"up": ColwiseParallel(**up), "down": RowwiseParallel()}


def expected(x):
    model = Mlp()
    with torch.no_grad():
        up = model.up(x)
        act = model.act(up)
        return {"up": up, "act": act, "down": model.down(act)}


def tried(call, values):
    """``"equal"``, ``"different"`` or the message of a refusal."""
    try:
        found = call()
    except TdcacheError as error:
        return f"{type(error).__name__}: {error}"
    close = all(torch.allclose(found[path], values[path], atol=1e-5) for path in found)
    return "equal" if close else "different"


def stored(folder, model, data, select, **options):
    dataset = harvest(model, data, folder, select=select, **options)
    dataset.verify()
    return {key: dataset[key][...] for key in dataset.keys}


def alone(folder, data):
    """Rank 0 harvests a share of its own; the other takes no part, and looks whether that one came to its end."""
    flag = folder / "rank 0 is done"
    if dist.get_rank() == 0:
        harvest(Mlp(), data, folder / "alone.acts", select="up", rank=0, world=1)
        flag.touch()
        return "done"
    until = time.monotonic() + 20
    while time.monotonic() < until and not flag.exists():
        time.sleep(0.01)
    return "done" if flag.exists() else "waits"


def captured(model, batch, mesh):
    """Hooks first, parallel layers second."""
    capture = BatchCapture(model, HarvestOptions(select="up|down", stop_early=False))
    with capture.open() as hooked:
        parallelize_module(model, mesh, plan())
        rows = RowRule(kind="samples")(batch, first=0)
        return dict(capture.run(hooked, batch, rows))


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    x = torch.randn(20, 8)
    data, values = list(x.split(4)), expected(x)
    parallel = parallelize_module(Mlp(), mesh, plan())
    open_ended = parallelize_module(Mlp(), mesh, plan(use_local_output=False))
    cases = {
        "row-parallel": lambda: stored(folder / "row.acts", parallel, data, "down"),
        "column-parallel": lambda: stored(folder / "column.acts", parallel, data, "up"),
        "between them": lambda: stored(folder / "between.acts", parallel, data, "act"),
        "column-parallel, DTensor": lambda: stored(folder / "open.acts", open_ended, data, "up"),
    }
    answers = {name: tried(case, values) for name, case in cases.items()}
    answers["hooks first"] = tried(lambda: captured(Mlp(), x, mesh), values)
    sharded, fresh = Mlp(), Mlp()
    for model in (sharded, fresh):  # after a forward the root's parameters are whole until the next backward
        fully_shard(model, mesh=mesh)
    answers["fsdp"] = tried(lambda: stored(folder / "fsdp.acts", sharded, data, "up|act|down"), values)
    mine = {"rank": dist.get_rank(), "world": 2}
    for name, model in {"parallel": parallel, "fsdp": fresh}.items():
        answers[f"own share, {name}"] = tried(partial(stored, folder / "own.acts", model, data, "act", **mine), values)
    answers["alone"] = alone(folder, data)
    print(json.dumps(answers), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
