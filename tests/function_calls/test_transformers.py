"""Tests over families of transformers: outputs to the bit, patterns beside those of eager attention, edits."""

import contextlib
import copy

import pytest
import torch

from model_state import state_of
from tdcache import Ablation, ActivationCaching
from tdcache.function_calls.attach import CallsLike, attach_call, attach_rules
from tdcache.function_calls.record import calls
from tdcache.function_calls.roles import attach_attention
from tdcache.function_calls.sites import CallPattern, CallSite
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.introspect import function_mode_count
from tdcache.selection import select

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
SHORT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LAYER_SELF = r"layers\.\d+\.self_attn"
BERT_SELF = r"encoder\.layer\.\d+\.attention\.self"

FAMILIES = {
    "bert": (SMALL, BERT_SELF),
    "roberta": (SMALL, BERT_SELF),
    "electra": ({**SMALL, "embedding_size": 32}, BERT_SELF),
    "distilbert": ({"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, r".*\.attention"),
    "gpt2": (SHORT, r"h\.\d+\.attn"),
    "gptj": ({**SHORT, "rotary_dim": 4}, r"h\.\d+\.attn"),
    "gpt_neo": (
        {**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        r".*\.attention",
    ),
    "gpt_neox": (SMALL, r"layers\.\d+\.attention"),
    "bloom": ({**SHORT, "hidden_size": 32}, r"h\.\d+\.self_attention"),
    "opt": ({**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, r".*\.self_attn"),
    "llama": (GROUPED, LAYER_SELF),
    "mistral": (GROUPED, LAYER_SELF),
    "qwen2": (GROUPED, LAYER_SELF),
    "qwen3": ({**GROUPED, "head_dim": 8}, LAYER_SELF),
    "gemma": ({**GROUPED, "head_dim": 8}, LAYER_SELF),
    "gemma2": ({**GROUPED, "head_dim": 8}, LAYER_SELF),
    "phi": (SMALL, LAYER_SELF),
    "olmo2": (GROUPED, LAYER_SELF),
    "granite": (GROUPED, LAYER_SELF),
    "cohere": (GROUPED, LAYER_SELF),
    "mixtral": ({**GROUPED, "num_local_experts": 2}, LAYER_SELF),
    "gpt_oss": ({**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, LAYER_SELF),
    "t5": (
        {"vocab_size": 60, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48},
        r".*(SelfAttention|EncDecAttention)",
    ),
    "bart": (ENCODER_DECODER, r".*(self_attn|encoder_attn)"),
    "whisper": (
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20},
        r".*(self_attn|encoder_attn)",
    ),
    "vit": (IMAGE, r"layers\.\d+\.attention"),
    "deit": (IMAGE, None),
}
PLACES = ("q", "k", "v", "scores", "pattern", "z")


def inputs_of(name):
    ids = torch.randint(3, 60, (2, 7))
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids[:, :4]}
    if name in ("t5", "bart"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


def build(name, kind):
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name][0])
    torch.manual_seed(0)
    try:
        return transformers.AutoModel.from_config(config, attn_implementation=kind).eval()
    except ValueError as error:
        pytest.skip(f"{name} has no {kind} attention: {error}")


def attentions(model, name):
    """The attention modules, in the order in which they are called."""
    pattern = FAMILIES[name][1] or r".*\.attention(\.attention)?"
    return list(select(model, pattern).paths)


def expected_patterns(name, inputs):
    """What eager attention returns: by a twin that shares nothing, its configuration included."""
    result = build(name, "eager")(**inputs, output_attentions=True)
    keys = ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions")
    return [pattern for key in keys for pattern in result.get(key) or ()]


def tensors_of(result):
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "bloom", "gpt_oss", "llama", "t5", "whisper"])  # test_zoo.py has others
def test_places_of_attention_in_a_family(name, kind):
    model, inputs, kept = build(name, kind), inputs_of(name), {}
    paths = attentions(model, name)
    before = state_of(model)
    with torch.no_grad():
        expected, wanted = tensors_of(model(**inputs)), expected_patterns(name, inputs)

        def keep(path, place):
            return lambda module, args, kwargs, value: kept.__setitem__((path, place), value.clone())

        handles = [
            attach_attention(model, CallSite(path, place), keep(path, place), use="read")
            for path in paths
            for place in PLACES
        ]
        with MultiHookHandle(handles):
            found = tensors_of(model(**inputs))
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert state_of(model) == before
    assert set(kept) == {(path, place) for path in paths for place in PLACES}
    patterns = [kept[path, "pattern"] for path in paths]
    assert len(wanted) == len(patterns)
    for pattern in wanted:
        assert any(pattern.shape == mine.shape and (pattern - mine).abs().max() <= 2e-6 for mine in patterns)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert", "t5", "bloom", "gpt_oss", "whisper", "qwen2"])
def test_an_edit_of_the_pattern_is_the_same_under_both_kinds(name):
    results, inputs = [], inputs_of(name)
    for kind in ("sdpa", "eager"):
        try:
            model = build(name, kind)
        except pytest.skip.Exception:
            continue
        path = attentions(model, name)[-1]
        keep = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None]

        def ablate(module, args, kwargs, value, keep=keep):
            return value * keep

        def by_hand(module, args, kwargs, output, keep=keep):
            return output * (keep if output.dim() == 4 else 1)

        with torch.no_grad():
            plain = tensors_of(model(**inputs))[0]
            with MultiHookHandle([attach_attention(model, CallSite(path, "pattern"), ablate)]):
                results.append(tensors_of(model(**inputs))[0])
            assert not torch.equal(results[-1], plain)
            if kind == "eager":
                with MultiHookHandle([attach_call(model, CallSite(path, "softmax"), None, by_hand)]):
                    assert torch.equal(tensors_of(model(**inputs))[0], results[-1])
    # Two kernels, after one more layer and a norm.
    assert all(torch.allclose(result, results[0], atol=1e-5, rtol=0) for result in results)


