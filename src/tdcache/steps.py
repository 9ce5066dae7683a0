"""The clock of generation: which forwards read a prompt, and which add tokens to it.

``generate()`` calls a model once for the prompt and then once for each token. An edit for one of these phases has to
tell them apart, from nothing but the tokens of one call and the contents of its cache. All of the library uses this
clock, so that ``steps="decode"`` means the same in an edit, a capture and a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tdcache.arguments import Cached, cached_in, forward_names, named_arguments, takes_cache, tokens_fed
from tdcache.errors import ContextError, SelectionError, listed
from tdcache.inplace import storage_address
from tdcache.introspect import in_backward
from tdcache.tables import html_table

__all__ = ["Clock", "Step", "Steps", "check_steps"]

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")
_READ = tuple((name,) for name in (*_TOKENS[:2], "input_features", "input_values", "pixel_values"))
_BY_PAST = "; give steps= a predicate of what is cached, such as lambda step: step.past < 12 for a prompt of 12 tokens"
_BY_FED = "; give steps= a predicate of what is fed, such as lambda step: step.fed > 1"


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
        phase = "not told" if isinstance(self, _Untold) else "prefill" if self.is_prefill else "decode"
        return html_table(f"Step ({phase})", self._fields, [[str(value) for value in self]], right=self._fields)


class _Untold(Step):
    """A step that may read a prompt or add to it: its ``decoded`` raises, and its other fields are known."""

    reason: str

    @property
    def decoded(self) -> int:
        raise ContextError(self.reason)


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
    """Determines the step of each forward from its tokens and the contents of its cache.

    It listens to the models that receive the cache: every module whose forward takes a cache and tokens, wherever it
    sits below a wrapper, and every encoder; of those that run inside one another the outermost counts. A model without
    any is one forward after the other. The clock registers no hook: whoever uses it calls :meth:`begin` before and
    :meth:`end` after each forward of the modules in ``receivers``, also after one that raised.

    A forward is *prefill* if nothing is cached, or if it feeds several tokens beside a cache: a chunk of a prompt, the
    prompt of a second turn. It is *decode* if it feeds one token beside a cache; if it feeds what ``logits_to_keep``
    keeps (assisted decoding); or if, without a cache, it repeats the ids of the forward before with one more. The last
    chunk of a prompt may be a single token: it is known by its mask or position ids, which are the next part of the
    memory of those of the chunk before. Where none of this tells, the ``decoded`` of a step is an error.

    Args:
        model: the model that the user holds.

    Attributes:
        receivers: the modules that tick, by path.
        encoders: the paths of those without a cache, which tick when they are called by themselves.

    Example:
        >>> clock = Clock(nn.Linear(2, 2))
        >>> clock.begin("", (), {})
        >>> clock.step_at("")
        Step(forward=0, decoded=0, past=0, fed=0)
    """

    def __init__(self, model: nn.Module) -> None:
        self.receivers, self.encoders = _receivers(model)
        self._counters = {path: _Counter(forward_names(each)) for path, each in self.receivers.items()}
        self._running: list[str] = []
        self._step: Step | None = None

    def __repr__(self) -> str:
        return f"Clock({listed(list(self.receivers))}, {self._step})"

    def begin(self, path: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The forward of the receiver at ``path`` begins."""
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
        """Whether something with these ``steps`` acts at the site ``path`` now.

        Raises:
            ContextError: no receiver is running, or it is not told whether it reads a prompt.
        """
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


