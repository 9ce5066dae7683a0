"""Keeping what passes hook points: values, gradients, slices; and each thing that must not go wrong silently."""

import copy

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from model_state import state_of
from points.point_models import (
    Branches,
    InPlace,
    Twice,
    by_hand,
    gradients_by_hand,
    small_transformer,
    some_tokens,
)
from tdcache import (
    ActivationCaching,
    CaptureError,
    ContextError,
    InplaceModificationError,
    RepeatedCallWarning,
    Stack,
    UnfiredSiteWarning,
    cache_activations,
)
from tdcache.points import HookedRootModule, HookPoint, hook_root
from tdcache.points.point_cache import PointCache

MID = "blocks.1.hook_resid_mid"
PATTERN = "blocks.0.attn.hook_pattern"


@pytest.fixture(scope="module")
def made():
    return small_transformer()


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


@pytest.fixture
def tokens():
    return some_tokens()


def run(model, *args, **options):
    """``run_with_cache``, by its own way."""
    return model.run_with_cache(*args, **options)


def run_by_hooks(model, *args, incl_bwd=False, gradient=None, **options):
    """The same by hooks that are added and reset."""
    cache = model.add_caching_hooks(incl_bwd=incl_bwd, **options)
    output = model(*args)
    if incl_bwd:
        output.backward(gradient)
    model.reset_hooks()
    return output, cache


def run_by_pairs(model, *args, incl_bwd=False, gradient=None, **options):
    """The same by pairs of names and hooks."""
    cache, fwd, bwd = model.get_caching_hooks(incl_bwd=incl_bwd, **options)
    with model.hooks(fwd, bwd):
        output = model(*args)
        if incl_bwd:
            output.backward(gradient)
    return output, cache


every_way = pytest.mark.parametrize("run", [run, run_by_hooks, run_by_pairs])


def assert_same(cache, expected):
    assert sorted(cache.keys()) == sorted(expected)
    assert all(torch.equal(cache[name], value) for name, value in expected.items())


# Values


@every_way
def test_every_point_is_cached_under_its_name(model, tokens, run):
    before = state_of(model)
    seen = by_hand(model, lambda: model(tokens))
    output, cache = run(model, tokens)
    assert isinstance(cache, TensorDictBase)
    assert_same(cache, {name: value for name, (value,) in seen.items()})
    assert torch.equal(output, model(tokens))
    assert not any(value.requires_grad for value in cache.values())
    model.reset_hooks(clear_contexts=False)
    assert state_of(model) == before


def test_a_run_with_a_cache_leaves_the_model_as_it_was(model, tokens):
    before = state_of(model)
    model.run_with_cache(tokens)
    model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert state_of(model) == before


def test_a_run_that_fails_leaves_the_model_as_it_was(model):
    before = state_of(model)
    with pytest.raises(IndexError):
        model.run_with_cache(torch.tensor([[99]]))
    assert state_of(model) == before


def test_arguments_go_to_the_model(model, tokens):
    loss, _ = model.run_with_cache(tokens, return_type="loss")
    assert torch.equal(loss, model(tokens, return_type="loss"))
    with pytest.raises(TypeError, match="no_such"):
        model.run_with_cache(tokens, no_such=1)


def test_every_cache_of_the_library_sees_the_points(model, tokens):
    _, cache = model.run_with_cache(tokens)
    with cache_activations(model, r"blocks\.\d+\.(attn\.)?hook_\w+|hook_embed") as plain:
        model(tokens)
    assert_same(cache, dict(plain.items()))
    pattern = r"blocks\.(?P<layer>\d+)\.attn\.hook_pattern"
    with ActivationCaching(pattern, stack_by="layer").prepare(model) as hooked:
        model(tokens)
    assert hooked.cache["blocks.*.attn.hook_pattern"].shape == (2, 2, 2, 5, 5)


def test_a_cache_sees_what_edits_made_of_a_value(model, tokens):
    with model.hooks([(MID, lambda tensor, hook: tensor * 0)]):
        _, cache = model.run_with_cache(tokens)
    assert cache[MID].count_nonzero() == 0
    assert cache["blocks.1.hook_resid_post"].count_nonzero() > 0


