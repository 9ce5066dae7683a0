"""Which call of a module an entry belongs to: repeated calls, stale entries, and sites that were never called."""

import warnings

import pytest
import torch
from torch import nn

from small_models import MLP, Residual, by_hand
from stable_ids import stable_id
from tdcache import ActivationCaching, Concatenate, First, Last, RepeatedCallWarning, Stack, UnfiredSiteWarning


class Looped(nn.Module):
    """Calls its one layer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x, times=2):
        for _ in range(times):
            x = torch.tanh(self.layer(x))
        return x if times == 0 else self.other(x)


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [each for each in caught if each.category in (RepeatedCallWarning, UnfiredSiteWarning)]


# Several calls in one forward


def test_of_several_calls_the_last_value_is_kept_and_a_warning_names_stack(x):
    model = Looped()
    with (
        ActivationCaching("layer").prepare(model) as hooked,
        pytest.warns(RepeatedCallWarning, match=r"'layer' ran more than once .*reducer=Stack\(\)"),
    ):
        hooked(x, times=3)
    assert torch.equal(hooked.cache["layer"], by_hand(model, ["layer"], lambda: model(x, times=3))["layer"][-1])


def test_the_warning_comes_once_per_site(x):
    model = nn.Sequential(Looped(), Looped())

    def body():
        with ActivationCaching(r"\d\.layer").prepare(model) as hooked:
            for _ in range(3):
                hooked(x)

    messages = [str(each.message) for each in warnings_of(body)]
    assert [message.partition(" ran")[0] for message in messages] == ["'0.layer'", "'1.layer'"]


@pytest.mark.parametrize(
    ("reducer", "of_all"),
    [(Stack(), torch.stack), (First(), lambda values: values[0]), (Concatenate(), torch.cat)],
    ids=["stack", "first", "concatenate"],
)
def test_a_reducer_takes_every_call_without_a_warning(x, reducer, of_all):
    model = Looped()

    def body():
        with ActivationCaching("layer", reducer=reducer).prepare(model) as hooked:
            hooked(x, times=3)
        body.found = hooked.cache["layer"]

    assert warnings_of(body) == []
    assert torch.equal(body.found, of_all(by_hand(model, ["layer"], lambda: model(x, times=3))["layer"]))


def test_one_call_in_each_of_two_forwards_is_no_repetition(x):
    def body():
        with ActivationCaching("layer", reducer=Last()).prepare(Looped()) as hooked:
            hooked(x, times=1)
            hooked(x, times=1)

    assert warnings_of(body) == []


def test_of_several_calls_the_gradient_of_the_last_is_kept(x):
    model = Looped()
    with ActivationCaching("layer", directions=["bwd"]).prepare(model) as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore", RepeatedCallWarning)
        hooked(x, times=2).sum().backward()
    last = torch.tanh(model.layer(x)).detach()
    output = model.layer(last).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(model.other(torch.tanh(output)).sum(), output)
    assert torch.equal(hooked.cache["layer"], wanted)


def test_stack_has_the_gradient_of_every_call_in_the_order_of_the_calls(x):
    model = Looped()
    with ActivationCaching("layer", directions=["fwd", "bwd"], reducer=Stack()).prepare(model) as hooked:
        hooked(x, times=3).sum().backward()
    values, grads = hooked.cache["fwd", "layer"], hooked.cache["bwd", "layer"]
    assert grads.shape == values.shape == (3, 5, 4)
    for call in range(3):
        output = values[call].clone().requires_grad_()
        y = torch.tanh(output)
        for _ in range(2 - call):
            y = torch.tanh(model.layer(y))
        (wanted,) = torch.autograd.grad(model.other(y).sum(), output)
        assert torch.equal(grads[call], wanted)


def test_the_twice_used_relu_of_a_residual_block_gives_both_values(x):
    model = Residual()
    with ActivationCaching("relu", reducer=Stack(), hold="snapshot").prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["relu"], torch.stack(by_hand(model, ["relu"], lambda: model(x))["relu"]))


def test_a_root_that_calls_itself_is_one_forward(x):
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            return self.layer(x) if depth == 0 else self(torch.tanh(x), depth - 1)

    model = Recursive()

    def body():
        with ActivationCaching("layer").prepare(model) as hooked:
            for scale in (1, 2):
                y = hooked(scale * x)
                assert torch.equal(hooked.cache["layer"], y)

    assert warnings_of(body) == []


def test_each_call_of_the_hooked_model_by_a_larger_one_is_a_forward(x):
    larger = Looped()
    model = larger.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    values = []
    larger.other.register_forward_pre_hook(lambda module, args: values.append(args[0]))

    def body():
        with (
            ActivationCaching("0").prepare(model) as last,
            ActivationCaching("0", reducer=Stack()).prepare(model) as every,
        ):
            larger(x, times=3)
            body.last, body.every = last.cache["0"], every.cache["0"]

    assert warnings_of(body) == []
    wanted = by_hand(model, ["0"], lambda: larger(x, times=3))["0"]
    assert torch.equal(body.last, wanted[-1])
    assert torch.equal(body.every, torch.stack(wanted))


# Entries of an earlier forward


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hold": "snapshot"},
        {"hold": "live"},
        {"index": 0},
        {"dtype": torch.float64},
        {"pick": "all"},
        {"batch_dims": 1},
    ],
    ids=stable_id,
)
def test_a_site_that_did_not_fire_has_no_entry_from_the_forward_before(x, options):
    with ActivationCaching("layer|other", **options).prepare(Looped()) as hooked:
        hooked(x, times=1)
        assert sorted(hooked.cache.keys()) == ["layer", "other"]
        hooked(x, times=0)
        assert list(hooked.cache.keys()) == []


def test_only_the_stale_entries_vanish(x):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, left):
            return (self.left if left else self.right)(self.always(x))

    with ActivationCaching("always|left|right", use_nested_keys=True).prepare(Branch()) as hooked:
        for left in (True, False, True):
            hooked(x, left)
            assert sorted(hooked.cache["fwd"].keys()) == sorted(["always", "left" if left else "right"])


def test_a_site_whose_structure_changes_between_forwards_has_the_latest_parts(x):
    class Parts(nn.Module):
        def forward(self, x, count):
            return tuple(x + part for part in range(count)) if count else x

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = Parts()

        def forward(self, x, count):
            return self.parts(x, count)

    with ActivationCaching("parts", pick="all").prepare(Holder()) as hooked:
        for count in (2, 1, 3, 0, 2):
            hooked(x, count)
            wanted = [("parts", str(part)) for part in range(count)] or ["parts"]
            assert list(hooked.cache.keys(include_nested=True, leaves_only=True)) == wanted


def test_the_gradients_of_an_earlier_forward_are_stale(x):
    model = MLP()
    with ActivationCaching("head", directions=["bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
        y = hooked(x)
        assert list(hooked.cache.keys()) == []
        (2 * y).sum().backward()
        assert torch.equal(hooked.cache["head"], torch.full((5, 2), 2.0))


def test_a_late_backward_of_an_earlier_forward_does_not_write_over_the_latest(x):
    model = MLP()
    with ActivationCaching("head", directions=["bwd"]).prepare(model) as hooked:
        first = hooked(x)
        second = hooked(x)
        second.sum().backward()
        (3 * first).sum().backward()
        assert torch.equal(hooked.cache["head"], torch.ones(5, 2))


def test_a_module_called_alone_is_kept_as_well(x):
    model = MLP()
    with ActivationCaching("head").prepare(model) as hooked:
        y = model.head(x)
        assert torch.equal(hooked.cache["head"], y)
        y = model.head(2 * x)
        assert torch.equal(hooked.cache["head"], y)


def test_a_failed_forward_leaves_no_entries_of_the_one_before(x):
    class Failing(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                raise ValueError("positive")
            return x

    model = nn.Sequential(nn.Identity(), Failing(), nn.Identity())
    with ActivationCaching(r"0|2").prepare(model) as hooked:
        hooked(-torch.ones(2))
        with pytest.raises(ValueError, match="positive"):
            hooked(torch.ones(2))
        assert sorted(hooked.cache.keys()) == ["0"]
        assert torch.equal(hooked.cache["0"], torch.ones(2))


# Sites that were never called


class WithContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.named["one"](self.blocks[0](x))
        return self.attention(x, x, x)[0]


def exit_messages(pattern, **options):
    def body():
        with ActivationCaching(pattern, **options).prepare(WithContainers()) as hooked:
            hooked(torch.randn(1, 5, 4))

    return [str(each.message) for each in warnings_of(body)]


def test_unfired_sites_are_reported_by_name_at_exit():
    (message,) = exit_messages("unused|attention")
    assert message == "1 of 2 selected sites saw no 'fwd' value: 'unused'"


@pytest.mark.parametrize(("path", "kind"), [("blocks", "ModuleList"), ("named", "ModuleDict")])
def test_a_container_is_reported_with_the_reason(path, kind):
    (message,) = exit_messages(path)
    assert f"{kind} '{path}' is a container that is never called; select its members" in message


def test_the_out_projection_of_an_attention_is_reported_with_the_reason():
    (message,) = exit_messages(r"attention\.out_proj|attention")
    assert "'attention.out_proj'; nn.MultiheadAttention 'attention' uses the weights" in message
    assert message.endswith("select 'attention' itself")


def test_gradients_that_no_backward_brought_are_reported():
    (message,) = exit_messages("attention", directions=["bwd"])
    assert "no 'bwd' value: 'attention'" in message
    assert message.endswith("was backward() called inside the block?")


def test_gradients_of_what_needs_none_are_reported_with_the_reason():
    with torch.no_grad():
        (message,) = exit_messages("attention", directions=["bwd"])
    assert "did not require grad" in message


def test_nothing_is_reported_without_a_forward():
    def body():
        with ActivationCaching("unused").prepare(WithContainers()):
            pass

    assert warnings_of(body) == []


def test_nothing_is_reported_when_the_body_raised():
    def failing(hooked):
        hooked(torch.randn(1, 5, 4))
        raise KeyError("body")

    def body():
        with pytest.raises(KeyError), ActivationCaching("unused").prepare(WithContainers()) as hooked:
            failing(hooked)

    assert warnings_of(body) == []


def test_a_site_that_fired_in_one_of_several_forwards_is_not_reported(x):
    def body():
        with ActivationCaching("layer").prepare(Looped()) as hooked:
            hooked(x, times=1)
            hooked(x, times=0)

    assert warnings_of(body) == []


def test_a_second_backward_replaces_the_gradients_of_every_site(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, times):
            for _ in range(times):
                x = self.a(x)
            return self.b(x)

    model = Twice()
    with (
        warnings.catch_warnings(action="ignore"),
        ActivationCaching("a|b", directions=["fwd", "bwd"]).prepare(model) as hooked,
    ):
        hooked(x, 2).sum().backward()
        loss = hooked(x, 1).sum()
        loss.backward(retain_graph=True)
        once = hooked.cache["bwd"].clone()
        (5 * loss).backward()
    assert torch.allclose(hooked.cache["bwd", "a"], 5 * once["a"])
    assert torch.allclose(hooked.cache["bwd", "b"], 5 * once["b"])
