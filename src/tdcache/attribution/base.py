"""The base of attribution methods: recipes that request activations and gradients from a shared pass and reduce them.

All methods that are open on one model share a pass: the outermost one collects the requests of all, runs them, and
writes every method's scores. Otherwise four methods would cost four forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.attribution.frame import Frame
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, Modifies, Point
from tdcache.attribution.runner import Runner
from tdcache.attribution.survey import Survey
from tdcache.attribution.targets import TargetLike
from tdcache.contexts import HookingContextFactory
from tdcache.errors import AttributionError, DirectionError, TdcacheError
from tdcache.function_calls.stand_in import check_selector
from tdcache.hooks import MultiHookHandle
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.place_modules import refuse_at_names, sites_of
from tdcache.selection import Selection
from tdcache.types import CacheKey, HookDirection, Match, Pick, Selector

__all__ = ["Attribution", "RoleAttribution", "Scores", "SiteAttribution", "Work"]

Scores: TypeAlias = Mapping[tuple[Any, ...], Any]
"""The scores by full key, such as ``("attr", "layers.0")``."""

Forward: TypeAlias = Callable[[TensorDictBase], TensorDictBase]

Work: TypeAlias = Generator[Iterable[Ask], None, Scores]
"""A running method: a generator that yields requests, is resumed once its sinks have the values, and returns scores."""


@dataclass(frozen=True, eq=False, slots=True)
class _Member:
    """One method that is open on one model."""

    factory: Attribution
    model: nn.Module
    selections: Mapping[str, Selection]

    def remove(self) -> None:
        """Leave; a second call does nothing."""
        crowd = _OPEN.get(self.model, [])
        if self in crowd:
            crowd.remove(self)


# The methods that are open, by model: what makes them share a pass. Entries leave with their contexts.
_OPEN: WeakKeyDictionary[nn.Module, list[_Member]] = WeakKeyDictionary()
_RUNNING: ContextVar[frozenset[int]] = ContextVar("tdcache_attribution_running", default=frozenset())


class Attribution(HookingContextFactory):
    """Base of the methods; override :meth:`work`, and :meth:`selectors_by_role` where sites are selected.

    Args:
        target: the scalar per row to explain: a callable on the output TensorDict, an index into the last axis
            of the first output, a tensor of one index per row, ``(out_key, index)``, or a list or dict of these, whose
            scores are keyed by position or name.
        name: an additional key, ``("attr", name, ...)``, in case several methods would write the same entry.
        modifiers: modifiers of the backward, for this method only.
        chunk: the number of points (steps of a path, samples) per forward; None for all.
        create_graph: keep the scores differentiable.
        snapshot: copy activations when they are captured; by default if the model has modules that work in place.
        inputs: the keys of the inputs that are scored and moved along paths; the others are held constant. All
            floating-point inputs by default.
        allow_unused: give sites that the target does not depend on scores of zero, and modules that do not run no
            scores, instead of raising an error.
        names: the canonical names of the model, ``tdcache.names(model)``, to which selectors then refer and by which
            scores are keyed.
    """

    reduce: int | Sequence[int] | None = None
    """The axes of the scores that are summed; see :class:`SiteAttribution`."""

    def __init__(
        self,
        *,
        target: TargetLike = None,
        name: str | None = None,
        modifiers: Sequence[Modifies] = (),
        chunk: int | None = None,
        create_graph: bool = False,
        snapshot: bool | None = None,
        inputs: Sequence[CacheKey] | None = None,
        allow_unused: bool = False,
        names: Names | None = None,
    ) -> None:
        super().__init__()
        refuse_at_names(names, ())
        self.names = names
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is the number of points in one forward, at least 1; got {chunk}")
        self.target = target
        self.name = name
        self.modifiers = tuple(modifiers)
        self.chunk = chunk
        self.create_graph = create_graph
        self.snapshot = snapshot
        self.inputs = None if inputs is None else tuple(inputs)
        self.allow_unused = allow_unused

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target={self.target!r})"

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {}

    def places(self, role: str, paths: Sequence[str]) -> list[Place]:
        """The places to score at the modules of one role."""
        return [Place("out", path) for path in paths]

    def work(self, frame: Frame) -> Work:
        """Request points, reduce their values, and return the scores."""
        raise NotImplementedError

    def _summed(self, scores: Tensor) -> Tensor:
        """Sum the axes of ``reduce``."""
        if self.reduce is None:
            return scores
        return scores.sum(dim=self.reduce if isinstance(self.reduce, int) else tuple(self.reduce))

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        model = module.model
        selections = {
            role: sites_of(model, selector, self.names, match=match)
            for role, (selector, match) in self.selectors_by_role().items()
        }
        member = _Member(self, model, selections)
        _OPEN.setdefault(model, []).append(member)
        return MultiHookHandle([member])

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        model = module.model
        running = _RUNNING.get()
        if id(model) in running:  # another method's pass: it asks us when it is our turn
            return forward(data)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._run_module(module, data, forward)
        token = _RUNNING.set(running | {id(model)})
        try:
            return _any_batch(module, data, forward, list(_OPEN.get(model, ())))
        finally:
            _RUNNING.reset(token)


class SiteAttribution(Attribution):
    """Base of the methods that explain values inside the model.

    Args:
        selector: which modules; None for the inputs of the model, if the method supports these.
        match: how patterns are compared with paths.
        direction: ``"fwd"`` for the outputs of modules, ``"fwd_pre"`` for their inputs. The gradient of an input is
            that from the module's own use of it.
        pick: which tensor of a structured value; or a list of picks, whose scores are written below the path:
            ``("attr", path, "0")``.
        call: which call of a module that runs several times in one forward; 0 the first, -1 the last.
        reduce: the axes of the scores to sum, such as -1 for the features.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        selector: Selector | None,
        *,
        match: Match = "full",
        direction: HookDirection = "fwd",
        pick: Pick | list[Pick] = None,
        call: int | None = None,
        reduce: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if selector is not None:
            check_selector(selector, match)  # refuse an invalid selector now rather than on entering
        if direction not in ("fwd", "fwd_pre"):
            raise DirectionError(
                f"attribution explains what modules return, 'fwd', or read, 'fwd_pre'; got {direction!r}"
            )
        refuse_at_names(self.names, [direction])
        if pick == "all":
            raise ValueError("pick='all' does not say how many scores there are; give a list, such as pick=[0, 1]")
        self.selector = selector
        self.match: Match = match
        self.direction = direction
        self.pick = pick
        self.call = call
        self.reduce = reduce

    def __repr__(self) -> str:
        where = "" if self.selector is None else f"{self.selector!r}, "
        return f"{type(self).__name__}({where}target={self.target!r})"

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {} if self.selector is None else {"sites": (self.selector, self.match)}

    def places(self, role: str, paths: Sequence[str]) -> list[Place]:
        """The places to score at the selected modules."""
        kind = "out" if self.direction == "fwd" else "in"
        if not isinstance(self.pick, list):
            return [Place(kind, path, self.pick, self.call) for path in paths]
        parts = {pick: tuple(map(str, pick if isinstance(pick, tuple) else (pick,))) for pick in self.pick}
        return [Place(kind, path, pick, self.call, part) for path in paths for pick, part in parts.items()]


