"""Rows and positions of values that are not of ``(batch, seq, ...)``: lists of tokens, packed data, heads first."""

import pytest
import torch
from torch import nn

from tdcache import Ablation, ActivationCaching, ActivationPatching, SelectionError, SteeringVectors
from tdcache.reducers import Mean


class Routed(nn.Module):
    """Token ids to scores; each of two experts is given a list of the tokens that are routed to it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        hidden = self.embed(ids)
        tokens, out = hidden.flatten(0, 1), hidden.flatten(0, 1)
        for number, expert in enumerate(self.experts):
            rows = (ids.flatten() % 2 == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(tokens[rows]))
        return self.head(out.view_as(hidden))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


IDS = torch.tensor([[1, 3, 5, 2, 4], [7, 1, 3, 6, 0]])  # six tokens for the second expert, two rows

AT_EXPERT = (
    r"^the value at 'experts\.1' has shape \(6, 4\), and no input of this call has 6 along its first two axes "
    r"\(2, 5\): without rows of the batch, rows= and positions= mean nothing there; select a module that every row "
    r"passes, or set position_dim="
)


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"rows": [0, 1]}, {"positions": 0}, {"positions": -1, "mask_key": None}], ids=str
)
@pytest.mark.parametrize(
    "recipe",
    [
        lambda **options: ActivationCaching(r"experts\.1", **options),
        lambda **options: ActivationCaching(r"experts\.1", directions=["fwd_pre"], **options),
        lambda **options: Ablation(r"experts\.1", **options),
        lambda **options: SteeringVectors(r"experts\.1", torch.ones(4), **options),
        lambda **options: ActivationPatching(r"experts\.1", source=torch.zeros(6, 4), **options),
    ],
    ids=["caching", "caching inputs", "ablation", "steering", "patching"],
)
def test_a_list_of_tokens_has_no_rows_and_no_positions(recipe, options):
    model = Routed()
    plain = model(IDS)
    with pytest.raises(SelectionError, match=AT_EXPERT), recipe(**options).prepare(model) as hooked:
        hooked(IDS)
    assert torch.equal(model(IDS), plain)


def test_a_list_of_tokens_is_kept_and_edited_whole_and_by_units():
    model = Routed()
    with ActivationCaching(r"experts\.1", units=[0], reducer=Mean()).prepare(model) as hooked:
        hooked(IDS)
    assert hooked.cache[r"experts.1"].shape == (1,)
    with Ablation(r"experts\.1", units=[0]).prepare(model) as hooked:
        assert not torch.equal(hooked(IDS), model.head(model.embed(IDS)))


@pytest.mark.parametrize("options", [{"rows": 0}, {"positions": 0}], ids=str)
def test_the_data_of_a_packed_sequence_has_no_rows_and_no_positions(options):
    model, x, lengths = Packed(), torch.randn(2, 4, 3), torch.tensor([4, 3])
    with (
        pytest.raises(SelectionError, match=r"at 'rnn' has shape \(7, 4\), and no input of this call has 7 along"),
        ActivationCaching("rnn", **options).prepare(model) as hooked,
    ):
        hooked(x, lengths)


class Heads(nn.Module):
    """A module that returns attention weights ``(batch, heads, query, key)``."""

    def __init__(self):
        super().__init__()
        self.embed, self.weights = nn.Embedding(8, 4), nn.Softmax(-1)

    def forward(self, ids):
        hidden = self.embed(ids).unflatten(-1, (2, 2)).transpose(1, 2)
        return self.weights(hidden @ hidden.mT)


def test_of_token_ids_the_axis_of_positions_has_as_many_entries():
    model = Heads()
    with (
        pytest.raises(
            SelectionError,
            match=r"^the value at 'weights' has 2 positions, and this call feeds 5 tokens; set position_dim= to the "
            r"axis of tokens, or count columns with mask_key=None",
        ),
        ActivationCaching("weights", positions=-1).prepare(model) as hooked,
    ):
        hooked(IDS)
    ablation = Ablation("weights", positions=-1).prepare(model)
    with pytest.raises(SelectionError, match="has 2 positions, and this call feeds 5 tokens"), ablation as hooked:
        hooked(IDS)
    with ActivationCaching("weights", positions=-1, position_dim=2).prepare(model) as hooked:
        kept = hooked(IDS)[:, :, -1]
    assert torch.equal(hooked.cache["weights"], kept)
    with ActivationCaching("weights", positions=-1, mask_key=None).prepare(model) as hooked:
        kept = hooked(IDS)[:, -1]
    assert torch.equal(hooked.cache["weights"], kept)


def test_rows_may_be_fed_first_and_worked_on_second():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model, x = Transposed(), torch.randn(2, 5, 3)
    with ActivationCaching("inner", rows=1, position_dim=0).prepare(model) as hooked:
        out = hooked(x)
    assert torch.equal(hooked.cache["inner"], out[1])
