"""Tests of names found by data flow, and of their proof."""

import copy

import pytest
import torch
from torch import nn

from model_state import state_of
from tdcache.naming import proved, resolve

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def build(family, settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.filterwarnings("default")
def test_the_places_of_gpt2():
    table = resolve(build("gpt2", GPT2))
    where = {name: place.where for name, place in table.items() if ".0." not in name}
    block = "transformer.h.1"
    assert where == {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "blocks.1.resid_pre": f"input of {block}",
        "blocks.1.resid_mid": f"{block}::add",
        "blocks.1.resid_post": block,
        "blocks.1.ln1": f"{block}.ln_1",
        "blocks.1.attn.q": f"{block}.attn::q",
        "blocks.1.attn.k": f"{block}.attn::k",
        "blocks.1.attn.v": f"{block}.attn::v",
        "blocks.1.attn.scores": f"{block}.attn::scores",
        "blocks.1.attn.pattern": f"{block}.attn::pattern",
        "blocks.1.attn.z": f"{block}.attn::z",
        "blocks.1.attn.out": f"{block}.attn",
        "blocks.1.attn.contribution": f"{block}.attn",
        "blocks.1.ln2": f"{block}.ln_2",
        "blocks.1.mlp.pre": f"{block}.mlp.c_fc",
        "blocks.1.mlp.post": f"input of {block}.mlp.c_proj",
        "blocks.1.mlp.out": f"{block}.mlp",
        "blocks.1.mlp.contribution": f"{block}.mlp",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    }
    assert table["blocks.1.attn.pattern"].axes == ("batch", "head", "query", "key")
    assert table.stream().layouts == ("pre-norm", "pre-norm")
    assert table.stream().embeddings == ("embed", "pos_embed")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("family", "settings"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_every_name_of_a_decoder_is_proved_and_the_model_is_left_alone(family, settings):
    model = build(family, settings)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    found = resolve(model)
    table = proved(model, found)
    assert dict(table) == dict(found)
    proof = {each.identity: each for each in table.proof.identities}
    assert {name for each in proof.values() for name in each.names} == set(table)
    total = proof["resid_pre + attn.contribution + mlp.contribution == resid_post"]
    assert total.error <= 1e-9  # float64: three additions of the model's own
    assert proof["pattern @ v == z"].error <= 3e-6  # Llama's rotary embedding computes in float32
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.filterwarnings("default")
def test_grouped_heads_are_named_among_the_axes():
    table = resolve(build("llama", LLAMA))
    assert table["blocks.0.attn.q"].axes == ("batch", "head", "query", "unit")
    assert table["blocks.0.attn.k"].axes == ("batch", "kv_head", "key", "unit")
    assert table["blocks.0.mlp.pre"].path == "model.layers.0.mlp.gate_proj"


class OwnBlock(nn.Module):
    """Attention spelled out, of one head, and an MLP, both behind norms."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.o((q @ k.transpose(-1, -2) / 3).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return x + self.hidden(self.norms[1](x))


class OwnModel(nn.Module):
    """A transformer without a configuration."""

    def __init__(self, width=8, blocks=3):
        super().__init__()
        self.tokens = nn.Embedding(20, width)
        self.stack = nn.ModuleList([OwnBlock(width) for _ in range(blocks)])
        self.last = nn.LayerNorm(width)
        self.logits = nn.Linear(width, 20, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.stack:
            x = block(x)
        return self.logits(self.last(x))


def test_a_model_of_ones_own_has_names_without_a_configuration():
    torch.manual_seed(0)
    model = OwnModel()
    table = proved(model, resolve(model))
    assert table["embed"].path == "tokens"
    assert table["blocks.2.attn.pattern"].path == "stack.2::pattern"
    assert table["blocks.2.mlp.pre"].path == "stack.2.hidden.0"
    assert table["blocks.2.ln2"].path == "stack.2.norms.1"
    assert (table["final_norm"].path, table["unembed"].path) == ("last", "logits")
    assert set(table.refused) == {"pos_embed"}
