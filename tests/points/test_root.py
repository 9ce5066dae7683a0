"""Hooks by name on a whole model: filters, contexts, levels, vetoes; on a root of one's own and on any model's."""

import copy

import pytest
import torch
from torch import nn

from model_state import state_of
from points.point_models import Branches, by_hand, small_transformer, some_tokens
from tdcache import ContextError, DirectionError, SelectionError, TdcacheWarning
from tdcache.points import HookedRootModule, HookPoint, hook_root

Q = ["blocks.0.attn.hook_q", "blocks.1.attn.hook_q"]


@pytest.fixture(scope="module")
def made():
    return small_transformer()


@pytest.fixture(params=["root", "companion"])
def model(request, made):
    """The model itself, and the same surface beside it."""
    own = copy.deepcopy(made)
    return own if request.param == "root" else hook_root(own)


@pytest.fixture
def tokens():
    return some_tokens()


def doubled(tensor, hook):
    return 2 * tensor


class Seeing:
    """Notes the names of the points it is called at."""

    def __init__(self):
        self.names = []

    def __call__(self, tensor, hook):
        self.names.append(hook.name)


# Names


def test_setup_names_every_point_and_nothing_else(model):
    root = model.points_root
    expected = {name: each for name, each in root.named_modules() if isinstance(each, HookPoint)}
    assert model.hook_dict == expected
    assert [point.name for point in model.hook_points()] == list(expected)
    assert model.mod_dict == {name: each for name, each in root.named_modules() if name}
    assert not any("name" in vars(each) for each in root.modules() if not isinstance(each, HookPoint))


def test_points_added_later_are_found_without_another_setup(model, tokens):
    model.points_root.blocks[0].hook_late = HookPoint()
    assert "blocks.0.hook_late" in model.hook_dict
    assert model.points_root.blocks[0].hook_late.name == "blocks.0.hook_late"


def test_a_shared_point_goes_by_its_first_name():
    model = nn.ModuleDict({"a": HookPoint(), "b": nn.Identity()})
    model["b"].inner = model["a"]
    root = hook_root(model)
    assert list(root.hook_dict) == ["a"]
    assert list(root.mod_dict) == ["a", "b"]


def test_a_model_whose_setup_was_not_called_works_all_the_same():
    class Late(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.point = HookPoint()

        def forward(self, x):
            return self.point(x)

    output, cache = Late().run_with_cache(torch.ones(2))
    assert torch.equal(cache["point"], output)


def test_the_root_can_be_a_mixin():
    class Hooked(HookedRootModule, nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.point = HookPoint()
            self.setup()

        def forward(self, x):
            return self.point(super().forward(x))

    model = Hooked(3, 2)
    output, cache = model.run_with_cache(torch.ones(1, 3))
    assert torch.equal(cache["point"], nn.functional.linear(torch.ones(1, 3), model.weight, model.bias))
    assert torch.equal(output, cache["point"])


def test_a_plain_root_takes_arguments_as_the_original_does():
    assert HookedRootModule("anything").context_level == 0


# Filters


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("blocks.0.attn.hook_q", Q[:1]),
        (r"blocks\.\d+\.attn\.hook_q", Q),
        (lambda name: name.endswith("hook_q"), Q),
        (Q[::-1], Q),
        ((Q[1],), Q[1:]),
        ({r"blocks\.0\.attn\.hook_q", Q[1]}, Q),
    ],
    ids=["name", "regex", "predicate", "list", "tuple", "set"],
)
def test_every_kind_of_filter_means_the_same_in_hooks_add_hook_and_caches(model, tokens, wanted, names):
    seeing = Seeing()
    with model.hooks([(wanted, seeing)]):
        model(tokens)
    assert seeing.names == names
    seeing.names.clear()
    model.add_hook(wanted, seeing)
    model(tokens)
    assert seeing.names == names
    assert list(model.list_hooks(wanted)) == names
    assert list(model.run_with_cache(tokens, names_filter=wanted)[1].keys()) == names