@every_way
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_a_device_is_where_entries_go(model, tokens, run, device):
    _, cache = run(model, tokens, names_filter=MID, device=device)
    assert cache[MID].device == torch.device(device)
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.gpu
@every_way
def test_entries_leave_the_accelerator_when_asked_to(model, tokens, run):
    expected = by_hand(model, lambda: model(tokens))[MID][0]
    model.cuda()
    for device, there in ((None, "cuda"), ("cpu", "cpu")):
        _, cache = run(model, tokens.cuda(), names_filter=MID, device=device, pos_slice=[0, -1])
        assert cache[MID].device.type == there
        assert torch.allclose(cache[MID].cpu(), expected[:, [0, -1]], atol=1e-4)  # another device's rounding


def test_a_plain_module_root_needs_no_graph_to_cache_inference_tensors(model, tokens):
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache[MID], by_hand(model, lambda: model(tokens))[MID][0])


# A cache of one's own


def test_positional_arguments_are_those_of_the_original(model, tokens):
    given = TensorDict()
    cache, fwd, bwd = model.get_caching_hooks(MID, True, None, False, given, -1)
    assert cache is given
    assert [name for name, _ in (*fwd, *bwd)] == [MID, MID]
    with model.hooks(fwd, bwd):
        model(tokens, return_type="loss").backward()
    assert given[MID].shape == given[MID + "_grad"].shape == (2, 1, 8)
    plain = {}
    assert model.add_caching_hooks(MID, False, None, False, plain) is plain
    model(tokens)
    assert isinstance(plain[MID], torch.Tensor)


def test_a_plain_dict_is_kept_current_like_a_tensordict():
    model = HookedRootModule()
    model.a, model.b, model.run_b = HookPoint(), HookPoint(), True
    model.forward = lambda x: model.b(model.a(x)) if model.run_b else model.a(x)
    for cache in ({}, TensorDict()):
        model.run_b = True
        model.add_caching_hooks(cache=cache)
        model(torch.ones(2))
        assert sorted(cache.keys()) == ["a", "b"]
        model.run_b = False
        model(torch.zeros(2))
        assert sorted(cache.keys()) == ["a"]  # nothing stale
        assert torch.equal(cache["a"], torch.zeros(2))
        model.reset_hooks()


def test_caching_hooks_stay_until_they_are_reset(model, tokens):
    cache = model.add_caching_hooks(MID)
    assert model.is_caching
    for shift in (0, 1):
        model((tokens + shift) % 11)
        assert torch.equal(cache[MID], by_hand(model, lambda s=shift: model((tokens + s) % 11))[MID][0])
    before = cache[MID].clone()
    model.reset_hooks()
    assert not model.is_caching
    model((tokens + 5) % 11)
    assert torch.equal(cache[MID], before)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_run_can_leave_its_hooks_on(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=MID, reset_hooks_end=False)
    first = cache[MID].clone()
    model((tokens + 1) % 11)
    assert not torch.equal(cache[MID], first)
    model.reset_hooks()
    assert not model._forward_hooks


def test_a_saving_hook_can_be_added_to_a_point_by_hand(model, tokens):
    cache, ((name, hook),), _ = model.get_caching_hooks(MID)
    model.hook_dict[name].add_hook(hook)
    model(tokens)
    assert torch.equal(cache[MID], by_hand(model, lambda: model(tokens))[MID][0])


def test_caching_and_editing_hooks_combine(model, tokens):
    cache, fwd, _ = model.get_caching_hooks(r"blocks\.\d\.hook_resid_mid")
    model.run_with_hooks(tokens, fwd_hooks=[*fwd, (MID, lambda tensor, hook: tensor * 0)])
    assert cache[MID].count_nonzero() == 0
    assert cache["blocks.0.hook_resid_mid"].count_nonzero() > 0


# Gradients


