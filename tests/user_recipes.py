"""Recipes as users write them, for the tests of several packages."""

from tdcache import HookingContextFactory


class TwoRuns(HookingContextFactory):
    """Runs the model twice and adds the outputs."""

    def _run_module(self, module, data, forward):
        first = forward(data.copy())["output"]
        data = forward(data)
        data["output"] = first + data["output"]
        return data
