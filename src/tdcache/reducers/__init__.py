"""Reducers: what is kept of the values that pass one site."""

from tdcache.reducers.base import Reducer
from tdcache.reducers.calls import First, Last, Stack
from tdcache.reducers.concatenate import Concatenate
from tdcache.reducers.rows import RowReducer
from tdcache.reducers.statistics import Mean, TopK, Variance

__all__ = ["Concatenate", "First", "Last", "Mean", "Reducer", "RowReducer", "Stack", "TopK", "Variance"]
