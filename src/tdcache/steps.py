"""The clock of generation: which forwards read a prompt, and which add tokens to it.

``generate()`` calls a model once for the prompt and then once for each token. An edit for one of these phases has to
tell them apart, and everything it can see is what one call feeds and what its cache holds. All of the library asks this
clock, so that ``steps="decode"`` means the same in an edit, a capture and a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tdcache.arguments import CACHE_NAMES, Cached, cached_in, forward_names, named_arguments, tokens_fed
from tdcache.errors import ContextError, SelectionError, listed
from tdcache.inplace import storage_address
from tdcache.introspect import in_backward
from tdcache.tables import html_table

__all__ = ["Clock", "Step", "Steps", "check_steps"]

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")


class Step(NamedTuple):
    """One forward of the model that receives the cache."""

    forward: int
    """How many forwards of that model came before it since the clock was made."""
    decoded: int
    """How many tokens were added to the prompt, those of this forward included: 0 for the prompt (prefill)."""
    past: int
    """How many tokens are in the cache already; 0 too where it was filled before the clock and does not say."""
    fed: int
    """How many tokens this forward feeds."""

    @property
    def is_prefill(self) -> bool:
        """Whether it reads a prompt, or a chunk of one; so does every forward of a model that does not generate."""
        return self.decoded == 0

    def _repr_html_(self) -> str:
        phase = "prefill" if self.is_prefill else "decode"
        return html_table(f"Step ({phase})", self._fields, [[str(value) for value in self]], right=self._fields)


Steps = Literal["prefill", "decode"] | Callable[[Step], bool] | None
"""In which forwards something acts: all (None), those of prompts, those that add tokens, or by a predicate."""


def check_steps(steps: Any) -> Steps:
    """``steps`` itself.

    Raises:
        SelectionError: it is none.
    """
    if steps is None or callable(steps) or (isinstance(steps, str) and steps in ("prefill", "decode")):
        return steps  # type: ignore[no-any-return]
    raise SelectionError(
        f"steps is 'prefill', 'decode', a predicate of a Step, or None for all, got {steps!r}", selector=steps
    )


class Clock:
    """Tells the step of each forward from what it feeds and what its cache holds.

    It listens to the models that receive the cache: every module whose forward takes a cache and tokens, wherever it
    sits below a wrapper; of those that run inside one another the outermost counts. A model without any is one forward
    after the other. The clock registers no hook: whoever uses it calls :meth:`begin` before and :meth:`end` after each
    forward of the modules in ``receivers``, also after one that raised.

    A forward is *prefill* if nothing is cached, or if it feeds several tokens beside a cache: a chunk of a prompt, the
    prompt of a second turn. It is *decode* if it feeds one token beside a cache; if it feeds what ``logits_to_keep``
    keeps (assisted decoding); or if, without a cache, it repeats the ids of the forward before with one more. The last
    chunk of a prompt may be a single token: it is known by its mask or position ids, which are the next part of the
    memory of those of the chunk before.

    Args:
        model: the model that the user holds.
        prompt: the length of the prompt, where that cannot be told; then every token beyond it is decoded.

    Attributes:
        receivers: the modules that tick, by path.

    Example:
        >>> clock = Clock(nn.Linear(2, 2))
        >>> clock.begin("", (), {})
        >>> clock.step_at("")
        Step(forward=0, decoded=0, past=0, fed=0)
    """

    def __init__(self, model: nn.Module, *, prompt: int | None = None) -> None:
        if prompt is not None and (type(prompt) is not int or prompt < 1):
            raise SelectionError(f"prompt is the number of its tokens, from 1, got {prompt!r}", selector=prompt)
        self.prompt = prompt
        self.receivers = _receivers(model)
        self._counters = {path: _Counter(forward_names(each), prompt) for path, each in self.receivers.items()}
        self._running: list[str] = []
        self._step: Step | None = None

    def __repr__(self) -> str:
        return f"Clock({listed(list(self.receivers))}, {self._step})"

    def begin(self, path: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The forward of the receiver at ``path`` begins.

        Raises:
            ContextError: what it feeds can be a prompt or a continuation of one.
        """
        while self._running and not _inside(path, self._running[-1]):  # left by an exception that no hook saw
            self._running.pop()
        if not self._running:
            counter = self._counters[path]
            self._step = counter.count(named_arguments(counter.names, args, kwargs))
        self._running.append(path)

    def end(self, path: str) -> None:
        """The forward of the receiver at ``path`` has ended, or was left by an exception."""
        if path in self._running:
            del self._running[self._running.index(path) :]

    def step_at(self, path: str) -> Step:
        """The step in which the site at ``path`` fires; in a backward that of the last forward.

        Raises:
            ContextError: no receiver is running.
        """
        if self._step is None or not (self._running or in_backward()):
            where = [f"{each}.*" if each else "the model itself" for each in self.receivers]
            raise ContextError(
                f"the site at {path!r} fired outside of every forward that tells the step ({listed(where)}): choose a "
                "site below one of these, call the model and not a part of it, or leave steps= out"
            )
        return self._step

    def acts(self, steps: Steps, path: str) -> bool:
        """Whether something with these ``steps`` acts at the site ``path`` now."""
        if steps is None:
            return True
        step = self.step_at(path)
        return bool(steps(step)) if callable(steps) else step.is_prefill == (steps == "prefill")

    def reset(self) -> None:
        """Forget every prompt and running forward."""
        self._running.clear()
        self._step = None
        for each in self._counters.values():
            each.reset()


