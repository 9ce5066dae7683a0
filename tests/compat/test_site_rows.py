"""What a collector gathers at one hook point: which values are rows, and whether they belong together."""

import pytest
import torch
from torch import nn

from tdcache.errors import CaptureError
from tdcache.harvesting import ActivationCollector, collect_activations_from_dataloader


class Uneven(nn.Module):
    """One layer runs twice in a forward, the other once."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.once(self.twice(self.twice(x) + 100))


@pytest.mark.parametrize("budget", [2, 4, 10, 1000])
@pytest.mark.filterwarnings("ignore:.*ran more than once")
def test_fault_a_budget_that_is_used_up_does_not_hide_that_rows_do_not_belong_together(budget):
    batches = [torch.arange(4.0)[:, None] + 10 * number for number in range(5)]
    with pytest.raises(CaptureError, match=r"saw different numbers of rows.*'twice': .*collect them one by one"):
        collect_activations_from_dataloader(Uneven(), batches, ["twice", "once"], budget, verbose=False)
    collector = ActivationCollector(Uneven(), ["twice", "once"], budget)
    with pytest.raises(CaptureError, match=r"\{'twice': 8, 'once': 4\}"), collector:
        collector.model(batches[0])
    with pytest.raises(CaptureError, match=r"\{'twice': 8, 'once': 4\}"):
        collector.get_activations("once")
    collector.clear()
    with collector:
        collector.model.once(collector.model.twice(batches[0]))
    assert len(collector.get_activations()["once"]) == min(4, budget)


def test_fault_rows_of_images_are_refused_and_no_columns_of_pixels():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(5 * 4 * 6, 2))
    images = torch.randn(2, 3, 4, 6)
    with pytest.raises(CaptureError, match=r"'0' gives values of shape \(2, 5, 4, 6\); .*nn.Flatten.*tdcache.harvest"):
        collect_activations_from_dataloader(model, [images], "0", verbose=False)
    found = collect_activations_from_dataloader(model, [images], ["1", "2"], verbose=False)
    assert torch.equal(found["1"], model[0](images).flatten(1))
    with pytest.raises(CaptureError, match=r"'0' gives values of shape \(4,\); rows are made of \(batch, features\)"):
        collect_activations_from_dataloader(nn.Sequential(nn.Flatten(0)), [torch.ones(2, 2)], "0", verbose=False)


class ByKeyword(nn.Module):
    """Calls its blocks by keyword."""

    def __init__(self):
        super().__init__()
        block = {"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}
        self.h = nn.ModuleList(KeywordBlock(**block) for _ in range(2))

    def forward(self, x):
        for block in self.h:
            x = block(flag=True, x=x)
        return x


class KeywordBlock(nn.Module):
    """Its input may come by name."""

    def __init__(self, attn, mlp):
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x, flag=False):
        return self.mlp(self.attn(x))


def test_fault_the_input_of_a_block_that_is_called_by_keyword_is_collected():
    model, x, name = ByKeyword(), torch.randn(3, 4), "blocks.1.hook_resid_pre"
    found = collect_activations_from_dataloader(model, [x], name, verbose=False)
    assert torch.equal(found[name], model.h[0](x))
