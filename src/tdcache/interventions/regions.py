"""The region of an edit, under the name that interventions import it by; it is shared with the verbs of runs."""

from tdcache.regions import Along, Heads, Region, as_index

__all__ = ["Along", "Heads", "Region", "as_index"]
