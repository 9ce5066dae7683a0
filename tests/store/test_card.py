"""The card of an exported folder."""

import torch
from torch import nn

from tdcache import harvest
from tdcache.store.card import dataset_card


def test_a_card_says_what_is_in_the_folder_and_what_was_lost(tmp_path):
    rows = torch.tensor([[1e-9, 1.0], [0.0, 2.0]])
    dataset = harvest(nn.Sequential(nn.Identity()), rows, tmp_path / "a.acts", select="0", dtype="float16")
    card = dataset_card(dataset)
    assert card.startswith(
        "---\ntags: [activations, tdcache]\nsize_categories: ['n<1K']\n---\n# Activations of Sequential\n"
    )
    assert "2 rows of 2 samples, harvested with tdcache. Each row knows `seq`, `pos`." in card
    assert "| `0` | float16 | 2 | 0.8944 | 0 | 1 |" in card  # the square root of 2 features over (1 + 4) / 2
    assert "- rows: `samples`\n- direction: `fwd`\n- drop: `['pad']`" in card
    assert f"- store id: `{dataset.id}`" in card


def test_a_card_says_of_what_stores_and_tokens_it_was_made(tmp_path):
    data = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    dataset = harvest(nn.Embedding(9, 2), [each["input_ids"] for each in data], tmp_path / "a.acts", select="", tag="x")
    mixed = dataset.repack(tmp_path / "b.acts", shuffle=True, seed=4)
    assert f"- made of: `{dataset.id}`, shuffled with seed 4\n" in dataset_card(mixed)
    assert f"- made of: `{dataset.id}`, in order\n" in dataset_card(dataset.repack(tmp_path / "c.acts"))
    both = dataset.merge(dataset, path=tmp_path / "d.acts")
    assert f"- made of: `{dataset.id}` (3 rows), `{dataset.id}` (3 rows)\n" in dataset_card(both)


def test_a_card_names_the_tokenizer_and_the_size(tmp_path):
    rows = [{"input_ids": torch.ones(50, 30, dtype=torch.long)}]
    dataset = harvest(Tokens(), rows, tmp_path / "a.acts", select="table", tokenizer="letters")
    card = dataset_card(dataset)
    assert "size_categories: ['1K<n<10K']\n" in card
    assert "- tokenizer: `letters`\n" in card


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 2)

    def forward(self, input_ids):
        return self.table(input_ids)
