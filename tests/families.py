"""Tiny models of the families of ``transformers``: one configuration each, shrunk by the names of its settings.

A family is a model type of ``AutoConfig``. Most settings go by a few names (``hidden_size``, ``d_model``,
``n_embd``), so that a table of names shrinks most families; what a family needs beside that is in ``SETTINGS``. Of a
family that does not become small, ``build`` says so.
"""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MOST_PARAMETERS = 5_000_000
WIDTH, HEADS, VOCABULARY = 32, 4, 60

# A size, and the names of the settings that get it.
_SMALL = {
    WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim d_embed projection_dim "
    "attention_hidden_size encoder_hidden_size decoder_hidden_size cross_attention_hidden_size embedding_dim "
    "hidden_dim_vision encoder_dim decoder_dim lru_width rotary_emb_base_dim conv_dim_out",
    48: "intermediate_size d_ff ffn_dim d_inner encoder_ffn_dim decoder_ffn_dim hidden_dim encoder_intermediate_size "
    "decoder_intermediate_size ffn_hidden_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "dense_intermediate_size mlp_dim intermediate_size_mlp",
    16: "moe_intermediate_size kv_lora_rank q_lora_rank expert_dim num_mel_bins max_source_positions feat_extract_dim "
    "mamba_d_head mamba_d_state state_size ssm_state_size n_channels time_step_rank num_buckets",
    HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads nhead "
    "num_decoder_attention_heads num_encoder_attention_heads decoder_num_attention_heads num_global_attention_heads "
    "encoder_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts num_key_value_heads "
    "num_attention_heads_per_layer mamba_n_heads mamba_num_heads",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim kv_channels attention_head_size "
    "global_head_dim relative_attention_num_buckets",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_block num_experts_per_tok "
    "moe_top_k num_experts_per_token n_groups mamba_n_groups depth num_hidden_groups num_blocks",
    1: "n_shared_experts n_group topk_group first_k_dense_replace moe_num_shared_experts",
    64: "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len max_sequence_length",
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size text_vocab_size",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SMALL.items() for name in names.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1}
IMAGE, PATCH = 16, 8

SETTINGS = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_oss": {"num_key_value_heads": 2},
    "xlnet": {"d_inner": 48},
    "deberta": {"relative_attention": True, "max_relative_positions": 8},
    "deberta-v2": {"relative_attention": True, "max_relative_positions": 8},
    "whisper": {"max_source_positions": 10},
    "transfo-xl": {"cutoffs": []},
}
"""What a family needs beside the names that are shrunk everywhere."""


def tiny_config(name, **more):
    """The configuration of a family, with every size that has a known name made small."""
    config = _config_class(name)()
    shrink(config)
    for key, value in {**SETTINGS.get(name, {}), **more}.items():
        setattr(config, key, value)
    return config


def _config_class(name):
    return CONFIG_MAPPING[name]


def shrink(config):
    """Make every known size of a configuration, and of those in it, small."""
    known = {**config.to_dict(), **vars(config)}
    kv_grouped = _grouped(known)
    for key, value in list(known.items()):
        at = {v: k for k, v in type(config).attribute_map.items()}.get(key, key)
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif key == "num_key_value_heads" and isinstance(value, int):
            setattr(config, key, 2 if kv_grouped else HEADS)
        elif key in SMALL and type(value) is int:
            setattr(config, key, SMALL[key])
        elif key in TOKENS and value is not None:
            setattr(config, key, TOKENS[key])
        elif key == "image_size" and value is not None:
            setattr(config, key, IMAGE if isinstance(value, int) else type(value)([IMAGE] * len(value)))
        elif key == "patch_size" and value is not None:
            setattr(config, key, PATCH if isinstance(value, int) else type(value)([PATCH] * len(value)))
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            setattr(config, key, _two_kinds(list(value)))
        elif "dropout" in key and isinstance(value, float) and at == key:
            setattr(config, key, 0.0)


def _grouped(known):
    heads = known.get("num_attention_heads") or known.get("n_head")
    return isinstance(known.get("num_key_value_heads"), int) and known["num_key_value_heads"] != heads


def _two_kinds(kinds):
    """Two layers, of two kinds where there are."""
    other = next((kind for kind in kinds if kind != kinds[0]), kinds[0])
    return [kinds[0], other]


def build(name, kind="sdpa", **more):
    """The base model of a family with random weights, in eval mode.

    Raises:
        ValueError: it would have more than ``MOST_PARAMETERS`` parameters; and whatever the family itself raises.
    """
    config = tiny_config(name, **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config, attn_implementation=kind).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name} has {size:,} parameters with the sizes that have known names")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(tiny_config(name, **more), attn_implementation=kind).eval()
    return model.float()


def inputs_for(model, rows=2, length=6):
    """What the base model is called with: random tokens, images or sound, by the name of its main input."""
    generator = torch.Generator().manual_seed(1)
    config, main = model.config, model.main_input_name
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    text = getattr(config, "text_config", config)
    given = {}
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", IMAGE) or IMAGE
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        channels = getattr(vision, "num_channels", 3)
        given["pixel_values"] = torch.randn(rows, channels, height, width, generator=generator)
    elif main == "input_values":
        given["input_values"] = torch.randn(rows, 1600, generator=generator)
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 10)
        given["input_features"] = torch.randn(rows, getattr(config, "num_mel_bins", 16), frames, generator=generator)
    else:
        given["input_ids"] = ids
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids[:, :4]
    elif main != "input_ids" and hasattr(config, "text_config") and hasattr(text, "vocab_size"):
        given["input_ids"] = ids
    return given


FAMILIES = tuple(sorted(CONFIG_MAPPING.keys()))
"""Every family that there is; many of them do not become small, or want inputs of their own."""
