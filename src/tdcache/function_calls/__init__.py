"""Places inside a forward: calls of functions, found by name, read and edited as modules are.

names, sites     what a call is called, and which calls a selector means
mode, scope      who sees the calls of torch's functions, and when
overlay          calls of Python functions that a forward looks up in its globals
attach           hooks around a call, with torch's conventions
attention        scores and pattern from the arguments of an attention call
attention_calls, roles   the places ``::q`` to ``::z``, under a kernel or computed step by step
places           selectors of calls, and taps at what they mean
record           the table of what a forward calls
"""

from tdcache.function_calls.attach import attach_call, attach_rules, call_rule
from tdcache.function_calls.record import CallTable, calls, record_calls, select
from tdcache.function_calls.roles import attach_attention, attention_rule
from tdcache.function_calls.sites import CallPattern, CallSite, is_call
from tdcache.public_names import MissingName

__all__ = [
    "CallPattern",
    "CallSite",
    "CallTable",
    "attach_attention",
    "attach_call",
    "attach_rules",
    "attention_rule",
    "call_rule",
    "calls",
    "is_call",
    "record_calls",
    "select",
]

__getattr__ = MissingName(__name__)
