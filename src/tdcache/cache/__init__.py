"""The capture side: taps take values from hooks, channels hold them, targets write them into the TensorDict.

The three steps are separate so that a hook costs no more than a dict write, while checks, copies and the rules of
TensorDict apply once per forward.
"""

from tdcache.cache.capture import Capture
from tdcache.cache.channel import Channel
from tdcache.cache.gradient_taps import GradientTap, OutputAndGradientTap
from tdcache.cache.keep import Keep, Transfers
from tdcache.cache.recorder import Recorder
from tdcache.cache.stacking import StackBy
from tdcache.cache.taps import CallbackTap, OutputTap, StopTap, ValueTap
from tdcache.cache.target import EntryTarget, Target

__all__ = [
    "CallbackTap",
    "Capture",
    "Channel",
    "EntryTarget",
    "GradientTap",
    "Keep",
    "OutputAndGradientTap",
    "OutputTap",
    "Recorder",
    "StackBy",
    "StopTap",
    "Target",
    "Transfers",
    "ValueTap",
]
