"""Which files of the package one forward, edit, gradient, attribution pass or harvest batch goes through, in order.

``python benchmarks/rooms.py [--order]`` counts, for each journey, the files that are entered and how often control
passes from one of them to another; ``--order`` also prints the files in the order of their first entry. The table in
``docs/architecture.md`` is made with it. Counts depend on the code alone, not on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

import tdcache
from tdcache import ActivationCaching, SteeringVectors, harvest
from tdcache.attribution import IntegratedGradients

PACKAGE = str(Path(tdcache.__file__).parent)


class Journey:
    """Notes each file of the package that control enters."""

    def __init__(self) -> None:
        self.rooms: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        room = frame.f_code.co_filename[len(PACKAGE) + 1 :]
        if not self.rooms or self.rooms[-1] != room:
            self.rooms.append(room)


def followed(act: Callable[[], Any]) -> list[str]:
    """The files that ``act`` enters, one entry per change of room; it runs once before, unobserved."""
    act()
    journey = Journey()
    sys.setprofile(journey)
    try:
        act()
    finally:
        sys.setprofile(None)
    return journey.rooms


def model() -> nn.Sequential:
    """Four layers that every journey is made through."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def journeys() -> dict[str, list[str]]:
    """The rooms of every journey."""
    x, found = torch.randn(3, 4), {}
    net = model()
    with torch.no_grad(), ActivationCaching(r"\d").prepare(net) as hooked:
        hooked(x)
        found["a warm forward"] = followed(lambda: net(x))
    with ActivationCaching(r"\d", directions=["fwd", "bwd"]).prepare(net):
        found["a warm forward and backward"] = followed(lambda: net(x).sum().backward())

    def steer() -> None:
        with SteeringVectors("2", torch.ones(4)).prepare(net) as steered, torch.no_grad():
            steered(x)

    found["a steering, from entry to exit"] = followed(steer)

    def attribute() -> None:
        with IntegratedGradients(target=0, n_steps=4).prepare(net) as attributed:
            attributed(TensorDict({"input": x}, batch_size=[3]))

    found["an attribution, from entry to exit"] = followed(attribute)
    with tempfile.TemporaryDirectory() as folder:
        batches = [torch.randn(3, 4) for _ in range(4)]
        names = iter(range(9))
        found["a harvest of four batches"] = followed(
            lambda: harvest(net, batches, select="2", path=Path(folder, str(next(names))), rows="samples")
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Count the files that a journey through the package enters.")
    parser.add_argument("--order", action="store_true", help="print the files in the order of their first entry")
    order = parser.parse_args().order
    print(f"{'journey':36} {'files':>6} {'changes of room':>16}")
    for name, rooms in journeys().items():
        print(f"{name:36} {len(set(rooms)):6} {len(rooms) - 1:16}")
        if order:
            print("    " + " > ".join(dict.fromkeys(rooms)))


if __name__ == "__main__":
    main()