def _receivers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward takes a cache and tokens; without any those nearest the root that take a cache."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        names = forward_names(module)
        inside = any(_inside(path, each) for each in found)
        built_in = type(module).__module__.startswith("torch.nn") and path
        takes = any(name in names for name in CACHE_NAMES) and not built_in
        if takes and (not inside or any(name in names for name in _TOKENS)):
            found[path] = module
    return found or {"": model}


def _inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(outer + "."))


class _Decoding:
    """What was seen of the prompt, and of what followed it, that one cache belongs to."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.prompt = total
        self.fed = 0
        self.decoding = False
        self.candidates = 0
        """Of the tokens of the first forward, how many an assistant may have proposed."""
        self.views: dict[Any, Tensor] = {}


class _Counter:
    """The steps of one receiver."""

    def __init__(self, names: tuple[str, ...], prompt: int | None) -> None:
        self.names = names
        self._prompt = prompt
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._forward = -1
        self._ids: Tensor | None = None
        self._unnamed = _Decoding()
        self._by_cache: dict[int, tuple[weakref.ref[Any], _Decoding]] = {}

    def count(self, arguments: Mapping[Any, Any]) -> Step:
        """The step of a forward with these arguments."""
        cached, tokens = cached_in(arguments), tokens_fed(arguments)
        fed = 0 if tokens is None else tokens.shape[1]
        sequence, known = self._sequence_of(cached, grown=not cached.filled and self._grows(tokens, arguments))
        past = sequence.total if cached.length is None else cached.length
        step = _Forward(arguments, past, fed, known)
        if self._prompt is not None:
            sequence.prompt = min(self._prompt, past + fed)
            sequence.decoding = past + fed > self._prompt
        elif not cached.filled:
            sequence.decoding = known
            if not known:
                sequence.prompt, sequence.candidates = fed, step.candidates
        elif step.decodes(sequence):
            self._begin_decoding(sequence, step)
        else:
            sequence.decoding, sequence.prompt = False, past + fed
        decoded = self._decoded(sequence, step)
        sequence.total, sequence.fed, sequence.views = past + fed, fed, step.views
        self._forward += 1
        return Step(self._forward, decoded, past, fed)

    def _begin_decoding(self, sequence: _Decoding, step: _Forward) -> None:
        if sequence.decoding:
            return
        sequence.decoding = True
        if not step.known:
            sequence.prompt = step.past
        elif step.assisted or step.past < sequence.total:
            sequence.prompt -= sequence.candidates

    @staticmethod
    def _decoded(sequence: _Decoding, step: _Forward) -> int:
        # A window that slides over the ids feeds no more of them, and yet adds one.
        return max(1, step.past + step.fed - sequence.prompt) if sequence.decoding else 0

    def _sequence_of(self, cached: Cached, *, grown: bool) -> tuple[_Decoding, bool]:
        """What is known of the sequence that a cache belongs to, and whether anything is."""
        if grown:
            return self._unnamed, True
        if cached.cache is None:
            self._unnamed = _Decoding()
            return self._unnamed, False
        key = id(cached.cache)
        reference, sequence = self._by_cache.get(key, (None, self._unnamed))
        known = reference is not None and reference() is cached.cache
        if not cached.filled:
            sequence, known = _Decoding(), False
        elif not known:  # made by the forward before, which was given none; or one that cannot be told by identity
            known = self._unnamed.total > 0 and cached.length in (None, self._unnamed.total)
            sequence = self._unnamed if known else _Decoding(cached.length or 0)
        try:
            self._by_cache[key] = (weakref.ref(cached.cache, lambda _: self._by_cache.pop(key, None)), sequence)
        except TypeError:
            self._unnamed = sequence
        return sequence, known

    def _grows(self, tokens: Tensor | None, arguments: Mapping[Any, Any]) -> bool:
        """Whether the fed ids are those of the forward before with one more: generation without a cache."""
        before, self._ids = self._ids, None
        uses_cache = arguments.get("use_cache") is not False and "use_cache" in arguments
        if tokens is None or tokens.dim() != 2 or tokens.is_floating_point() or uses_cache:
            return False
        self._ids = tokens.detach().clone()  # the caller may write into its own
        if before is None or before.shape[0] != tokens.shape[0] or before.device != tokens.device:
            return False
        if tokens.shape[1] == before.shape[1] and self._unnamed.decoding:
            before = before[:, 1:]  # a full context window slides
        if tokens.shape[1] != before.shape[1] + 1 or not before.shape[1]:
            return False
        # Beams change their rows: each begins as some row did.
        return bool((tokens[:, None, :-1] == before[None]).all(-1).any(1).all())


class _Forward:
    """One call, as far as it tells its phase."""

    def __init__(self, arguments: Mapping[Any, Any], past: int, fed: int, known: bool) -> None:
        self.past, self.fed, self.known = past, fed, known
        keep = arguments.get("logits_to_keep")
        self.candidates = keep - 1 if type(keep) is int and 1 < keep <= fed else 0
        self.assisted = 1 < fed == self.candidates + 1
        self._is_encoder_decoder = "decoder_input_ids" in arguments and "logits_to_keep" not in arguments
        self.views = {
            name: each
            for name, each in arguments.items()
            if isinstance(each, Tensor) and each.dim() == 2 and ("mask" in str(name) or "position_ids" in str(name))
        }

    def decodes(self, sequence: _Decoding) -> bool:
        """Whether it adds to the prompt, of which something is cached."""
        if self.fed > 1:
            if self._is_encoder_decoder and self.known:
                raise ContextError(
                    f"{self.fed} tokens beside {self.past} cached ones can be candidates of assisted decoding or more "
                    "of the prompt, and this model takes no logits_to_keep, which tells them apart; give the clock "
                    "the prompt's length: prompt=..."
                )
            return self.assisted
        if sequence.decoding or not self.known or not self._continues(sequence):
            return True
        if sequence.fed > 1:
            return False  # the rest of a prompt that was cut into chunks
        raise ContextError(
            "a single token whose mask is a view of the same memory as the one before can be a chunk of a prompt or a "
            "token that is added; give the clock the prompt's length: prompt=..., or pass masks of their own memory"
        )

    def _continues(self, sequence: _Decoding) -> bool:
        """Whether a mask or position ids are the next part of the tensor that those before were a part of."""
        for name, view in self.views.items():
            before = sequence.views.get(name)
            if before is None or storage_address(before) != storage_address(view):
                continue
            end = view.storage_offset() + view.shape[1]
            if before.storage_offset() + before.shape[1] + self.fed == end:
                width = view.stride(0) or view.untyped_storage().nbytes() // view.element_size()
                if end == width or sequence.fed == 1:
                    return True
        return False
