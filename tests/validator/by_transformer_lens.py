"""TransformerLens' bridge, around the same model: hook points under its own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from validator.subjects import NotOfferedError, Subject, copied, first_tensor, score


def bridge_of(subject: Subject) -> Any:
    """A bridge around the model, whose class must be one that it knows."""
    config = getattr(subject.model, "config", None)
    if config is None:
        raise NotOfferedError("models that are none of its architectures")
    try:
        return build_bridge_from_module(subject.model, type(subject.model).__name__, hf_config=config)
    except ValueError as error:
        if "nsupported architecture" in str(error) or "architecture" in str(error).lower():
            raise NotOfferedError("models that are none of its architectures") from error
        raise


def places(bridge: Any, subject: Subject) -> tuple[str, str]:
    """The stack that holds the site, and the name of the first output in it."""
    stacks = ("decoder_blocks", "blocks") if "decoder" in subject.site else ("blocks", "encoder_blocks")
    stack = next(name for name in stacks if f"{name}.0.hook_out" in bridge.hook_dict)
    return stack, f"{stack}.0.hook_out"


def read(bridge: Any, subject: Subject, name: str, *, other: bool = False) -> Tensor:
    inputs = copied(subject.other if other else subject.inputs)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(*leading(inputs), names_filter=lambda each: each == name, **inputs)
    return cache[name]


def leading(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The first argument by position, as a bridge takes it; the others stay in the mapping."""
    return (inputs.pop(next(iter(inputs))),)


def logits_of(bridge: Any, subject: Subject) -> Tensor:
    inputs = copied(subject.inputs)
    return first_tensor(bridge(*leading(inputs), **inputs))


def edited(bridge: Any, subject: Subject, name: str, hook: Any) -> Tensor:
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, hook)]):
        return logits_of(bridge, subject)


def cache(subject: Subject) -> Tensor:
    bridge = bridge_of(subject)
    return read(bridge, subject, places(bridge, subject)[1])


def gradient(subject: Subject) -> Tensor:
    bridge, kept = bridge_of(subject), []
    name = places(bridge, subject)[1]
    with bridge.hooks(bwd_hooks=[(name, lambda grad, hook: kept.append(grad.clone()))]):
        score(logits_of(bridge, subject)).sum().backward()
    return kept[0]


def patch(subject: Subject) -> Tensor:
    bridge = bridge_of(subject)
    name = places(bridge, subject)[1]
    source = read(bridge, subject, name, other=True)
    return edited(bridge, subject, name, lambda value, hook: subject.pasted(value, source))


def ablate(subject: Subject) -> Tensor:
    bridge = bridge_of(subject)
    return edited(bridge, subject, places(bridge, subject)[1], lambda value, hook: torch.zeros_like(value))


def pattern(subject: Subject) -> Tensor:
    bridge = bridge_of(subject)
    stack = places(bridge, subject)[0]
    name = next(each for each in bridge.hook_dict if each.startswith(f"{stack}.0.") and each.endswith("hook_pattern"))
    return read(bridge, subject, name)


def lens(subject: Subject) -> Tensor:
    untouched = subject.fresh()
    bridge = bridge_of(subject)
    stack = places(bridge, subject)[0]
    return untouched.read_out(
        [read(bridge, subject, f"{stack}.{index}.hook_out") for index in range(len(subject.blocks))]
    )
