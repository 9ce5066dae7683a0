"""The forms of the verbs for inputs and gradients, shared by hooked modules and runs.

``set_grad_output(...)`` reads better than ``set(..., direction="bwd")``. These forms only add the direction to the
verbs, which are implemented elsewhere.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DirectedForms"]


class DirectedForms:
    """``get``, ``set`` and ``save`` with the direction in the name; the other arguments are those of the plain verb.

    ``_grad`` is the gradient of the input (direction ``"grad_in"``), ``_grad_output`` that of the output.
    """

    get: Any
    set: Any
    save: Any

    def get_input(self, *args: Any, **kwargs: Any) -> Any:
        """``get`` of the input."""
        return self.get(*args, **{**kwargs, "direction": "fwd_pre"})

    def set_input(self, *args: Any, **kwargs: Any) -> Any:
        """``set`` of the input: a tensor for the first one, or a tuple for all positional arguments."""
        return self.set(*args, **{**kwargs, "direction": "fwd_pre"})

    def save_input(self, *args: Any, **kwargs: Any) -> Any:
        """``save`` of the input."""
        return self.save(*args, **{**kwargs, "direction": "fwd_pre"})

    def get_grad(self, *args: Any, **kwargs: Any) -> Any:
        """``get`` of the gradient of the input."""
        return self.get(*args, **{**kwargs, "direction": "grad_in"})

    def set_grad(self, *args: Any, **kwargs: Any) -> Any:
        """``set`` of the gradient of the input: a tensor for the first, or a tuple for all."""
        return self.set(*args, **{**kwargs, "direction": "grad_in"})

    def save_grad(self, *args: Any, **kwargs: Any) -> Any:
        """``save`` of the gradient of the input."""
        return self.save(*args, **{**kwargs, "direction": "grad_in"})

    def get_grad_output(self, *args: Any, **kwargs: Any) -> Any:
        """``get`` of the gradient of the output."""
        return self.get(*args, **{**kwargs, "direction": "bwd_pre"})

    def set_grad_output(self, *args: Any, **kwargs: Any) -> Any:
        """``set`` of the gradient of the output: a tensor for the first, or a tuple for all."""
        return self.set(*args, **{**kwargs, "direction": "bwd_pre"})

    def save_grad_output(self, *args: Any, **kwargs: Any) -> Any:
        """``save`` of the gradient of the output."""
        return self.save(*args, **{**kwargs, "direction": "bwd_pre"})
