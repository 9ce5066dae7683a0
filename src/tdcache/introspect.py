"""The only reader of torch's private state: hook dicts, compiled frames, and why a module was not called."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from operator import attrgetter
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "CALL_IMPL",
    "HookEntry",
    "NO_TASK",
    "add_tensor_hook",
    "backward_task",
    "calls_on_stack",
    "compiled_modules",
    "function_mode_at",
    "function_mode_count",
    "global_hooks",
    "has_stale_graph",
    "in_backward",
    "is_optimized_module",
    "is_wrapped_by_compile",
    "module_hooks",
    "pop_function_mode",
    "post_hooks",
    "pre_hooks",
    "push_function_mode",
    "set_eval_frame",
    "skip_frame",
    "storage_users",
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


def skip_frame(code: CodeType) -> None:
    """Let dynamo, if it is loaded, run frames of this code as they stand."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        dynamo.skip_code(code)


def post_hooks(module: nn.Module) -> Any:
    """The ordered dict of a module's forward hooks, by registration number."""
    return module._forward_hooks


def pre_hooks(module: nn.Module) -> Any:
    """The ordered dict of a module's forward pre-hooks, by registration number."""
    return module._forward_pre_hooks


_tensor_hooks = count(1)


def add_tensor_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """``tensor.register_hook(hook)`` for a tensor that requires grad, without a handle: at 0.4 times the cost.

    Hooks run in the order they were added in, whichever of the two ways it was.
    """
    if torch.compiler.is_compiling():
        tensor.register_hook(hook)
        return
    hooks = tensor._backward_hooks
    if hooks is None:
        tensor._backward_hooks = hooks = OrderedDict()
        node = tensor.grad_fn
        if node is not None:
            node._register_hook_dict(tensor)  # type: ignore[attr-defined]
    hooks[-next(_tensor_hooks)] = hook  # torch numbers its own upward from zero


_use_count = getattr(torch._C, "_storage_Use_Count", None)


_address = attrgetter("_cdata")


def storage_users(tensors: Collection[Tensor]) -> list[int]:
    """How many tensors (saved ones of a graph included) have the memory of each of these, itself among them.

    Where torch does not say, or the memory is not the tensor's own, 2: somebody else may have it.
    """
    if _use_count is None:
        return [2] * len(tensors)
    try:
        counts = list(map(_use_count, map(_address, map(Tensor.untyped_storage, tensors))))
    except (NotImplementedError, RuntimeError):  # sparse, nested or wrapper tensors among them
        return [2] * len(tensors) if len(tensors) == 1 else [storage_users((each,))[0] for each in tensors]
    return [count - 1 for count in counts]  # the storage object that is asked counts as well


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


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in there is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and backward_task() != NO_TASK


def calls_on_stack(module: nn.Module | None) -> int:
    """How many calls of ``module`` are under way; slow, and asked only in doubt: an exception may have ended them."""
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls


def is_optimized_module(model: nn.Module) -> bool:
    """Whether ``model`` is what ``torch.compile(module)`` returns."""
    return type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules


def is_wrapped_by_compile(model: nn.Module) -> bool:
    """Whether ``torch.compile(model)`` was called and its result is alive; slow, and asked only in doubt."""
    holders = (each for each in gc.get_referrers(model) if isinstance(each, dict))
    return any(holder.get("_orig_mod") is model for holder in holders)


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` on which ``module.compile()`` was called."""
    return [module for module in model.modules() if getattr(module, "_compiled_call_impl", None) is not None]


def has_stale_graph(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has traced this model, or another of its classes, so that hooks added now are skipped.

    Graphs belong to code objects, not to instances: one that was traced for another model of the class serves here too.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters:  # nothing was ever compiled in this process
        return False
    entries = dynamo.eval_frame._debug_get_cache_entry_list
    return any(entries(code) for code in _traced_codes(model, dynamo))


def _traced_codes(model: nn.Module, dynamo: Any) -> Iterator[CodeType]:
    if is_optimized_module(model) or type(model).forward.__module__.startswith("torch.nn."):
        # A model of torch.nn's own classes is traced through a helper.
        constants = dynamo.external_utils.wrap_inline.__code__.co_consts
        yield from (constant for constant in constants if isinstance(constant, CodeType))
    for kind in {type(module) for module in model.modules()}:
        code = getattr(kind.forward, "__code__", None)
        if code is not None:
            yield code


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
        child = owner._modules.get(name)
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
