"""The only reader of torch's private state: hook dicts, compiled frames, and why a module was not called."""

from __future__ import annotations

import gc
import importlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from operator import attrgetter
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "ALONE",
    "CALL_IMPL",
    "HookEntry",
    "NO_TASK",
    "add_tensor_hook",
    "add_tensor_hook_eagerly",
    "backward_outputs",
    "backward_task",
    "break_graph",
    "calls_on_stack",
    "current_node",
    "eval_frame",
    "function_mode_at",
    "function_mode_count",
    "global_hooks",
    "has_stale_graph",
    "has_tensor_hooks",
    "hooks_always_called",
    "hooks_with_kwargs",
    "in_backward",
    "is_compiled",
    "is_optimized_module",
    "keep_frames_out_of_graphs",
    "keep_out_of_graphs",
    "keyword_arguments",
    "may_be_compiled",
    "module_hooks",
    "next_registration",
    "pop_function_mode",
    "post_hooks",
    "pre_hooks",
    "push_function_mode",
    "remove_hooks",
    "scripted_ancestor",
    "set_eval_frame",
    "set_hook_dicts",
    "skip_frame",
    "storage_users",
    "uncompiled",
    "why_not_called",
]

CALL_IMPL: CodeType = nn.Module._call_impl.__code__
"""The code that calls a module's hooks and its forward; a frame of it on the stack is a call of a module."""

# The stack of function modes of this thread, without the Python wrappers around it.
function_mode_count: Callable[[], int] = torch._C._len_torch_function_stack
function_mode_at: Callable[[int], Any] = torch._C._get_function_stack_at
push_function_mode: Callable[[Any], None] = torch._C._push_on_torch_function_stack
pop_function_mode: Callable[[], Any] = torch._C._pop_torch_function_stack

set_eval_frame: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame
"""Exchange dynamo's callback of this thread for another one, None for plain Python; returns the one before."""
eval_frame: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""That callback: None outside of compiled code."""


def skip_frame(code: CodeType) -> None:
    """Let dynamo, if it is loaded, run frames of this code as they stand."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        dynamo.skip_code(code)


post_hooks: Callable[[nn.Module], Any] = attrgetter("_forward_hooks")
"""The ordered dict of a module's forward hooks, by registration number."""

pre_hooks: Callable[[nn.Module], Any] = attrgetter("_forward_pre_hooks")
"""The ordered dict of a module's forward pre-hooks, by registration number."""


def next_registration() -> int:
    """A number for hooks of modules that no other has had; ask under a lock, for torch's counter is not atomic."""
    number = RemovableHandle.next_id
    RemovableHandle.next_id = number + 1
    return number


def set_hook_dicts(module: nn.Module, before: Any, after: Any) -> None:
    """Give a module that has no hooks yet other dicts to keep them in."""
    module._forward_pre_hooks, module._forward_hooks = before, after


def hooks_with_kwargs(module: nn.Module, *, before: bool) -> Any:
    """The dict of the registration numbers of hooks that are called with keyword arguments as well."""
    return module._forward_pre_hooks_with_kwargs if before else module._forward_hooks_with_kwargs


hooks_always_called: Callable[[nn.Module], Any] = attrgetter("_forward_hooks_always_called")
"""The dict of the registration numbers of a module's forward hooks that are called also when the forward raises."""


_tensor_hooks = count(1)


def add_tensor_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """``tensor.register_hook(hook)`` for a tensor that requires grad, without a handle: at 0.4 times the cost.

    Hooks run in the order they were added in, whichever of the two ways it was.
    """
    if torch.compiler.is_compiling():
        tensor.register_hook(hook)
    else:
        add_tensor_hook_eagerly(tensor, hook)


