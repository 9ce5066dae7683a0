"""Tiny random models of many families of transformers: ``build("gpt2")``, and an input for each.

A family's configuration is its class's default with every size that it has shrunk by one table, and a few settings of
its own where these do not fit each other.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from tdcache.naming.inputs import own_inputs

logging.getLogger("transformers").setLevel(logging.CRITICAL)

WIDTH, HEADS, LAYERS, HIDDEN, VOCABULARY = 32, 4, 2, 48, 60

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), HIDDEN
    ),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "moe_intermediate_size", "shared_expert_intermediate_size"), HIDDEN),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "attention_head_dim", "kv_channels", "d_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_n_heads", "n_shared_experts"), 4),
    **dict.fromkeys(("pad_token_id", "pad_idx"), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "mask_token_id"), 2),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "q_lora_dim"), 16),
    "vocab_size": VOCABULARY,
    "type_vocab_size": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": None,
    "tubelet_size": 2,
    "num_frames": 4,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (8, 3, 3),
    "conv_stride": (4, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 3,
}
"""What a setting is where a configuration has it."""

LEAVE = object()
"""In place of a size: that of the family's default stays."""

SWIN = {
    "num_attention_heads": LEAVE,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
    "num_layers": LEAVE,
    "hidden_size": LEAVE,
}

OWN: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_groups": 1, "inner_group_num": 1},
    "biogpt": {"vocab_size": VOCABULARY},
    "bloom": {"hidden_size": WIDTH},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoe": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoeshared": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "mpt": {"max_seq_len": 64, "expansion_ratio": 2},
    "bert-generation": {"pad_token_id": 0},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 2},
    "xglm": {"num_layers": 2, "attention_heads": HEADS},
    "falcon": {"head_dim": LEAVE, "multi_query": True, "new_decoder_architecture": False},
    "falcon_h1": {"attention_out_multiplier": 0.7, "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.9, 0.8]},
    "falcon_mamba": {"conv_kernel": 4},
    "mamba": {"conv_kernel": 4},
    "mamba2": {"conv_kernel": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "nemotron_h": {"conv_kernel": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": LEAVE, "qk_head_dim": LEAVE},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": LEAVE, "qk_head_dim": LEAVE},
    "funnel": {"num_hidden_layers": LEAVE, "block_sizes": [2, 2], "n_head": 4, "d_head": 8},
    "prophetnet": {"num_hidden_layers": LEAVE},
    "xlnet": {"max_position_embeddings": LEAVE, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "xlstm": {"v_head_dim": LEAVE, "qk_head_dim": LEAVE},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"]},
    "zamba2": {"num_mem_blocks": 1, "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4},
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    "swin": SWIN,
    "swinv2": SWIN,
    "hiera": {
        "num_attention_heads": LEAVE,
        "patch_size": [4, 4],
        "patch_stride": [4, 4],
        "patch_padding": [0, 0],
        "image_size": [32, 32],
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "num_layers": LEAVE,
        "hidden_size": LEAVE,
    },
    "segformer": {
        "num_attention_heads": [1, 2],
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
        "num_encoder_blocks": 2,
        "patch_size": LEAVE,
        "image_size": 32,
    },
    "pvt": {
        "num_attention_heads": [1, 2, 2, 4],
        "patch_size": LEAVE,
        "image_size": 32,
        "hidden_sizes": [8, 16, 32, 32],
    },
    "levit": {
        "num_attention_heads": [2, 2, 2],
        "hidden_sizes": [16, 16, 16],
        "patch_size": LEAVE,
        "image_size": 32,
        "key_dim": [8, 8, 8],
        "depths": [2, 2, 2],
    },
    "vivit": {"tubelet_size": [2, 4, 4]},
    "yolos": {"image_size": [16, 16]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": 60,
        "hidden_size_per_layer_input": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "residual_multiplier": 0.3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_conv": 4},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 4,
        "full_attn_alpha_factor": 1.5,
        "full_attn_beta_factor": 0.7,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.6,
    },
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_expand": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "image_size": 32,
    },
    "xmod": {"default_language": "en_XX"},
}
"""Settings of single families."""

_TEXT = """
afmoe albert apertus arcee bailing_hybrid bamba bart bert bert-generation big_bird bigbird_pegasus biogpt bitnet
blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe convbert cpmant ctrl cwm data2vec-text
deberta deberta-v2 deepseek_v2 deepseek_v3 diffllama distilbert doge dots1 dpr electra ernie ernie4_5 ernie4_5_moe esm
eurobert exaone4 exaone_moe falcon falcon_h1 falcon_mamba flaubert flex_olmo fnet fsmt funnel gemma gemma2 gemma3_text
gemma3n_text git glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe
granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax ibert jais2 jamba
jetmoe jina_embeddings_v3 laguna layoutlm led lfm2 lfm2_moe lfm3 llama llama4_text longformer longt5 luke m2m_100
mamba mamba2 marian markuplm mbart megatron-bert mellum minimax minimax_m2 ministral ministral3 mistral mixtral
mobilebert modernbert modernbert-decoder mpnet mpt mt5 mvp nanochat nemotron nemotron_h nllb-moe nomic_bert
nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus pegasus_x persimmon phi phi3 phimoe plbart
prophetnet qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rembert roberta roberta-prelayernorm roc_bert
roformer rwkv seed_oss smollm3 solar_open splinter squeezebert stablelm starcoder2 switch_transformers t5 t5gemma
trocr ultrabert umt5 vaultgemma xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod yoso zamba
"""
_SEEING = """
aimv2_vision_model altclip beit bit chinese_clip chinese_clip_vision_model clip clip_vision_model clipseg convnext
data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit dpt flava focalnet groupvit ijepa imagegpt levit
metaclip_2 mlcd_vision_model owlvit pixio pixtral pvt segformer siglip siglip_vision_model swin swinv2 timesformer
videomae vit vit_mae vit_msn vitdet vivit yolos
"""
_HEARING = """
audio-spectrogram-transformer data2vec-audio hubert moonshine sew speech_to_text speecht5 unispeech unispeech-sat
wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper
"""
FAMILIES = tuple(" ".join((_TEXT, _SEEING, _HEARING)).split())

_CLASSES = (
    transformers.AutoModelForSpeechSeq2Seq,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForCausalLM,
    transformers.AutoModel,
)


def tiny_config(family: str) -> Any:
    """The configuration of a family with every size shrunk."""
    default = transformers.AutoConfig.for_model(family)
    settings = {name: value for name, value in SIZES.items() if _has(default, name)}
    if isinstance(getattr(default, "sliding_window", None), int):
        settings["sliding_window"] = 16
    settings |= OWN.get(family, {})
    settings = {name: value for name, value in settings.items() if value is not LEAVE}
    for name, part in vars(default).items():
        if isinstance(part, transformers.PretrainedConfig):
            settings[name] = {key: value for key, value in SIZES.items() if _has(part, key)}
            if isinstance(getattr(part, "sliding_window", None), int):
                settings[name]["sliding_window"] = 16
    return transformers.AutoConfig.for_model(family, **settings)


def _has(config: Any, name: str) -> bool:
    return hasattr(config, name) and getattr(config, name) is not None


def build(family: str, **settings: Any) -> nn.Module:
    """A random model of a family, in evaluation mode: with a language head where it has one."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(family)
        for kind in _CLASSES:
            if type(config) in kind._model_mapping:
                return kind.from_config(config, **settings).eval()
    raise ValueError(f"no model of transformers is {family!r}")


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that a model can be called with: random tokens, images or sound, by its configuration."""
    given: dict[str, Any] = own_inputs(model, seed=1)
    return given