def test_a_filter_that_matches_nothing_is_an_error_with_near_misses(model, tokens):
    before = state_of(model.points_root)
    for call in (
        lambda name: model.add_hook(name, doubled),
        lambda name: model.run_with_cache(tokens, names_filter=name),
        lambda name: model.run_with_hooks(tokens, fwd_hooks=[(name, doubled)]),
        lambda name: model.get_caching_hooks(name),
        lambda name: model.add_caching_hooks(name),
        lambda name: model.list_hooks(name),
        lambda name: model.run_with_cache(tokens, names_filter=[Q[0], name]),
    ):
        with pytest.raises(SelectionError, match=r"did you mean 'blocks\.0\.attn.hook_q'") as error:
            call("blocks.0.attn.hook_q_")
        assert error.value.near
    assert state_of(model.points_root) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (lambda name: False, "says no to each of the 23 hook points of Transformer"),
        ([], "names_filter is a name, a regex"),
        (3, "names_filter is a name, a regex"),
        ("(", "not a valid regex"),
        ("blocks.0.attn", "is a Attention and no hook point; put one behind it with insert_hook_point"),
    ],
)
def test_an_unusable_filter_says_why(model, wanted, message):
    with pytest.raises(SelectionError, match=message.replace("(", r"\(")):
        model.add_hook(wanted, doubled)


def test_a_model_without_points_says_how_to_get_some():
    with pytest.raises(SelectionError, match=r"Linear has no hook points.*insert_hook_point\(\)"):
        hook_root(nn.Linear(2, 2)).run_with_cache(torch.ones(2))


# Hooks that stay


def test_a_hook_can_be_added_by_name_and_by_predicate_with_positional_arguments(model, tokens):
    seen = Seeing()
    (handle,) = model.add_hook(Q[0], seen, "fwd", True, 7, True)
    assert (handle.is_permanent, handle.context_level, handle.user_hook) == (True, 7, seen)
    model.add_perma_hook(lambda name: name in Q, seen, "fwd")
    model(tokens)
    assert seen.names == [Q[0], Q[0], Q[1]]
    model.reset_hooks()
    assert list(model.list_hooks()) == Q
    model.reset_hooks(True, "both", True)
    assert model.list_hooks() == {}


def test_adding_to_several_points_is_all_or_nothing(model):
    class Picky(Exception):
        pass

    def check(hook_point, hook_point_name, hook, **rest):
        if hook_point_name == Q[1]:
            raise Picky

    model.check_hooks_to_add = check
    before = state_of(model.points_root)
    with pytest.raises(Picky):
        model.add_hook(Q, doubled)
    assert state_of(model.points_root) == before


@pytest.mark.parametrize("by", ["add_hook", "hooks", "run_with_hooks"])
def test_every_hook_by_name_passes_the_models_own_check(model, tokens, by):
    asked = []

    def check(hook_point, hook_point_name, hook, **rest):
        asked.append((hook_point_name, rest["dir"]))
        if hook_point_name == Q[1]:
            raise ValueError("switched off in the configuration")

    model.check_hooks_to_add = check
    with pytest.raises(ValueError, match="switched off"):
        {
            "add_hook": lambda: model.add_hook(Q, doubled),
            "hooks": lambda: model.hooks([(Q, doubled)]).__enter__(),
            "run_with_hooks": lambda: model.run_with_hooks(tokens, fwd_hooks=[(Q, doubled)]),
        }[by]()
    assert asked == [(Q[0], "fwd"), (Q[1], "fwd")]
    assert model.list_hooks() == {}
    assert model.context_level == 0


def test_reset_clears_contexts_unless_told_otherwise_and_counts_levels(model):
    point = model.hook_dict[Q[0]]
    point.ctx["k"] = 1
    for level in (None, 1, 2):
        model.add_hook(Q[0], doubled, level=level)
    model.reset_hooks(clear_contexts=False, level=2)
    assert point.ctx == {"k": 1}
    assert [handle.context_level for handle in point.fwd_hooks] == [None, 1]
    model.reset_hooks()
    assert point.ctx == {}
    assert point.fwd_hooks == []


