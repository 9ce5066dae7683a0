"""LSTM and GRU: tuple outputs, hidden states, packed sequences, one call per step."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from stable_ids import stable_id
from tdcache import ActivationCaching, CaptureError, Stack


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **options)
        self.head = nn.Linear(3 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.fixture
def x():
    return torch.randn(2, 5, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=stable_id)
def test_the_sequence_of_outputs_is_kept(kind, options, x):
    model = Tagger(kind, **options)
    with ActivationCaching("rnn|head").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["rnn"], model.rnn(x)[0])
    assert torch.equal(hooked.cache["head"], y)


def test_the_states_of_an_lstm_are_picked_by_path(x):
    model = Tagger(nn.LSTM)
    _, (h, c) = model.rnn(x)
    for pick, wanted in (((1, 0), h), ((1, 1), c)):
        with ActivationCaching("rnn", pick=pick).prepare(model) as hooked:
            hooked(x)
        assert torch.equal(hooked.cache["rnn"], wanted)


def test_every_tensor_of_an_lstm_is_a_nested_entry(x):
    model = Tagger(nn.LSTM)
    output, (h, c) = model.rnn(x)
    with ActivationCaching("rnn", pick="all").prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["rnn", "0"], output)
    assert torch.equal(hooked.cache["rnn", "1", "0"], h)
    assert torch.equal(hooked.cache["rnn", "1", "1"], c)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_gradient_of_the_outputs_is_that_of_autograd(kind, x):
    model = Tagger(kind)
    output = model.rnn(x)[0].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(model.head(output).square().sum(), output)
    with ActivationCaching("rnn", directions=["bwd"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    assert torch.equal(hooked.cache["rnn"], wanted)


def test_one_cell_called_per_step_gives_one_entry_per_step():
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(4, 3)

        def forward(self, x):
            h = x.new_zeros(x.shape[0], 3)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return h

    model, x = Unrolled(), torch.randn(2, 5, 4)
    with ActivationCaching("cell", directions=["fwd", "bwd"], reducer=Stack(dim=1)).prepare(model) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert hooked.cache["fwd", "cell"].shape == hooked.cache["bwd", "cell"].shape == (2, 5, 3)
    assert torch.equal(hooked.cache["fwd", "cell"][:, -1], y)
    assert torch.equal(hooked.cache["bwd", "cell"][:, -1], torch.ones(2, 3))


def test_a_packed_sequence_gives_its_data():
    model = nn.ModuleDict({"rnn": nn.GRU(4, 3)})
    packed = pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    with ActivationCaching("rnn").prepare(model) as hooked:
        output, _ = model["rnn"](packed)
        assert torch.equal(hooked.cache["rnn"], output.data)


def test_a_pick_that_is_not_there_names_what_is(x):
    with (
        pytest.raises(
            CaptureError, match=r"pick=2 finds nothing at 'rnn'.*tuple of \(Tensor, tuple\); use one of \[0, 1\]"
        ),
        ActivationCaching("rnn", pick=2).prepare(Tagger(nn.LSTM)) as hooked,
    ):
        hooked(x)
