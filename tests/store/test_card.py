"""The card of an exported folder."""

import torch
from torch import nn

from tdcache import harvest
from tdcache.store.card import dataset_card


def test_a_card_says_what_is_in_the_folder_and_what_was_lost(tmp_path):
    rows = torch.tensor([[1e-9, 1.0], [0.0, 2.0]])
    dataset = harvest(nn.Sequential(nn.Identity()), rows, tmp_path / "a.acts", select="0", dtype="float16")
    card = dataset_card(dataset)
    assert card.startswith("---\ntags: [activations, tdcache]\n---\n# Activations of Sequential\n")
    assert "2 rows of 2 samples, harvested with tdcache. Each row knows `seq`, `pos`." in card
    assert "| `0` | float16 | 2 | 0.8944 | 0 | 1 |" in card  # the square root of 2 features over (1 + 4) / 2
    assert "- rows: `samples`\n- direction: `fwd`\n- drop: `['pad']`" in card
    assert f"- store id: `{dataset.id}`" in card