def test_all_hook_functions_go_in_one_direction_or_both(model):
    model.add_hook(Q, doubled)
    model.add_hook(Q, doubled, "bwd")
    model.remove_all_hook_fns("fwd")
    assert {name: len(handles) for name, handles in model.list_hooks().items()} == dict.fromkeys(Q, 1)
    model.remove_all_hook_fns()
    assert model.list_hooks() == {}


def test_listing_filters_by_name_direction_and_permanence(model):
    (temporary,) = model.add_hook(Q[0], doubled)
    (permanent,) = model.add_perma_hook(Q[0], doubled)
    (backward,) = model.add_hook(Q[1], doubled, "bwd")
    assert model.list_hooks() == {Q[0]: [temporary, permanent], Q[1]: [backward]}
    assert model.list_hooks(Q[0], "fwd", False) == {Q[0]: [temporary]}
    assert model.list_hooks(name_filter={Q[1]}, dir="fwd") == {}
    with pytest.raises(DirectionError):
        model.list_hooks(dir="forward")


def test_reset_leaves_foreign_hooks_alone(model, tokens):
    point, seen = model.hook_dict[Q[0]], []
    point.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.add_hook(Q[0], doubled)
    with model.hooks([(Q[0], doubled)]):
        pass
    model.reset_hooks(including_permanent=True)
    model(tokens)
    assert len(seen) == 1


# Contexts


def test_a_context_has_its_hooks_on_inside_and_off_outside(model, tokens):
    before, plain = state_of(model.points_root), model(tokens)
    with model.hooks(fwd_hooks=[(Q, doubled)], bwd_hooks=[(Q[0], doubled)]) as inside:
        assert inside is model
        assert model.context_level == 1
        assert [handle.context_level for handle in model.list_hooks()[Q[0]]] == [1, 1]
        assert not torch.allclose(inside(tokens), plain)
    assert state_of(model.points_root) == before
    assert torch.equal(model(tokens), plain)
    assert model.context_level == 0


def test_a_context_can_be_entered_again_after_it_was_left(model, tokens):
    seen = Seeing()
    context = model.hooks([(Q[0], seen)])
    for _ in range(3):
        with context:
            model(tokens)
    model(tokens)
    assert seen.names == [Q[0]] * 3


def test_entering_a_context_inside_itself_is_an_error_and_leaves_it_as_it_was(model, tokens):
    seen = Seeing()
    context = model.hooks([(Q[0], seen)])
    with context:
        with pytest.raises(ContextError, match="not inside itself"):
            context.__enter__()
        model(tokens)
    assert seen.names == [Q[0]]
    assert model.context_level == 0


def test_a_context_leaves_standing_hooks_of_the_same_level_alone(model, tokens):
    standing = Seeing()
    with model.hooks([(Q[0], standing)], reset_hooks_end=False):
        pass
    assert [handle.context_level for handle in model.list_hooks()[Q[0]]] == [1]
    with model.hooks([(Q[1], doubled)]):
        pass
    model.run_with_cache(tokens)
    assert standing.names == [Q[0]]
    model.reset_hooks(level=1)
    assert model.list_hooks() == {}


