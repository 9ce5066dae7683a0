"""DeepLift's rules against their defining equations, in double precision unless said otherwise."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet
from tdcache.attribution import DeepLift

F64 = torch.float64


def run(factory, model, x, start):
    with factory.prepare(model) as hooked:
        return hooked(TensorDict({"input": x, "baseline": {"input": start}}, batch_size=[len(x)]))


def multipliers(module, x, start):
    """The matrix of the rule at one row, one output at a time."""
    rows = len(x)
    factory = DeepLift(target=list(range(rows)), multiply_by_inputs=False)
    attr = run(factory, nn.Sequential(module), x[None], start[None])["attr"]
    return torch.stack([attr[str(at), "input"][0] for at in range(rows)])


@given(shift=st.floats(-100, 100), scale=st.floats(1e-9, 30), seed=st.integers(0, 999))
@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.LogSoftmax(-1)], ids=["softmax", "log"])
def test_a_softmax_is_complete_for_every_output_and_indifferent_to_shifts(module, shift, scale, seed):
    x, start = scale * torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
    matrix = multipliers(module, x, start)
    # Rounding of the shifted logits themselves (1e-14) sets the limit, and the size of the largest difference.
    close = {"rtol": 0, "atol": 1e-12 * (1 + scale)}
    torch.testing.assert_close(matrix @ (x - start), module(x) - module(start), **close)
    torch.testing.assert_close(multipliers(module, x + shift, start + shift), matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.sum(1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.LogSoftmax(-1)], ids=["softmax", "log"])
def test_a_softmax_between_equal_logits_has_its_derivative(module):
    x = 3 * torch.randn(5, dtype=F64)
    wanted = torch.autograd.functional.jacobian(module, x)
    torch.testing.assert_close(multipliers(module, x, x.clone()), wanted, rtol=0, atol=1e-15)
    torch.testing.assert_close(multipliers(module, x, x + 1e-9), wanted, rtol=0, atol=1e-8)


def test_a_softmax_around_large_logits_explains_its_rise_and_no_more():
    for around in (10.0, 90.0):
        x = torch.tensor([around, around + 1, around - 1])
        start = torch.tensor([around, around, around])
        scores = multipliers(nn.Softmax(-1), x, start) * (x - start)
        torch.testing.assert_close(scores.sum(1), x.softmax(-1) - start.softmax(-1), rtol=0, atol=1e-6)
        assert scores.abs().max() < 1


@pytest.mark.parametrize("mask", [-torch.inf, -1e9])
@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.LogSoftmax(-1)], ids=["softmax", "log"])
def test_masked_logits_have_finite_multipliers(module, mask):
    x = torch.tensor([1.0, 2.0, 0.5, mask], dtype=F64)
    start = torch.tensor([1.0, 0.0, 1.5, mask], dtype=F64)
    both = multipliers(module, x, start)
    seen = multipliers(module, x[:3], start[:3])
    torch.testing.assert_close(both[:3, :3], seen, rtol=0, atol=1e-12)
    one = multipliers(module, x, start.nan_to_num(neginf=0.0).clamp(min=-5))  # masked in the input alone
    assert both[:3].isfinite().all()
    assert one[:3].isfinite().all()
    assert multipliers(module, start.nan_to_num(neginf=0.0).clamp(min=-5), x)[:3].isfinite().all()


def test_a_logit_masked_by_a_large_number_in_one_row_is_complete():
    x, start = torch.tensor([1.0, 2.0, -1e9], dtype=F64), torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    found = multipliers(nn.Softmax(-1), x, start) @ (x - start)
    # A multiplier of 1e-9 times a step of 1e9, each exact to 1e-16: the sum loses what the step of 1e9 rounds away.
    torch.testing.assert_close(found, x.softmax(-1) - start.softmax(-1), rtol=0, atol=1e-12)


def test_softmaxes_that_share_no_logit_have_finite_multipliers():
    inf = torch.inf
    found = multipliers(nn.Softmax(-1), torch.tensor([1.0, -inf]), torch.tensor([-inf, 1.0]))
    assert torch.equal(found, torch.zeros(2, 2))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_a_softmax_over_any_axis_but_the_rows_is_complete(axis):
    x, start = torch.randn(2, 4, 3, 5, dtype=F64)
    model = nn.Sequential(nn.Softmax(axis), nn.Flatten(), nn.Linear(15, 2).double())
    td = run(DeepLift(target=0), model, x, start)
    assert td["gap", "input"].abs().max() < 1e-12


def test_a_softmax_in_half_precision_is_computed_in_single():
    x, start = torch.tensor([9.0, 11.0, -60000.0]).half(), torch.tensor([10.0, 10.0, -60000.0]).half()
    found = multipliers(nn.Softmax(-1), x, start)
    torch.testing.assert_close(
        found.double(), multipliers(nn.Softmax(-1), x.double(), start.double()), rtol=2e-3, atol=1e-6
    )


def test_attention_with_a_softmax_module_is_complete_in_its_pattern():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.softmax, self.value = nn.Softmax(-1), torch.randn(6, 3, dtype=F64)

        def forward(self, logits):
            mask = torch.ones(4, 6, dtype=torch.bool).triu(3)
            return (self.softmax(logits.masked_fill(mask, -torch.inf)) @ self.value).sum(1)

    td = run(DeepLift(target=1), Scores(), *(9 * torch.randn(2, 2, 4, 6, dtype=F64)))
    assert td["gap", "input"].abs().max() < 1e-12
    assert td["attr", "input"].isfinite().all()


def test_each_row_may_have_a_target_of_its_own():
    model, x, start = ConvNet().double(), *torch.randn(2, 3, 1, 8, 8, dtype=F64)
    labels = torch.tensor([2, 0, 1])
    found = run(DeepLift(target=labels), model, x, start)["attr", "input"]
    by_call = run(DeepLift(target=lambda td: td["output"][torch.arange(3), labels]), model, x, start)["attr", "input"]
    for row, label in enumerate(labels):
        alone = run(DeepLift(target=int(label)), model, x[row : row + 1], start[row : row + 1])["attr", "input"][0]
        torch.testing.assert_close(found[row], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_call[row], alone, rtol=1e-9, atol=1e-12)


def test_it_runs_the_rows_of_the_reference_and_those_of_the_input_once_and_the_outputs_are_those_of_the_inputs():
    model, x, start = ConvNet(), *torch.randn(2, 3, 1, 8, 8)
    rows = []
    watch = model.c1.forward
    model.c1.forward = lambda value: (rows.append(len(value)), watch(value))[1]
    td = run(DeepLift(target=1), model, x, start)
    assert rows == [3, 3]
    torch.testing.assert_close(td["output"], model(x).detach(), rtol=1e-5, atol=1e-6)  # a batch of another size
    assert torch.equal(td["input"], x)
    both = run(DeepLift(target=1, chunk=1), model, x, start)
    torch.testing.assert_close(both["output"], td["output"], rtol=1e-5, atol=1e-6)


def test_the_multipliers_times_the_difference_are_the_scores():
    model, x, start = ConvNet().double(), *torch.randn(2, 3, 1, 8, 8, dtype=F64)
    scores = run(DeepLift(target=1), model, x, start)["attr", "input"]
    bare = run(DeepLift(target=1, multiply_by_inputs=False), model, x, start)
    assert torch.equal(bare["attr", "input"] * (x - start), scores)
    assert bare["gap", "input"].abs().max() < 1e-10


@pytest.mark.parametrize("masked", ["input", "reference", "both"])
def test_scores_at_masked_logits_are_zero_and_the_gap_says_what_a_mask_in_one_row_hides(masked):
    x, start = torch.randn(2, 3, 4, dtype=F64)
    if masked != "reference":
        x[:, 1] = -torch.inf
    if masked != "input":
        start[:, 1] = -torch.inf
    td = run(DeepLift(target=0), nn.Sequential(nn.Softmax(-1)), x, start)
    rise = (x.softmax(-1) - start.softmax(-1))[:, 0]
    assert (td["attr", "input"][:, 1] == 0).all()
    torch.testing.assert_close(td["gap", "input"], td["attr", "input"].sum(1) - rise, rtol=0, atol=1e-14)
    assert (td["gap", "input"].abs().max() < 1e-12) == (masked == "both")
