"""A differential fuzz: random models, random options, against hooks that are written here with torch alone.

Each case makes three models of one recipe. One is captured by tdcache. One is watched by hooks of this file: they copy
every value, and send it through an identity whose backward copies the gradient, so that no alias, no in-place operation
and no option can get in the way. One runs bare, and says what the outputs and the ``.grad`` of the leaves must be.

Run ``python tests/differential.py --cases 10000 --seed 0``; a case that fails is printed with its recipe, and
``--only NUMBER`` runs it alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from differential_cases import PICKS, Case, random_case
from differential_models import WIDTH, model_of
from differential_oracle import Oracle, Stopped, expected
from tdcache import ActivationCaching, InplaceModificationError, TdcacheError, TdcacheWarning


def data(number: int, leaf: bool) -> Tensor:
    """The input of one forward."""
    x = torch.linspace(-2, 2, WIDTH * 2, dtype=torch.float64).reshape(2, WIDTH) + number / 3
    return x.requires_grad_(leaf)


def weighted(output: Tensor, scale: float) -> Tensor:
    return scale * (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum()


class Runner:
    """Carries out a script on one model."""

    def __init__(self, case: Case, forward: Any, oracle: Oracle | None = None) -> None:
        self.case, self.forward, self.oracle = case, forward, oracle
        self.outputs: dict[int, Any] = {}
        self.inputs: dict[int, Tensor] = {}

    def run(self) -> None:
        for step, *rest in self.case.script:
            getattr(self, f"do_{step}")(*rest)

    def do_forward(self, number: int, graph: bool) -> None:
        if self.oracle is not None:
            self.oracle.begin()
        x = self.inputs[number] = data(number, self.case.leaf)
        with torch.set_grad_enabled(graph):
            try:
                self.outputs[number] = self.forward(x)
            except Stopped:
                self.outputs[number] = None

    def do_backward(self, number: int, again: bool, scale: float, functional: bool) -> None:
        if self.oracle is not None:
            self.oracle.backward += 1
        output = self.outputs[number]
        if output is None or not output.requires_grad:
            return
        if functional and self.case.leaf:
            torch.autograd.grad(weighted(output, scale), self.inputs[number], retain_graph=again)
        else:
            weighted(output, scale).backward(retain_graph=again)

    def do_read(self) -> None:
        """The caller compares."""


class Mismatch(AssertionError):
    pass


FINDINGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    TdcacheError,
)


def check_cache(cache: TensorDictBase, oracle: Oracle, when: str) -> None:
    """Hold a cache against the oracle."""
    wanted = expected(oracle)
    found = {
        key if isinstance(key, tuple) else (key,): value
        for key, value in cache.items(include_nested=True, leaves_only=True)
    }
    if set(found) != set(wanted):
        raise Mismatch(f"{when}: entries {sorted(found)} instead of {sorted(wanted)}")
    for key, value in wanted.items():
        check_same(found[key].detach(), value, f"{when}: {key}")


def check_same(found: Tensor, wanted: Tensor, what: str) -> None:
    # A capture may change the order in which autograd adds gradients: some units in the last place of each number.
    tolerance = 1e-10 if found.dtype == torch.float64 else 1e-5
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise Mismatch(f"{what}: {found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}")
    if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        raise Mismatch(f"{what}: {found.tolist()} instead of {wanted.tolist()}")


def run_case(case: Case) -> str:
    """Run one case; says ``"same"``, or ``"refused"`` where an in-place operation was named as the obstacle.

    Raises:
        Mismatch: tdcache gave something else than the hooks of this file.
    """
    plain_model, model = model_of(case.tree), model_of(case.tree)
    plain = Runner(case, plain_model)
    plain.run()
    oracle = Oracle(case, model_of(case.tree))
    watched = Runner(case, oracle.model, oracle)
    try:
        cache = capture(case, model, plain, plain_model, oracle, watched)
    except InplaceModificationError:
        if not case.changes_in_place:
            raise
        return "refused"
    return "same" if cache is not None else "empty"


def recipe(case: Case) -> ActivationCaching:
    options = {**case.options, "pick": PICKS[case.options["pick"]]}
    options["cache"] = TensorDict() if options.pop("cache", False) else None
    pattern: Any = [re.compile(re.escape(path)) for path in case.paths]
    if "stack_by" in options:
        pattern = r"parts\.1\.parts\.(?P<layer>\d+)"
    return ActivationCaching(pattern, **options)


def capture(
    case: Case, model: nn.Module, plain: Runner, plain_model: nn.Module, oracle: Oracle, watched: Runner
) -> TensorDictBase | None:
    """Run a case in a block, step by step beside the oracle, and compare wherever the script reads."""
    context = recipe(case).prepare(model)
    with context as hooked:
        captured = Runner(case, hooked)
        for step in case.script:
            for runner in (watched, captured):
                getattr(runner, f"do_{step[0]}")(*step[1:])
            if step[0] == "read":
                check_cache(hooked.cache, oracle, "in the block")
    if not case.options.get("stop_early"):
        check_users(captured, plain, model, plain_model)
    if case.options["hold"] == "live":
        check_cache(hooked.cache, oracle, "after the block")
        return hooked.cache
    with torch.no_grad():
        outputs = [each for each in captured.outputs.values() if isinstance(each, Tensor)]
        grads = [each.grad for each in (*model.parameters(), *captured.inputs.values()) if each.grad is not None]
        for tensor in (*model.parameters(), *captured.inputs.values(), *outputs, *grads):
            tensor.add_(100)
    check_cache(hooked.cache, oracle, "after everything was overwritten")
    return hooked.cache


def check_users(captured: Runner, plain: Runner, model: nn.Module, plain_model: nn.Module) -> None:
    """The outputs and every ``.grad`` are those of a model without hooks."""
    for number, output in plain.outputs.items():
        check_same(captured.outputs[number].detach(), output.detach(), f"output {number}")
    pairs = [(name, mine, plain_model.get_parameter(name)) for name, mine in model.named_parameters()]
    pairs += [(f"input {number}", captured.inputs[number], x) for number, x in plain.inputs.items()]
    for name, mine, theirs in pairs:
        if (mine.grad is None) != (theirs.grad is None):
            raise Mismatch(f".grad of {name}: {mine.grad} instead of {theirs.grad}")
        if mine.grad is not None:
            check_same(mine.grad, theirs.grad, f".grad of {name}")


def fuzz(cases: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Run cases; gives how they ended, and what failed, each with its recipe."""
    ended: Counter[str] = Counter()
    failures = []
    for number in cases:
        case = random_case(f"{seed}-{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TdcacheWarning)
            try:
                ended[run_case(case)] += 1
            except FINDINGS as error:
                ended["failed"] += 1
                failures.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}\n  {case}")
    return ended, failures


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="run this case alone, with its traceback")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only is not None:
        case = random_case(f"{arguments.seed}-{arguments.only}")
        print(case)
        print(run_case(case))
        return 0
    start = time.monotonic()
    ended, failures = fuzz(range(arguments.cases), arguments.seed)
    print("\n".join(failures[:20]))
    print(f"{arguments.cases} cases in {time.monotonic() - start:.0f} s: {dict(ended)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
