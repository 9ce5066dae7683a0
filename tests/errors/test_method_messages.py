"""What the errors of interventions and attribution say about options that only rarely are wrong."""

import pytest
import torch
from torch import nn

from tdcache.attribution.gradients import Seen
from tdcache.errors import AttributionError, DirectionError, EditError
from tdcache.hooks import InputPort
from tdcache.interventions import ActivationPatching, SteeringVectors

MESSAGES = {
    "an edit of a gradient": (
        lambda: SteeringVectors("layer", torch.ones(2), direction="bwd"),
        DirectionError,
        "an intervention changes outputs ('fwd') or inputs ('fwd_pre'), got 'bwd'",
    ),
    "a sweep over something else": (
        lambda: ActivationPatching("layer", sweep="rows", metric=lambda data: data["output"]),
        EditError,
        "sweep is True, 'position', 'head' or both of them, got 'rows'",
    ),
    "one of several sweeps": (
        lambda: ActivationPatching("layer", sweep=["head", 3], heads=2, metric=lambda data: data["output"]),
        EditError,
        "sweep is True, 'position', 'head' or both of them, got 3",
    ),
    "a place for a new value that only a function finds": (
        lambda: InputPort("layer", lambda args: args[0]).write(nn.ReLU(), (torch.ones(2),), {}, torch.ones(2)),
        EditError,
        "a callable pick= cannot say where to put the new value at 'layer'; use an index or a key",
    ),
    "no target": (lambda: Seen([]).needed_target(), AttributionError, "the target was not computed"),
}


@pytest.mark.parametrize(("wrong", "kind", "text"), MESSAGES.values(), ids=MESSAGES)
def test_an_error_says(wrong, kind, text):
    with pytest.raises(kind) as caught:
        wrong()
    assert str(caught.value).splitlines()[0] == text
