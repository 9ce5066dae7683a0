"""The cases of the differential fuzz: which sites of a random model, captured how, and what is done in the block."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from differential_models import CHANGES_IN_PLACE, WIDTH, Gives, Split, model_of, random_tree
from tdcache import Concatenate, First, Last, Mean, Stack

GRADIENTS = ("bwd", "bwd_pre", "grad_in")
OUTPUTS = ("fwd", "fwd_kwargs", "bwd", "bwd_pre")


NO_ARGUMENT = torch.zeros(2, WIDTH, dtype=torch.float64)
"""What a callback takes where all arguments are keywords, which hooks of inputs do not get."""


@dataclass
class Case:
    """One case: a model, options, and what is done in the block."""

    tree: Any
    paths: list[str]
    options: dict[str, Any]
    script: list[tuple[Any, ...]]
    leaf: bool

    @property
    def changes_in_place(self) -> bool:
        return any(repr(name) in repr(self.tree) for name in CHANGES_IN_PLACE)


def flat(value: Any, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of a value, with the steps to it, in order."""
    if isinstance(value, Tensor):
        return [(above, value)]
    if isinstance(value, TensorDictBase | dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        items = []
    return [each for step, child in items for each in flat(child, (*above, str(step)))]


def first_leaf(value: Any) -> Tensor:
    return flat(value)[0][1]


def last_leaf(value: Any) -> Tensor:
    return flat(value)[-1][1]


PICKS = {"none": None, "all": "all", "first leaf": first_leaf, "last leaf": last_leaf, "one": 0, "last": -1}


def doubled_output(output, **others):
    return first_leaf(output).detach() * 2


def doubled_input(args, **others):
    return first_leaf((*args, NO_ARGUMENT)).detach() * 2


def doubled_gradient(grad_output, **others):
    return next(grad for grad in grad_output if grad is not None) * 2


CALLBACKS = {"fwd": doubled_output, "fwd_pre": doubled_input, "bwd_pre": doubled_gradient}
REDUCERS = [None, None, Last(), First(), Stack(), Concatenate(), Mean()]


def random_options(rng: random.Random, model: nn.Module, paths: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Some paths, and options that go with them."""
    directions = rng.sample([*OUTPUTS, "fwd_pre", "fwd_pre_kwargs", "grad_in"], rng.randint(1, 3))
    chosen = rng.sample(paths, rng.randint(1, min(4, len(paths))))
    options: dict[str, Any] = {
        "directions": directions,
        "pick": rng.choice(["none", "none", "none", "all", "first leaf", "last leaf", "one", "last"]),
        "hold": rng.choice(["detached", "detached", "snapshot", "live"]),
        "index": rng.choice([None, None, None, 0, slice(0, 1), (..., 0)]),
        "dtype": rng.choice([None, None, None, torch.float32]),
        "reducer": rng.choice(REDUCERS),
        "prepend": rng.random() < 0.2,
        "use_nested_keys": rng.random() < 0.5,
        "cache": rng.random() < 0.2,
    }
    if options["pick"] in ("one", "last"):
        # The last part of what Split gives is no tensor.
        kinds = Gives if options["pick"] == "last" else Split | Gives
        options["directions"] = [each for each in directions if each in OUTPUTS]
        chosen = [path for path in paths if isinstance(model.get_submodule(path), kinds)]
        if not (chosen and options["directions"]):
            return random_options(rng, model, paths)
    if rng.random() < 0.15:
        direction = rng.choice(sorted(CALLBACKS))
        options.update(directions=[direction], callback=CALLBACKS[direction], pick="none")
    if rng.random() < 0.2 and not set(options["directions"]) & set(GRADIENTS):
        options["stop_early"] = True
    if rng.random() < 0.2 and options["reducer"] is None and options["index"] is None and "callback" not in options:
        options["batch_dims"] = 0  # sites differ in shape where views are; see the stacked cases for more
    return chosen, options


def random_script(rng: random.Random, gradients: bool) -> list[tuple[Any, ...]]:
    """What is done in the block: forwards, backwards in any order, readings."""
    script: list[tuple[Any, ...]] = []
    open_losses: list[int] = []
    for number in range(rng.randint(1, 3)):
        graph = rng.random() < (0.85 if gradients else 0.4)
        script.append(("forward", number, graph))
        if graph:
            open_losses.append(number)
        while open_losses and rng.random() < 0.5:
            loss = rng.choice(open_losses)
            again = rng.random() < 0.3
            script.append(("backward", loss, again, rng.choice([1.0, 2.0]), rng.random() < 0.2))
            if not again:
                open_losses.remove(loss)
        if rng.random() < 0.3:
            script.append(("read",))
    rng.shuffle(open_losses)
    script.extend(("backward", loss, False, 1.0, False) for loss in open_losses)
    return script


def random_case(seed: str) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    if rng.random() < 0.1:
        return stacked_case(rng)
    tree = random_tree(rng, rng.choice([1, 2, 3]))
    model = model_of(tree)
    paths = [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)]
    chosen, options = random_options(rng, model, paths)
    return Case(
        tree, chosen, options, random_script(rng, bool(set(options["directions"]) & set(GRADIENTS))), rng.random() < 0.5
    )


def stacked_case(rng: random.Random) -> Case:
    """A row of layers that become one entry."""
    count = rng.randint(2, 12)
    tree = ("chain", *[rng.choice(["linear", "tanh", "views", "through"]) for _ in range(count)])
    directions = rng.sample(["fwd", "fwd_pre", "bwd", "bwd_pre"], rng.randint(1, 2))
    options = {
        "directions": directions,
        "pick": "none",
        "hold": rng.choice(["detached", "snapshot"]),
        "index": rng.choice([None, 0]),
        "reducer": rng.choice([None, Stack(), Mean()]),
        "stack_by": "layer",
        "use_nested_keys": rng.random() < 0.5,
        "batch_dims": 0,
    }
    script = [("forward", 0, True), ("backward", 0, False, 1.0, False)]
    if rng.random() < 0.5:
        script += [("forward", 1, True), ("backward", 1, False, 2.0, False)]
    return Case(tree, [f"parts.1.parts.{number}" for number in range(count)], options, script, rng.random() < 0.5)
