"""Collections and the ready trees: names, paths, binding through the tree, copies, reprs."""

import pickle
from copy import deepcopy

import pytest
import torch

from pipeline.written_out import Save, Written
from tdcache.errors import HookSignatureError, PathError
from tdcache.pipeline import (
    AtLayers,
    AttentionHooks,
    AutoencoderHooks,
    FwdBwdHooks,
    HookCollection,
    Hooks,
    MLPHooks,
    NormalizationHooks,
    ResidualStreamHooks,
    ResidualStreamTorsoHooks,
    TransformerHooks,
)

PLACES = {
    "mlp": ["pre_act", "post_act"],
    "attn": ["q", "k", "v", "qk_logits", "qk_softmax_denominator", "qk_probs", "v_out"],
    "resid": [
        "post_emb",
        "torso.post_ln_attn",
        *(f"torso.ln_attn.{part}" for part in ("post_mean_subtraction", "scale", "post_scale")),
        *("torso.delta_attn", "torso.post_attn"),
        *(f"torso.ln_mlp.{part}" for part in ("post_mean_subtraction", "scale", "post_scale")),
        *("torso.post_ln_mlp", "torso.delta_mlp", "torso.post_mlp"),
        *(f"ln_f.{part}" for part in ("post_mean_subtraction", "scale", "post_scale")),
        "post_ln_f",
    ],
}
TREE = [f"{group}.{place}" for group, places in PLACES.items() for place in places] + ["logits"]


def plus(x, amount):
    return x + amount


@pytest.fixture
def model():
    return Written()


@pytest.fixture
def ids():
    return torch.randint(11, (2, 5))


def test_the_transformer_tree_has_its_places_with_three_sequences_each():
    assert list(TransformerHooks().paths()) == [f"{place}.{part}" for place in TREE for part in ("fwd", "bwd", "fwd2")]


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        (MLPHooks, 2),
        (AttentionHooks, 7),
        (NormalizationHooks, 3),
        (ResidualStreamTorsoHooks, 12),
        (ResidualStreamHooks, 17),
    ],
)
def test_the_parts_of_the_tree_stand_on_their_own(kind, places):
    assert len(kind().paths()) == 3 * places
    assert kind().is_empty()


def test_every_place_of_the_tree_is_called_by_a_forward_that_is_written_so(model, ids):
    called = {}
    hooks = TransformerHooks()
    for place in TREE:
        hooks.append_to_path(f"{place}.fwd", called.setdefault(place, Save()))
    model(ids, hooks)
    assert [place for place, save in called.items() if not save.seen] == []


def test_hooks_that_only_look_change_nothing(model, ids):
    want = model(ids)
    assert torch.equal(model(ids, TransformerHooks().append_all(Save())), want)


def test_forward_values_come_in_the_order_of_the_layers_and_gradients_in_reverse(model, ids):
    forward, backward = Save(), Save()
    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(forward).append_bwd(backward)
    model(ids, hooks).sum().backward()
    assert list(forward.seen) == [0, 1, 2]
    assert list(backward.seen) == [2, 1, 0]
    assert forward.seen[0].shape == backward.seen[0].shape == (2, 5, 12)


def test_append_all_appends_once_at_each_place():
    hooks = TransformerHooks().append_all(plus)
    assert [path for path in hooks.paths() if len(hooks.at(path))] == [f"{place}.fwd" for place in TREE]
    assert {len(hooks.at(f"{place}.fwd")) for place in TREE} == {1}
    hooks.append_all(plus, part="bwd")
    assert {len(hooks.at(f"{place}.bwd")) for place in TREE} == {1}


def test_append_all_reaches_bare_sequences_once_also_one_of_two_names():
    shared = Hooks()
    collection = HookCollection().add_subhooks("one", shared).add_subhooks("two", shared)
    collection.append_all(lambda x: x + 1)
    assert collection.two(0) == 1


def test_append_all_refuses_an_unknown_part():
    with pytest.raises(ValueError, match="part is one of 'fwd', 'bwd', 'fwd2', got 'forward'"):
        MLPHooks().append_all(plus, part="forward")