class RoleAttribution(Attribution):
    """Base of the methods that select modules in several roles; they call :meth:`select_by` when they are made."""

    selectors: Mapping[str, Selector]
    """The selectors by role."""
    match: Match

    def select_by(self, match: Match, **selectors: Selector) -> None:
        """Keep the selectors of the roles; an unusable one is refused here, not on entering."""
        for selector in selectors.values():
            check_selector(selector, match)
        self.selectors, self.match = selectors, match

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {role: (selector, self.match) for role, selector in self.selectors.items()}


def _any_batch(module: HookedModule, data: TensorDictBase, forward: Forward, crowd: list[_Member]) -> TensorDictBase:
    """The pass; several batch dimensions become one for a model that does not take them, such as a convolution."""
    if data.batch_dims < 2:
        return _shared_pass(module, data, forward, crowd)
    try:
        return _shared_pass(module, data, forward, crowd)
    except TdcacheError:
        raise
    except (RuntimeError, ValueError) as refusal:
        flat = data.reshape(-1)
        try:
            result = _shared_pass(module, flat, forward, crowd)
        except (RuntimeError, ValueError):
            raise refusal from None
    shape = data.batch_size
    for key, value in result.items(include_nested=True, leaves_only=True):
        if data.get(key, None) is None:
            data.set(key, value.reshape(*shape, *value.shape[1:]))
    return data