@every_way
def test_gradients_are_those_of_autograd_under_the_name_with_a_suffix(model, tokens, run):
    expected = gradients_by_hand(model, list(model.hook_dict), lambda: model(tokens).square().mean())
    scaled = copy.deepcopy(model)
    scaled.forward = lambda tokens: type(model).forward(scaled, tokens).square().mean()
    _, cache = run(scaled, tokens, incl_bwd=True)
    assert len(cache.keys()) == 2 * len(expected)
    assert all(torch.allclose(cache[name + "_grad"], grad, atol=1e-7) for name, grad in expected.items())


@every_way
def test_a_point_has_the_gradient_of_its_own_branch(run):
    model, x = Branches(), torch.randn(2, 3)
    _, cache = run(model, x, incl_bwd=True, gradient=torch.ones(2, 3))
    assert {name: cache[name + "_grad"].unique().tolist() for name in ("a", "b", "sum")} == {
        "a": [2.0],
        "b": [3.0],
        "sum": [1.0],
    }


def test_a_caching_context_has_the_gradients_of_the_branches_too():
    model, x = Branches(), torch.randn(2, 3)
    with ActivationCaching("a|b", directions=["fwd", "bwd"]).prepare(model) as hooked:
        model(x).sum().backward()
    assert [hooked.cache["bwd", name].unique().item() for name in ("a", "b")] == [2.0, 3.0]
    assert torch.equal(hooked.cache["fwd", "a"], model.linear(x))


def test_a_vector_loss_works_with_a_seed_and_says_so_without(model):
    model, x, seed = Branches(), torch.randn(2, 3), torch.randn(2, 3)
    _, cache = model.run_with_cache(x, incl_bwd=True, gradient=seed)
    assert torch.equal(cache["a_grad"], 2 * seed)
    before = state_of(model)
    with pytest.raises(ContextError, match=r"shape \(2, 3\) and is no scalar; pass its gradient, e.g. gradient="):
        model.run_with_cache(x, incl_bwd=True)
    with torch.no_grad(), pytest.raises(ContextError, match="has no graph"):
        model.run_with_cache(x, incl_bwd=True)
    assert state_of(model) == before


def test_parameter_gradients_are_left_alone_unless_asked_for():
    model, x = Branches(), torch.randn(2, 3)
    model.linear.bias.grad = bias = torch.ones(3)
    model.run_with_cache(x, incl_bwd=True, gradient=torch.ones(2, 3))
    assert model.linear.weight.grad is None
    assert model.linear.bias.grad is bias
    assert torch.equal(bias, torch.ones(3))
    model.run_with_cache(x, incl_bwd=True, gradient=torch.ones(2, 3), keep_parameter_grads=True)
    assert torch.equal(model.linear.bias.grad, torch.full((3,), 21.0))
    assert model.linear.weight.grad is not None


def test_parameter_gradients_are_put_back_when_the_backward_fails():
    model, x = Branches(), torch.randn(2, 3)
    model.linear.bias.grad = bias = torch.ones(3)

    def fail(grad, hook):
        raise KeyError("mine")

    model.add_hook("a", fail, "bwd")
    with pytest.raises(KeyError, match="mine"):
        model.run_with_cache(x, incl_bwd=True, gradient=torch.ones(2, 3))
    assert model.linear.bias.grad is bias


