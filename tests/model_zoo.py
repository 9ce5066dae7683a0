"""Tiny models of many families, each with two batches, its padding, and the sites of it that are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
DECODER_MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
SIZES = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """A model and what it is called with.

    Args:
        model: in evaluation mode.
        batch: keyword arguments of its forward.
        other: the same for a second input with the same padding.
        masks: which columns are tokens, by the length of a sequence.
        position_dim: the axis of positions in its values; None where there are none.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    position_dim: int | None = 1
    name: str = ""

    def mask_of(self, value: Tensor) -> Tensor | None:
        """Which columns of a value (batch, seq, features) are tokens; None for a value without positions."""
        if value.ndim != 3 or self.position_dim is None or value.shape[1 - self.position_dim] != 3:
            return None
        return self.masks.get(value.shape[self.position_dim])


def ids(length: int = 5) -> Tensor:
    """Three rows of ids that are none of the special ones."""
    return torch.randint(3, 20, (3, length))


def text(model: nn.Module) -> Family:
    batch, other = ({"input_ids": ids(), "attention_mask": MASK} for _ in range(2))
    return Family(model, batch, other, {5: MASK})


def causal(name: str, sizes: Mapping[str, Any] = SIZES, **more: Any) -> Callable[[], Family]:
    def make() -> Family:
        config = getattr(transformers, f"{name}Config")(**{**sizes, **more})
        return text(getattr(transformers, f"{name}ForCausalLM")(config).eval())

    return make


def gpt2() -> Family:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return text(transformers.GPT2LMHeadModel(config).eval())


def bert() -> Family:
    return text(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval())


def mamba() -> Family:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4, pad_token_id=0)
    return text(transformers.MambaForCausalLM(config).eval())


def both_sides(model: nn.Module) -> Family:
    batch, other = (
        {
            "input_ids": ids(), "attention_mask": MASK,
            "decoder_input_ids": ids(4), "decoder_attention_mask": DECODER_MASK,
        }
        for _ in range(2)
    )  # fmt: skip
    return Family(model, batch, other, {5: MASK, 4: DECODER_MASK})


def t5() -> Family:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, num_heads=2, num_layers=2, d_ff=16, decoder_start_token_id=0, pad_token_id=0
    )
    return both_sides(transformers.T5ForConditionalGeneration(config).eval())


SEQ2SEQ = {
    "vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def bart() -> Family:
    config = transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=32)
    return both_sides(transformers.BartForConditionalGeneration(config).eval())


def whisper() -> Family:
    config = transformers.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=7, max_source_positions=6, max_target_positions=16, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    batch, other = (
        {
            "input_features": torch.randn(3, 7, 12), "decoder_input_ids": ids(4),
            "decoder_attention_mask": DECODER_MASK,
        }
        for _ in range(2)
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    return Family(model, batch, other, {6: torch.ones(3, 6, dtype=torch.long), 4: DECODER_MASK})


def vit() -> Family:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    batch, other = ({"pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(2))
    model = transformers.ViTForImageClassification(config).eval()
    return Family(model, batch, other, {5: torch.ones(3, 5, dtype=torch.long)})


class Tagger(nn.Module):
    """An LSTM over a sequence, which returns a tuple with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Encoder(nn.Module):
    """Torch's own transformer in the layout (sequence, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def plain(kind: Callable[[], nn.Module], *shape: int, **options: Any) -> Callable[[], Family]:
    def make() -> Family:
        return Family(kind().eval(), {"x": torch.randn(shape)}, {"x": torch.randn(shape)}, **options)

    return make


class Images(nn.Module):
    """A CNN; by default its activation overwrites what the convolution returned."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(4)
        self.pool, self.flat, self.head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.norm(self.act(self.conv(x))))))


ZOO: dict[str, Callable[[], Family]] = {
    "gpt2": gpt2,
    "llama": causal("Llama", GROUPED),
    "qwen2": causal("Qwen2", GROUPED),
    "gemma2": causal("Gemma2", GROUPED, head_dim=4, sliding_window=4),
    "mistral": causal("Mistral", GROUPED),
    "neox": causal("GPTNeoX"),
    "opt": causal("OPT", SIZES, ffn_dim=16, word_embed_proj_dim=8),
    "phi": causal("Phi"),
    "falcon": causal("Falcon", SIZES, new_decoder_architecture=True, num_kv_heads=1),
    "bloom": causal("Bloom", SIZES, n_head=2, n_layer=2),
    "mixtral": causal("Mixtral", GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "mamba": mamba,
    "bert": bert,
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
    "vit": vit,
    "lstm": plain(Tagger, 3, 5, 4, masks={5: torch.ones(3, 5, dtype=torch.long)}),
    "sequence_first": plain(Encoder, 5, 3, 8, masks={5: torch.ones(3, 5, dtype=torch.long)}, position_dim=0),
    "cnn": plain(Images, 3, 3, 8, 8, position_dim=None),
}
