"""Calls inside models that are no transformers of Hugging Face's: their values are those of a forward written out."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from model_state import state_of
from tdcache import Ablation, ActivationCaching, CaptureError, SteeringVectors, calls, select


class ResidualNet(nn.Module):
    """Functional ReLUs, of which the second follows a residual sum."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.norm(self.one(x)), inplace=self.inplace)
        y = self.two(y)
        y += x
        return F.relu(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_residual_sum_of_a_convolutional_block(inplace):
    torch.manual_seed(0)
    model, x = ResidualNet(inplace).eval(), torch.randn(2, 3, 6, 6)
    hidden = F.relu(model.norm(model.one(x)))
    total = model.two(hidden) + x
    with ActivationCaching(r"::(relu|relu\.1|add_)", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert torch.equal(hooked.cache["fwd", "::relu"], hidden)
    assert torch.equal(hooked.cache["fwd", "::add_"], total)
    assert torch.equal(hooked.cache["fwd", "::relu.1"], total.relu())
    assert torch.equal(hooked.cache["bwd", "::add_"], (total > 0).float())
    with Ablation("::add_", units=[1], unit_dim=-3).prepare(model) as hooked, torch.no_grad():
        edited = hooked(x)
    keep = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    assert torch.equal(edited, (total * keep).relu())


class DenseLayer(nn.Module):
    def __init__(self, before, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(before), nn.Conv2d(before, growth, 3, padding=1)

    def forward(self, features):
        joined = torch.cat(features, 1)
        return self.conv(F.relu(self.norm(joined)))


class DenseBlock(nn.ModuleDict):
    """As torchvision's: a container with a forward of its own, whose layers get the list of what came before."""

    def __init__(self, layers=3, width=4, growth=2):
        super().__init__({f"denselayer{n}": DenseLayer(width + n * growth, growth) for n in range(layers)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def test_what_a_densenet_joins():
    torch.manual_seed(0)
    model, x = nn.Sequential(DenseBlock()).eval(), torch.randn(2, 4, 5, 5)
    with ActivationCaching(r"0(\.denselayer\d)?::cat").prepare(model) as hooked, torch.no_grad():
        y = hooked(x)
    cache = hooked.cache
    assert torch.equal(cache["0.denselayer0::cat"], x)
    assert cache["0.denselayer2::cat"].shape == (2, 8, 5, 5)
    assert torch.equal(cache["0::cat"], y)
    assert torch.equal(cache["0.denselayer2::cat"], y[:, :8])
    with ActivationCaching(r"0\.denselayer1::cat", directions=["fwd_pre"], pick=(0, 1)).prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["0.denselayer1::cat"], y[:, 4:6])


class GraphLayer(nn.Module):
    """Sums the messages that arrive at each node."""

    def __init__(self, width=4):
        super().__init__()
        self.message = nn.Linear(2 * width, width)

    def forward(self, nodes, edges):
        source, target = edges
        messages = F.silu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
        gathered = torch.zeros_like(nodes).index_add_(0, target, messages)
        most = torch.zeros_like(nodes).scatter_reduce(0, target[:, None].expand_as(messages), messages, "amax")
        return nodes + gathered + most


def test_what_a_graph_network_gathers():
    torch.manual_seed(0)
    model, nodes = GraphLayer(), torch.randn(3, 4)
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
    messages = F.silu(model.message(torch.cat([nodes[edges[0]], nodes[edges[1]]], -1)))
    names = select(model, "::.*", (nodes, edges)).sites
    assert {"::index_add_", "::scatter_reduce", "::silu", "::add", "::add.1", "::cat"} <= set(names)
    with ActivationCaching("::(index_add_|scatter_reduce|silu)", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(nodes, edges).sum().backward()
    by_hand = torch.stack([messages[2], messages[0] + messages[3], messages[1]])
    torch.testing.assert_close(hooked.cache["fwd", "::index_add_"], by_hand)  # two terms, in another order
    assert torch.equal(hooked.cache["fwd", "::silu"], messages)
    assert torch.equal(hooked.cache["bwd", "::index_add_"], torch.ones(3, 4))
    with Ablation("::silu", rows=[3]).prepare(model) as hooked, torch.no_grad():
        edited = hooked(nodes, edges)
    with torch.no_grad():
        assert not torch.equal(edited[1], model(nodes, edges)[1])
        assert torch.equal(edited[0], model(nodes, edges)[0])


def test_calls_in_tensordict_modules():
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return F.gelu(self.lin(x)) * 0.5

    model = TensorDictSequential(
        TensorDictModule(Half(), in_keys=["a"], out_keys=["b"]), TensorDictModule(Half(), in_keys=["b"], out_keys=["c"])
    )
    data = TensorDict({"a": torch.randn(2, 3)}, batch_size=[2])
    first, second = (module.module for module in model.module)
    hidden = F.gelu(first.lin(data["a"]))
    with ActivationCaching(r"module\.\d\.module::gelu").prepare(model) as hooked:
        out = hooked(data.clone())
    assert torch.equal(hooked.cache["module.0.module::gelu"], hidden)
    assert torch.equal(hooked.cache["module.1.module::gelu"] * 0.5, out["c"])
    with SteeringVectors(r"module\.0\.module::gelu", torch.ones(3)).prepare(model) as hooked:
        steered = hooked(data.clone())
    assert torch.equal(steered["b"], (hidden + 1) * 0.5)
    assert torch.equal(steered["c"], second(steered["b"]))


def test_the_fused_path_of_torchs_own_encoder_is_refused_by_name():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, before = torch.randn(2, 5, 8), state_of(model)
    context = ActivationCaching(r"layers\.\d::(relu|add)").prepare(model)
    with torch.no_grad(), context as hooked, pytest.raises(CaptureError, match="would run its fused path here"):
        hooked(x)
    assert state_of(model) == before


def test_torchs_own_encoder_without_the_fused_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    x, seen = torch.randn(2, 5, 8), []
    model.layers[0].linear2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with ActivationCaching(r"layers\.0::(relu|_sa_block|add.*)").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(y, model(x))
    assert torch.equal(hooked.cache["layers.0::relu"], seen[0])
    assert torch.equal(hooked.cache["layers.0::add"], x + model.layers[0]._sa_block(x, None, None))


def test_torchs_own_attention_is_one_call_whose_inside_is_not_seen():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    assert calls(model, "", (x, x, x)).sites == (
        "::transpose", "::transpose.1", "::multi_head_attention_forward", "::transpose.2",
    ) or "::multi_head_attention_forward" in calls(model, "", (x, x, x)).sites  # fmt: skip
    with ActivationCaching("::multi_head_attention_forward", pick=1).prepare(model) as hooked:
        _, weights = hooked(x, x, x)
    assert torch.equal(hooked.cache["::multi_head_attention_forward"], weights)


def test_the_gates_of_an_lstm_are_not_reached():
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    names = calls(model, "", x).sites
    assert "::lstm" in names
    assert not any("sigmoid" in name or "tanh" in name for name in names)
