"""Plain MLPs: nn.Sequential, and a ModuleList with functional activations."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from small_models import MLP, by_hand
from tdcache import ActivationCaching


@pytest.mark.parametrize(
    ("model", "pattern"),
    [(MLP(width=4), r"layers\.\d+|act|head"), (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), r"\d")],
)
@pytest.mark.parametrize("grad", [True, False])
def test_every_layer_of_an_mlp_is_kept(model, pattern, grad):
    x = torch.randn(5, 4)
    with ActivationCaching(pattern).prepare(model) as hooked, torch.set_grad_enabled(grad):
        y = hooked(x)
    wanted = by_hand(model, hooked.cache.keys(), lambda: model(x))
    assert len(wanted) >= 3
    for path, (value,) in wanted.items():
        assert torch.equal(hooked.cache[path], value)
    assert y.requires_grad == grad


def test_a_training_loop_runs_inside_the_block():
    def train(model, forward):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = forward(torch.randn(5, 4)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    plain = MLP()
    torch.manual_seed(0)
    model = MLP()
    wanted = train(plain, plain)
    with ActivationCaching(r"layers\.\d|head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        assert train(model, hooked) == wanted
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert hooked.cache["bwd", "head"].shape == (5, 2)


def test_an_empty_batch_is_kept_as_it_is():
    with ActivationCaching("head").prepare(MLP()) as hooked:
        hooked(TensorDict({"input": torch.zeros(0, 4)}))
    assert hooked.cache["head"].shape == (0, 2)
