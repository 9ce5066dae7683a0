"""``tdcache.names``: whose names, in which spelling, checked or not, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import tdcache
from model_state import state_of
from named_model import LAYERS, Transformer, ids
from tdcache import ActivationCaching, CanonicalNameError, HookedModule, NamedPlace, PathError, SelectionError
from tdcache.naming import front
from tiny_transformers import bert, gpt2, llama

MAPPING = {
    "embed": "embed",
    "blocks.{i}.resid_pre": NamedPlace(path="blocks.{i}", side="fwd_pre"),
    "blocks.{i}.resid_mid": "blocks.{i}::add",
    "blocks.{i}.resid_post": "blocks.{i}",
    "blocks.{i}.attn.contribution": "blocks.{i}.attn",
    "blocks.{i}.mlp.contribution": "blocks.{i}.mlp",
    "final_norm": "norm",
    "unembed": "head",
}


@pytest.fixture(scope="module")
def own():
    model = Transformer()
    return model, tdcache.names(model, ids())


def test_a_model_without_a_config_gets_its_names_from_its_data_flow(own):
    model, table = own
    assert table.model is model
    assert table["blocks.2.attn.contribution"].where == "blocks.2.attn"
    assert table["blocks.0.resid_mid"].where == "blocks.0::add"
    assert table["unembed"].path == "head"
    assert {"resid_pre + attn.contribution + mlp.contribution == resid_post", "pattern @ v == z"} <= {
        each.identity for each in table.proof.identities
    }
    assert table.streams[""].blocks == LAYERS


def test_the_model_is_left_as_it_was():
    model = Transformer()
    before, state = state_of(model), torch.random.get_rng_state()
    tdcache.names(model, ids())
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrappers_are_looked_into(own):
    model, table = own
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager"), HookedModule.from_module(model)):
        found = tdcache.names(wrapper, ids())
        assert found.model is model
        assert found == table
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(tdcache.TdcacheWarning, match="runs eagerly"):
        hooked = ActivationCaching("blocks.1.attn.z", names=table).prepare(compiled).open()
    compiled(ids())
    assert hooked.cache["attn.z", 1].shape == (2, 2, 5, 4)
    hooked.restore()


class LowRank(nn.Module):
    """As an adapter library wraps one projection."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(8, 1, bias=False), nn.Linear(1, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapted_model_has_the_names_of_its_own_tree():
    model = Transformer()
    model.blocks[1].attn.out = LowRank(model.blocks[1].attn.out)
    table = tdcache.names(model, ids())
    assert table["blocks.1.attn.contribution"].where == "blocks.1.attn"
    wrapper = nn.Sequential(model)
    assert tdcache.names(wrapper, ids())["blocks.1.attn.contribution"].where == "0.blocks.1.attn"
    with pytest.raises(CanonicalNameError, match="this is another one: modules, shapes or numbers of heads differ"):
        tdcache.select(Transformer(), "embed", names=table)


def test_what_is_to_be_skipped_is_not_checked(own):
    model, _ = own
    table = tdcache.names(model, ids(), prove=r"blocks\.0\.attn\.(q|k)")
    assert table.proof.skipped == ("blocks.0.attn.q", "blocks.0.attn.k")
    assert "blocks.0.attn.q" in table
    assert tdcache.names(model, ids(), prove=["blocks.0.attn.q"]).proof.skipped == ("blocks.0.attn.q",)
    unproved = tdcache.names(model, ids(), prove=False)
    assert unproved.proof is None
    assert dict(unproved) == dict(tdcache.names(model, ids()))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(
        CanonicalNameError, match=r"^Sequential has no blocks: .*; give the names yourself, as mapping="
    ):
        tdcache.names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(3, 2))


def test_tied_embeddings_are_two_places():
    model, _ = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    table = tdcache.names(model)
    assert (table["embed"].path, table["unembed"].path) == ("transformer.wte", "lm_head")


def test_names_of_ones_own_are_checked_in_the_same_way(own):
    model, _found = own
    table = tdcache.names(model, ids(), mapping=MAPPING)
    assert len(table) == 3 + 5 * LAYERS
    assert not table.refused
    assert table.streams[""].final_norm == "norm"
    identities = {each.identity for each in table.proof.identities}
    assert {"resid_pre + attn.contribution == resid_mid", "final_norm == norm(last resid_post)"} <= identities
    lies = {**MAPPING, "blocks.{i}.mlp.contribution": "blocks.{i}.mlp.0", "blocks.0.ln1": "blocks.1.ln1"}
    table = tdcache.names(model, ids(), mapping=lies)
    assert "its shape (2, 5, 16) is not the stream's" in table.refused["blocks.1.mlp.contribution"]
    assert "off by" in table.refused["blocks.0.ln1"]
    assert "blocks.0.attn.contribution" in table
    unproved = tdcache.names(model, ids(), mapping=lies, prove=False)
    assert unproved["blocks.0.ln1"].axes == ("batch", "position", "unit")


def test_a_mapping_that_fits_no_module_is_refused(own):
    model, _ = own
    with pytest.raises(PathError, match=r"path 'hed' names none of .* did you mean 'head'"):
        tdcache.names(model, ids(), mapping={"unembed": "hed"})
    with pytest.raises(
        CanonicalNameError, match=r"^'blocks.{i}.resid_post' speaks of every block, .* has no module 'layers.0'"
    ):
        tdcache.names(model, ids(), mapping={"blocks.{i}.resid_post": "layers.{i}"})