def add_tensor_hook_eagerly(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """:func:`add_tensor_hook` where no graph is being made."""
    hooks = tensor._backward_hooks
    if hooks is None:
        tensor._backward_hooks = hooks = OrderedDict()
        node = tensor.grad_fn
        if node is not None:
            node._register_hook_dict(tensor)
    hooks[-next(_tensor_hooks)] = hook  # torch numbers its own upward from zero


has_tensor_hooks = attrgetter("_backward_hooks")
"""What says whether anyone has set a tensor hook on this very tensor."""

_use_count = getattr(torch._C, "_storage_Use_Count", None)
_address = attrgetter("_cdata")

ALONE = 2
"""What :func:`storage_users` counts for an unshared tensor: the tensor, and the storage object that is asked."""


def storage_users(tensors: Collection[Tensor]) -> list[int]:
    """How many references there are to the memory of each tensor: ``ALONE`` if no other tensor shares it.

    Tensors saved by a graph count. It is more than ``ALONE`` where torch does not tell, or the memory is not its own.
    """
    if _use_count is None:
        return [ALONE + 1] * len(tensors)
    try:
        return list(map(_use_count, map(_address, map(Tensor.untyped_storage, tensors))))
    except (NotImplementedError, RuntimeError):  # sparse, nested or wrapper tensors among them
        return [ALONE + 1] if len(tensors) == 1 else [storage_users((each,))[0] for each in tensors]


class HookEntry(NamedTuple):
    """One hook as torch has it."""

    kind: str
    """``"fwd_pre"``, ``"fwd"``, ``"bwd_pre"`` or ``"bwd"``."""
    position: int
    """Its place among those of its kind, in the order they are called."""
    hook: Callable[..., Any]


_HOOK_DICTS = {
    "fwd_pre": "_forward_pre_hooks",
    "fwd": "_forward_hooks",
    "bwd_pre": "_backward_pre_hooks",
    "bwd": "_backward_hooks",
}


def module_hooks(module: nn.Module) -> list[HookEntry]:
    """The forward and backward hooks of one module."""
    return _entries(vars(module), "")


def global_hooks() -> list[HookEntry]:
    """The hooks that torch calls for every module."""
    return _entries(vars(torch.nn.modules.module), "_global")


def _entries(holder: Mapping[str, Any], prefix: str) -> list[HookEntry]:
    return [
        HookEntry(kind, position, hook)
        for kind, name in _HOOK_DICTS.items()
        for position, hook in enumerate(holder.get(prefix + name, {}).values())
    ]


NO_TASK = -1
backward_task = torch._C._current_graph_task_id
"""The backward that autograd is running on this thread; ``NO_TASK`` outside of one. Not to be asked in a graph."""
current_node = torch._C._current_autograd_node
"""The node of the graph whose hooks are running on this thread."""


def remove_hooks(hook_dicts: Sequence[Any], is_meant: Callable[[Any], bool]) -> None:
    """Remove the forward hooks that are meant from the modules whose hook dicts these are, without a trace."""
    found = {id(hooks): [number for number, hook in hooks.items() if is_meant(hook)] for hooks in hook_dicts}
    states = [each for each in gc.get_referrers(*hook_dicts) if type(each) is dict] if hook_dicts else []
    for state in states:
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            for number in found.get(id(state.get(name)), ()):
                for extra in ("", "_with_kwargs", "_always_called"):
                    state.get(name + extra, {}).pop(number, None)


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in there is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and backward_task() != NO_TASK


def _frames_of(code: CodeType, frame: FrameType | None = None) -> Iterator[FrameType]:
    """The calls of ``code`` that are under way on this thread, or below ``frame``, innermost first; slow."""
    at: FrameType | None = sys._getframe(1) if frame is None else frame
    while at is not None:
        if at.f_code is code:
            yield at
        at = at.f_back


def calls_on_stack(module: nn.Module | None) -> int:
    """How many calls of ``module`` are under way; slow, and asked only in doubt: an exception may have ended them."""
    return sum(frame.f_locals.get("self") is module for frame in _frames_of(CALL_IMPL))


def keyword_arguments(module: nn.Module) -> Mapping[str, Any]:
    """What the innermost call of ``module`` was given by name: plain forward hooks are not told; slow."""
    calls = (frame.f_locals for frame in _frames_of(CALL_IMPL) if frame.f_locals.get("self") is module)
    return cast(Mapping[str, Any], next(calls, {"kwargs": {}})["kwargs"])


def backward_outputs() -> Sequence[Any]:
    """What the innermost backward under way began at; its call is on this thread's stack, or on that of another one."""
    code = torch.autograd.graph._engine_run_backward.__code__
    stacks = (_frames_of(code, top) for top in (sys._getframe(1), *sys._current_frames().values()))
    return next((frame.f_locals["t_outputs"] for stack in stacks for frame in stack), ())


def is_optimized_module(model: nn.Module) -> bool:
    """Whether ``model`` is what ``torch.compile(module)`` returns."""
    return type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile(module)`` was given, for what it returns; any other model itself."""
    return model.get_submodule("_orig_mod") if is_optimized_module(model) else model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` was called for this model or a part of it."""
    return any(is_optimized_module(module) or _is_compiled_in_place(module) for module in model.modules())


def _is_compiled_in_place(module: nn.Module) -> bool:
    return module.__dict__.get("_compiled_call_impl") is not None


def may_be_compiled(model: nn.Module) -> bool:
    """Whether :func:`is_compiled` and :func:`has_stale_graph` are worth asking; does not walk the model."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        backends = list(dynamo.eval_frame.cached_backends.values())  # torch.compiler.disable() leaves None there
        if backends.count(None) < len(backends) or dynamo.convert_frame.input_codes.seen:
            return True
    return is_optimized_module(model) or _is_compiled_in_place(model)


def has_stale_graph(model: nn.Module, *, noticed: bool = False) -> bool:
    """Whether ``torch.compile`` has made a graph with modules like these in it, which skips hooks that are added now.

    It may be that of a part, or of another module or function that calls the model. Guards name classes, not modules:
    a graph is taken for one of this model if it was made for something of the model's class, or if it begins with a
    module of the class of a part. A model of torch.nn's classes that was compiled in place never makes a graph (its
    frames are skipped), but would have every hook compiled by itself; it counts as traced from the beginning.

    With ``noticed``, only hooks on the model itself may be skipped, and a graph of its own forward skips none of them.
    """
    if not may_be_compiled(model):
        return False
    inner = uncompiled(model)
    modules = list(inner.modules())
    if any(type(each).__module__.startswith("torch.nn.") and _is_compiled_in_place(each) for each in modules):
        return True
    kind, parts = str(id(type(inner))), {str(id(type(module))) for module in modules}
    own = getattr(getattr(type(inner), "forward", None), "__code__", None)
    return any(
        kind in inside and not (code is own and kind in first)
        if noticed
        else kind in inside or not parts.isdisjoint(first)
        for code, first, inside in _graphs()
    )


def _graphs() -> Iterator[tuple[CodeType, frozenset[str], frozenset[str]]]:
    """Every graph that ``torch.compile`` keeps in this process: the code it was made of, and what it guards."""
    dynamo = sys.modules["torch._dynamo"]
    for reference in list(dynamo.convert_frame.input_codes.seen):
        code = reference()
        if code is not None:
            for entry in dynamo.eval_frame._debug_get_cache_entry_list(code):
                yield code, *_guarded_classes(entry.guard_manager)


_TYPE_GUARD = re.compile(r"___check_type_id\((.*?), (\d+)\)")
_NO_GRAPH = "no graph can hold this hook of tdcache; compile without fullgraph=True, or run once before the block"
_classes_by_guards: WeakKeyDictionary[Any, tuple[frozenset[str], frozenset[str]]] = WeakKeyDictionary()


def _guarded_classes(guards: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The ids, as text, of the classes that guards name: of what the graph gets at directly, and of all in it."""
    if guards not in _classes_by_guards:
        found = _TYPE_GUARD.findall(str(guards))
        first = frozenset(number for source, number in found if "_modules" not in source)
        _classes_by_guards[guards] = first, frozenset(number for _, number in found)
    return _classes_by_guards[guards]


