"""The function mode that sees the calls of one thread, and to whom each call belongs.

The mode is on the thread's stack only while the forward of a selected module runs, and only between the forwards of
its children: modules that are not selected run as if nothing were there.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

from tdcache.errors import CaptureError
from tdcache.function_calls.handlers import Call, Handlers, Run, Scope
from tdcache.introspect import (
    CALL_IMPL,
    function_mode_at,
    function_mode_count,
    pop_function_mode,
    push_function_mode,
    set_eval_frame,
)

__all__ = ["CallMode", "intercept", "owning_frame", "refuse_fused", "run_forward", "thread"]

_CHECKPOINT_FILE = torch_checkpoint.__file__


class CallMode(TorchFunctionMode):
    """Hands the calls of the running forward to the handlers of its scope."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        """The forward that runs, or None: no selected module, or the child of one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self.run
        found = None if run is None else run.scope.found[func]
        if run is None or found is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return intercept(run, found, func, args, kwargs or {}, sys._getframe(1))  # noqa: SLF001

    # torch's own stack, in place of __enter__ and __exit__: a scope closes in the middle of it where a child runs.

    def open(self) -> bool:
        """Put the mode on top of the stack, unless it is on it; says whether it was put there."""
        for at in range(function_mode_count()):
            if function_mode_at(at) is self:
                return False
        push_function_mode(self)
        return True

    def close_on_top(self) -> bool:
        """Take the mode off the stack if it is on top; says whether it was."""
        count = function_mode_count()
        if not count or function_mode_at(count - 1) is not self:
            return False
        pop_function_mode()
        return True

    def close(self) -> None:
        """Take the mode off the stack, also from below modes that somebody left on."""
        if self.close_on_top():
            return
        above = []
        while function_mode_count():
            mode = pop_function_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            push_function_mode(mode)


class _OwnMode(threading.local):
    def __init__(self) -> None:
        self.mode = CallMode()


thread = _OwnMode()
"""The mode of the current thread."""


def intercept(run: Run, found: Handlers, func: Any, args: Any, kwargs: Any, frame: FrameType) -> Any:
    """Make a call of ``func`` between the handlers, if it belongs to the forward of ``run``."""
    owner = owning_frame(run, frame)
    if owner is None:
        return func(*args, **kwargs)
    ordinal = run.counts.get(found.name, 0)
    run.counts[found.name] = ordinal + 1
    handlers = found.at(ordinal)
    if not handlers:
        return func(*args, **kwargs)
    call = Call(run, found.name, ordinal, args, kwargs)
    call.recomputed = owner == "checkpoint"
    call.frame = frame
    for handler in handlers:
        handler.before(call)
    call.output = (func if call.instead is None else call.instead)(*call.args, **call.kwargs)
    for handler in handlers:
        handler.after(call)
    call.frame = None
    return call.output


def owning_frame(run: Run, frame: FrameType | None) -> str | None:
    """How the forward of ``run`` makes a call: ``"own"``, or ``"checkpoint"`` within code that it checkpoints itself.

    None where a hook or a registered module makes it. A module that was made on the fly has no path; its calls belong
    to its caller.
    """
    members, how = run.scope.members, "own"
    while frame is not None:
        code = frame.f_code
        if code is _RUN:
            return how
        if code is CALL_IMPL:
            if id(frame.f_locals["self"]) in members:
                return None
        elif code.co_filename == _CHECKPOINT_FILE:
            how = "checkpoint"
        frame = frame.f_back
    return None


def run_forward(scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward of a scope: with the mode on if it has rules, without it otherwise."""
    mode, forward = thread.mode, scope.forward
    above = mode.run
    if not scope.rules:
        if above is None or above.scope.module is scope.module:  # or a scope that somebody wrapped, and that was left
            return forward(*args, **kwargs)
        mode.run = None
        closed = mode.close_on_top()
        try:
            return forward(*args, **kwargs)
        finally:
            mode.run = above
            if closed:
                mode.open()
    if scope.everything:
        refuse_fused(scope.module)
    tracer = set_eval_frame(None)  # after a graph break dynamo would go on to trace the forward, mode and all
    mode.run = Run(scope)
    opened = scope.everything and mode.open()
    try:
        return forward(*args, **kwargs)
    finally:
        mode.run = above
        if opened:
            mode.close()
        set_eval_frame(tracer)


# Traced as it stands, the mode would be recompiled without end: dynamo breaks the graph here instead.
run_forward._torchdynamo_disable = True  # type: ignore[attr-defined]  # noqa: SLF001


def refuse_fused(module: nn.Module) -> None:
    """Refuse a forward that the mode would change: torch leaves its fused path where it sees a function mode.

    Raises:
        CaptureError: it says how to switch the fused path off for good.
    """
    if not isinstance(module, _FUSED) or module.training or torch.is_grad_enabled():
        return
    if torch.backends.mha.get_fastpath_enabled():
        raise CaptureError(
            f"{type(module).__name__} would run its fused path here, which makes no calls that could be seen; switch "
            "it off with torch.backends.mha.set_fastpath_enabled(False), or select the modules around it"
        )


_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


_RUN = run_forward.__code__