def test_a_mapping_may_name_a_model_whose_blocks_nothing_finds():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    table = tdcache.names(model, torch.ones(3, 2), mapping={"blocks.0.resid_post": "1"}, prove=False)
    assert (table["blocks.0.resid_post"].path, table.streams[""].blocks) == ("1", 1)


def test_what_is_no_model_and_what_is_no_place_is_refused(own):
    with pytest.raises(CanonicalNameError, match=r"^names\(\) takes an nn.Module, got int"):
        tdcache.names(3)
    with pytest.raises(SelectionError, match=r"^'embed' stands for 3 \(int\); a name stands for a path"):
        tdcache.names(own[0], mapping={"embed": 3})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_copy_takes_the_names_of_its_original(own):
    model, table = own
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(CanonicalNameError, match="this is another one"):
        tdcache.select(quantised, ".*", names=table)
    names = tdcache.names(quantised, ids(), mapping=table, prove=False)
    assert list(names) == list(table)
    with ActivationCaching(".*", names=names).prepare(quantised) as hooked, torch.no_grad():
        quantised(ids())
    cache = hooked.cache
    assert torch.equal(cache["resid_pre", 1] + cache["attn.contribution", 1], cache["resid_mid", 1])
    assert cache["attn.z", 1].shape == (2, 2, 5, 4)


def test_an_unknown_style_is_refused(own):
    with pytest.raises(
        CanonicalNameError, match=r"^there is no style 'nnsight'; the styles are 'transformer_lens', or None"
    ):
        tdcache.names(own[0], style="nnsight")


def test_transformer_lens_names_have_its_layouts():
    model, _ = gpt2()
    table = tdcache.names(model, style="transformer_lens")
    assert table.style == "transformer_lens"
    tokens = torch.tensor([[2, 3, 4]])
    with ActivationCaching(r"blocks\.(?P<layer>\d+)\.attn\.hook_(q|pattern|z)", names=table).prepare(model) as hooked:
        model(tokens)
    assert hooked.cache["blocks.0.attn.hook_q"].shape == (1, 3, 2, 4)
    assert hooked.cache["pattern", 1].shape == (1, 2, 3, 3)
    pattern, z = hooked.cache["pattern", 1], hooked.cache["z", 1, "attn"]
    with ActivationCaching("blocks.1.attn.v", names=tdcache.names(model)).prepare(model) as values:
        model(tokens)
    mixed = pattern @ values.cache["attn.v", 1]
    assert torch.allclose(mixed.transpose(1, 2), z, atol=1e-6)  # the same sums, by another kernel
    assert {"hook_embed", "hook_pos_embed", "blocks.1.hook_resid_mid", "ln_final.hook_normalized"} <= set(table)
    with pytest.raises(CanonicalNameError, match="refused for GPT2LMHeadModel: a norm computes its scale inside"):
        table["blocks.0.ln1.hook_scale"]
    assert table.spelled("blocks.0.attn.z") == "blocks.0.attn.hook_z"
    assert table.in_blocks("resid_post") == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def test_transformer_lens_q_is_the_projection_and_rot_q_what_is_multiplied():
    model, _ = llama()
    table = tdcache.names(model, style="transformer_lens")
    tokens = torch.tensor([[2, 3, 4]])
    with ActivationCaching(r"blocks\.0\.attn\.hook_(rot_)?[qk]", names=table).prepare(model) as hooked:
        model(tokens)
    cache = hooked.cache
    for role, heads in (("q", 4), ("k", 2)):
        plain, turned = cache[f"blocks.0.attn.hook_{role}"], cache[f"blocks.0.attn.hook_rot_{role}"]
        assert plain.shape == turned.shape == (1, 3, heads, 2)
        assert torch.equal(plain[:, 0], turned[:, 0])  # the first position is not rotated
        assert torch.allclose(plain.norm(dim=-1), turned.norm(dim=-1), atol=1e-6)  # a rotation, rounded
        assert not torch.allclose(plain[:, 1:], turned[:, 1:])


def test_bert_s_contributions_are_said_to_be_normed_with_the_stream():
    model, _ = bert()
    table = tdcache.names(model)
    assert table.streams[""].layouts == ("post-norm", "post-norm")
    assert "N(stream + contribution)" in table["blocks.0.attn.contribution"].note


def test_a_table_serves_copies_of_its_model(own):
    model, table = own
    twin = copy.deepcopy(model).double()
    with ActivationCaching("blocks.0.attn.z", names=table).prepare(twin) as hooked:
        twin(ids())
    assert hooked.cache["attn.z", 0].dtype == torch.float64


def test_a_table_is_made_once_for_a_class_and_configuration(own, monkeypatch):
    _, table = own
    forwards = []
    monkeypatch.setattr(front, "in_best_dtype", lambda *args: forwards.append(args) or table)
    second = Transformer()
    found = tdcache.names(second, ids())
    assert not forwards
    assert found == table
    assert found.model is second
    assert found.proof is table.proof
    tdcache.names(second, ids()[:, :3])  # another shape may have other axes
    assert len(forwards) == 1
    second.blocks[0].scale = 2.0  # a setting that the class's code may read
    tdcache.names(second, ids())
    assert len(forwards) == 2
    third = Transformer()
    nn.init.zeros_(third.blocks[0].attn.out.weight)  # through which nothing is seen
    tdcache.names(third, ids())
    assert len(forwards) == 3
