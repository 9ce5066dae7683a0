"""GPT-2, Llama and BERT, as small as they go, each with the path of its first block; skips where they are missing.

Keyword arguments change the configuration: ``gpt2(n_layer=3)``.
"""

import pytest

transformers = pytest.importorskip("transformers")


def gpt2(**changes):
    options = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 32}
    config = transformers.GPT2Config(**{**options, "bos_token_id": 0, "eos_token_id": 1, **changes})
    return transformers.GPT2LMHeadModel(config).eval(), "transformer.h.0"


def llama(**changes):
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "vocab_size": 20, "max_position_embeddings": 32, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval(), "model.layers.0"


def bert(**changes):
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"vocab_size": 20, "max_position_embeddings": 32, **changes}
    return transformers.BertModel(transformers.BertConfig(**options)).eval(), "encoder.layer.0"
