"""``attach``: runs pipelines that were written for a hand-written forward at module paths of any model.

Without it a pipeline would need a model whose forward calls it; here a forward hook makes that call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.current_call import CurrentCall, InSteps
from tdcache.errors import HookSignatureError, InplaceModificationError
from tdcache.function_calls.stand_in import check_selector
from tdcache.hooks import MultiHookHandle, Order, OutputPort, Port, port_at
from tdcache.hooks import attach as attach_hook
from tdcache.hooks.gradients import handed_on
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import check_fits, leaves
from tdcache.inplace import NO_COUNTER, eager_version_of, shares_memory
from tdcache.introspect import add_tensor_hook, has_tensor_hooks, in_backward
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.pipeline.collection import HookCollection
from tdcache.pipeline.hooks import Hook, HookNode, Hooks
from tdcache.pipeline.prepared import VARYING, HookStep, laid_out, run_steps
from tdcache.place_modules import refuse_at_names
from tdcache.selection import Site, distinct_sites
from tdcache.steps import Steps, check_steps
from tdcache.types import Match, Pick, Selector

__all__ = ["AttachedPipeline", "attach"]

Where: TypeAlias = "Selector | Mapping[str, Selector]"


_NONE: dict[str, Any] = dict.fromkeys(VARYING)


class _ForwardCounter(Transient):
    """Counts the forwards of a model."""

    def __init__(self) -> None:
        self.forward = -1

    def begin(self, module: nn.Module, args: Any) -> None:
        """Hook of the root: a forward begins."""
        if not in_backward():
            self.forward += 1


@dataclass(slots=True, eq=False)
class _AttachedHook(Transient):
    """The pipeline of one site, as a hook on its module."""

    port: Port
    steps: tuple[HookStep, ...]
    counter: _ForwardCounter
    call: CurrentCall | None = None
    """The call tracker for ``steps=``; None if the pipeline acts in all forwards."""
    order: int = Order.EDIT
    calls: int = 0
    """How often the module has run in the current forward."""
    forward: int = -1
    counts: bool = field(init=False)
    """Whether some hook takes ``call=``."""

    def __post_init__(self) -> None:
        self.counts = any(step.varying for step in self.steps)

    @property
    def hook(self) -> Callable[..., Any]:
        """The method to register: the fast one for plain tensor outputs, unless ``pick`` is given."""
        if self.call is not None:
            return self.on_step
        return self.on_plain if isinstance(self.port, OutputPort) and self.port.pick is None else self.on_call

    def _values(self) -> dict[str, Any]:
        return {"call": self._next_call(), "forward": self.forward} if self.counts else _NONE

    def _next_call(self) -> int | None:
        """The number of this call; None if a checkpoint recomputes one of several calls."""
        if in_backward():
            return 0 if self.calls == 1 else None
        if self.forward != self.counter.forward:
            self.forward, self.calls = self.counter.forward, 0
        self.calls += 1
        return self.calls - 1

    def on_step(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """:meth:`on_call` in the forwards that ``steps`` select."""
        call = self.call
        return self.on_call(module, args, rest) if call is None or call.is_due(self.port.path) else None

    def on_plain(self, module: nn.Module, args: Any, output: Any) -> Any:
        """:meth:`on_call` for a tensor output, at the cost of a hand-written hook."""
        try:
            version = output._version
        except (AttributeError, RuntimeError):  # an inference tensor, or not a tensor
            version = NO_COUNTER
        if version == NO_COUNTER or type(output) is not Tensor:
            return self.on_call(module, args, output)
        values = self._values() if self.counts else _NONE
        new = output
        for hook, varying, gradient in self.steps:
            if gradient is not None and new is output and _is_made_here(module, args, output):
                add_tensor_hook(output, partial(gradient.on_grad, values=values) if varying else gradient.on_grad)
                continue
            changed = hook(new, **{name: values[name] for name in varying}) if varying else hook(new)
            if changed is not None:
                new = changed
        if output._version != version:
            self._check_input(args, output)
        if new is output:
            return None
        check_fits(new, output, self.port.path)
        return new

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """Pass the value through the pipeline."""
        x = self.port.read(module, args, rest)
        version = eager_version_of(x)
        new = run_steps(self.steps, x, self._values())
        if eager_version_of(x) != version and isinstance(self.port, OutputPort):
            self._check_input(args, x)
        return None if new is x else self.port.write(module, args, rest, new)

    def _check_input(self, args: Any, x: Tensor) -> None:
        if any(shares_memory(x, each) for _, each in leaves(args)):
            raise InplaceModificationError(
                f"a hook at {self.port.path!r} wrote into the output in place, which is also the module's input and "
                "may be used elsewhere; return a new tensor instead, e.g. from x.clone()",
                paths=(self.port.path,),
            )


@torch.compiler.substitute_in_graph(_AttachedHook.on_plain, skip_signature_check=True)
def _on_plain_in_graph(self: _AttachedHook, module: nn.Module, args: Any, output: Any) -> Any:
    """:meth:`_AttachedHook.on_plain` in a compiled graph, where version counters are not known while tracing."""
    return self.on_call(module, args, output)


def _is_made_here(module: nn.Module, args: Any, x: Tensor) -> bool:
    """Whether ``module`` computed ``x`` and it has no hook yet, so that a tensor hook on ``x`` itself is enough."""
    if x.grad_fn is None or x._base is not None or has_tensor_hooks(x) or not torch.is_grad_enabled():
        return False
    return args[0] is not x if len(args) == 1 and type(args[0]) is Tensor else not handed_on(module, x, args)


class AttachedPipeline(HookingContextFactory):
    r"""A pipeline at every selected module, as a recipe; :func:`attach` binds it to a model.

    Each module gets its own deep copy, with the keyword arguments ``path``, the named groups of the pattern (decimal
    ones as integers, so that ``(?P<layer>\d+)`` gives ``layer=3``), ``call`` (the number of the module's call in this
    forward, from 0) and ``forward`` (the number of the forward since entering) in scope. A module with several names is
    selected once, under the first.

    Pipelines are edits: they run before captures at their site, in the order in which contexts were entered. A graph
    made inside the block keeps its gradient hooks after the block, as it keeps the edited values.

    Args:
        selector: which modules; for a tree such as :class:`~tdcache.pipeline.TransformerHooks`, a mapping from dotted
            names in it to selectors.
        pipeline: any callable ``x -> x``: ``Hooks``, ``FwdBwdHooks``, ``AutoencoderHooks``, a function.
        direction: ``"fwd"`` for the output or ``"fwd_pre"`` for the input.
        pick: which tensor of a structured value: an index, a key or a path of these; the first by default.
        match: ``"full"``, ``"prefix"`` or ``"search"``.
        steps: in which forwards of ``generate()``: ``"prefill"``, ``"decode"``, or a predicate of a
            :class:`tdcache.Step`. All by default.
        names: the canonical names of the model, ``tdcache.names(model)``, which selectors then mean; ``path`` is a
            name.

    Raises:
        HookSignatureError: the pipeline cannot be called.
        SelectionError: the steps or the selector are invalid; on entering, the selector matches nothing.
        PathError: the tree has no such name.
        ValueError: on entering, the pipeline itself has bound a name that a group of the pattern binds.

    Example:
        >>> import torch
        >>> model, seen = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
        >>> with AttachedPipeline(r"(?P<layer>\d)", lambda x, layer: seen.append(layer)).prepare(model) as hooked:
        ...     y = hooked(torch.ones(1, 2))
        >>> seen
        [0, 1]
    """

    def __init__(
        self,
        selector: Where,
        pipeline: Hook | HookNode,
        *,
        direction: Literal["fwd", "fwd_pre"] = "fwd",
        pick: Pick = None,
        match: Match = "full",
        steps: Steps = None,
        names: Names | None = None,
    ) -> None:
        super().__init__()
        refuse_at_names(names, [direction] if direction in ("fwd", "fwd_pre") else ())
        self.names = names
        self._steps = check_steps(steps)
        if direction not in ("fwd", "fwd_pre"):
            raise HookSignatureError(
                f"a pipeline is attached to 'fwd' or 'fwd_pre', got {direction!r}; gradients are its bwd"
            )
        if callable(pick):
            raise HookSignatureError(f"pick= must say where to put the new value; use an index or a key, not {pick!r}")
        self._selector = selector
        self._pipeline = pipeline
        self._direction, self._pick, self._match = direction, pick, match
        self._places = tuple(_places(selector, pipeline, match))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._selector!r}, {self._pipeline!r})"

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        counter, handle = _ForwardCounter(), MultiHookHandle()
        select = module.hooking_context.select
        found = [(node, select(selector, match=self._match)) for node, selector in self._places]
        call = None if self._steps is None else CurrentCall(module.model, InSteps(self._steps))
        with handle.installing():
            handle.add(attach_hook(module.model, counter.begin, "fwd_pre", order=Order.FIRST))
            for node, selection in found:
                for site in distinct_sites(selection):
                    self._attach(site, node, counter, call, handle)
            if call is not None:
                call.attach(handle)
        return handle

    def _attach(
        self, site: Site, node: Any, counter: _ForwardCounter, call: CurrentCall | None, handle: MultiHookHandle
    ) -> None:
        own = copy.deepcopy(node).bind(**{"path": site.path, **_bindings(site.groups)})
        hook = _AttachedHook(port_at(site.path, self._direction, self._pick), tuple(laid_out(own, {})), counter, call)
        handle.add(attach_hook(site.module, hook.hook, hook.port.direction, order=hook.order))


def _places(selector: Where, pipeline: Any, match: Match) -> Iterator[tuple[HookNode, Selector]]:
    if isinstance(selector, Mapping):
        if not isinstance(pipeline, HookCollection):
            raise HookSignatureError(f"a mapping of names to selectors is for a HookCollection, got {pipeline!r}")
        for name, each in selector.items():
            node = pipeline.at(name)
            check_selector(each, match)  # refuse an invalid selector now rather than on entering
            yield _callable_only(node, f"{name!r} is"), each
    else:
        _callable_only(pipeline, "the pipeline is")
        check_selector(selector, match)
        yield pipeline if isinstance(pipeline, HookNode) else Hooks(pipeline), selector


def _callable_only(node: Any, what: str) -> Any:
    if not callable(node):
        more = ""
        if isinstance(node, HookCollection):
            first = node.paths()[0].rpartition(".")[0] if node.paths() else "name"
            more = f"; say which of its places goes where with a mapping, e.g. {{{first!r}: ...}}"
        raise HookSignatureError(f"{what} {type(node).__name__}, which cannot be called as x -> x{more}")
    return node


def _bindings(groups: Mapping[str, str | None]) -> dict[str, Any]:
    return {name: int(text) if text.isdecimal() else text for name, text in groups.items() if text is not None}


def attach(model: nn.Module, selector: Where, pipeline: Hook | HookNode, **options: Any) -> HookingContext:
    """A context in which ``pipeline`` runs at every selected module of ``model``.

    Short for ``AttachedPipeline(selector, pipeline, **options).prepare(model)``; see :class:`AttachedPipeline`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with attach(model, "1", lambda x: x + 1):
        ...     print(bool((model(torch.ones(1, 2)) >= 1).all()))
        True
    """
    return AttachedPipeline(selector, pipeline, **options).prepare(model)
