"""Canonical names: found by the data flow of one forward, proved by arithmetic on another input.

trace, trace_flow, trace_attention   one forward taken down, and walks over it
front, mapping, styles               what users call; names of one's own; other spellings
remembered                           tables made before
resolve*                             stacks of blocks, their terms, and the places of names
prove*                               identities over the values of a table's places
copies, inputs, gradients            what forwards are run on, and what both halves ask for
"""

from tdcache.naming.front import names
from tdcache.naming.prove import Verdict, prove, proved, verdict_of
from tdcache.naming.resolve import resolve
from tdcache.public_names import MissingName

__all__ = ["Verdict", "names", "prove", "proved", "resolve", "verdict_of"]

__getattr__ = MissingName(__name__)
