"""GPT-2, Llama and BERT, as small as they go, each with the path of its first block; skips where they are missing."""

import pytest

transformers = pytest.importorskip("transformers")


def gpt2():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval(), "transformer.h.0"


def llama():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), "model.layers.0"


def bert():
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config).eval(), "encoder.layer.0"
