"""Statistics over rows in a caching context: sites that see no rows, values with a graph, checkpoints."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stable_ids import stable_id
from tdcache import ActivationCaching, Concatenate, Mean, TopK, Variance

OVER_ROWS = [Mean(), Variance(), TopK(2), Concatenate(), Concatenate(max_rows=4)]


class Experts(nn.Module):
    """Sends every row to the expert whose number it carries."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert):
        out = torch.zeros_like(x)
        for number, module in enumerate(self.experts):
            out[expert == number] = module(x[expert == number])
        return out


@pytest.mark.parametrize("reducer", OVER_ROWS, ids=stable_id)
def test_an_expert_that_gets_no_token_is_no_error(reducer):
    x = torch.randn(5, 4)
    with ActivationCaching(r"experts\.\d", reducer=reducer).prepare(Experts()) as hooked, torch.no_grad():
        hooked(x, torch.tensor([0, 0, 2, 0, 2]))
        hooked(x, torch.zeros(5, dtype=torch.int64))
    silent = hooked.cache["experts.1"]
    if isinstance(reducer, Mean | Variance):
        assert silent.shape == (4,)
        assert silent.isnan().all()
        assert not hooked.cache["experts.2"].isnan().any()
    else:
        assert (silent["values"] if isinstance(reducer, TopK) else silent).shape == (0, 4)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reducer", OVER_ROWS, ids=stable_id)
def test_live_values_under_a_checkpoint_are_reduced_without_their_graph(reducer, reentrant):
    model, x = Checkpointed(reentrant), torch.randn(3, 4, requires_grad=True)
    with ActivationCaching("inner.1", reducer=reducer).prepare(model) as plain, torch.no_grad():
        plain(x)
    model(x).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with ActivationCaching("inner.1", reducer=reducer, hold="live").prepare(model) as hooked:
        hooked(x).sum().backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, grad)  # one code path, one shape
    found = hooked.cache["inner.1"]
    assert (found == plain.cache["inner.1"]).all()
    assert not any(leaf.requires_grad for leaf in (found.values() if isinstance(reducer, TopK) else [found]))
