"""Reducers: what is kept of the values at one site, such as the last one, all of them, or a mean.

They are independent of hooks, so that statistics over a data set use the same code in a cache, in a harvest and on
their own, and the results of several processes can be merged.
"""

from tdcache.public_names import MissingName
from tdcache.reducers.base import Reducer
from tdcache.reducers.calls import First, Last, Stack
from tdcache.reducers.concatenate import Concatenate
from tdcache.reducers.rows import RowReducer
from tdcache.reducers.statistics import Mean, TopK, Variance

__all__ = ["Concatenate", "First", "Last", "Mean", "Reducer", "RowReducer", "Stack", "TopK", "Variance"]

__getattr__ = MissingName(__name__)
