"""What attribution refuses in forms that users rarely write, and rare forms that it takes."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import READERS, Transformer
from tdcache import AttributionError
from tdcache.attribution import (
    AttributionPatching,
    DeepLift,
    DirectLogitAttribution,
    EdgeAttributionPatching,
    FreezeNorm,
    GradientXActivation,
    IntegratedGradients,
    QKAttributionPatching,
    Saliency,
    ScaleGradient,
    StopGradient,
)

IDS = torch.tensor([[1, 2, 3, 4], [4, 0, 2, 5]])


def run(factory, model, data, batch_size=2, **keys):
    data = {"input": data} if isinstance(data, torch.Tensor) else data
    with factory.prepare(model, **keys) as hooked:
        return hooked(TensorDict(data, batch_size=batch_size))


def last(td):
    return td["output"][:, -1, 3]


def corrupted(ids=IDS):
    return {"input": ids, "corrupt": {"input": ids.flip(1)}}


class Mixed(nn.Module):
    """Numbers and ids in, which an embedding of theirs is added to."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x, ids):
        return self.out(x + self.embed(ids))


class Repeats(nn.Module):
    """Runs an activation as often as the first number says."""

    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        for _ in range(int(x.detach().abs().max())):
            x = self.act(x)
        return x


def test_queries_keys_and_patterns_come_in_equal_numbers():
    method = QKAttributionPatching(r".*attn\.q", r"blocks\.0\.attn\.k", r".*pattern", heads=2, target=last)
    with pytest.raises(AttributionError, match=r"select 2, 1 and 2 modules; select as many of each"):
        run(method, Transformer(), corrupted())


def test_one_norm_is_the_final_one():
    method = DirectLogitAttribution("embed", norm=r"blocks\.\d\.ln1", target=last)
    with pytest.raises(AttributionError, match=r"means 2 modules; give the final norm alone"):
        run(method, Transformer(), IDS)


def test_a_writer_is_as_wide_as_the_stream():
    model = Transformer()
    direct = DirectLogitAttribution(r"blocks\.0\.mlp\.0", norm="ln_f", target=last)
    with pytest.raises(
        AttributionError, match=r"'blocks.0.mlp.0' gives \(2, 4, 16\), the stream is \(2, 4, 8\); select"
    ):
        run(direct, model, IDS)
    edges = EdgeAttributionPatching(r"blocks\.0\.mlp\.0", READERS, target=last)
    with pytest.raises(
        AttributionError, match=r"a writer gives \(2, 4, 16\) and a reader takes \(2, 4, 8\); they share"
    ):
        run(edges, model, corrupted())


def test_a_module_that_runs_otherwise_for_the_reference_is_refused():
    with pytest.raises(AttributionError, match=r"'act' ran 1 times for the reference, and otherwise for the input"):
        run(DeepLift(target=0), Repeats(), {"input": torch.full((2, 3), 2.0), "baseline": {"input": torch.ones(2, 3)}})


def test_ids_with_a_baseline_have_no_path():
    data = {"x": torch.ones(2, 3), "ids": torch.tensor([1, 2]), "baseline": {"ids": torch.tensor([0, 0])}}
    with pytest.raises(
        AttributionError, match=r"the input 'ids' is of integers, between which there is no path; give a"
    ):
        run(IntegratedGradients(target=0), Mixed(), data, in_keys=["x", "ids"])


def test_a_baseline_larger_than_the_input_is_refused():
    with pytest.raises(AttributionError, match=r"has shape \(2, 2, 3\), the input \(2, 3\); give one of that shape"):
        run(IntegratedGradients(baseline=torch.ones(2, 2, 3)), nn.Linear(3, 1), torch.ones(2, 3))


def test_an_error_of_ours_is_not_hidden_by_trying_rows_in_one_axis():
    with pytest.raises(AttributionError, match=r"not one scalar per row \(2, 2\)"):
        run(Saliency(target=lambda td: td["output"]), nn.Linear(3, 4), torch.ones(2, 2, 3), [2, 2])


def test_scores_that_cannot_be_written_for_another_reason_say_that():
    data = {"input": torch.ones(2, 3), "attr": TensorDict(batch_size=[2]).lock_()}
    with pytest.raises(RuntimeError, match=r"(?i)lock"):
        run(Saliency(target=0), nn.Linear(3, 4), data)


def test_several_axes_that_no_norm_computes_are_refused():
    class Sinus(nn.Module):
        normalized_shape = (2, 3)

        def forward(self, x):
            return x.sin()

    with pytest.raises(
        AttributionError, match=r"'0' is a Sinus, which does not compute weight \* x / scale\(x\) \+ bias"
    ):
        run(Saliency(target=0, modifiers=[FreezeNorm("0")]), nn.Sequential(Sinus()), torch.ones(2, 2, 3))


def test_a_modifier_of_what_all_rows_share_has_its_points_run_apart():
    model = Transformer(length=4)
    method = AttributionPatching(r"blocks\.\d\.mlp", target=last, modifiers=[ScaleGradient("position", 2.0)])
    together, alone = run(method, model, corrupted()), run(method, model, corrupted(), [])
    for path in together["attr"].keys():  # noqa: SIM118
        assert torch.equal(together["attr", path], alone["attr", path])


def test_scores_of_what_all_rows_share_have_no_rows():
    method = AttributionPatching("position", target=last)
    assert run(method, Transformer(length=4), corrupted(), [])["attr", "position"].shape == (4, 8)
    with pytest.raises(
        AttributionError, match=r"'position'\) have shape \(4, 8\), which does not begin with the batch"
    ):
        run(method, Transformer(length=4), corrupted())


def test_a_target_without_any_gradient_gives_zeros_where_that_is_allowed():
    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    model = Detached(nn.Linear(3, 2))
    td = run(GradientXActivation("0", target=0, allow_unused=True), model, torch.ones(2, 3))
    assert torch.equal(td["attr", "0"], torch.zeros(2, 2))
    with pytest.raises(
        AttributionError, match=r"the target does not depend on '0': no gradient can reach it; is the out"
    ):
        run(GradientXActivation("0", target=0), model, torch.ones(2, 3))


def test_a_modifier_changes_the_part_of_the_gradient_that_its_index_means():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(2, 3)
    modifier = StopGradient("0", index=(..., slice(0, 2)))
    method = GradientXActivation("0", target=1, multiply_by_inputs=False, name="own", modifiers=[modifier])
    assert repr(modifier) == "StopGradient('0')"
    for batch_size in (2, []):
        td = run(Saliency(target=1, absolute=False, modifiers=[modifier]), model, x, batch_size)
        kept = model[1].weight[1, 2:] @ model[0].weight[2:]
        torch.testing.assert_close(td["attr", "input"], kept.expand(2, 3).detach())
        assert torch.equal(run(method, model, x, batch_size)["attr", "own", "0"][:, :2], torch.zeros(2, 2))


def test_a_strict_and_a_lenient_method_of_one_pass_disagree_about_an_unused_site():
    from tdcache import CompositeHookingContextFactory

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.never = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    lenient = GradientXActivation("used|never", target=0, allow_unused=True, name="lenient")
    strict = GradientXActivation("used|never", target=0, name="strict")
    for pair in ((lenient, strict), (strict, lenient)):
        with pytest.raises(AttributionError, match=r"'never' did not run in the forward, so it has no score"):
            run(CompositeHookingContextFactory(*pair), Idle(), torch.ones(2, 3))
