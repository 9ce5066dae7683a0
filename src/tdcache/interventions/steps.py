"""The steps of ``generate()``: telling the prompt's forward from those that add a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tdcache.errors import EditError
from tdcache.hooks.attach import Order

__all__ = ["Step", "StepClock", "Steps", "check_steps"]


class Step(NamedTuple):
    """One forward of the model."""

    forward: int
    """How many forwards came before it since the context was entered."""
    decoded: int
    """0 for the forward of a prompt (prefill), then 1, 2, ... for those that go on from it (decode)."""
    past: int
    """How many tokens are in the key-value cache already."""

    @property
    def is_prefill(self) -> bool:
        """Whether it is the forward of a prompt, or of a model without a key-value cache."""
        return self.decoded == 0


Steps = Literal["prefill", "decode"] | Callable[[Step], bool] | None
"""In which forwards an intervention acts: all (None), those of prompts, those that add a token, or by a predicate."""


def check_steps(steps: Any) -> Steps:
    """``steps`` itself.

    Raises:
        EditError: it is none.
    """
    if steps is None or steps in ("prefill", "decode") or callable(steps):
        return steps  # type: ignore[no-any-return]
    raise EditError(f"steps is 'prefill', 'decode', a predicate of a Step, or None for all, got {steps!r}")


class StepClock:
    """A pre-hook on the root of the model that says for each forward whether an intervention acts in it."""

    order = Order.FIRST

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.acts = steps != "decode"
        self._forward = -1
        self._decoded = 0

    def on_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        past = _cached_tokens(kwargs)
        self._forward += 1
        self._decoded = self._decoded + 1 if past else 0
        step = Step(self._forward, self._decoded, past)
        if callable(self.steps):
            self.acts = bool(self.steps(step))
        else:
            self.acts = step.is_prefill == (self.steps == "prefill")


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    past = kwargs.get("past_key_values")
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        return int(past.get_seq_length())
    first = past
    while isinstance(first, tuple | list) and first:
        first = first[0]
    return int(first.shape[-2]) if isinstance(first, Tensor) else 0
