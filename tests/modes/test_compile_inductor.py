"""torch.compile with its default backend, which compiles: a few small models, and none where no compiler works."""

import functools

import pytest
import torch
from torch import nn

from tdcache import ActivationCaching

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class UserModel(nn.Module):
    """A linear layer, whose kernel raises the version counter of its result, and a ReLU that overwrites it."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@functools.cache
def why_inductor_fails():
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "inductor's C++ does not compile for a CPU without vector instructions"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # noqa: BLE001  (a missing or broken compiler shows in many ways)
        return f"inductor does not work here: {type(error).__name__}"
    finally:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def inductor():
    torch._dynamo.reset()
    if reason := why_inductor_fails():
        pytest.skip(reason)
    yield
    torch._dynamo.reset()


def snapshots(model, x):
    with ActivationCaching("first|act|second", hold="snapshot").prepare(model) as hooked:
        hooked(x)
    return hooked.cache.clone()


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_are_captured_inside_the_graph_as_they_were_when_they_were_seen(grad):
    model, x = UserModel(), torch.randn(5, 4)
    wanted = [snapshots(model, scale * x) for scale in (1, 2)]
    compiled = torch.compile(model, fullgraph=True)
    with ActivationCaching("first|act|second").prepare(compiled) as hooked, torch.set_grad_enabled(grad):
        for scale in (1, 2):
            compiled(scale * x)
            for path, value in wanted[scale - 1].items():
                # Inductor may fuse and reorder: rounding of single precision.
                torch.testing.assert_close(hooked.cache[path], value, rtol=1e-6, atol=1e-6)


def test_a_second_block_on_a_compiled_model_captures_gradients_eagerly():
    model, x = UserModel(), torch.randn(5, 4)
    compiled = torch.compile(model)
    compiled(x)
    with ActivationCaching("first|second", directions=["bwd"]).prepare(model) as eager:
        eager(x).square().sum().backward()
    with ActivationCaching("first|second", directions=["bwd"]).prepare(compiled) as hooked:
        compiled(x).square().sum().backward()
    for path, value in eager.cache.items():
        assert torch.equal(hooked.cache[path], value)  # the same shape on the same eager kernels


def test_a_model_compiled_in_the_block_leaves_its_graph_for_what_the_graph_cannot_hold():
    model, x = UserModel(), torch.randn(5, 4)
    with ActivationCaching("act|second", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
        wanted = hooked.cache.clone()
        torch.compile(model)(x).square().sum().backward()
        for key, value in wanted.items(True, True):
            # Inductor may fuse and reorder: rounding of single precision.
            torch.testing.assert_close(hooked.cache[key], value, rtol=1e-5, atol=1e-5)
