"""Canonical names in contexts: what is kept, edited and differentiated at each kind of place."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from model_state import state_of
from named_model import HEADS, LAYERS, Transformer, ids, places, table
from tdcache import (
    Ablation,
    ActivationCaching,
    CanonicalNameError,
    CompositeHookingContextFactory,
    DirectionError,
    EditError,
    NamedCache,
    NamedPlace,
    Names,
    SelectionError,
    SteeringVectors,
    UnfiredSiteWarning,
    cache_activations,
    select,
)
from tdcache.place_modules import PlaceModule


def captured(model, pattern=".*", **options):
    with ActivationCaching(pattern, names=table(model), **options).prepare(model) as hooked:
        logits = model(ids())
    return hooked.cache, logits


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_kept_at_names_is_what_plain_arithmetic_gives(shared):
    model = Transformer(shared=shared)
    before = state_of(model)
    cache, logits = captured(model)
    assert state_of(model) == before
    assert torch.equal(logits, model(ids()))
    assert isinstance(cache, NamedCache)
    assert next(iter(cache.keys())) == "embed"
    assert torch.equal(cache["resid_pre", 0], cache["embed"])
    for layer in range(LAYERS):
        mid = cache["resid_pre", layer] + cache["attn.contribution", layer]
        assert torch.equal(mid, cache["resid_mid", layer])
        assert torch.equal(mid + cache["mlp.contribution", layer], cache["resid_post", layer])
        if layer:
            assert torch.equal(cache["resid_post", layer - 1], cache["resid_pre", layer])
        out = model.blocks[0 if shared else layer].attn.out
        assert torch.equal(out(cache["attn.z", layer].flatten(-2)), cache["attn.contribution", layer])
        assert torch.allclose(cache["attn.pattern", layer].sum(-1), torch.ones(2, HEADS, 5))  # rounding of a softmax
        assert cache["attn.q", layer].shape == (2, HEADS, 5, 4)
    assert torch.equal(model.head(cache["final_norm"]), logits)


def test_the_gradient_of_a_name_is_that_of_the_value_there():
    model = Transformer()
    cache, logits = captured(model, hold="live")
    # The heads of z are a view, which the forward does not go on with.
    wanted = {name: value for name, value in cache.items() if not name.endswith("attn.z")}
    probe = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    by_hand = torch.autograd.grad((logits * probe).sum(), list(wanted.values()), retain_graph=True)
    with ActivationCaching(".*", names=table(model), directions=["bwd"], use_nested_keys=True).prepare(model) as hooked:
        (model(ids()) * probe).sum().backward()
    for name, expected in zip(wanted, by_hand, strict=True):
        assert torch.allclose(hooked.cache["bwd", name], expected, atol=1e-7), name  # order of summation
    post, pre = hooked.cache["bwd", "resid_post", 0], hooked.cache["bwd", "resid_pre", 1]
    assert torch.equal(post, pre)
    into_out = hooked.cache["bwd", "attn.contribution", 1] @ model.blocks[1].attn.out.weight
    assert torch.allclose(hooked.cache["bwd", "attn.z", 1].flatten(-2), into_out, atol=1e-7)


def test_groups_of_a_pattern_become_axes():
    model = Transformer()
    cache, _ = captured(model, r"blocks\.(?P<layer>\d+)\.attn\.pattern", stack_by="layer")
    assert {key: tuple(value.shape) for key, value in cache.items()} == {
        "blocks.*.attn.pattern": (LAYERS, 2, HEADS, 5, 5)
    }


def test_a_selector_may_be_a_sequence_a_class_or_a_predicate():
    model = Transformer()
    assert set(captured(model, ["embed", r"blocks\.1\.resid_.*"])[0].keys()) == {
        "embed", "blocks.1.resid_pre", "blocks.1.resid_mid", "blocks.1.resid_post",
    }  # fmt: skip
    assert set(captured(model, nn.Embedding)[0].keys()) == {"embed"}
    assert set(captured(model, lambda name, module: name.endswith("z"))[0].keys()) == {
        f"blocks.{layer}.attn.z" for layer in range(LAYERS)
    }
    assert set(captured(model, "final", match="prefix")[0].keys()) == {"final_norm"}


def test_positions_are_along_the_axis_that_a_name_has():
    model = Transformer()
    cache, _ = captured(model, r"blocks\.1\.(attn\.(q|z|pattern)|resid_mid)", positions=-1, mask_key=None)
    whole, _ = captured(model)
    assert torch.equal(cache["attn.q", 1], whole["attn.q", 1][:, :, -1])
    assert torch.equal(cache["attn.pattern", 1], whole["attn.pattern", 1][:, :, -1])
    assert torch.equal(cache["attn.z", 1], whole["attn.z", 1][:, -1])
    assert torch.equal(cache["resid_mid", 1], whole["resid_mid", 1][:, -1])


def test_an_edit_is_seen_by_captures_at_the_same_name_and_at_the_plain_path():
    model = Transformer()
    names = table(model)
    caching = ActivationCaching(r"blocks\.1\.(attn\.z|resid_mid)", names=names)
    plain = ActivationCaching(r"blocks\.1\.attn\.out", directions=["fwd_pre"])
    steering = SteeringVectors("blocks.1.resid_mid", torch.ones(8), names=names)
    ablation = Ablation("blocks.1.attn.z", heads=[1], names=names)
    with (
        caching.prepare(model) as kept,
        plain.prepare(model) as inputs,
        ablation.prepare(model),
        steering.prepare(model),
    ):
        edited = model(ids())
    z = kept.cache["attn.z", 1]
    assert torch.equal(z[:, :, 1], torch.zeros_like(z[:, :, 1]))
    assert torch.equal(z.flatten(-2), inputs.cache["blocks.1.attn.out"])
    with cache_activations(model, r"blocks\.1", directions=["fwd_pre"]) as given:
        model(ids())
    block, x = model.blocks[1], given["blocks.1"]
    mid = x + block.attn.out(z.flatten(-2)) + 1
    assert torch.allclose(kept.cache["resid_mid", 1], mid, atol=1e-6)  # the same sums in another order
    assert torch.equal(
        edited,
        model.head(
            model.norm(model.blocks[2](kept.cache["resid_mid", 1] + block.mlp(block.ln2(kept.cache["resid_mid", 1]))))
        ),
    )


def test_heads_positions_and_units_are_along_the_axes_of_the_name():
    model = Transformer()
    names = table(model)
    clean, _ = captured(model)
    ablation = Ablation("blocks.0.attn.pattern", heads=[0], positions=-1, names=names)
    with ActivationCaching(".*", names=names).prepare(model) as hooked, ablation.prepare(model):
        model(ids())
    pattern, before = hooked.cache["attn.pattern", 0], clean["attn.pattern", 0]
    assert torch.equal(pattern[:, 0, -1], torch.zeros(2, 5))
    assert torch.equal(pattern[:, 1], before[:, 1])
    assert torch.equal(pattern[:, 0, :-1], before[:, 0, :-1])
    ablation = Ablation("blocks.0.attn.z", heads=1, units=[2], names=names)
    with ActivationCaching(".*", names=names).prepare(model) as hooked, ablation.prepare(model):
        model(ids())
    z = hooked.cache["attn.z", 0]
    assert torch.equal(z[:, :, 1, 2], torch.zeros(2, 5))
    assert torch.equal(z[:, :, 0], clean["attn.z", 0][:, :, 0])
    with pytest.raises(
        EditError, match=r"'blocks.0.resid_mid' has no axis of heads \(batch, position, unit\), so heads="
    ):
        Ablation("blocks.0.resid_mid", heads=[1], names=names).prepare(model).open()
    with (
        pytest.raises(
            EditError, match=r"heads=\(3, ...\) is not the number of heads at 'blocks.0.attn.z', whose value has 2"
        ),
        Ablation("blocks.0.attn.z", heads=(3, [1]), names=names).prepare(model),
    ):
        model(ids())


def test_one_module_in_several_calls_is_edited_in_the_one_that_is_meant():
    model = Transformer(shared=True)
    names = table(model)
    clean, _ = captured(model)
    ablation = Ablation("blocks.1.mlp.contribution", names=names)
    with ActivationCaching(".*", names=names).prepare(model) as hooked, ablation.prepare(model):
        model(ids())
    assert torch.equal(hooked.cache["resid_post", 0], clean["resid_post", 0])
    assert torch.equal(hooked.cache["resid_post", 1], clean["resid_mid", 1])
    assert not torch.equal(hooked.cache["mlp.contribution", 2], torch.zeros(2, 5, 8))


def test_two_names_of_one_place_are_edited_once():
    model = Transformer()
    names = Names({"x": "blocks.0", "y": "blocks.0"}, model=model)
    with SteeringVectors(["x", "y"], torch.ones(8), names=names).prepare(model):
        once = model(ids())
    with SteeringVectors("blocks.0", torch.ones(8)).prepare(model):
        assert torch.equal(once, model(ids()))


def test_a_run_reads_and_sets_names():
    model = Transformer()
    clean, logits = captured(model)
    with ActivationCaching("embed", names=table(model)).prepare(model) as hooked:
        with hooked.run(ids()) as run:
            z = run.get("blocks.1.attn.z")
            run.set("blocks.2.mlp.contribution", run.get("blocks.0.mlp.contribution"))
            path = run.get("blocks.1.mlp.1")  # a path that is no name
        assert torch.equal(z.resolve(), clean["attn.z", 1])
        assert torch.equal(path.resolve(), clean["mlp.post", 1])
        assert not torch.equal(run.result, logits)
        with hooked.run(ids(), run_callback=lambda model, data: model(data).sum().backward()) as run:
            grads = [run.get(f"blocks.1.{role}", direction="bwd") for role in ("attn.z", "attn.q", "resid_pre")]
        assert [tuple(grad.resolve().shape) for grad in grads] == [(2, 5, HEADS, 4), (2, HEADS, 5, 4), (2, 5, 8)]
        with pytest.raises(CanonicalNameError, match=r"'blocks.0.attn.v' is refused for Transformer: it is not told"):
            hooked.get(hooked.cache, "blocks.0.attn.v")
        with pytest.raises(DirectionError, match="a canonical name is one value"):
            hooked.get(hooked.cache, "blocks.0.attn.z", direction="fwd_pre")


def test_a_verb_s_positions_and_units_are_along_the_axes_of_the_name():
    model = Transformer()
    clean, _ = captured(model)
    with ActivationCaching("embed", names=table(model)).prepare(model) as hooked:
        with hooked.run(ids()) as run:
            query = run.get("blocks.1.attn.q", positions=-1, units=[0])
            run.set("blocks.0.attn.pattern", torch.zeros(2, HEADS, 5), positions=2)
            pattern = run.get("blocks.0.attn.pattern")
            before = run.get("blocks.0.attn.q", positions=[0, 1])
        assert torch.equal(before.resolve(), clean["attn.q", 0][:, :, :2])
        assert query.resolve().shape == (2, HEADS, 1)
        assert not pattern.resolve()[:, :, 2].any()
        assert torch.equal(pattern.resolve()[:, :, 3], clean["attn.pattern", 0][:, :, 3])


def test_a_name_is_skipped_where_it_is_a_module():
    model = Transformer()
    clean, _ = captured(model)
    with ActivationCaching("embed", names=table(model)).prepare(model) as hooked:
        with hooked.run(ids()) as run:
            run.skip("blocks.2.mlp.contribution", lambda x: 0 * x)
            post = run.get("blocks.2.resid_post")
        assert torch.equal(post.resolve(), clean["resid_mid", 2])
        with (
            hooked.run(ids()) as run,
            pytest.raises(EditError, match=r"^'blocks.1.attn.z' is the input of blocks.1.attn.out"),
        ):
            run.skip("blocks.1.attn.z", lambda x: x)


def test_names_are_selected_and_printed_without_a_hook():
    model = Transformer()
    selection = select(model, r"blocks\.(?P<layer>\d)\.attn\.(z|q)", names=table(model))
    assert selection.paths[:2] == ("blocks.0.attn.q", "blocks.0.attn.z")
    assert selection[1].module is model.blocks[0].attn.out
    assert selection[1].groups["layer"] == "0"
    assert "blocks.2.attn.z  Linear" in repr(selection)


def test_what_a_pattern_cannot_mean_is_said():
    model = Transformer()
    names = table(model)
    with pytest.raises(
        CanonicalNameError, match=r"^pattern 'blocks.0.atn.z' matches none of the 30 names of Transformer"
    ):
        select(model, "blocks.0.atn.z", names=names)
    with pytest.raises(CanonicalNameError, match=r"^'blocks.0.attn.v' is refused for Transformer: it is not told"):
        select(model, ["embed", r"blocks\.\d\.attn\.v"], names=names)
    with pytest.raises(CanonicalNameError, match=r"^selector <class .* matches none of the 30 names .*; print"):
        select(model, nn.Conv2d, names=names)
    assert len(select(model, "nothing", names=names, allow_empty=True)) == 0
    for direction in ("fwd_pre", "grad_in"):
        with pytest.raises(DirectionError, match=f"'fwd' is that value and 'bwd' its gradient, got '{direction}'"):
            ActivationCaching("embed", directions=[direction], names=names)
    with pytest.raises(SelectionError, match=r"^names= is a table such as tdcache.names\(model\), got dict"):
        ActivationCaching("embed", names={})


def test_a_table_is_refused_for_another_model_and_taken_for_an_equal_one():
    model = Transformer()
    names = table(model)
    with pytest.raises(CanonicalNameError, match=r"^these names were made for Transformer, and this is Linear"):
        select(nn.Linear(1, 1), ".*", names=names)
    with pytest.raises(CanonicalNameError, match=r"this is another one: modules, shapes or numbers of heads"):
        select(Transformer(shared=True), ".*", names=names)
    twin = copy.deepcopy(model)
    for each in (names, pickle.loads(pickle.dumps(names))):
        with ActivationCaching(".*", names=each).prepare(twin) as hooked:
            twin(ids())
        assert torch.equal(hooked.cache["attn.z", 1], captured(model)[0]["attn.z", 1])
    assert len(select(model, "embed", names=Names({"embed": "embed"}))) == 1
    with pytest.raises(CanonicalNameError, match=r"^these names were made for other modules, and this is Transformer"):
        select(model, "embed", names=Names({"embed": "wte"}))


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args):
        return self.base(*args)


def test_wrappers_around_the_model_are_looked_through():
    model = Transformer()
    names = table(model)
    for wrapper in (Adapter(Adapter(model)), nn.DataParallel(model)):
        with ActivationCaching(r"blocks\.1\..*", names=names).prepare(wrapper) as hooked:
            wrapper(ids())
        assert torch.equal(hooked.cache["attn.z", 1], captured(model)[0]["attn.z", 1])


def test_a_composite_keeps_names_beside_paths():
    model = Transformer()
    names = table(model)
    both = CompositeHookingContextFactory(
        ActivationCaching("blocks.1.attn.z", names=names),
        ActivationCaching(r"blocks\.1\.attn\.out"),
        Ablation("blocks.0.attn.z", names=names),
    )
    with both.prepare(model) as hooked:
        model(ids())
        with hooked.run(ids()) as run:
            z = run.get("blocks.0.attn.z")
    assert set(hooked.cache.keys()) == {"blocks.1.attn.z", "blocks.1.attn.out"}
    assert hooked.cache["attn.z", 1].shape == (2, 5, HEADS, 4)
    assert torch.equal(z.resolve(), torch.zeros(2, 5, HEADS, 4))


def test_stop_early_stops_after_the_last_name():
    model = Transformer()
    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    with ActivationCaching([r"blocks\.1\.attn\.z", "blocks.1.resid_mid"], names=table(model), stop_early=True).prepare(
        model
    ) as hooked:
        assert hooked(ids()) is None
    assert hooked.cache["resid_mid", 1].shape == (2, 5, 8)
    assert ran == []


def test_callbacks_and_reducers_see_the_value_of_a_name():
    model = Transformer()
    shown = []

    def callback(*, module, args, output, key, direction):
        shown.append((key, tuple(output.shape)))
        return output.mean(1)

    cache, _ = captured(model, r"blocks\.0\.(attn\.z|resid_pre|resid_post)", callback=callback)
    assert sorted(shown) == [
        ("blocks.0.attn.z", (2, 5, HEADS, 4)), ("blocks.0.resid_post", (2, 5, 8)), ("blocks.0.resid_pre", (2, 5, 8)),
    ]  # fmt: skip
    assert cache["attn.z", 0].shape == (2, HEADS, 4)


def test_a_place_module_keeps_no_model_alive_and_says_what_it_is():
    model = Transformer()
    names = table(model)
    with ActivationCaching("blocks.0.attn.z", names=names).prepare(model) as hooked:
        _, place_module = hooked.find_site("blocks.0.attn.z")
        assert isinstance(place_module, PlaceModule)
        assert repr(place_module) == "PlaceModule(input of blocks.0.attn.out)"
    gone = weakref.ref(model)
    del model, hooked
    gc.collect()
    assert gone() is None
    with pytest.raises(SelectionError, match=r"^the model of the place 'blocks.0.attn.z' is gone"):
        _ = place_module.target


def test_an_axis_that_does_not_hold_the_heads_is_named():
    model = Transformer()
    names = Names({"z": NamedPlace(path="blocks.0.attn.out", side="fwd_pre", heads=(3, 2))}, model=model)
    with (
        ActivationCaching("z", names=names).prepare(model),
        pytest.raises(EditError, match=r"'z' has 3 heads"),
    ):
        model(ids())


def test_another_layout_is_a_view_that_is_read_and_written():
    model = Transformer()
    positions_first = NamedPlace(
        path="blocks.0.attn::q", order=(0, 2, 1, 3), axes=("batch", "position", "head", "unit")
    )
    units_first = NamedPlace(
        path="blocks.0.attn.out",
        side="fwd_pre",
        heads=(HEADS, -1),
        order=(3, 0, 2, 1),
        axes=("unit", "batch", "head", "position"),
    )
    names = Names({**places(), "hook_q": positions_first, "hook_z": units_first}, model=model)
    with ActivationCaching([".*q", ".*z"], names=names, directions=["fwd", "bwd"]).prepare(model) as hooked:
        model(ids()).square().sum().backward()
    for direction in ("fwd", "bwd"):
        q, z = (hooked.cache[direction, f"blocks.0.attn.{role}"] for role in "qz")
        assert torch.equal(hooked.cache[direction, "hook_q"], q.transpose(1, 2))
        assert torch.equal(hooked.cache[direction, "hook_z"], z.permute(3, 0, 2, 1))
    with Ablation("hook_z", heads=[1], names=names).prepare(model):
        viewed = model(ids())
    with Ablation("blocks.0.attn.z", heads=[1], names=names).prepare(model):
        assert torch.equal(viewed, model(ids()))


def test_names_that_saw_nothing_are_reported_with_their_places():
    model = Transformer()
    names = Names(
        {"unused": NamedPlace(path="blocks.2.attn.out", side="fwd_pre"), "no": "blocks.0::softmax"}, model=model
    )
    model.blocks[2].forward = lambda x: x
    with (
        pytest.warns(UnfiredSiteWarning, match=r"'unused', 'no', which are 'input of blocks.2.attn.out'"),
        ActivationCaching(".*", names=names).prepare(model),
    ):
        model(ids())
