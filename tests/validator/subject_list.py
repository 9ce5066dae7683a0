"""The models that are asked about: tiny ones of many families of transformers, and our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from families import VOCABULARY, build
from validator.own_models import own_subjects
from validator.subjects import Subject, found

TEXT = (
    *("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi"),
    *("phi3", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "mpt", "olmo", "olmo2", "olmoe", "stablelm"),
    *("starcoder2", "granite", "cohere", "codegen", "gpt_bigcode", "persimmon", "smollm3", "glm4"),
    *("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "ctrl", "xglm"),
)
BOTH_SIDES = ("t5", "bart", "pegasus", "marian")
PIXELS = ("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model")
SHORT = ("gpt2", "llama", "t5")
"""Those of transformers that the suite asks about."""


def ids(length: int, random: torch.Generator) -> Tensor:
    """Two rows of token ids, none of them special."""
    return torch.randint(5, VOCABULARY, (2, length), generator=random)


def inputs_of(family: str, random: torch.Generator) -> dict[str, Tensor]:
    """Keyword arguments for a model of the family."""
    if family in PIXELS:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    batch = {"input_ids": ids(6, random)}
    return {**batch, "decoder_input_ids": ids(5, random)} if family in BOTH_SIDES else batch


def first_block(model: nn.Module) -> str:
    """The path of the first module of the stack that holds most parameters; of a decoder where there are two."""
    stacks = {
        path: sum(each.numel() for each in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) >= 1
    }
    outer = {path: size for path, size in stacks.items() if not any(path.startswith(f"{other}.") for other in stacks)}
    return max(outer, key=outer.get) + ".0"


def transformers_subject(family: str) -> Subject:
    """A tiny random model of a family, with attention spelled out, so that every library can see its pattern."""
    try:
        model = build(family, attn_implementation="eager")
    except (TypeError, ValueError):  # it knows one implementation only
        model = build(family)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    random = torch.Generator().manual_seed(3)
    inputs, other = inputs_of(family, random), inputs_of(family, random)
    return found(Subject(name=family, model=model, inputs=inputs, other=other, site=first_block(model)))


def subjects(names: Sequence[str] = ()) -> Iterator[Subject]:
    """The models with these names, one at a time; all of them where none is named."""
    yield from (each for each in own_subjects() if not names or each.name in names)
    for family in (*TEXT, *BOTH_SIDES, *PIXELS):
        if not names or family in names:
            yield transformers_subject(family)
