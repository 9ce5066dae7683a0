"""Decides in which forwards of ``generate()`` a capture takes part (``steps=``): the gate in front of the recorder.

A forward that is left out must not reach the recorder at all, because a new forward there makes the entries of the
previous one stale.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tdcache.cache.recorder import Recorder
from tdcache.current_call import CurrentCall, InSteps
from tdcache.hooks.attach import bracket
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.hooks.transient import Transient
from tdcache.steps import Steps

__all__ = ["StepGate"]


class StepGate(Transient):
    """Passes a recorder the forwards that ``steps`` select, and hides all others from it.

    Args:
        model: the user's own.
        steps: see :class:`tdcache.ActivationCaching`.
        recorder: keeps the values.
    """

    def __init__(self, model: nn.Module, steps: Steps, recorder: Recorder) -> None:
        self.call = CurrentCall(model, InSteps(steps))
        self.recorder = recorder
        recorder.gate = self.call

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.call.options.steps!r})"

    def attach(self, handle: MultiHookHandle) -> None:
        """Listen to every module that receives a cache."""
        for module in self.call.clock.receivers.values():
            bracket(module, self.begin, self.end, handle)
        self.call.attach(handle)  # afterwards, so that the clock has ticked when the recorder hears of a forward

    def begin(self, module: nn.Module, args: Any) -> None:
        """Tell the recorder that a forward begins, if its step is selected."""
        if not self.call.is_outermost:
            return
        if self.call.is_due(""):
            self.recorder.begin(module, args)
        else:
            self.recorder.left_out += 1

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward has ended or raised."""
        if self.call.is_outermost and self.recorder.running:
            self.recorder.end(module, args, output)
