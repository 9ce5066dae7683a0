"""Proxies that can be computed with before their values are there."""

import pytest
import torch
from torch import nn

from tdcache import ContextError, EditError, HookedModule, InplaceModificationError


@pytest.fixture
def hooked(model):
    return HookedModule.from_module(model)


BIAS = torch.arange(4.0)

EXPRESSIONS = {
    "index, product, sum": lambda v: v[:, [-1]] * 2 + BIAS,
    "reflected": lambda v: 1 - BIAS * v / 2,
    "tensor on the left": lambda v: BIAS - v,
    "matrices": lambda v: (v @ v.T).mT @ v,
    "unary": lambda v: -(abs(v) ** 2),
    "whole numbers": lambda v: (v * 4) // 3 % 2,
    "methods": lambda v: v.mean(0, keepdim=True).expand(5, 4).clamp(min=0.1),
    "functions": lambda v: nn.functional.gelu(torch.cat([v[:, :2], torch.relu(v[:, 2:])], dim=-1)),
    "chosen by element": lambda v: torch.where(torch.gt(v, 0), v, BIAS),
    "a mask as an index": lambda v: v.masked_fill(v.isnan() | ~torch.ge(v, 0), 0.0),
    "fields of a result": lambda v: v.max(-1, keepdim=True).values + torch.sort(v).indices,
    "a proxy in an index": lambda v: v[v.argsort(0)[:, 0]],
    "a module": lambda v: nn.functional.linear(v, torch.eye(4)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_is_what_plain_tensors_give(hooked, x, name):
    expression = EXPRESSIONS[name]
    with hooked.run(x) as run:
        value = run.get("layers.0")
        computed = expression(value)
        assert computed.resolve() is None
    expected = expression(value.value)
    assert torch.equal(computed.value, expected)
    assert torch.equal(computed.resolve(), expected)


def test_an_expression_is_set_later_in_the_same_run_and_in_another(hooked, model, x):
    with hooked.run(x) as run:
        early = run.get("layers.0")
        run.set("layers.1", early * 2 + BIAS)
    hidden = nn.functional.gelu(model.layers[0](x))
    by_hand = model.layers[0](x) * 2 + BIAS
    handle = model.layers[1].register_forward_hook(lambda module, args, output: by_hand)
    expected = model(x)
    handle.remove()
    assert hidden.shape == by_hand.shape
    assert torch.equal(run.result, expected)
    with hooked.run(x + 1) as other:
        other.set("layers.1", early * 2 + BIAS)
    assert torch.equal(other.result, expected)


def test_two_runs_meet_in_one_expression(hooked, model, x):
    with hooked.run(x) as clean:
        one = clean.get("layers.1")
    with hooked.run(x + 1) as corrupted:
        other = corrupted.get("layers.1")
    with hooked.run(x) as run:
        run.set_input("head", (torch.lerp(one, other, 0.5),))
    assert torch.equal(run.result, model.head(torch.lerp(one.value, other.value, 0.5)))


def test_an_expression_without_its_values_is_an_error_that_names_it(hooked, x):
    message = r"mul\(CacheProxy\('layers.2_output'\), 2\) has no value yet when 'layers.0' needs it"
    with pytest.raises(EditError, match=message), hooked.run(x) as run:
        run.set("layers.0", run.get("layers.2") * 2)


def test_the_value_before_the_run_has_ended_is_an_error(hooked, x):
    with hooked.run(x) as run:
        proxy = run.get("head")
        with pytest.raises(ContextError, match=r"'head_output'\) has no value yet; it is there when the block"):
            _ = proxy.value
        with pytest.raises(ContextError, match=r"add\(CacheProxy\('head_output'\), 1\) has no value yet"):
            _ = (proxy + 1).value
    assert torch.equal(proxy.value, run.result)


COMPARED = {
    "==": lambda v: v == 1, "!=": lambda v: v != 1, "<": lambda v: v < 1, "<=": lambda v: v <= 1,
    ">": lambda v: v > 1, ">=": lambda v: v >= 1, "eq": lambda v: BIAS.eq(v), "gt": lambda v: BIAS.gt(v),
}  # fmt: skip


@pytest.mark.parametrize("symbol", COMPARED)
def test_comparisons_are_refused_with_a_hint(hooked, x, symbol):
    message = rf"a comparison \({symbol}\) asks for a value that is not there.*torch.gt\(proxy, 0\).*proxy.value"
    with hooked.run(x) as run, pytest.raises(ContextError, match=message):
        COMPARED[symbol](run.get("head"))


REFUSED = {
    r"a condition \(if, and, or, not\)": bool,
    r"len\(\)": len,
    "a loop or unpacking": list,
    r"float\(\)": float,
    r"int\(\)": int,
    "'in'": lambda v: 1 in v,
    r"an assignment to a part \(instead: run.set\(path, value, positions=": lambda v: v.__setitem__(0, 1),
    r"an operation that writes in place \(mul_\)": BIAS.clone().mul_,
    r"an operation that writes in place \(__setitem__\)": lambda v: BIAS.clone().__setitem__(0, v),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_the_value_at_once_is_refused(hooked, x, what):
    with hooked.run(x) as run, pytest.raises(ContextError, match=f"{what}.*asks for a value that is not there"):
        REFUSED[what](run.get("head"))


def test_attributes_that_are_not_known_yet_are_refused_and_misspelt_ones_are_no_attributes(hooked, x):
    with hooked.run(x) as run:
        proxy = run.get("head")
        for name in ("shape", "item", "add_", "grad"):
            message = rf"'{name}' is not known before the run has ended.*proxy.value.{name}"
            with pytest.raises(AttributeError, match=message):
                getattr(proxy, name)
        with pytest.raises(AttributeError, match="'ValueProxy' object has no attribute 'maen'"):
            _ = proxy.maen
        assert repr(proxy.mean) == "CacheProxy('head_output').mean"


def test_an_expression_that_fails_names_itself(hooked, x):
    with hooked.run(x) as run:
        wrong = run.get("head") @ torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="shapes") as caught:
        wrong.resolve()
    expression = "matmul(CacheProxy('head_output'), Tensor(3, 3))"
    assert caught.value.__notes__[-1:] == [f"while {expression} was computed from the values of a run"]


def test_a_value_that_was_overwritten_is_refused_in_an_expression(hooked, x):
    with hooked.run(x) as run:
        proxy = run.get("head")
    doubled = proxy * 2
    run.result.zero_()
    with pytest.raises(InplaceModificationError, match="'head' was overwritten"):
        doubled.resolve()


def test_a_proxy_can_be_a_key(hooked, x):
    with hooked.run(x) as run:
        one, other = run.get("head"), run.get("layers.0")
        assert len({one, other, one}) == 2
