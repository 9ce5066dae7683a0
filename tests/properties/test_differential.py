"""A short form of ``tests/differential.py``: random models and options against hooks written with torch alone."""

import pytest
import torch

import differential
import differential_oracle
from differential_cases import Case, random_case
from differential_models import model_of

CASES = 300


@pytest.mark.parametrize("seed", [1, 2])
def test_random_cases_give_what_hand_written_hooks_give(seed):
    ended, failures = differential.fuzz(range(CASES // 2), seed)
    assert not failures, "\n".join(failures[:3])
    assert ended["same"] > 0.9 * CASES / 2  # the rest is refused, because of an in-place operation


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre", "bwd", "grad_in"])
def test_the_fuzz_notices_a_wrong_value(direction, monkeypatch):
    tree, paths = ("residual", "tanh"), ["parts.1", "parts.1.parts.0"]
    options = {"directions": [direction], "pick": "none", "hold": "snapshot", "index": None, "dtype": None}
    options |= {"reducer": None, "use_nested_keys": False}
    script = [("forward", 0, True), ("backward", 0, False, 1.0, False)]
    case = Case(tree, paths, options, script, leaf=True)
    assert differential.run_case(case) == "same"
    of_oracle = differential_oracle.kept
    monkeypatch.setattr(differential_oracle, "kept", lambda value, case: of_oracle(value, case) + 1)
    with pytest.raises(differential.Mismatch, match="instead of"):
        differential.run_case(case)


def test_the_fuzz_notices_a_changed_gradient_of_the_users():
    case = random_case("0-0")
    one, other = model_of(case.tree), model_of(case.tree)
    captured, plain = differential.Runner(case, one), differential.Runner(case, other)
    for runner in (captured, plain):
        runner.outputs, runner.inputs = {}, {0: torch.ones(1, requires_grad=True)}
        runner.inputs[0].grad = torch.ones(1)
    differential.check_users(captured, plain, one, other)
    captured.inputs[0].grad += 1
    with pytest.raises(differential.Mismatch, match=r"\.grad of input 0"):
        differential.check_users(captured, plain, one, other)