def test_an_attribute_error_in_a_hook_of_the_user_is_seen():
    def broken(x):
        return x.no_such_attribute

    hooks = TransformerHooks().append_all(broken)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'no_such_attribute'"):
        hooks.mlp.post_act(1)


def test_append_to_path_and_at():
    hooks = TransformerHooks().append_to_path("resid.torso.post_mlp.fwd", lambda x: x + 1)
    assert hooks.resid.torso.post_mlp(1) == 2
    assert hooks.at("resid.torso") is hooks.resid.torso
    assert not hooks.is_empty()
    assert hooks.attn.is_empty()


def test_a_wrong_path_names_the_nearest():
    with pytest.raises(
        PathError, match=r"'mlp\.post_akt\.fwd' names no hooks.*did you mean 'mlp\.post_act\.fwd'"
    ) as failure:
        TransformerHooks().append_to_path("mlp.post_akt.fwd", plus)
    assert failure.value.near[0] == "mlp.post_act.fwd"
    with pytest.raises(PathError, match=r"names no hooks of MLPHooks; there are 'pre_act\.fwd'"):
        MLPHooks().at("something.quite.different")
    with pytest.raises(PathError, match="names no hooks"):
        MLPHooks().at("pre_act.fwd.more")


def test_a_path_to_a_place_says_which_sequences_it_has():
    with pytest.raises(
        PathError, match=r"'mlp\.post_act' is a FwdBwdHooks; append to one of 'mlp\.post_act\.fwd', 'mlp\.p"
    ):
        TransformerHooks().append_to_path("mlp.post_act", plus)


def test_a_child_that_is_not_there_is_an_attribute_error_with_the_children():
    with pytest.raises(AttributeError, match="MLPHooks has no 'post'; its children are 'pre_act', 'post_act'"):
        MLPHooks().post  # noqa: B018
    assert not hasattr(MLPHooks(), "post")
    assert "pre_act" in dir(MLPHooks())


def test_children_need_a_free_name_and_must_be_hooks():
    collection = HookCollection().add_subhooks("one", Hooks())
    for name in ("one", "bind", "all_hooks", "a.b", "_private", ""):
        with pytest.raises(ValueError, match=f"{name!r} cannot name a child of HookCollection"):
            collection.add_subhooks(name, Hooks())
    with pytest.raises(ValueError, match="child 'two' must be Hooks or a HookCollection"):
        collection.add_subhooks("two", lambda x: x)


def test_names_that_are_no_identifiers_are_reached_by_path_and_by_all_hooks():
    layers = HookCollection()
    for name in (0, "1", "layer-2"):
        layers.add_subhooks(name, FwdBwdHooks())
    layers.append_to_path("1.fwd", lambda x: 2 * x).append_to_path("layer-2.fwd", lambda x: x + 3)
    assert list(layers.all_hooks) == ["0", "1", "layer-2"]
    assert [hooks(1) for hooks in layers.all_hooks.values()] == [1, 2, 4]
    assert layers.at("0") is layers.all_hooks["0"]
    assert layers.paths()[:3] == ("0.fwd", "0.bwd", "0.fwd2")
    assert list(deepcopy(layers).all_hooks) == list(layers.all_hooks)
    with pytest.raises(ValueError, match=r"'1' cannot name a child of HookCollection: it is in use"):
        layers.add_subhooks(1, Hooks())


def test_all_hooks_is_the_tree_as_it_is_and_cannot_be_written_to():
    hooks = TransformerHooks()
    assert hooks.all_hooks["mlp"].all_hooks["post_act"].all_hooks["fwd"] is hooks.mlp.post_act.fwd
    with pytest.raises(TypeError, match="does not support item assignment"):
        hooks.all_hooks["other"] = Hooks()


