"""The region of an edit, under the name that interventions import it by; it is shared with captures and runs."""

from __future__ import annotations

from tdcache.function_calls.sites import region_at
from tdcache.regions import Along, Heads, Region, as_index

__all__ = ["Along", "Heads", "Region", "as_index", "region_at"]
