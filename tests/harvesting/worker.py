"""One process of a harvest, started by tests: ``python worker.py FOLDER [NAME=VALUE ...]``."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from tdcache import harvest

COUNT = 60


class Slow(nn.Module):
    """Three layers, and a little time, so that there is one to be killed in."""

    def __init__(self, seconds=0.0, dies_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.seconds, self.dies_at, self.calls = seconds, dies_at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        for layer in self.layers:
            x = layer(x).relu_()
        return x


def data():
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(COUNT * 4, 16))


def run(folder, seconds=0.0, dies_at=None):
    torch.set_num_threads(1)
    return harvest(Slow(seconds, dies_at), data(), folder, select=r"layers\.[02]", batch_size=4, dtype=torch.bfloat16)


def main():
    folder, *pairs = sys.argv[1:]
    options = dict(pair.split("=") for pair in pairs)
    seconds = float(options.get("seconds", 0))
    if options.get("group") == "gloo":
        dist.init_process_group("gloo")
    dies_at = 12 if "dies" in options and os.environ["RANK"] == options["dies"] else None
    print("ready", flush=True)
    dataset = run(folder, seconds, dies_at)
    print(len(dataset), dataset.complete, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