def test_binding_reaches_every_sequence_and_unbinding_takes_it_back():
    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", plus).bind(amount=3)
    assert hooks.mlp.post_act(1) == 4
    assert hooks.mlp.post_act.fwd.bound == {"amount": 3}
    hooks.unbind(["amount"])
    assert hooks.mlp.post_act.fwd.bound == {}


def test_a_key_bound_at_two_levels_is_no_error_and_the_nearer_counts_in_either_order():
    inside_first, outside_first = TransformerHooks().append_all(plus), TransformerHooks().append_all(plus)
    inside_first.mlp.bind(amount=1)
    inside_first.bind(amount=10)
    outside_first.bind(amount=10)
    outside_first.mlp.bind(amount=1)
    for hooks in (inside_first, outside_first):
        assert (hooks.mlp.post_act(0), hooks.attn.q(0)) == (1, 10)
        hooks.mlp.unbind("amount")
        assert (hooks.mlp.post_act(0), hooks.attn.q(0)) == (10, 10)
        with pytest.raises(ValueError, match="'amount' is bound further up"):
            hooks.mlp.unbind("amount")


def test_an_autoencoder_with_a_layer_of_its_own_in_a_tree_with_a_layer_is_no_error():
    layers = []
    inner = AutoencoderHooks(lambda x: x, lambda z: z).bind(layer=7)
    inner.latents.append_fwd(lambda z, layer: layers.append(layer))
    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", inner).bind(layer=0)
    hooks.mlp.post_act(torch.ones(2))
    assert layers == [7]


def test_a_child_that_is_added_late_takes_over_what_is_bound():
    hooks = HookCollection().bind(amount=2).add_subhooks("late", Hooks(plus))
    assert hooks.late(1) == 3


def test_copies_per_layer_are_bound_apart_and_share_encode_and_decode(model, ids):
    save = Save()
    pair = AutoencoderHooks(lambda x: x @ torch.ones(12, 4), lambda z: z @ torch.ones(4, 12))
    pair.latents.append_fwd(save)
    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", AtLayers([0, 2], pair))
    first, second = deepcopy(hooks).bind(layer=0), deepcopy(hooks).bind(layer=1)
    one, other = (each.mlp.post_act.fwd[0][0] for each in (first, second))
    assert one is not other
    assert one.encode is other.encode is pair.encode
    assert one.decode is other.decode is pair.decode
    model(ids, hooks)
    assert list(save.seen) == [0, 2]
    assert hooks.bound == {}


def test_a_place_runs_fwd_then_fwd2_and_is_a_hook():
    place = FwdBwdHooks().append_fwd2(lambda x: x * 10).append_fwd(lambda x: x + 1)
    assert place(1) == 20
    assert Hooks(place)(1) == 20


def test_a_tree_is_no_hook_itself():
    with pytest.raises(HookSignatureError, match="a hook is a callable"):
        Hooks(MLPHooks())


def test_trees_can_be_pickled():
    hooks = pickle.loads(pickle.dumps(TransformerHooks().append_all(plus).bind(amount=2)))
    assert hooks.attn.v_out(1) == 3


def test_reprs_show_the_places_that_hold_hooks():
    assert repr(MLPHooks()) == "MLPHooks()"
    pair = AutoencoderHooks(torch.relu, torch.neg, add_error=True)
    pair.latents.append_bwd(Save())
    hooks = (
        TransformerHooks()
        .append_to_path("mlp.post_act.fwd", AtLayers([3, 4], pair))
        .append_to_path("logits.fwd2", plus)
    )
    hooks.mlp.bind(kind="mlp")
    assert repr(hooks.bind(layer=3)) == (
        "TransformerHooks() [layer=3]\n"
        "    mlp.post_act.fwd\n"
        "        AtLayers(3, 4)\n"
        "            AutoencoderHooks(encode=relu, decode=neg, add_error=True)\n"
        "                latents.bwd\n"
        "                    Save()\n"
        "    logits.fwd2\n"
        "        plus"
    )
    assert repr(hooks.mlp).startswith("MLPHooks() [kind='mlp']\n    post_act.fwd\n        AtLayers(3, 4)")
