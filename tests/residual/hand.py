"""Small models with tables of names written by hand, and caches captured by bare hooks: no name is resolved here."""

from dataclasses import dataclass, field

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache.hooks.values import first_tensor
from tdcache.named_places import NamedPlace, Names
from tdcache.named_streams import ResidualStream
from tdcache.paths import resolve

transformers = pytest.importorskip("transformers")

F64 = torch.float64
AXES = ("batch", "position", "head", "unit")
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 11]])


@dataclass
class Case:
    """A model, its table, one input, what bare hooks saw, and what the model returned."""

    model: nn.Module
    table: Names
    cache: TensorDict
    logits: torch.Tensor
    inputs: torch.Tensor = field(default_factory=lambda: TOKENS)


def places(count, heads, blocks, **ends):
    """A table's places from ``role: path`` with ``{}`` for the block; ``<path`` means the input of a module."""
    found = {name: _place(path) for name, path in ends.items()}
    for i in range(count):
        for role, path in blocks.items():
            name = f"blocks.{i}.{role}"
            found[name] = _place(path.format(i), heads=(heads, -1) if role == "attn.z" else None)
    return found


def _place(path, heads=None):
    side = "fwd_pre" if path.startswith("<") else "fwd"
    return NamedPlace(
        path=path.lstrip("<"), side=side, heads=heads, axes=AXES if heads else ("batch", "position", "unit")
    )


def capture(model, table, inputs):
    """What bare hooks see at the places of a table, and what the model returns."""
    seen, handles = {}, []

    def keep(name, place, value):
        value = first_tensor(value)
        if place.heads is not None:
            value = value.unflatten(-1, (place.heads[0], -1))
        seen[name] = value.detach().clone()

    for name, place in table.items():
        if "::" in place.path:
            continue
        module = resolve(model, place.path)
        if place.side == "fwd":
            handles.append(module.register_forward_hook(lambda _, a, out, n=name, p=place: keep(n, p, out)))
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, a, k, n=name, p=place: keep(n, p, a or next(iter(k.values()))), with_kwargs=True
                )
            )
    with torch.no_grad():
        out = model(inputs)
    for handle in handles:
        handle.remove()
    logits = out.logits if hasattr(out, "logits") else first_tensor(out)
    return TensorDict(seen), logits.detach()


def finish(model, places, refused=None, **stream):
    model = jolted(model).to(F64).eval()
    count = sum(name.endswith("resid_post") for name in places)
    layouts = stream.pop("layouts", ("pre-norm",) * count)
    blocks = {key: tuple(path.format(i) for i in range(count)) for key, path in stream.items() if key.endswith("tions")}
    facts = ResidualStream(layouts=layouts, **{**stream, **blocks})
    table = Names(places, streams={"": facts}, refused=refused, model=model)
    cache, logits = capture(model, table, TOKENS)
    return Case(model, table, cache, logits)


def jolted(model):
    """Random numbers in every parameter, so that no bias or norm weight is left at its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


SIZES = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
WIDE = {**SIZES, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 20}


def gpt2():
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=12, n_positions=16, **SIZES)
    torch.manual_seed(0)
    block = {
        "resid_pre": "<transformer.h.{}",
        "resid_mid": "<transformer.h.{}.ln_2",
        "resid_post": "transformer.h.{}",
        "attn.z": "<transformer.h.{}.attn.c_proj",
        "attn.contribution": "transformer.h.{}.attn",
        "mlp.post": "<transformer.h.{}.mlp.c_proj",
        "mlp.contribution": "transformer.h.{}.mlp",
        "ln1": "transformer.h.{}.ln_1",
        "ln2": "transformer.h.{}.ln_2",
    }
    found = places(3, 2, block, embed="transformer.wte", pos_embed="transformer.wpe", final_norm="transformer.ln_f")
    return finish(
        transformers.GPT2LMHeadModel(config), found, embeddings=("embed", "pos_embed"), final_norm="transformer.ln_f",
        unembed="lm_head", out_projections="transformer.h.{}.attn.c_proj",
        down_projections="transformer.h.{}.mlp.c_proj",
    )  # fmt: skip


def _llama_like(model, *, contributions=("self_attn", "mlp"), mid="<model.layers.{}.post_attention_layernorm", **facts):
    block = {
        "resid_pre": "<model.layers.{}",
        "resid_mid": mid,
        "resid_post": "model.layers.{}",
        "attn.z": "<model.layers.{}.self_attn.o_proj",
        "attn.contribution": "model.layers.{}." + contributions[0],
        "mlp.contribution": "model.layers.{}." + contributions[1],
    }
    facts = {"embeddings": ("embed",), "down_projections": "model.layers.{}.mlp.down_proj", **facts}
    if facts["down_projections"]:
        block["mlp.post"] = "<" + facts["down_projections"]
    else:
        del facts["down_projections"]
    ends = {"embed": "model.embed_tokens"} if facts["embeddings"] else {}
    found = places(3, 4, block, **ends)
    return finish(
        model, found, final_norm="model.norm", unembed="lm_head", out_projections="model.layers.{}.self_attn.o_proj",
        **facts,
    )  # fmt: skip


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WIDE, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    return _llama_like(transformers.LlamaForCausalLM(config))


def gemma2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **WIDE, num_attention_heads=4, num_key_value_heads=2, head_dim=6, final_logit_softcapping=2.0,
        attn_implementation="eager",
    )  # fmt: skip
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    mid = "<model.layers.{}.pre_feedforward_layernorm"
    model = transformers.Gemma2ForCausalLM(config)
    layouts = ("sandwich",) * 3
    return _llama_like(model, contributions=after, mid=mid, embeddings=(), logit_softcap=2.0, layouts=layouts)


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **WIDE, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, experts_implementation="eager"
    )
    return _llama_like(transformers.MixtralForCausalLM(config), down_projections=None)


def granite():
    """Scales wherever Granite has one; what it adds to the stream is a product in the forward of the block."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        **WIDE, num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.22, logits_scaling=4.0,
        embedding_multiplier=3.0, attention_multiplier=0.3,
    )  # fmt: skip
    case = _llama_like(transformers.GraniteForCausalLM(config), embeddings=(), logit_scale=0.25)
    places = dict(case.table)
    for i in range(3):
        for role in ("attn", "mlp"):
            name = f"blocks.{i}.{role}.contribution"
            case.cache[name] = 0.22 * case.cache[name]
            places[name] = NamedPlace(path=f"model.layers.{i}::mul" + (".1" if role == "mlp" else ""))
    case.table = Names(places, streams=case.table.streams, model=case.model)
    return case