def _shared_pass(module: HookedModule, data: TensorDictBase, forward: Forward, crowd: list[_Member]) -> TensorDictBase:
    given, bare = dict(data.items()), data
    if not _RESULTS.isdisjoint(given):
        bare = data.exclude(*_RESULTS.intersection(given))
    given = dict(_leaves(bare))
    runner = _runner(module, _without_inference(bare, given), forward, crowd)
    base = Point(label="base")
    works = []
    for member in crowd:
        frame = Frame(runner, data, member.factory, member.selections, base=base)
        works.append((member.factory, member.factory.work(frame)))
    scores = _work_together(runner, works, base)
    for key, value in _leaves(runner.finish(base)):
        if key not in given or key in runner.out_keys:
            data.set(key, value if runner.create_graph else value.detach())
    for key, value in scores.items():
        _write(data, key, value)
    return data


_RESULTS = frozenset({"attr", "gap", "leak", "baseline", "corrupt"})


def _leaves(data: TensorDictBase) -> Iterable[tuple[Any, Any]]:
    """The entries, with those of nested TensorDicts in their place."""
    flat = list(data.items())
    for _, value in flat:
        if not isinstance(value, Tensor):
            return data.items(include_nested=True, leaves_only=True)
    return flat


def _runner(module: HookedModule, data: TensorDictBase, forward: Forward, crowd: list[_Member]) -> Runner:
    model, called = module.model, module.td_module
    survey = Survey.of(model)
    runner = Runner(
        model,
        forward,
        data,
        in_keys=called.in_keys,
        out_keys=called.out_keys,
        watched=survey.watched or _runs_otherwise(module),
        survey=survey,
    )
    for member in crowd:
        runner.add(member.factory, member.selections.values())
    return runner


def _without_inference(data: TensorDictBase, given: Mapping[Any, Any]) -> TensorDictBase:
    """A copy of inference tensors, which cannot take part in a backward."""
    found = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor) and value.is_inference()}
    return data.copy().update(found) if found else data


def _runs_otherwise(module: HookedModule) -> bool:
    inner: Any = module.td_module
    while isinstance(inner, HookedModule):
        context = inner.hooking_context
        if context is not None and context.runs_module and not isinstance(context.factory, Attribution):
            return True
        inner = inner.td_module
    return False


def _work_together(runner: Runner, works: list[tuple[Attribution, Work]], base: Point) -> dict[tuple[Any, ...], Any]:
    """Collect the requests of all methods and run them together, until each method has returned its scores."""
    scores: dict[tuple[Any, ...], Any] = {}
    while works:
        asks: list[Ask] = []
        left = []
        for factory, work in works:
            try:
                asks += next(work)
            except StopIteration as done:
                for key, value in done.value.items():
                    if key in scores:
                        raise AttributionError(
                            f"two methods in one pass write {key!r}; tell them apart with name='...'"
                        ) from None
                    keep = factory.create_graph or not isinstance(value, Tensor)
                    scores[key] = value if keep else value.detach()
            else:
                left.append((factory, work))
        works = left
        if asks:
            runner.run(asks, base)
    return scores


def _write(data: TensorDictBase, key: tuple[Any, ...], value: Any) -> None:
    try:
        data.set(key, value)
    except RuntimeError as error:
        if not isinstance(value, Tensor | TensorDictBase) or value.shape[: data.batch_dims] == data.batch_size:
            raise
        raise AttributionError(
            f"the scores {key!r} have shape {tuple(value.shape)}, which does not begin with the batch size "
            f"{tuple(data.batch_size)}; call with a TensorDict of batch_size=[]"
        ) from error