def _receivers(model: nn.Module) -> tuple[dict[str, nn.Module], frozenset[str]]:
    """The modules whose forward takes a cache and tokens, and the root if it takes a cache; beside them the encoders.

    Without any the outermost that take a cache; for layers in a list the model that has the list. An encoder reads
    tokens, images or sound without a cache, and may be called by itself.
    """
    modules = dict(model.named_modules())
    names = {path: forward_names(module) for path, module in modules.items()}
    built_in = {path for path, module in modules.items() if path and type(module).__module__.startswith("torch.nn")}
    takes = [path for path in modules if path not in built_in and takes_cache(names[path])]
    found = [path for path in takes if not path or any(name in _TOKENS for name in names[path])]
    found = found or _outermost([_owner(path, modules) for path in _outermost(takes)]) or [""]
    reads = [path for path in modules if names[path][:1] in _READ and any(modules[path].children())]
    apart = [path for path in reads if not any(path == each or _inside(each, path) for each in found)]
    encoders = frozenset(_outermost(apart))
    return {path: modules[path] for path in (*found, *encoders)}, encoders


def _outermost(paths: list[str]) -> list[str]:
    return [path for path in dict.fromkeys(paths) if not any(_inside(path, outer) for outer in paths)]


def _owner(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of a module, or if it is an entry of a list or dict, that of the module which has it."""
    while isinstance(modules[outer := path.rpartition(".")[0]], nn.ModuleList | nn.ModuleDict) and path:
        path = outer
    return outer if isinstance(modules[path], nn.ModuleList | nn.ModuleDict) else path


def _inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(outer + "."))


class _Decoding:
    """What was seen of the prompt, and of what followed it, that one cache belongs to."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.prompt = total
        self.fed = 0
        self.decoding = False
        self.chunks = 0
        """Of how many forwards the prompt consists so far."""
        self.candidates = 0
        """Of the tokens of the first forward, how many an assistant may have proposed."""
        self.untold = ""
        """Why it is not told what its forwards do."""
        self.views: dict[Any, Tensor] = {}


class _Counter:
    """The steps of one receiver."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._takes_cache = takes_cache(names)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._forward = -1
        self._ids: Tensor | None = None
        self._unnamed = self._latest = _Decoding()
        self._by_cache: dict[int, tuple[weakref.ref[Any], _Decoding]] = {}

    def count(self, arguments: Mapping[Any, Any]) -> Step:
        """The step of a forward with these arguments."""
        cached, tokens = cached_in(arguments), tokens_fed(arguments)
        fed = 0 if tokens is None else tokens.shape[1]
        before, growth = self._latest, self._growth(tokens)
        uncached = not self._takes_cache or arguments.get("use_cache") is False or "use_cache" not in arguments
        repeats = growth == "appended" and uncached and not cached.filled
        sequence, known = (before, True) if repeats else self._sequence_of(cached)
        if growth == "appended" and cached.length is not None and cached.length > sequence.total > 0:
            repeats, cached = True, Cached(cached.cache, 0)  # the model cuts off what its cache holds (CPMAnt)
        past = sequence.total if cached.length is None else cached.length
        step = _Forward(arguments, past, fed, known)
        if repeats:
            sequence.decoding = True
        elif not cached.filled:
            sequence.prompt, sequence.candidates, sequence.decoding = fed, step.candidates, False
            if not self._takes_cache and before.fed and _is_token(tokens, before.fed):
                sequence.untold = (
                    "a single token of a model that takes no cache can be a prompt or one that is added" + _BY_FED
                )
            elif growth == "inserted" and (uncached or cached.cache is not None):
                sequence.untold = "ids of the forward before with one between them can be another prompt" + _BY_FED
        elif step.decodes(sequence):
            self._begin_decoding(sequence, step)
        else:
            sequence.decoding, sequence.prompt = False, past + fed
        self._latest = sequence
        sequence.chunks = 0 if sequence.decoding else sequence.chunks + 1
        decoded = self._decoded(sequence, step)
        sequence.total, sequence.fed, sequence.views = past + fed, fed, step.views
        self._forward += 1
        if not sequence.untold:
            return Step(self._forward, decoded, past, fed)
        untold = _Untold(self._forward, None, past, fed)  # type: ignore[arg-type]
        untold.reason = sequence.untold
        return untold

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

    def _sequence_of(self, cached: Cached) -> tuple[_Decoding, bool]:
        """What is known of the sequence that a cache belongs to, and whether anything is."""
        if cached.cache is None:
            known = cached.filled and self._unnamed.total == cached.length
            self._unnamed = self._unnamed if known else _Decoding(cached.length or 0)
            return self._unnamed, known
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

    def _growth(self, tokens: Tensor | None) -> Literal["", "appended", "inserted"]:
        """How the fed ids are those of the forward before with one more; a full context window slides."""
        before, self._ids = self._ids, None
        if tokens is None or tokens.dim() != 2 or tokens.is_floating_point():
            return ""
        self._ids = tokens.detach().clone()  # the caller may write into its own
        if before is None or before.shape[0] != tokens.shape[0] or before.device != tokens.device:
            return ""
        if tokens.shape == before.shape and (self._latest.decoding or not torch.equal(tokens, before)):
            before = before[:, 1:]
        if tokens.shape[1] != before.shape[1] + 1 or not before.shape[1]:
            return ""
        if _begin_as(tokens[:, :-1], before):
            return "appended"
        same_end = before.shape[1] > 1 and torch.equal(tokens[:, -1], before[:, -1])  # such as a mask (XLM)
        return "inserted" if same_end and _begin_as(tokens[:, :-2], before[:, :-1]) else ""


def _begin_as(rows: Tensor, before: Tensor) -> bool:
    """Whether each row is one of those before; beams change theirs."""
    return bool((rows[:, None] == before[None]).all(-1).any(1).all())


def _is_token(tokens: Tensor | None, before: int) -> bool:
    """Whether one token a row is fed, after ``before``: an id, or a vector after several."""
    if tokens is None or tokens.shape[1] != 1:
        return False
    return (tokens.dim() == 2 and not tokens.is_floating_point()) or (tokens.dim() == 3 and before > 1)


class _Forward:
    """One call, as far as it tells its phase."""

    def __init__(self, arguments: Mapping[Any, Any], past: int, fed: int, known: bool) -> None:
        self.past, self.fed, self.known = past, fed, known
        keep = arguments.get("logits_to_keep")
        self.candidates = keep - 1 if type(keep) is int and 1 < keep <= fed else 0
        self.assisted = 1 < fed == self.candidates + 1
        self._is_encoder_decoder = "decoder_input_ids" in arguments and "logits_to_keep" not in arguments
        self._takes_positions = "position_ids" in arguments
        self._permutes = arguments.get("perm_mask") is not None
        self.views = {
            name: each
            for name, each in arguments.items()
            if isinstance(each, Tensor) and each.dim() == 2 and ("mask" in str(name) or "position_ids" in str(name))
        }

    def decodes(self, sequence: _Decoding) -> bool:
        """Whether it adds to the prompt, of which something is cached; in the sequence is noted if it is not told."""
        if self.fed > 1:
            if self._is_encoder_decoder and self.known:
                sequence.untold = (
                    f"{self.fed} tokens beside {self.past} cached ones can be candidates of assisted decoding or more "
                    "of the prompt, and this model takes no logits_to_keep, which tells them apart" + _BY_PAST
                )
            elif self._permutes:
                sequence.untold = "beside a perm_mask, tokens are fed again of which some are cached" + _BY_PAST
            return self.assisted
        if sequence.decoding or not self.known:
            return True
        if self._continues(sequence):
            if sequence.fed == 1:
                sequence.untold = (
                    "a single token whose mask is a view of the same memory as the one before can be a chunk of a "
                    "prompt or a token that is added" + _BY_PAST
                )
            return False  # the rest of a prompt that was cut into chunks
        if sequence.chunks > 1 and not (self.views or self._takes_positions):
            sequence.untold = (
                "a single token after several chunks of a prompt can be the rest of it or a token that is added, as "
                "neither a mask nor position_ids are given" + _BY_PAST
            )
        return True

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
