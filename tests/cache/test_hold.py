"""What a kept tensor holds alive, and that a later in-place operation never goes unnoticed."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from small_models import Residual
from stable_ids import stable_id
from tdcache import ActivationCaching, First, InplaceModificationError, Mean, Stack


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))


def test_by_default_an_alias_without_graph_is_kept(model, x):
    with ActivationCaching("2").prepare(model) as hooked:
        y = hooked(x)
        kept = hooked.cache["2"]
        assert kept.data_ptr() == y.data_ptr()
    assert not kept.requires_grad
    assert kept.grad_fn is None


class Witness(torch.autograd.Function):
    """An identity; what is put into ``held`` lives exactly as long as the graph does."""

    held: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x):
        ctx.token = set()
        Witness.held.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(("hold", "graph_lives"), [("detached", False), ("snapshot", False), ("live", True)])
def test_the_graph_is_retained_by_live_only(x, hold, graph_lives):
    class Watched(nn.Linear):
        def forward(self, x):
            return Witness.apply(super().forward(x))

    Witness.held.clear()
    model = nn.Sequential(Watched(4, 3), nn.GELU(), nn.Linear(3, 2))
    with ActivationCaching("2", hold=hold).prepare(model) as hooked:
        hooked(x)
        cache = hooked.cache
    gc.collect()
    assert cache["2"].shape == (5, 2)
    assert (Witness.held[0]() is not None) == graph_lives


def test_live_keeps_the_tensor_with_its_graph(model, x):
    with ActivationCaching("0", hold="live").prepare(model) as hooked:
        hooked(x)
    hooked.cache["0"].sum().backward()
    assert torch.equal(model[0].bias.grad, torch.full((3,), 5.0))


def test_a_snapshot_is_a_detached_copy(model, x):
    with ActivationCaching("2", hold="snapshot").prepare(model) as hooked:
        y = hooked(x)
        before = y.detach().clone()
        y.data.zero_()  # not even the version counter sees this
    assert torch.equal(hooked.cache["2"], before)
    assert not hooked.cache["2"].requires_grad


def test_an_unknown_hold_is_refused():
    with pytest.raises(ValueError, match="'detached', 'live', 'snapshot', got 'frozen'"):
        ActivationCaching("0", hold="frozen")


@pytest.mark.parametrize("hold", ["detached", "live", "snapshot"])
@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_a_kept_slice_does_not_pin_the_whole_activation(hold, direction):
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 64))
    with ActivationCaching("1", index=(slice(None), 0), hold=hold, directions=[direction]).prepare(model) as hooked:
        y = hooked(torch.randn(32, 64))
    kept = hooked.cache["1"]
    assert kept.shape == (32,)
    assert kept.untyped_storage().size() == 32 * 4
    assert kept.requires_grad == (hold == "live" and direction == "fwd")
    if direction == "fwd":
        assert torch.equal(kept, y[:, 0])


@pytest.mark.parametrize(
    "index", [0, slice(1, 3), (..., -1), [0, 2], torch.tensor([True, False, True, False, True])], ids=stable_id
)
def test_index_is_what_stands_in_brackets(model, x, index):
    with ActivationCaching("2", index=index).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["2"], y[index])


def test_a_kept_gradient_slice_does_not_pin_the_whole_gradient():
    model = nn.Sequential(nn.Linear(64, 64))
    with ActivationCaching("0", directions=["bwd"], index=0).prepare(model) as hooked:
        hooked(torch.randn(32, 64)).square().sum().backward()
    assert hooked.cache["0"].untyped_storage().size() == 64 * 4


def test_an_earlier_forwards_activations_are_let_go(model, x):
    with ActivationCaching(r"\d").prepare(model) as hooked, torch.no_grad():
        first = weakref.ref(hooked(x))
        assert first() is not None  # the cache has it
        hooked(x)
        gc.collect()
        assert first() is None


def test_nothing_but_the_cache_holds_activations_after_exit(model, x):
    context = ActivationCaching(r"\d", directions=["fwd", "bwd"]).prepare(model)
    with context as hooked:
        y = hooked(x)
        y.sum().backward()
    kept = weakref.ref(context.cache["fwd", "1"])
    del y
    context.cache.clear()
    gc.collect()
    assert kept() is None


# In-place operations after the capture


@pytest.mark.parametrize("reducer", [None, Stack(), First()], ids=stable_id)
@pytest.mark.parametrize("grad", [True, False])
def test_an_overwritten_alias_is_detected_when_the_forward_ends(x, reducer, grad):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    with (
        pytest.raises(InplaceModificationError, match="hold='snapshot'") as caught,
        torch.set_grad_enabled(grad),
        ActivationCaching("0|2", reducer=reducer).prepare(model) as hooked,
    ):
        hooked(x)
    assert caught.value.paths == ("0", "2")
    assert "'0', '2'" in str(caught.value)


def test_the_error_of_the_forward_shows_when_plain_calls_are_made(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with ActivationCaching("0").prepare(model) as hooked:
        with pytest.raises(InplaceModificationError, match="'0'"):
            model(x)
        hooked.hooking_context.clear()


def test_an_overwritten_alias_is_detected_when_the_cache_is_read(model, x):
    with ActivationCaching("2").prepare(model) as hooked, torch.no_grad():
        y = hooked(x)
        y.add_(1)
        with pytest.raises(InplaceModificationError, match="'2'") as caught:
            hooked.cache  # noqa: B018  the read is what is tested
        hooked.hooking_context.clear()
    assert caught.value.paths == ("2",)


def test_an_overwritten_alias_is_detected_when_the_context_exits(model, x):
    with (
        pytest.raises(InplaceModificationError, match="'2'"),
        torch.no_grad(),
        ActivationCaching("2").prepare(model) as hooked,
    ):
        hooked(x).add_(1)
    assert not model[2]._forward_hooks


def test_an_overwritten_alias_is_detected_under_a_dtype_that_changes_nothing(model, x):
    with (
        pytest.raises(InplaceModificationError),
        torch.no_grad(),
        ActivationCaching("2", dtype=torch.float32).prepare(model) as hooked,
    ):
        hooked(x).add_(1)


def test_an_overwritten_input_is_detected(x):
    model = nn.Sequential(nn.ReLU(inplace=True))
    with (
        pytest.raises(InplaceModificationError, match="'0'"),
        ActivationCaching("0", directions=["fwd_pre"]).prepare(model) as hooked,
    ):
        hooked(x)


def test_an_overwritten_gradient_is_detected(model, x):
    with ActivationCaching("2", directions=["bwd"]).prepare(model) as hooked:
        hooked(x).backward(torch.ones(5, 2))
        grad = hooked.cache["2"]
        assert torch.equal(grad, torch.ones(5, 2))
        grad.mul_(2)
        with pytest.raises(InplaceModificationError, match="'2'"):
            hooked.cache  # noqa: B018
        hooked.hooking_context.clear()


def test_an_overwritten_alias_inside_a_callbacks_tensordict_is_detected(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with (
        pytest.raises(InplaceModificationError, match="'0'"),
        ActivationCaching("0", callback=lambda output, **rest: TensorDict({"kept": output})).prepare(model) as hooked,
    ):
        hooked(x)


def test_a_snapshot_of_a_callbacks_tensordict_is_a_copy(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    callback = lambda output, **rest: TensorDict({"kept": output})  # noqa: E731
    with ActivationCaching("0", callback=callback, hold="snapshot").prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["0", "kept"], model[0](x))


def test_an_in_place_operation_before_the_capture_is_no_error(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with ActivationCaching("1").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["1"], y)


def test_a_module_whose_output_was_written_in_place_is_kept_as_it_came_out(x):
    class Twice(nn.Module):
        def forward(self, x):
            return (2 * x).add_(1).mul_(3)

    model = nn.Sequential(Twice(), nn.Tanh())
    with ActivationCaching("0").prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["0"], (2 * x + 1) * 3)


@pytest.mark.parametrize(
    "options", [{"hold": "snapshot"}, {"dtype": torch.float64}, {"index": 0}, {"reducer": Mean()}], ids=stable_id
)
def test_what_is_copied_cannot_be_overwritten(x, options):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with ActivationCaching("0", **options).prepare(model) as hooked:
        hooked(x)
    assert (hooked.cache["0"] < 0).any()  # before the ReLU


def test_snapshots_of_an_in_place_block_are_those_of_its_out_of_place_twin(x):
    model = Residual()
    with ActivationCaching("first|second", hold="snapshot").prepare(model) as hooked:
        hooked(x)
    first = model.first(x)
    assert torch.equal(hooked.cache["first"], first)
    assert torch.equal(hooked.cache["second"], model.second(first.relu()))


def test_inference_tensors_are_kept_as_snapshots(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with torch.inference_mode(), ActivationCaching("0|1").prepare(model) as hooked:
        y = hooked(x)
        before = y.clone()
        y.zero_()
        wanted = model[0](x)
    assert torch.equal(hooked.cache["0"], wanted)
    assert torch.equal(hooked.cache["1"], before)


def test_a_later_forward_ends_the_watch_over_the_earlier_one(model, x):
    with ActivationCaching("2").prepare(model) as hooked, torch.no_grad():
        first = hooked(x)
        second = hooked(2 * x)
        first.zero_()
    assert torch.equal(hooked.cache["2"], second)