def test_contexts_can_be_left_in_any_order(model, tokens):
    one, two = Seeing(), Seeing()
    first, second = model.hooks([(Q[0], one)]), model.hooks([(Q[0], two)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model(tokens)
    second.__exit__(None, None, None)
    model(tokens)
    assert (one.names, two.names) == ([], [Q[0]])


def test_a_context_that_cannot_be_entered_leaves_nothing_behind(model):
    before = state_of(model.points_root)
    with pytest.raises(SelectionError):
        model.hooks([(Q, doubled), ("no_such_point", doubled)]).__enter__()
    assert state_of(model.points_root) == before
    assert model.context_level == 0


def test_the_bodys_exception_is_the_one_seen(model):
    before = state_of(model.points_root)
    with pytest.raises(KeyError, match="mine"), model.hooks([(Q, doubled)], clear_contexts=True):
        raise KeyError("mine")
    assert state_of(model.points_root) == before


def test_permanent_hooks_that_are_added_inside_stay(model, tokens):
    seen = Seeing()
    with model.hooks([(Q[0], doubled)]):
        model.add_perma_hook(Q[0], seen)
    model(tokens)
    assert seen.names == [Q[0]]


def test_clear_contexts_empties_the_scratch_space_at_the_end(model, tokens):
    def keep(tensor, hook):
        hook.ctx["kept"] = tensor

    with model.hooks([(Q[0], keep)]):
        model(tokens)
    assert "kept" in model.hook_dict[Q[0]].ctx
    model.run_with_hooks(tokens, fwd_hooks=[(Q[0], keep)], clear_contexts=True)
    assert model.hook_dict[Q[0]].ctx == {}


def test_the_repr_of_a_context_says_what_it_would_do(model):
    assert repr(model.hooks([(Q[0], doubled)])) == f"<closed PointHooks: doubled at {Q[0]!r}>"
    assert repr(model.hooks()) == "<closed PointHooks: no hooks>"


# Runs


def test_a_run_with_hooks_edits_and_cleans_up(model, tokens):
    before = state_of(model.points_root)
    scaled = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", doubled)], return_type="logits")
    by_plain_hook = model.hook_dict["hook_embed"].register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(scaled, model(tokens))
    by_plain_hook.remove()
    assert state_of(model.points_root) == before


def test_a_run_with_hooks_is_a_call_of_the_model_so_hooks_on_the_root_fire(model, tokens):
    calls = []
    handle = model.points_root.register_forward_hook(lambda *args: calls.append(1))
    model.run_with_hooks(tokens)
    handle.remove()
    assert calls == [1]


def test_backward_hooks_that_would_see_no_backward_are_warned_of(model, tokens):
    with pytest.warns(TdcacheWarning, match="see no backward") as told:
        model.run_with_hooks(tokens, bwd_hooks=[(Q[0], doubled)])
    assert told[0].filename == __file__


def test_backward_hooks_stay_when_asked_to(model, tokens):
    seen = Seeing()
    loss = model.run_with_hooks(tokens, bwd_hooks=[(Q[0], seen)], reset_hooks_end=False, return_type="loss")
    loss.backward()
    assert seen.names == [Q[0]]
    model.reset_hooks()


def test_gradient_edits_flow_on_like_the_formula():
    model = Branches()
    x = torch.randn(2, 3)
    with model.hooks(bwd_hooks=[("a", lambda grad, hook: 10 * grad)]):
        model(x).sum().backward()
    expected = (20 + 3 + 5) * torch.stack([x.sum(0)] * 3)
    assert torch.allclose(model.linear.weight.grad, expected, atol=1e-5)  # sums in another order


def test_a_copy_of_a_model_with_hooks_is_independent(made, tokens):
    model, seen = copy.deepcopy(made), Seeing()
    model.add_hook(Q[0], seen)
    twin = copy.deepcopy(model)
    twin.reset_hooks()
    model(tokens)
    twin(tokens)
    assert seen.names == [Q[0]]
    assert torch.equal(twin.run_with_cache(tokens)[1][Q[0]], by_hand(model, lambda: model(tokens))[Q[0]][0])


# Compiled models


def test_a_model_that_was_traced_runs_eagerly_inside_contexts_and_refuses_hooks_that_stay():
    torch._dynamo.reset()
    model = Branches()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3)
    expected = compiled(x)
    root, seen = hook_root(compiled), Seeing()
    with root.hooks([("a", seen)]):
        root(x)
    assert seen.names == ["a"]
    assert torch.equal(root.run_with_cache(x)[1]["sum"], expected)
    for call in (
        lambda: root.add_hook("a", seen),
        root.add_caching_hooks,
        lambda: root.hooks([("a", seen)], reset_hooks_end=False).__enter__(),
    ):
        with pytest.raises(ContextError, match=r"traced by torch\.compile"):
            call()
    assert torch.equal(compiled(x), expected)
    assert seen.names == ["a"]
    torch._dynamo.reset()