def test_a_gradient_that_becomes_a_leafs_is_a_copy():
    class Leaf(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.point = HookPoint()

        def forward(self, x):
            return 2 * self.point(x)

    model, x = Leaf(), torch.ones(2, requires_grad=True)
    _, cache = model.run_with_cache(x, incl_bwd=True, gradient=torch.ones(2))
    for _ in range(2):
        (5 * x).sum().backward()  # adds to x.grad in place
    assert torch.equal(cache["point_grad"], torch.full((2,), 2.0))


def test_a_cached_gradient_is_what_edits_made_of_it_in_the_scale_that_hooks_see():
    model, x = Branches(), torch.randn(2, 3)
    model.a.backward_scale = 4.0
    ones = torch.ones(2, 3)
    for each_way in (run, run_by_hooks):
        _, cache = each_way(model, x, incl_bwd=True, gradient=ones)
        assert cache["a_grad"].unique().tolist() == [8.0]
    model.add_hook("a", lambda grad, hook: grad + 4, "bwd")
    _, cache = model.run_with_cache(x, incl_bwd=True, gradient=ones)
    assert cache["a_grad"].unique().tolist() == [12.0]


@every_way
def test_an_in_place_operation_behind_a_point_spoils_no_gradient(run):
    model, x = InPlace(), torch.randn(4, 3)
    hidden = model.linear(x)
    _, cache = run(model, x, incl_bwd=True, gradient=torch.ones(4, 3), hold="snapshot")
    assert torch.equal(cache["before_grad"], (hidden > 0).float())
    assert torch.equal(cache["before"], hidden)


def test_gradient_hooks_and_a_capture_share_a_point_with_an_in_place_operation_behind_it():
    model, x = InPlace(), torch.randn(4, 3)
    model.add_hook("before", lambda grad, hook: 10 * grad, "bwd")
    _, cache = model.run_with_cache(x, incl_bwd=True, gradient=torch.ones(4, 3), hold="snapshot")
    assert torch.equal(cache["before_grad"], 10 * (cache["before"] > 0).float())


# Known to be wrong elsewhere: in-place edits


@every_way
def test_an_in_place_edit_by_a_later_hook_does_not_corrupt_what_was_cached_earlier(model, tokens, run):
    clean = by_hand(model, lambda: model(tokens))

    def erase(tensor, hook):
        tensor[:] = 0

    model.add_perma_hook("blocks.1.hook_resid_pre", erase)  # the same tensor as layer 0's resid_post
    _, cache = run(model, tokens)
    assert torch.equal(cache["blocks.0.hook_resid_post"], clean["blocks.0.hook_resid_post"][0])
    assert cache["blocks.1.hook_resid_pre"].count_nonzero() == 0


@every_way
def test_what_hooks_cached_is_a_copy_that_later_forwards_and_edits_leave_alone(model, tokens, run):
    x = torch.randn(2, 3)
    branches = Branches()
    _, cache = run(branches, x, names_filter="sum", hold="snapshot")
    before = cache["sum"].clone()
    branches(x + 1)
    assert torch.equal(cache["sum"], before)


def test_an_in_place_operation_of_the_model_is_an_error_that_names_the_point_or_a_copy():
    model, x = InPlace(), torch.randn(4, 3)
    before = state_of(model)
    with torch.no_grad(), pytest.raises(InplaceModificationError, match=r"'before'.*hold='snapshot'"):
        model.run_with_cache(x)
    assert state_of(model) == before
    with torch.no_grad():
        _, cache = model.run_with_cache(x, hold="snapshot")
        assert torch.equal(cache["before"], model.linear(x))


# Known to be wrong elsewhere: points that fire twice


@every_way
def test_a_point_that_fires_twice_is_told_of_and_all_its_values_can_be_had(run):
    model, x = Twice(), torch.zeros(2)
    with pytest.warns(RepeatedCallWarning, match=r"'step' ran more than once.*Stack\(\)"):
        _, cache = run(model, x)
    assert torch.equal(cache["step"], torch.full((2,), 10.0))


def test_every_value_of_a_point_that_fires_twice_can_be_kept():
    _, cache = Twice().run_with_cache(torch.zeros(2), reducer=Stack())
    assert torch.equal(cache["step"], torch.tensor([[1.0, 1], [10, 10]]))


# Known to be wrong elsewhere: the batch axis


@every_way
def test_a_batch_of_one_loses_its_axis(model, tokens, run):
    _, whole = run(model, tokens[:1])
    _, cache = run(model, tokens[:1], remove_batch_dim=True)
    assert all(torch.equal(cache[name], whole[name][0]) for name in whole.keys())  # noqa: SIM118


@every_way
def test_a_batch_of_two_has_no_axis_to_lose(model, tokens, run):
    before = state_of(model)
    with pytest.raises(CaptureError, match=r"first axis of size 1, but 'hook_embed' has shape \(2, 5, 8\)"):
        run(model, tokens, remove_batch_dim=True)
    model.reset_hooks(clear_contexts=False)
    assert state_of(model) == before


def test_gradients_lose_their_batch_axis_too(model, tokens):
    _, cache = model.run_with_cache(
        tokens[:1], names_filter=MID, remove_batch_dim=True, incl_bwd=True, return_type="loss", pos_slice=(1, 3)
    )
    assert cache[MID].shape == cache[MID + "_grad"].shape == (2, 8)


# Known to be wrong elsewhere: positions


@every_way
@pytest.mark.parametrize(
    ("given", "positions"),
    [
        (-1, [4]),
        (0, [0]),
        ((2,), [0, 1]),
        ((1, 4), [1, 2, 3]),
        ((0, 5, 2), [0, 2, 4]),
        (slice(1, None), [1, 2, 3, 4]),
        ([0, 3], [0, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(2), [2]),
        ([True, False, False, True, False], [0, 3]),
    ],
)
def test_positions_are_sliced_on_their_own_axis(model, tokens, run, given, positions):
    _, whole = run(model, tokens)
    _, cache = run(model, tokens, pos_slice=given)
    for name, value in whole.items():
        axis = -3 if name.endswith(("_q", "_k", "_v", "_z")) else -2
        assert torch.equal(cache[name], value.index_select(axis, torch.tensor(positions))), name


@pytest.mark.parametrize("given", [-1, (1, 3), slice(0, 1), [2]])
def test_kept_positions_are_a_copy_that_does_not_pin_the_whole(model, tokens, given):
    for _, cache in (run(model, tokens, pos_slice=given), run_by_hooks(model, tokens, pos_slice=given)):
        for value in cache.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("batch_stays", [True, False])
@pytest.mark.parametrize("head", ["q", "k", "v", "z", "result"])
def test_positions_under_a_name_with_heads_are_found_where_the_heads_are_joined(head, batch_stays):
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(1, 5, 4)  # (batch, positions, heads * features)
    with hook_root(model, {f"0.hook_{head}": "0"}) as root:
        y, cache = root.run_with_cache(x, pos_slice=[1, -1], remove_batch_dim=not batch_stays)
    assert torch.equal(cache[f"0.hook_{head}"], y[:, [1, -1]] if batch_stays else y[0, [1, -1]])


def test_positions_of_a_tensor_without_such_an_axis_are_its_own():
    class Flat(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.flat, self.odd, self.scalar = HookPoint(), HookPoint(), HookPoint()
            self.odd.pos_dim = 0

        def forward(self, x):
            return self.scalar(self.odd(self.flat(x)).sum())

    x = torch.arange(6.0).reshape(3, 2)
    _, cache = Flat().run_with_cache(x, pos_slice=-1)
    assert torch.equal(cache["flat"], x)  # (batch, features): the batch is not sliced
    assert torch.equal(cache["odd"], x[-1:])  # unless the point says so
    assert cache["scalar"] == x.sum()


def test_positions_that_are_not_there_are_an_error_with_the_name(model, tokens):
    with pytest.raises(CaptureError, match=r"pos_slice=7 does not fit axis -2 of 'hook_embed', shape \(2, 5, 8\)"):
        model.run_with_cache(tokens, pos_slice=7)
    with pytest.raises(ValueError, match="pos_slice is a position, a slice"):
        model.run_with_cache(tokens, pos_slice="last")


# Conversions and odd values


@every_way
def test_a_cache_holds_what_hooks_see_of_a_converted_point(model, tokens, run):
    point = model.hook_dict[MID]
    plain = by_hand(model, lambda: model(tokens))[MID][0]
    point.enable_reshape((lambda value: value.transpose(1, 2), lambda value: value.transpose(1, 2)))
    _, cache = run(model, tokens, names_filter=[MID, PATTERN])
    assert torch.equal(cache[MID], plain.transpose(1, 2))


@every_way
def test_of_a_tuple_the_first_tensor_is_kept_and_without_one_the_point_is_named(run):
    class Odd(HookedRootModule):
        def __init__(self, value):
            super().__init__()
            self.point, self.value = HookPoint(), value

        def forward(self):
            return self.point(self.value)

    _, cache = run(Odd((torch.ones(2), "more")))
    assert torch.equal(cache["point"], torch.ones(2))
    with pytest.raises(CaptureError, match=r"'point'.*holds no tensor"):
        run(Odd("nothing"), pos_slice=0)


class Gated(HookedRootModule):
    """A point that runs only when it is switched on."""

    def __init__(self):
        super().__init__()
        self.always, self.gated = HookPoint(), HookPoint()

    def forward(self, x):
        return self.always(x)


def test_a_point_that_was_asked_for_and_did_not_fire_is_reported():
    with pytest.warns(UnfiredSiteWarning, match="'gated'"):
        _, cache = Gated().run_with_cache(torch.ones(1), names_filter=".*")
    assert list(cache.keys()) == ["always"]


def test_one_who_asks_for_everything_means_everything_that_runs():
    _, cache = Gated().run_with_cache(torch.ones(1))
    assert list(cache.keys()) == ["always"]


def test_live_entries_keep_their_graph(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=MID, hold="live")
    (grad,) = torch.autograd.grad(cache[MID].sum(), model.embed.weight)
    assert grad.count_nonzero() > 0


def test_points_in_a_checkpoint_are_kept_once():
    class Checkpointed(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.inner = Branches()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False).sum()

    import torch.utils.checkpoint

    model, x = Checkpointed(), torch.randn(2, 3)
    _, cache = model.run_with_cache(x, incl_bwd=True)
    assert torch.equal(cache["inner.a"], model.inner.linear(x))
    assert cache["inner.a_grad"].unique().tolist() == [2.0]


def test_the_companion_of_a_tensordict_free_model_gives_the_same(model, tokens):
    wrapped = nn.ModuleDict({"inside": model})
    root = hook_root(wrapped)
    wrapped.forward = lambda tokens: wrapped["inside"](tokens)
    _, cache = root.run_with_cache(tokens)
    _, own = model.run_with_cache(tokens)
    assert_same(cache, {f"inside.{name}": value for name, value in own.items()})


class ShorthandCache:
    """How TransformerLens' ``ActivationCache`` uses its dict: it asks for shorthands before it spells them out."""

    def __init__(self, activations):
        self.activations = activations

    def __getitem__(self, key):
        if key in self.activations:
            return self.activations[key]
        kind, layer = key
        return self.activations[f"blocks.{layer}.attn.hook_{kind}"]

    def remove_batch_dim(self):
        for key in self.activations:
            self.activations[key] = self.activations[key][0]


def test_a_cache_stands_where_a_dict_is_asked_for_shorthands():
    model, tokens = small_transformer(HookedRootModule, HookPoint), some_tokens()
    _, cache = model.run_with_cache(tokens[:1])
    plain = {name: value.clone() for name, value in cache.items()}
    assert isinstance(cache, TensorDict)
    assert list(cache) == list(plain)
    for asked in (("q", 0), ("q", -1), ("q", None), ("q", 0, "attn"), 0, ()):
        assert asked not in cache
    short = ShorthandCache(cache)
    assert torch.equal(short["q", 0], plain["blocks.0.attn.hook_q"])
    assert torch.equal(short["hook_embed"], plain["hook_embed"])
    short.remove_batch_dim()
    assert all(torch.equal(cache[name], value[0]) for name, value in plain.items())


def test_a_cache_with_a_batch_iterates_as_every_tensordict():
    cache = PointCache({"a": torch.arange(2)}, batch_size=[2])
    assert [int(row["a"]) for row in cache] == [0, 1]


@pytest.mark.parametrize("hold", ["snapshot", "detached"])
def test_caching_hooks_that_stay_hold_what_was_seen_or_say_that_it_was_overwritten(hold):
    class Overwriting(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.point = HookPoint()
            self.setup()

        def forward(self, x):
            return self.point(2 * x).relu_()

    model, x = Overwriting(), torch.tensor([-1.0, 1.0])
    cache = model.add_caching_hooks(hold=hold)
    if hold == "detached":
        with pytest.raises(InplaceModificationError, match="'point' was overwritten"):
            model(x)
        return
    for scale in (1, 3):
        model(scale * x)
        assert torch.equal(cache["point"], 2 * scale * x)
    model.point(x)  # outside of a forward of the root
    assert torch.equal(cache["point"], x)
    with torch.inference_mode():
        model(x)
    assert torch.equal(cache["point"], 2 * x)
