"""Tests of canonical names in some of the families that ``tests/names_zoo.py`` goes over."""

import pytest
import torch
from torch import nn

import families
import names_zoo
import tdcache
from naming.planted import lies
from tdcache import Ablation, ActivationCaching
from tdcache.errors import CanonicalNameError
from tdcache.named_places import NamedPlace, Names
from tdcache.naming import proved, resolve

pytest.importorskip("transformers")

WHOLE = {
    "bert": "post-norm",
    "bloom": "pre-norm",
    "clip": "pre-norm",
    "distilbert": "post-norm",
    "doge": "mixed",
    "falcon": "parallel",
    "gemma2": "sandwich",
    "gpt_oss": "pre-norm",
    "gptj": "parallel",
    "granite": "pre-norm",
    "mixtral": "pre-norm",
    "opt": "pre-norm",
    "swin": "pre-norm",
    "t5": "pre-norm",
    "wav2vec2-conformer": "mixed, mixer",
    "whisper": "pre-norm",
    "xlm": "post-norm",
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", WHOLE)
def test_all_blocks_of_a_family_are_proved(family):
    row, table = names_zoo.look(family)
    assert row.whole
    assert row.layouts == WHOLE[family]
    proof = {name for each in table.proof.identities for name in each.names}
    assert set(table) == proof
    for prefix, stream in table.streams.items():
        head = f"{prefix}blocks.{stream.blocks - 1}."
        assert {f"{head}{role}" for role in ("attn.contribution", "attn.pattern", "mlp.contribution")} <= set(table)


@pytest.mark.filterwarnings("default")
def test_heads_that_a_model_holds_with_its_rows_have_an_axis_of_their_own():
    model, tokens = families.build("bloom"), torch.tensor([[3, 4, 5], [6, 7, 8], [9, 3, 4]])
    table = tdcache.names(model)
    assert table["blocks.1.attn.k"].axes == ("batch", "head", "key", "unit")
    with ActivationCaching(r"blocks\.1\.attn\.(q|v|z|pattern)", names=table).prepare(model) as hooked:
        plain = model(tokens).logits
    cache = hooked.cache
    assert cache["attn.q", 1].shape == (3, 4, 3, 8)
    torch.testing.assert_close(cache["attn.pattern", 1] @ cache["attn.v", 1], cache["attn.z", 1])
    cut = Ablation("blocks.1.attn.z", heads=[2], positions=-1, names=table)
    with cut.prepare(model) as hooked, hooked.run(tokens) as run:
        ablated, logits = run.get("blocks.1.attn.z"), run.get("lm_head")
    wanted = cache["attn.z", 1].clone()
    wanted[:, 2, -1] = 0
    assert torch.equal(ablated.resolve(), wanted)
    assert not torch.equal(logits.resolve(), plain)
    spelled = tdcache.names(model, style="transformer_lens")
    with ActivationCaching("blocks.1.attn.hook_z", names=spelled).prepare(model) as hooked:
        model(tokens)
    assert torch.equal(hooked.cache["z", 1], cache["attn.z", 1].transpose(1, 2))


@pytest.mark.filterwarnings("default")
def test_what_a_module_returns_and_what_it_adds_are_two_names():
    def places(family):
        table = resolve(families.build(family))
        return [table[f"blocks.1.attn.{part}"].path for part in ("out", "contribution")]

    layer = "model.layers.1"
    assert places("gemma2") == [f"{layer}.self_attn", f"{layer}.post_attention_layernorm"]
    assert places("granite") == [f"{layer}.self_attn", f"{layer}::mul"]
    assert places("bloom") == ["transformer.h.1.self_attention.dense"] * 2  # the module's own output holds the residual


@pytest.mark.filterwarnings("default")
def test_nothing_is_guessed():
    table = resolve(families.build("gptj"))
    reason = table.refused["blocks.1.resid_mid"]
    assert reason == (
        "attention and MLP read the same stream, nothing lies between; nearest: blocks.1.resid_pre, blocks.1.resid_post"
    )
    experts = resolve(families.build("mixtral"))
    assert experts.refused["blocks.0.mlp.pre"] == (
        "its experts have one each; nearest: blocks.0.mlp.router and blocks.0.mlp.out"
    )
    assert experts["blocks.0.mlp.router"].axes[-1] == "expert"


@pytest.mark.filterwarnings("default")
def test_prefixes_are_those_of_what_runs():
    assert set(resolve(families.build("t5")).streams) == {"encoder.", "decoder."}
    assert set(resolve(families.build("clip")).streams) == {"", "vision."}
    assert set(resolve(families.build("swin")).streams) == {"vision.stages.0.", "vision.stages.1."}
    assert "decoder.blocks.1.cross_attn.pattern" in resolve(families.build("whisper"))


@pytest.mark.filterwarnings("default")
def test_the_logits_are_scaled_and_capped_as_the_model_does():
    stream = resolve(families.build("gemma2")).stream()
    assert (stream.final_norm, stream.unembed, stream.logit_softcap) == ("model.norm", "lm_head", 30.0)
    assert resolve(families.build("granite")).stream().logit_scale == 0.5
    decoder = resolve(families.build("t5")).stream("decoder.")
    assert decoder.logit_scale == pytest.approx(32**-0.5)  # d_model = 32: applied before the unembedding


def test_torchs_own_encoder_has_no_places_inside_its_fused_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    table = proved(model, resolve(model))
    assert table["blocks.1.attn.contribution"].path == "layers.1.self_attn"
    assert table["blocks.1.mlp.pre"].path == "layers.1.linear1"
    assert table.refused["blocks.1.attn.pattern"] == (
        "torch's fused attention shows no value inside; nearest: blocks.1.attn.out"
    )
    assert model.training


def test_a_model_without_blocks_is_refused_by_name():
    with pytest.raises(
        CanonicalNameError, match=r"^Sequential has no blocks: no list of modules whose members run one"
    ):
        resolve(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(CanonicalNameError, match=r"^nothing says what Identity takes: .*; pass inputs="):
        resolve(nn.Identity())


class Stack(nn.Module):
    """Blocks that add what one layer makes of them; the layer reads nothing else."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Plain(change) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Plain(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.change = change

    def forward(self, x):
        return self.change(x, self.down(self.up(self.norm(x)).relu()))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda x, c: x + c, "blocks.1.down"),
        (lambda x, c: c.add_(x), "blocks.1.down"),
        (lambda x, c: x + 0.5 * c, "blocks.1::mul"),
        (lambda x, c: x.clone().add_(c.view(2, -1).view_as(c)), "blocks.1.down"),
    ],
)
def test_however_a_block_adds_its_term_is_found(change, place):
    model = Stack(change)
    table = proved(model, resolve(model, torch.randn(2, 5, 4)))
    assert table["blocks.1.mlp.contribution"].path == place
    assert table["blocks.1.mlp.post"].where == "input of blocks.1.down"


def test_a_stream_that_is_scaled_between_its_sums_is_followed():
    model = Stack(lambda x, c: 0.5 * (x + c))
    table = proved(model, resolve(model, torch.randn(2, 5, 4)))
    assert table.stream().layouts == ("mixed", "mixed")
    assert [(each.kind, each.factor) for each in table.stream().changes[1]] == [("add", 1.0), ("scale", 0.5)]
    assert "0.5 * (resid_pre + mlp.contribution) == resid_post" in str(table.proof)


def plain(x, c):
    return x + c


def rounded_stream(x, c):
    return x.float() + c


def rounded_sum(x, c):
    return (x + c).float().to(x.dtype)


@pytest.mark.parametrize(
    ("change", "rounds", "refused"), [(plain, False, True), (rounded_stream, True, True), (rounded_sum, True, False)]
)
def test_a_sum_may_be_off_by_what_float32_gives_only_where_the_model_rounds_to_it(change, rounds, refused):
    model, inputs = Stack(change), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    table = proved(model, resolve(model, inputs))
    total = next(
        each for each in table.proof.identities if each.identity == "resid_pre + mlp.contribution == resid_post"
    )
    assert (1e-9 < total.error < 1e-6) is rounds  # rounding to float32 is 6e-8 of a number
    assert total.tolerance == (3e-6 if rounds else 1e-9)
    off = [lie for lie in lies(model, table) if lie.kind == "a_ten_millionth"]
    assert [lie.names for lie in off] == [("blocks.1.mlp.contribution",)]
    assert ("blocks.1.mlp.contribution" in proved(off[0].model, off[0].table).refused) is refused


def test_a_class_that_is_defined_anew_is_proved_anew():
    found = []
    for forward in (lambda self, x: x + self.inner(x), lambda self, x: x + 2 * self.inner(x)):
        kind = type("Doubling", (nn.Module,), {"forward": forward, "__module__": "__main__"})
        blocks = []
        for _ in range(2):
            block = kind()
            block.inner = nn.Linear(4, 4)
            blocks.append(block)
        model = nn.Sequential(*blocks)
        streams = resolve(model, torch.randn(2, 5, 4)).streams
        places = {f"blocks.{at}.{role}": path for at in (0, 1) for role, path in places_of_doubling(at)}
        found.append(proved(model, Names(places, streams=streams), torch.randn(2, 5, 4)))
    assert "blocks.0.mlp.contribution" in found[0]
    assert "blocks.0.mlp.contribution" in found[1].refused


def places_of_doubling(at):
    pre = NamedPlace(path=str(at), side="fwd_pre")
    return [("resid_pre", pre), ("resid_post", str(at)), ("mlp.contribution", f"{at}.inner")]


def test_queries_of_one_key_are_refused_with_what_to_give_and_proved_on_larger_inputs():
    model = families.build("segformer")
    name = "vision.stages.0.blocks.0.attn.q"
    assert "these inputs leave one key, whose weight is 1 whatever q is" in tdcache.names(model).refused[name]
    table = tdcache.names(model, {"pixel_values": torch.randn(1, 3, 96, 64)})
    assert {name, "vision.stages.0.blocks.0.attn.k"} <= table.keys()
