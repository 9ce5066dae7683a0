"""Ablation in its four modes."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, pasted
from model_state import state_of
from tdcache import Ablation, ActivationCaching, EditError, Mean, cache_activations


def test_zero(model, x):
    with Ablation("layers.1").prepare(model) as hooked:
        found = hooked(x)
    with edited(model, "layers.1", torch.zeros_like):
        assert torch.equal(found, model(x))


def test_a_mean_that_was_gathered_before(model, x):
    with ActivationCaching(r"layers\.\d", reducer=Mean()).prepare(model) as hooked:
        model(torch.randn(50, 4))
    means = hooked.cache
    with Ablation("layers.1", "mean", means).prepare(model) as hooked:
        found = hooked(x)
    with edited(model, "layers.1", lambda output: means["layers.1"].expand_as(output)):
        assert torch.equal(found, model(x))


def test_the_mean_of_the_batch(model, x):
    with Ablation("layers.1", "mean", units=[0, 1]).prepare(model) as hooked:
        found = hooked(x)
    with edited(model, "layers.1", lambda old: pasted(old, old.mean(0, keepdim=True).expand_as(old), (..., [0, 1]))):
        torch.testing.assert_close(found, model(x))


def test_rows_of_the_same_batch_never_stay_where_they_are():
    model, x = nn.Sequential(nn.Identity()), torch.arange(7.0)[:, None].repeat(1, 3)
    for seed in range(20):
        with Ablation("0", "resample", seed=seed, units=[0, 2]).prepare(model) as hooked:
            found, again = hooked(x), hooked(x)
        assert torch.equal(found, again)
        assert torch.equal(found[:, 1], x[:, 1])
        assert torch.equal(found[:, 0], found[:, 2])
        assert sorted(found[:, 0].tolist()) == x[:, 0].tolist()
        assert bool((found[:, 0] != x[:, 0]).all())


def test_rows_of_a_cache():
    model, x = nn.Sequential(nn.Identity()), torch.zeros(6, 2)
    rows = torch.arange(1.0, 101.0)[:, None].repeat(1, 2)
    with Ablation("0", "resample", {"0": rows}, seed=3).prepare(model) as hooked:
        found = hooked(x)
    assert torch.equal(found[:, 0], found[:, 1])
    assert set(found[:, 0].tolist()) <= set(rows[:, 0].tolist())
    with Ablation("0", "resample", rows, seed=4).prepare(model) as hooked:
        assert not torch.equal(hooked(x), found)


def test_directions_are_projected_out(model, x):
    model, x = model.double(), x.double()
    directions = torch.randn(2, 4).double()
    with (
        Ablation("layers.1", "project", directions).prepare(model) as hooked,
        cache_activations(model, "layers.1") as kept,
    ):
        found = hooked(x)
    torch.testing.assert_close(kept["layers.1"] @ directions.T, torch.zeros(5, 2).double(), rtol=0, atol=1e-12)
    projector = torch.eye(4).double() - directions.T @ torch.linalg.inv(directions @ directions.T) @ directions
    with edited(model, "layers.1", lambda output: output @ projector):
        torch.testing.assert_close(found, model(x))


def test_directions_that_depend_on_each_other_count_once(model, x):
    direction = torch.randn(4)
    results = []
    for directions in (direction, torch.stack([direction, 2 * direction])):
        with Ablation("layers.1", "project", directions).prepare(model) as hooked:
            results.append(hooked(x))
    torch.testing.assert_close(*results)


def test_projecting_about_a_centre_leaves_the_centre(model, x):
    direction, center = torch.randn(4), torch.randn(4)
    with (
        Ablation("layers.1", "project", {"layers.1": direction}, center=center).prepare(model) as hooked,
        cache_activations(model, "layers.1") as kept,
    ):
        hooked(x)
    torch.testing.assert_close(kept["layers.1"] @ direction, (center @ direction).expand(5))


def test_gradients_do_not_pass_what_was_zeroed(model, x):
    x.requires_grad_()
    with Ablation("layers.1").prepare(model) as hooked:
        hooked(x).sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "blank"}, "mode is one of 'zero', 'mean', 'resample', 'project', got 'blank'"),
        ({"mode": "zero", "source": torch.zeros(4)}, "mode='zero' takes no source"),
        ({"mode": "project"}, "needs the directions"),
        ({"mode": "mean", "center": torch.zeros(4)}, "center= is of mode='project'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(EditError, match=message):
        Ablation("head", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean", "source": torch.zeros(3)}, r"mean of shape \(3,\) does not fit at 'layers.1'.*\(5, 4\)"),
        ({"mode": "resample", "source": torch.zeros(9, 3)}, r"rows to resample from of shape \(9, 3\)"),
        ({"mode": "project", "source": torch.eye(3)}, r"directions of shape \(3, 3\) does not fit"),
        (
            {"mode": "mean", "source": TensorDict({"head": torch.zeros(2)})},
            "source= has no entry for the site 'layers.1'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_both(model, x, arguments, message):
    before = state_of(model)
    with pytest.raises(EditError, match=message), Ablation("layers.1", **arguments).prepare(model) as hooked:
        hooked(x)
    assert state_of(model) == before


def test_one_row_cannot_be_resampled_from_itself(model):
    with (
        Ablation("head", "resample").prepare(model) as hooked,
        pytest.raises(EditError, match="needs 2 rows or more at 'head'; give source="),
    ):
        hooked(torch.randn(1, 4))
