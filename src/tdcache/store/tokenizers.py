"""What token ids mean, by the name of the tokenizer that a store remembers."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from tdcache.errors import StoreError

__all__ = ["load_tokenizer"]


def load_tokenizer(name: Any, path: object) -> Any:
    """The tokenizer of a name, from transformers; no code of others is run.

    Args:
        name: as the store has it.
        path: of the store, for messages.

    Raises:
        StoreError: there is no name, no transformers, or no such tokenizer.
    """
    if not isinstance(name, str):
        raise StoreError(
            f"{path} does not say whose token ids these are; give tokenizer= here, or to harvest", path=path
        )
    try:
        return _loaded(name)
    except ImportError:
        raise StoreError("text of tokens needs transformers: pip install 'tdcache[hf]'", path=path) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"the tokenizer {name!r} of {path} cannot be loaded: {error}", path=path) from error


@functools.lru_cache(maxsize=4)
def _loaded(name: str) -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
