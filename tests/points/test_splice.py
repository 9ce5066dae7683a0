"""Hook points in models that were written without any: where they sit, what they see, and that they come out again."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from model_state import state_of
from small_models import MLP, Pair
from tdcache import ActivationCaching, CaptureError, ContextError, EditError, PathError, cache_activations
from tdcache.points import HookPoint, hook_root, insert_hook_point, list_hooks


def doubled(tensor, hook):
    return 2 * tensor


def by_plain_hook(model, path, hook, call, pre=False):
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)
    found = call()
    handle.remove()
    return found


def test_a_point_sees_and_changes_what_a_module_returns(model, x):
    expected = by_plain_hook(model, "layers.1", lambda module, args, output: 2 * output, lambda: model(x))
    spliced = insert_hook_point(model, "layers.1", "hook_out")
    assert model.get_submodule("hook_out") is spliced.point
    assert isinstance(spliced.point, HookPoint)
    assert spliced.point.name == "hook_out"
    spliced.point.add_hook(doubled)
    assert torch.equal(model(x), expected)


def test_a_point_before_a_module_sees_and_changes_what_it_is_given(model, x):
    expected = by_plain_hook(model, "layers.1", lambda module, args: (2 * args[0],), lambda: model(x), pre=True)
    insert_hook_point(model, "layers.1", "hook_in", before=True).point.add_hook(doubled)
    assert torch.equal(model(x), expected)


def test_without_hooks_a_point_changes_no_bit(model, x):
    expected = model(x)
    insert_hook_point(model, "layers.1", "hook_out")
    insert_hook_point(model, "layers.1", "hook_in", before=True)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_points_come_out_in_any_order_and_the_model_is_as_it_was(model, x, order):
    before = state_of(model)
    spliced = [
        insert_hook_point(model, "layers.0", "blocks.0.hook_out"),
        insert_hook_point(model, "layers.1", "blocks.1.hook_out"),
        insert_hook_point(model, "layers.1", "blocks.1.hook_in", before=True),
    ]
    spliced[0].point.add_hook(doubled)
    model(x)
    for at in order:
        spliced[at].remove()
        spliced[at].remove()
    assert state_of(model) == before


def test_a_with_block_takes_the_point_out_also_when_the_body_fails(model):
    before = state_of(model)
    spliced = insert_hook_point(model, "head", "a.b.hook")
    assert model.a.b.hook is spliced.point
    with pytest.raises(KeyError, match="mine"), spliced:
        raise KeyError("mine")
    assert state_of(model) == before


def test_the_state_dict_keeps_its_keys_and_the_parameters_their_order(model):
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    insert_hook_point(model, "head", "blocks.0.hook")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names


def test_a_point_takes_the_mode_of_its_model():
    model = MLP().eval()
    insert_hook_point(model, "head", "blocks.0.hook")
    assert not any(module.training for module in model.modules())


def test_every_cache_of_the_library_finds_a_spliced_point(model, x):
    with insert_hook_point(model, "layers.1", "hook_out"):
        with cache_activations(model, r"hook_out|layers\.1") as cache:
            model(x)
        assert torch.equal(cache["hook_out"], cache["layers.1"])


def test_names_of_ones_own_lead_through_shelves_and_have_layers(model):
    point = insert_hook_point(model, "layers.1", "blocks.1.attn.hook_z").point
    assert point.layer() == 1
    assert [type(module).__name__ for module in (model.blocks, model.get_submodule("blocks.1.attn"))] == [
        "PointShelf"
    ] * 2


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_of_a_structured_output_one_tensor_goes_through(kind, x):
    model = Pair(kind)
    first, second = (value.clone() for value in (model.inner.left(x), model.inner.right(x)))
    with insert_hook_point(model, "inner", "hook") as point:
        point.add_hook(doubled)
        assert torch.allclose(model(x), 2 * first + second)
    with insert_hook_point(model, "inner", "hook", pick="right" if kind is dict else 1) as point:
        point.add_hook(doubled)
        assert torch.allclose(model(x), first + 2 * second)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Sum()

    def forward(self, x):
        return self.inner(x, 1, other=10 * x)


class Sum(nn.Module):
    def forward(self, x, number, *, other):
        return x + number + other


@pytest.mark.parametrize(("pick", "expected"), [(None, 13.0), (0, 13.0), ("other", 22.0)])
def test_of_the_arguments_one_tensor_goes_through(pick, expected):
    model = Keywords()
    with insert_hook_point(model, "inner", "hook", before=True, pick=pick) as point:
        assert torch.equal(model(torch.ones(1)), torch.tensor([12.0]))
        point.add_hook(doubled)
        assert torch.equal(model(torch.ones(1)), torch.tensor([expected]))


def test_a_pick_without_a_tensor_is_the_error_that_a_cache_gives():
    model, messages = Keywords(), []
    with insert_hook_point(model, "inner", "hook", before=True, pick=1), pytest.raises(CaptureError) as caught:
        model(torch.ones(1))
    messages.append(str(caught.value))
    with (
        ActivationCaching("inner", directions=["fwd_pre"], pick=1).prepare(model),
        pytest.raises(CaptureError) as caught,
    ):
        model(torch.ones(1))
    assert (
        messages
        == [str(caught.value)]
        == ["pick=1 gives int at 'inner'; a cache holds tensors (or TensorDicts of them)"]
    )


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Lists()

    def forward(self, x):
        return self.inner({"pair": [x, 10 * x]}, last=100 * x)


class Lists(nn.Module):
    def forward(self, given, *, last):
        return [given["pair"][0], {"deep": given["pair"][1] + last}]


@pytest.mark.parametrize(
    ("pick", "before"),
    [
        ((0, "pair", 1), True),
        (("given", "pair", -1), True),
        (-1, True),
        ("last", True),
        (None, True),
        ((1, "deep"), False),
        ((-1, "deep"), False),
        (0, False),
        (None, False),
    ],
)
def test_a_pick_means_at_a_point_what_it_means_to_a_cache(pick, before):
    model, seen = Nested(), []
    with insert_hook_point(model, "inner", "hook", before=before, pick=pick) as point:
        point.add_hook(lambda tensor, hook: seen.append(tensor.clone()))
        with ActivationCaching("inner", directions=["fwd_pre" if before else "fwd"], pick=pick).prepare(
            model
        ) as hooked:
            model(torch.ones(1))
        assert torch.equal(seen[0], hooked.cache["inner"])
        point.add_hook(doubled)
        with ActivationCaching("inner", directions=["fwd_pre" if before else "fwd"], pick=pick).prepare(
            model
        ) as hooked:
            model(torch.ones(1))
        assert torch.equal(hooked.cache["inner"], 2 * seen[0])


def two_steps():
    return TensorDictSequential(
        TensorDictModule(nn.Linear(2, 2), in_keys=["x"], out_keys=["first"]),
        TensorDictModule(nn.Linear(2, 2), in_keys=["first"], out_keys=["second"]),
    )


@pytest.mark.parametrize(("before", "key"), [(False, "second"), (True, "first")])
def test_of_a_tensordict_module_its_own_entry_goes_through(before, key):
    model, x = two_steps(), torch.ones(3, 2)
    expected = model(TensorDict({"x": x}))
    with insert_hook_point(model, "module.1", "hook", before=before) as point:
        point.add_hook(doubled)
        changed = model(TensorDict({"x": x}))
    assert torch.equal(changed[key], 2 * expected[key])
    assert torch.equal(changed["x"], x)


def test_the_gradient_at_a_point_in_a_tensordict_module_is_that_of_its_own_entry():
    model, grads = two_steps(), []
    with insert_hook_point(model, "module.0", "hook") as point:
        point.add_hook(lambda grad, hook: grads.append(grad.clone()), dir="bwd")
        out = model(TensorDict({"x": torch.ones(3, 2, requires_grad=True)}))
        out["second"].sum().backward()
    assert torch.equal(grads[0], torch.ones(3, 2) @ model.module[1].module.weight)


def test_a_replacement_that_does_not_fit_a_structure_is_an_edit_error(x):
    model = Pair()
    insert_hook_point(model, "inner", "hook").point.add_hook(lambda tensor, hook: tensor[:1])
    with pytest.raises(EditError, match="does not fit"):
        model(x)


def test_gradients_at_a_spliced_point_are_those_of_the_output(model, x):
    with ActivationCaching(r"layers\.1", directions=["bwd"]).prepare(model) as hooked:
        model(x).square().sum().backward()
    root = hook_root(model, {"hook_out": "layers.1"})
    _, cache = root.run_with_cache(x, incl_bwd=True, gradient=2 * model(x).detach())
    assert torch.allclose(cache["hook_out_grad"], hooked.cache["layers.1"])


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("layers.7", "hook", "'layers.7' names none of the 6 modules"),
        ("layers", "hook", "'layers' is a ModuleList, which is never called"),
        ("head", "act", "the name 'act' is taken in MLP"),
        ("head", "training", "the name 'training' is taken in MLP"),
        ("head", "training.hook", "leads through 'training', which is no module"),
        ("head", "layers.hook", r"a member of a ModuleList, which runs its members; .* for instance 'head.hook'"),
        ("head", "layers.9.hook", "would make '9' a member of a ModuleList"),
        ("head", "", "a hook point's name is a path"),
        ("head", "a..b", "a hook point's name is a path"),
    ],
)
def test_a_place_or_name_that_cannot_be_had_is_refused_and_nothing_changes(model, path, name, message):
    before = state_of(model)
    with pytest.raises(PathError, match=message):
        insert_hook_point(model, path, name)
    assert state_of(model) == before


def test_a_model_that_was_traced_refuses_a_point():
    torch._dynamo.reset()
    model = MLP()
    torch.compile(model, backend="eager")(torch.randn(2, 4))
    before = state_of(model)
    with pytest.raises(ContextError, match=r"was traced by torch\.compile"):
        insert_hook_point(model, "head", "hook")
    assert state_of(model) == before
    torch._dynamo.reset()


def test_a_foreign_hook_that_was_there_before_is_seen_through(model, x):
    model.head.register_forward_hook(lambda module, args, output: output + 1)
    with insert_hook_point(model, "head", "hook_out"), cache_activations(model, "hook_out") as cache:
        output = model(x)
    assert torch.equal(cache["hook_out"], output)
    assert len(model.head._forward_hooks) == 1


def test_captures_of_the_module_see_what_the_point_made_of_its_output(model, x):
    with cache_activations(model, "head") as cache, insert_hook_point(model, "head", "hook_out") as point:
        point.add_hook(doubled)
        output = model(x)
    assert torch.equal(cache["head"], output)


# The companion


def test_a_companion_puts_points_in_and_takes_them_out(model, x):
    before = state_of(model)
    with hook_root(model, {f"blocks.{at}.hook_out": f"layers.{at}" for at in range(3)}) as root:
        output, cache = root.run_with_cache(x, names_filter=r"blocks\.\d\.hook_out")
        assert list(cache.keys()) == ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out"]
        assert torch.equal(root(x), output)
        assert repr(root) == "HookRoot(MLP, 3 hook points)"
    assert state_of(model) == before


def test_a_companion_puts_in_all_points_or_none(model):
    before = state_of(model)
    with pytest.raises(PathError, match=r"layers\.9"):
        hook_root(model, {"a": "layers.0", "b": "layers.9"})
    assert state_of(model) == before


def test_the_report_names_a_spliced_point_and_its_place(model):
    insert_hook_point(model, "head", "hook_out")
    (row,) = list_hooks(model)
    assert (row.path, row.owner, row.name) == ("head", "tdcache", "SpliceTap('hook_out' after 'head')")


def test_a_real_model_without_points_gets_the_originals_names():
    transformers = pytest.importorskip("transformers")
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, use_cache=False, **special
    )
    model = transformers.GPT2Model(config).eval()
    places = {
        f"blocks.{layer}.{name}": f"h.{layer}{path}"
        for layer in range(2)
        for name, path in {"hook_attn_out": ".attn", "hook_mlp_out": ".mlp", "hook_resid_post": ""}.items()
    }
    ids = torch.arange(8)[None]
    hidden = model(ids, output_hidden_states=True).hidden_states
    before = state_of(model)
    with hook_root(model, places) as root:
        _, cache = root.run_with_cache(input_ids=ids)
        assert torch.equal(cache["blocks.0.hook_resid_post"], hidden[1])
        post, mid = (cache[f"blocks.1.{name}"] for name in ("hook_resid_post", "hook_mlp_out"))
        assert torch.allclose(post - mid - cache["blocks.1.hook_attn_out"], hidden[1], atol=1e-5)
        ablated = root.run_with_hooks(ids, fwd_hooks=[(r".*hook_mlp_out", lambda tensor, hook: 0 * tensor)])
        assert not torch.allclose(ablated.last_hidden_state, hidden[2])
    assert state_of(model) == before