def keep_frames_out_of_graphs(*functions: Callable[..., Any]) -> None:
    """Have these run in Python, with all that they call, where a graph that could have them in it was broken.

    Otherwise torch compiles each of their frames by itself.
    """
    frames = importlib.import_module("torch._dynamo.eval_frame")
    kinds = importlib.import_module("torch._dynamo.types")
    for function in functions:
        code = function.__code__
        if hasattr(frames, "set_code_exec_strategy"):
            skip = kinds.FrameAction.SKIP
            frames.set_code_exec_strategy(code, kinds.FrameExecStrategy(skip, skip))
        else:
            frames.skip_code(code)


def keep_out_of_graphs(*functions: Callable[..., Any]) -> None:
    """What ``torch.compiler.disable`` does, without a wrapper that every call would pay for."""
    keep_frames_out_of_graphs(*functions)
    for marked in cast(tuple[Any, ...], functions):
        marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, _NO_GRAPH


def break_graph() -> None:
    """End the graph that is being made; an error with ``fullgraph=True``."""


keep_out_of_graphs(break_graph)


def scripted_ancestor(model: nn.Module, path: str) -> str | None:
    """The path of the TorchScript module above ``path``, if there is one: it calls its parts without their hooks."""
    owner, names = model, path.split(".") if path else []
    for depth, name in enumerate(names):
        if isinstance(owner, torch.jit.ScriptModule):
            return ".".join(names[:depth])
        child = owner._modules.get(name)
        if child is None:
            return None
        owner = child
    return None


_REASONS = (
    (
        (nn.TransformerEncoder, nn.TransformerEncoderLayer),
        "the fused fast path of {kind} {owner!r} calls no submodules in eval mode; switch it off with "
        "torch.backends.mha.set_fastpath_enabled(False), or call model.train()",
    ),
    (
        (nn.MultiheadAttention,),
        "nn.MultiheadAttention {owner!r} uses the weights of its projections without calling them; "
        "select {owner!r} itself",
    ),
)


def why_not_called(model: nn.Module, path: str) -> str | None:
    """The known reason why the module at ``path`` sees no forward, or None."""
    parts = path.split(".")
    owner, owners = model, [("", model)]
    for end, name in enumerate(parts, 1):
        child: nn.Module | None = getattr(owner, name, None)
        if child is None:
            return None
        owner = child
        owners.append((".".join(parts[:end]), owner))
    if isinstance(owner, nn.ModuleList | nn.ModuleDict):
        return f"{type(owner).__name__} {path!r} is a container that is never called; select its members"
    for name, module in reversed(owners[:-1]):
        for kinds, text in _REASONS:
            if isinstance(module, kinds):
                return text.format(kind=type(module).__name__, owner=name)
    return None
