"""Small random inputs of a model's own kind: token ids, pixels, sound, by its configuration, signature or embedding."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import CanonicalNameError

__all__ = ["like", "own_inputs"]

ROWS, POSITIONS = 2, 7


def own_inputs(model: nn.Module, seed: int) -> Any:
    """A random input of the model: two rows, seven positions, or an image or sound of the size that it is made for.

    Args:
        model: with a ``config`` and a ``main_input_name``, as transformers' are, or any module that embeds token ids
            or begins with a linear map.
        seed: of the random numbers. The global generator is left alone.

    Raises:
        CanonicalNameError: nothing says what the model takes.
    """
    random = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and isinstance(main, str):
        made = _for_config(model, config, main, random)
        if made is not None:
            return made
    return _for_plain(model, random)


def _for_config(model: nn.Module, config: Any, main: str, random: torch.Generator) -> dict[str, Tensor] | None:
    if main == "pixel_values":
        made = {main: _pixels(config, random)}
    elif main in ("input_values", "input_features"):
        made = {main: _sound(model, config, main, random)}
    elif main in ("input_ids", "decoder_input_ids"):
        made = {"input_ids": _ids(model, config, random)}
    else:
        return None
    parameters = inspect.signature(model.forward).parameters
    if {"pixel_values", "input_ids"} <= set(parameters) and _two_towers(config):
        made = {"input_ids": _ids(model, config, random), "pixel_values": _pixels(config, random)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _ids(model, config, random)[:, : POSITIONS - 2]
    if "use_cache" in parameters:
        made["use_cache"] = False  # type: ignore[assignment]
    return made


def _two_towers(config: Any) -> bool:
    """Whether text and image go in side by side, and not the image in the place of tokens."""
    inside = hasattr(config, "image_token_id") or hasattr(config, "image_token_index")
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and not inside


def _of(config: Any, names: Iterable[str], default: Any = None) -> Any:
    """The first of these settings that the configuration, or that of one of its parts, has."""
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config"))]
    for part in parts:
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return default


def _ids(model: nn.Module, config: Any, random: torch.Generator) -> Tensor:
    """Token ids that are none of the special ones, so that nothing counts as padding or as an image."""
    size = _of(config, ("vocab_size",))
    if size is None:
        size = min(each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding))
    special = {value for part in (config, getattr(config, "text_config", None)) for value in _special(part)}
    allowed = torch.tensor([at for at in range(min(int(size), 5000)) if at not in special])
    return allowed[torch.randint(len(allowed), (ROWS, POSITIONS), generator=random)]


def _special(config: Any) -> set[int]:
    if config is None:
        return set()
    settings = vars(config).items()
    return {value for name, value in settings if isinstance(value, int) and name.endswith(("token_id", "token_index"))}


def _pixels(config: Any, random: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    size = _of(vision, ("image_size", "img_size"), 32)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels, frames = _of(vision, ("num_channels", "in_channels"), 3), getattr(vision, "num_frames", None)
    shape = (channels, height, width) if frames is None else (frames, channels, height, width)
    return torch.randn(ROWS, *shape, generator=random)


def _sound(model: nn.Module, config: Any, main: str, random: torch.Generator) -> Tensor:
    if main == "input_values":
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
            return torch.randn(ROWS, config.max_length, config.num_mel_bins, generator=random)
        return torch.randn(ROWS, 2000, generator=random)
    bins = _of(config, ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"), 80)
    positions = getattr(config, "max_source_positions", None)
    if positions is not None and positions <= 3000 and model.__class__.__name__.startswith("Whisper"):
        return torch.randn(ROWS, bins, 2 * positions, generator=random)
    return torch.randn(ROWS, 24, bins, generator=random)


def _for_plain(model: nn.Module, random: torch.Generator) -> Any:
    """An input for a module without a configuration, by the first module that would take it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            sizes = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
            return torch.randint(
                max(sizes) if module.num_embeddings == max(sizes) else min(sizes), (ROWS, POSITIONS), generator=random
            )
        if isinstance(module, nn.Conv2d):
            side = 8 * max(module.kernel_size)
            return torch.randn(ROWS, module.in_channels, side, side, generator=random)
        if isinstance(module, nn.Linear):
            return torch.randn(ROWS, POSITIONS, module.in_features, generator=random)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return torch.randn(ROWS, POSITIONS, *module.normalized_shape, generator=random)
    raise CanonicalNameError(
        f"nothing says what {type(model).__name__} takes: it has no configuration and no embedding or linear map; "
        "pass inputs="
    )


def like(inputs: Any, seed: int) -> Any:
    """Other random numbers of the same kind: ids among those that were there, floats alike, masks as they are."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(inputs, Mapping):
        return {name: _like(value, name, random) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_like(value, "", random) for value in inputs)
    return _like(inputs, "", random)


def _like(value: Any, name: str, random: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or "mask" in name or "position" in name or value.dtype is torch.bool:
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
        return noise * value.std() + value.mean() if value.numel() > 1 else value
    flat = value.flatten()
    if flat.numel() < 2 or bool((flat == flat[0]).all()):
        return value
    return flat[torch.randint(len(flat), (len(flat),), generator=random).to(flat.device)].reshape(value.shape)