@pytest.mark.filterwarnings("default")
def test_generation_gives_the_same_tokens_and_a_pattern_per_step():
    config = transformers.AutoConfig.for_model("llama", **GROUPED)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids, shapes = torch.randint(3, 60, (1, 5)), []
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    site = CallSite("model.layers.1.self_attn", "pattern")
    keep = attach_attention(model, site, lambda m, a, k, value: shapes.append(tuple(value.shape[-2:])), use="read")
    with MultiHookHandle([keep]):
        assert torch.equal(model.generate(ids, **options), expected)
    assert shapes == [(5, 5), (1, 6), (1, 7), (1, 8)]


@pytest.mark.parametrize("place", ["scores", "pattern"])
def test_a_step_of_one_token_has_the_heads_of_the_model_where_its_kernel_packs_them_by_group(place):
    ids, mask = torch.randint(3, 60, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    seen, tokens, gradients = [], [], []
    for kind in ("sdpa", "eager"):
        config = transformers.AutoConfig.for_model("mistral", **GROUPED, sliding_window=3)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kind).eval()
        site, values = CallSite("model.layers.1.self_attn", place), []
        with MultiHookHandle(
            [attach_attention(model, site, lambda m, a, k, v, kept=values: kept.append(v), use="read")]
        ):
            model.generate(ids, **options)
        seen.append([value.softmax(-1) if place == "scores" else value for value in values])
        with Ablation(r"model\.layers\.\d\.self_attn::" + place, heads=(4, [1, 2])).prepare(model):
            tokens.append(model.generate(ids, **options))
        cache = model(ids, attention_mask=mask).past_key_values
        more = torch.ones(2, 6, dtype=torch.long) * torch.nn.functional.pad(mask, (0, 1), value=1)
        with ActivationCaching(str(site).replace(".", r"\."), directions=["fwd", "bwd"]).prepare(model) as hooked:
            model(ids[:, -1:], attention_mask=more, past_key_values=cache).logits.square().sum().backward()
        gradients.append(hooked.cache["bwd", str(site)])
        assert hooked.cache["fwd", str(site)].shape == gradients[-1].shape
    assert torch.equal(*tokens)
    assert [value.shape[:3] for value in seen[0][1:]] == [(2, 4, 1)] * 3
    for one, other in zip(seen[0][1:], seen[1][1:], strict=True):
        assert torch.allclose(one, other, atol=2e-6)
    assert gradients[0].shape[:3] == (2, 4, 1)
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_checkpointed_blocks_give_the_gradients_of_plain_ones_under_an_edit():
    model, inputs, gradients = build("llama", "sdpa").train(), inputs_of("llama"), []
    edit = attach_attention(model, CallSite("layers.1.self_attn", "pattern"), lambda m, a, k, value: value * 0.5)
    with MultiHookHandle([edit]):
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(**inputs, use_cache=False).last_hidden_state.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("default")
def test_the_table_of_a_state_space_model_has_no_attention():
    model = build("mamba", "eager") if "mamba" in FAMILIES else _mamba()
    table = calls(model, "layers.1.mixer", {"input_ids": torch.randint(3, 60, (1, 5))})
    assert table.attention == {}
    assert "softplus" in {row.site.name for row in table}


def _mamba():
    config = transformers.AutoConfig.for_model(
        "mamba", vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32
    )
    return transformers.AutoModel.from_config(config).eval()


class Failing:
    """Raises at one of the calls that it sees."""

    order, stage = 2, 0

    def __init__(self):
        self.at = self.seen = 0

    def __call__(self, site):
        return self

    def before(self, call):
        self.after(call)

    def after(self, call):
        self.seen += 1
        if self.seen == self.at:
            raise ZeroDivisionError


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_an_exception_at_any_call_leaves_nothing(kind):
    model, failing = build("llama", kind), Failing()
    before, ids = state_of(model), torch.tensor([[3, 4]])
    pattern = CallPattern.parse("x::.*")
    rules = [(module, CallsLike(path, pattern, failing)) for path, module in model.named_modules()]
    places = [
        attach_attention(model, CallSite(path, "pattern"), lambda *_: None) for path in attentions(model, "llama")
    ]
    with torch.no_grad(), attach_rules(model, rules), MultiHookHandle(places):
        expected = model(ids).last_hidden_state
        count, raised = failing.seen, 0
        for at in range(1, count + 1):
            failing.at, failing.seen = at, 0
            with contextlib.suppress(ZeroDivisionError):
                model(ids)
                raised -= 1
            raised += 1
            assert function_mode_count() == 0
        assert raised == count > 300
        failing.at = 0
        assert torch.equal(model(ids).last_hidden_state, expected)
    assert state_of(model) == before


@pytest.mark.filterwarnings("default")
def test_values_after_the_rotary_embedding_are_those_that_attention_sees():
    model, kept = build("llama", "sdpa"), {}
    path = "layers.1.self_attn"
    rotary = attach_call(
        model,
        CallSite(path, "apply_rotary_pos_emb"),
        None,
        lambda m, a, k, output: kept.update(q=output[0], k=output[1]),
    )
    seen = [
        attach_attention(
            model, CallSite(path, place), lambda m, a, k, value, place=place: kept.update({f"{place}?": value})
        )
        for place in "qk"
    ]
    with MultiHookHandle([rotary, *seen]), torch.no_grad():
        copy.deepcopy(model)
        model(**inputs_of("llama"))
    assert kept["q"] is kept["q?"]
    assert torch.equal(kept["k"], kept["k?"])  # through the cache