def bloom():
    torch.manual_seed(0)
    config = transformers.BloomConfig(n_layer=3, n_head=4, hidden_size=12, **SIZES)
    at = "transformer.h.{}."
    block = {
        "resid_pre": "<transformer.h.{}",
        "resid_mid": f"<{at}post_attention_layernorm",
        "resid_post": "transformer.h.{}",
        "attn.z": f"<{at}self_attention.dense",
        "attn.contribution": f"{at}self_attention.dense",
        "mlp.post": f"<{at}mlp.dense_4h_to_h",
        "mlp.contribution": f"{at}mlp.dense_4h_to_h",
    }
    return finish(
        transformers.BloomForCausalLM(config),
        places(3, 4, block, embed="transformer.word_embeddings_layernorm"), embeddings=("embed",),
        final_norm="transformer.ln_f", unembed="lm_head", out_projections=at + "self_attention.dense",
        down_projections=at + "mlp.dense_4h_to_h",
    )  # fmt: skip


def neox():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**WIDE, num_attention_heads=4, use_parallel_residual=True)
    at = "gpt_neox.layers.{}."
    block = {
        "resid_pre": "<gpt_neox.layers.{}",
        "resid_post": "gpt_neox.layers.{}",
        "attn.z": f"<{at}attention.dense",
        "attn.contribution": f"{at}attention",
        "mlp.post": f"<{at}mlp.dense_4h_to_h",
        "mlp.contribution": f"{at}mlp",
    }
    why = "attention and MLP both read resid_pre; nearest is 'blocks.{}.resid_pre'"
    return finish(
        transformers.GPTNeoXForCausalLM(config), places(3, 4, block, embed="gpt_neox.embed_in"),
        refused={f"blocks.{i}.resid_mid": why.format(i) for i in range(3)}, layouts=("parallel",) * 3,
        embeddings=("embed",), final_norm="gpt_neox.final_layer_norm", unembed="lm_head",
        out_projections=at + "attention.dense", down_projections=at + "mlp.dense_4h_to_h",
    )  # fmt: skip


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**WIDE, num_attention_heads=4, max_position_embeddings=16)
    at = "bert.encoder.layer.{}."
    block = {
        "resid_pre": "<bert.encoder.layer.{}",
        "resid_mid": f"{at}attention.output.LayerNorm",
        "resid_post": f"{at}output.LayerNorm",
        "attn.z": f"<{at}attention.output.dense",
        "attn.contribution": f"{at}attention.output.dense",
        "mlp.post": f"<{at}output.dense",
        "mlp.contribution": f"{at}output.dense",
        "ln1": f"{at}attention.output.LayerNorm",
        "ln2": f"{at}output.LayerNorm",
    }
    parts = {"embed": "word", "pos_embed": "position", "type_embed": "token_type"}
    ends = {name: f"bert.embeddings.{part}_embeddings" for name, part in parts.items()}
    why = "a dense layer and an activation stand between the stream and the logits"
    return finish(
        transformers.BertForMaskedLM(config), places(3, 4, block, **ends),
        refused={"final_norm": why, "unembed": why}, layouts=("post-norm",) * 3,
        embeddings=tuple(ends), embedding_norm="bert.embeddings.LayerNorm",
        out_projections=at + "attention.output.dense", down_projections=at + "output.dense",
    )  # fmt: skip


class OwnBlock(nn.Module):
    """Attention without a library: norm after one head's worth of arithmetic, and a learned scale on the MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = LayerScale(width)

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        z = (q @ k.mT).softmax(-1) @ v
        x = x + self.merge(z.transpose(-3, -2).flatten(-2))
        return x + self.scale(self.down(self.up(self.second(x)).relu()))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return self.weight * x


class OwnModel(nn.Module):
    """No final norm, a bias in the unembedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(OwnBlock(12, 3) for _ in range(2))
        self.head = nn.Linear(12, 20)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def own():
    torch.manual_seed(0)
    block = {
        "resid_pre": "<layers.{}",
        "resid_mid": "<layers.{}.second",
        "resid_post": "layers.{}",
        "attn.z": "<layers.{}.merge",
        "attn.contribution": "layers.{}.merge",
        "mlp.post": "<layers.{}.down",
        "mlp.contribution": "layers.{}.scale",
    }
    why = "no norm reads the last resid_post"
    return finish(
        OwnModel(), places(2, 3, block, embed="embed"), refused={"final_norm": why}, embeddings=("embed",),
        unembed="head", out_projections="layers.{}.merge", down_projections="layers.{}.down",
    )  # fmt: skip


FAMILIES = {
    "gpt2": gpt2, "llama": llama, "gemma2": gemma2, "mixtral": mixtral, "bloom": bloom, "neox": neox, "bert": bert,
    "own": own, "granite": granite,
}  # fmt: skip
