"""Targets, and the errors of everything that cannot be computed as asked."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet, Transformer
from small_models import Pair
from tdcache import ActivationCaching, AttributionError, ContextError, SelectionError
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    Conductance,
    GradientXActivation,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
    quadrature,
)


def run(factory, model, data, rows=(), **keys):
    with factory.prepare(model, **keys) as hooked:
        return hooked(TensorDict(data, batch_size=list(rows)))


MODEL = nn.Linear(3, 4, bias=False)


def gradients(target, rows=2):
    return run(Saliency(target=target, absolute=False), MODEL, {"input": torch.ones(rows, 3)}, (rows,))["attr"]


def test_a_target_is_an_index_one_per_row_a_key_with_an_index_or_a_callable():
    w = MODEL.weight.detach()
    for target in (2, ("output", 2), lambda td: td["output"][:, 2], torch.tensor(2)):
        assert torch.equal(gradients(target)["input"], w[2].expand(2, 3))
    assert torch.equal(gradients(np.int64(2))["input"], w[2].expand(2, 3))
    per_row = torch.tensor([3, 0])
    for target in (per_row, ("output", per_row)):
        assert torch.equal(gradients(target)["input"], w[per_row])


def test_several_targets_are_keyed_by_position_or_name():
    w = MODEL.weight.detach()
    listed, named = gradients([1, 3]), gradients({"cat": 1, "dog": 3})
    for at, name, row in (("0", "cat", 1), ("1", "dog", 3)):
        assert torch.equal(listed[at, "input"], w[row].expand(2, 3))
        assert torch.equal(named[name, "input"], w[row].expand(2, 3))


def test_a_row_target_sees_only_its_rows_along_a_path():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3)
    per_row = torch.tensor([0, 1, 2, 3, 0])
    td = run(IntegratedGradients(target=per_row, n_steps=30), model, {"input": x}, (5,))
    wanted = (model(x) - model(0 * x)).gather(1, per_row[:, None])[:, 0].detach()
    torch.testing.assert_close(td["attr", "input"].sum(1), wanted, rtol=0, atol=1e-5)


def test_named_outputs_and_keyword_inputs_are_read_as_the_context_was_prepared():
    model, x = Pair(dict).inner, torch.randn(2, 4)
    td = run(Saliency(target=("right", 0)), model, {"x": x}, (2,), in_keys={"x": "x"}, out_keys=["left", "right"])
    assert torch.equal(td["attr", "x"], model.right.weight[0].abs().expand(2, 4).detach())


def test_a_tuple_is_the_key_of_a_nested_output():
    w = MODEL.weight.detach()
    for target in ((("head", "logits"), 2), (("head", "logits"), np.int64(2)), ("head", "logits", 2)):
        factory = Saliency(target=target, absolute=False)
        td = run(factory, MODEL, {"input": torch.ones(2, 3)}, (2,), out_keys=[("head", "logits")])
        assert torch.equal(td["attr", "input"], w[2].expand(2, 3))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ((("output", 1), 2), "a target is a callable on the output TensorDict"),
        (lambda td: td["output"], r"values of shape \(2, 4\), not one scalar per row \(2,\)"),
        (lambda td: td["output"].sum(), r"values of shape \(\), not one scalar per row \(2,\)"),
        (lambda td: 3, "returned int; return a tensor, one scalar per row"),
        (("logits", 1), "the model wrote no entry 'logits'; there are"),
        (torch.tensor([1, 2, 3]), r"\(3,\) indices for an output 'output' of shape \(2, 4\); give one per row"),
        (None, r"values of shape \(2, 4\), not one scalar per row"),
        ("output", "a target is a callable on the output TensorDict"),
        (lambda td: td["output"][:, 0].detach(), "the target does not depend on 'input'"),
    ],
)
def test_a_target_that_is_not_one_scalar_per_row_is_refused(target, text):
    with pytest.raises(AttributionError, match=text):
        gradients(target)


def test_a_site_that_gets_no_gradient_is_named():
    model = Pair(tuple)
    with pytest.raises(AttributionError, match=r"no gradient reaches 'inner\.left'"):
        run(
            GradientXActivation(r"inner\.(left|right)", target=("right", 0)),
            Only(model),
            {"input": torch.randn(2, 4)},
            (2,),
            out_keys=["left", "right"],
        )


class Only(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.inner = pair.inner

    def forward(self, x):
        return self.inner(x)


def test_a_site_that_does_not_run_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(AttributionError, match="'unused' did not run in the forward"):
        run(GradientXActivation("used|unused", target=0), Skips(), {"input": torch.randn(2, 3)}, (2,))


def test_a_baseline_of_another_shape_is_refused():
    with pytest.raises(AttributionError, match=r"the baseline of 'input' has shape \(2, 5\), the input \(2, 3\)"):
        run(
            IntegratedGradients(target=0),
            MODEL,
            {"input": torch.ones(2, 3), "baseline": {"input": torch.ones(2, 5)}},
            (2,),
        )
    with pytest.raises(AttributionError, match=r"the baseline of '' has shape \(7,\), the activation \(2, 4\)"):
        run(IntegratedGradients("", target=0, baseline=torch.ones(7)), MODEL, {"input": torch.ones(2, 3)}, (2,))


def test_a_backward_under_an_early_stop_is_refused():
    model, x = ConvNet(), torch.randn(2, 1, 8, 8)
    with (
        Together(ActivationCaching("c1", stop_early=True), Saliency(target=0)).prepare(model) as hooked,
        pytest.raises(ContextError, match=r"stopped early.*leave stop_early=True out"),
    ):
        hooked(TensorDict({"input": x}, batch_size=[2]))


def test_two_methods_that_would_write_one_entry_are_told_to_take_names():
    with pytest.raises(AttributionError, match=r"write \('attr', 'input'\); tell them apart with name="):
        run(Together(Saliency(target=0), Saliency(target=1)), MODEL, {"input": torch.ones(2, 3)}, (2,))


def test_scores_whose_rows_are_not_in_front_do_not_fit_a_batch_size():
    class Transposes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Identity(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.inner(x.transpose(0, 1)).transpose(0, 1)[:, -1])

    model, x = Transposes(), torch.randn(4, 5, 3)
    with pytest.raises(AttributionError, match=r"shape \(5, 4, 3\), which does not begin with .*batch_size=\[\]"):
        run(Conductance("inner", target=0, n_steps=3), model, {"input": x}, (4,))
    td = run(Conductance("inner", target=0, n_steps=3), model, {"input": x})
    assert td["attr", "inner"].shape == (5, 4, 3)


def test_plain_tensors_and_wrong_settings_are_refused():
    with Saliency(target=0).prepare(MODEL) as hooked, pytest.raises(ContextError, match="needs a TensorDict"):
        hooked(torch.ones(2, 3))
    with pytest.raises(SelectionError, match="matches none"), GradientXActivation("nothing", target=0).prepare(MODEL):
        pass
    for wrong, text in (
        (lambda: Saliency(target=0, chunk=0), "at least 1; got 0"),
        (lambda: IntegratedGradients(n_steps=0), "n_steps is at least 1"),
        (lambda: IntegratedGradients(method="simpson"), "unknown quadrature method 'simpson'"),
        (lambda: SmoothGrad(n_samples=0), "n_samples is at least 1"),
        (lambda: quadrature("trapezoid", 1), "needs n_steps >= 2"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()


def test_values_without_gradient_are_refused_by_name():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.round = Rounds()

        def forward(self, x):
            return x * self.round(x)

    with pytest.raises(AttributionError, match=r"'round' is torch\.int64, which has no gradient"):
        run(GradientXActivation("round", target=0), Casts(), {"input": torch.randn(2, 3)}, (2,))


class Rounds(nn.Module):
    def forward(self, x):
        return x.round().long()


def test_a_call_that_did_not_happen_is_named():
    model, ids = Transformer(), torch.arange(6).reshape(2, 3)
    with pytest.raises(AttributionError, match="call=3: 'embed' ran 1 times"):
        run(GradientXActivation("embed", target=lambda td: td["output"][:, 0, 0], call=3), model, {"input": ids}, (2,))
