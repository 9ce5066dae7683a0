"""Watching gradients changes nothing of the user's: not ``.grad``, not a container, not a tensor hook of the model."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdcache import ActivationCaching, Concatenate, First, InplaceModificationError, Stack

GRADIENTS = ["bwd", "bwd_pre", "grad_in"]


class Bias(nn.Module):
    """Hands its own parameter on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.weight


class Leaves(nn.Module):
    """Adds a leaf that is handed on to a parameter that is handed on."""

    def __init__(self):
        super().__init__()
        self.same, self.bias = nn.Identity(), Bias()

    def forward(self, x):
        return self.same(x) + self.bias(x)


@pytest.mark.filterwarnings("ignore::tdcache.UnfiredSiteWarning")  # a module that ignores its input has no grad_in
@pytest.mark.parametrize("directions", [*([each] for each in GRADIENTS), ["fwd", "bwd"], GRADIENTS])
@pytest.mark.parametrize("options", [{}, {"pick": "all"}, {"hold": "snapshot"}, {"hold": "live"}, {"reducer": Stack()}])
def test_gradients_accumulate_in_every_leaf_as_without_a_capture(directions, options):
    model, x = Leaves(), torch.zeros(3, requires_grad=True)
    with ActivationCaching("same|bias", directions=directions, allow_empty=True, **options).prepare(model) as hooked:
        for scale in (1.0, 10.0, 100.0):
            (scale * hooked(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 111.0), rtol=0, atol=0)
    torch.testing.assert_close(model.bias.weight.grad, torch.full((3,), 111.0), rtol=0, atol=0)


class Log(nn.Module):
    """Writes what it sees into the containers it is given."""

    def forward(self, x, *, states, named):
        states.append(x * 2)
        states[0] = x * 3
        named["seen"] = x * 4
        return x + states[0] + named["old"]


class Logged(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = Log()

    def forward(self, x):
        states, named = [x], {"old": x * 1}
        old = named["old"]
        y = self.log(x, states=states, named=named)
        assert named["old"] is old
        return y + states[0] + states[1] + named["seen"]


@pytest.mark.parametrize("pick", [None, "states", ("states", 0), ("named", "old"), "all"])
@pytest.mark.parametrize("directions", [["grad_in"], ["bwd"], GRADIENTS])
def test_what_a_module_writes_into_its_callers_containers_stays(pick, directions):
    if "grad_in" not in directions and pick not in (None, "all"):
        pick = None
    pick = ("states", 0) if pick == "states" else pick
    x = torch.ones(2, requires_grad=True)
    options = {"pick": pick} if directions == ["grad_in"] else {}
    with ActivationCaching("log", directions=directions, **options).prepare(Logged()) as hooked:
        y = hooked(x)
        y.sum().backward()
    # x + 3x + x, and 3x + 2x + 4x from what was written
    torch.testing.assert_close(y, torch.full((2,), 14.0), rtol=0, atol=0)
    torch.testing.assert_close(x.grad, torch.full((2,), 14.0), rtol=0, atol=0)


class HandsOnByName(nn.Module):
    def forward(self, x, *, state):
        return state


class Twofold(nn.Module):
    def forward(self, x, state=None):
        return x * 1, state


class Caller(nn.Module):
    """Uses the keyword argument beside what becomes of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        state = x * 2
        out = self.inner(x, state=state)
        out = out[1] if isinstance(out, tuple) else out
        return 3 * out + 5 * state


@pytest.mark.parametrize("hold", ["detached", "snapshot", "live"])
@pytest.mark.parametrize(("inner", "pick"), [(HandsOnByName, None), (Twofold, 1), (Twofold, "all")])
@pytest.mark.parametrize("directions", [["bwd"], ["fwd", "bwd"]])
def test_the_gradient_of_a_keyword_argument_that_is_handed_on_is_the_modules_own(directions, inner, pick, hold):
    recipe = ActivationCaching("inner", directions=directions, pick=pick, hold=hold, use_nested_keys=True)
    with recipe.prepare(Caller(inner())) as hooked:
        hooked(torch.ones(2, requires_grad=True)).sum().backward()
    key = ("bwd", "inner", "1") if pick == "all" else ("bwd", "inner")
    assert hooked.cache[key].tolist() == [3.0, 3.0]


class Front(nn.Module):
    def forward(self, x):
        return x[:, :2]


class ChangesView(nn.Module):
    def __init__(self, changes_base):
        super().__init__()
        self.front, self.changes_base = Front(), changes_base

    def forward(self, x):
        x = x * 1
        half = self.front(x)
        y = half.exp()
        (x if self.changes_base else half).mul_(2)
        return y.sum() + half.sum() + x.sum()


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre"])
@pytest.mark.parametrize("hold", ["detached", "snapshot", "live"])
@pytest.mark.parametrize("changes_base", [False, True])
def test_the_gradient_of_a_view_that_is_changed_in_place_later_is_refused(direction, hold, changes_base):
    recipe = ActivationCaching("front", directions=[direction], hold=hold)
    model, message = ChangesView(changes_base), "'front' is a view"
    with pytest.raises(InplaceModificationError, match=message), recipe.prepare(model) as hooked:
        hooked(torch.ones(2, 4, requires_grad=True)).backward()


class OwnHooks(nn.Module):
    """Has tensor hooks of its own, before and after the layer has run."""

    def __init__(self):
        super().__init__()
        self.layer = HookedLayer()

    def forward(self, x):
        y = self.layer(x)
        y.register_hook(lambda grad: grad * 5)
        return y * 2


class HookedLayer(nn.Module):
    def forward(self, x):
        y = x * 1
        y.register_hook(lambda grad: grad * 3)
        return y


@pytest.mark.parametrize(
    "options", [{}, {"hold": "snapshot"}, {"hold": "live"}, {"index": slice(None)}, {"pick": "all"}]
)
@pytest.mark.parametrize("directions", [["bwd"], ["fwd", "bwd"]])
def test_tensor_hooks_of_the_model_act_before_and_after_a_capture_alike(directions, options):
    x = torch.ones(2, requires_grad=True)
    recipe = ActivationCaching("layer", directions=directions, use_nested_keys=True, **options)
    with recipe.prepare(OwnHooks()) as hooked:
        hooked(x).sum().backward()
    assert hooked.cache["bwd", "layer"].tolist() == [6.0, 6.0]  # after the module's own, before its caller's
    assert x.grad.tolist() == [30.0, 30.0]


class Checkpointed(nn.Module):
    """Recomputes a layer that returns a view, and counts how often its own tensor hook is called."""

    def __init__(self, reentrant):
        super().__init__()
        self.front, self.reentrant, self.seen = Front(), reentrant, []

    def inner(self, x):
        y = self.front(x * 2)
        if y.requires_grad:
            y.register_hook(self.seen.append)
        return y * 3

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("directions", [["bwd"], ["fwd"], ["fwd", "bwd"], ["grad_in"]])
def test_a_checkpoint_leaves_the_users_own_tensor_hooks_alone(directions, reentrant):
    counts = []
    for captured in (False, True):
        model, x = Checkpointed(reentrant), torch.ones(2, 4, requires_grad=True)
        with ActivationCaching("front" if captured else "", directions=directions).prepare(model) as hooked:
            hooked(x).sum().backward()
        counts.append(([grad.tolist() for grad in model.seen], x.grad.tolist()))
    assert counts[0] == counts[1]
    assert counts[0][0]


class Same(nn.Module):
    def forward(self, x):
        return x


SITES = {
    "made": lambda: nn.Linear(2, 2),
    "view": lambda: nn.Flatten(0),
    "handed on": Same,
    "sequence": lambda: nn.Sequential(nn.Linear(2, 2), Same()),
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("options", [{}, {"hold": "live"}, {"reducer": Stack()}, {"pick": "all"}])
@pytest.mark.parametrize("directions", [["bwd"], ["fwd", "bwd"]])
def test_a_gradient_that_autograd_is_asked_for_at_the_site_itself_is_kept(directions, options, name):
    model, seen = nn.Sequential(SITES[name]()), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    with ActivationCaching("0", directions=directions, use_nested_keys=True, **options).prepare(model) as hooked:
        output = hooked(torch.ones(2, 2, requires_grad=True) * 1)
        (grad,) = torch.autograd.grad((output**2).sum(), output)
    assert torch.equal(hooked.cache["bwd", "0"].reshape(-1), grad.reshape(-1))


class Pair(nn.Module):
    def forward(self, x):
        return x * 2, x * 3


class ChangesPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        one, other = self.pair(x)
        one.add_(1)
        other.mul_(2)
        return one + other


@pytest.mark.parametrize("direction", GRADIENTS)
@pytest.mark.parametrize("options", [{}, {"pick": "all"}, {"pick": 1}, {"callback": True}])
def test_the_tensors_of_a_tuple_may_be_changed_in_place_afterwards(direction, options):
    def grads(key, direction, module, grad_output, grad_input=None):
        return torch.stack(grad_output)

    if "callback" in options:
        options = {"callback": grads}
    if direction == "grad_in" and options == {"pick": 1}:
        options = {"pick": 0}
    x = torch.ones(2, requires_grad=True)
    with ActivationCaching("pair", directions=[direction], **options).prepare(ChangesPair()) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert y.tolist() == [9.0, 9.0]
    assert x.grad.tolist() == [8.0, 8.0]
    kept = hooked.cache["pair"]
    if "callback" in options:
        assert kept.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    elif direction == "grad_in":
        assert (kept["0"] if options.get("pick") == "all" else kept).tolist() == [8.0, 8.0]
    elif options.get("pick") == "all":
        assert [kept["0"].tolist(), kept["1"].tolist()] == [[1.0, 1.0], [2.0, 2.0]]
    else:
        assert kept.tolist() == ([2.0, 2.0] if options else [1.0, 1.0])


class DoublesGradient(nn.Module):
    """Overwrites the gradient that it hands upstream, which is the very tensor that came."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.shift = Shift()

    def forward(self, x):
        y = self.layer(x)
        y.register_hook(lambda grad: grad.mul_(2))
        return self.shift(y)


class Shift(nn.Module):
    def forward(self, x):
        return x + 0


@pytest.mark.parametrize("reducer", [Concatenate(), Stack(), First(), None])
@pytest.mark.parametrize("pick", [None, "all"])
def test_an_overwritten_gradient_is_an_error_whatever_gathers_it(reducer, pick):
    recipe = ActivationCaching("shift", directions=["bwd"], reducer=reducer, pick=pick)
    message = "'shift' was overwritten"
    with pytest.raises(InplaceModificationError, match=message), recipe.prepare(DoublesGradient()) as hooked:
        hooked(torch.ones(1, 2)).backward(torch.ones(1, 2))
    recipe = ActivationCaching("shift", directions=["bwd"], reducer=reducer, pick=pick, hold="snapshot")
    with recipe.prepare(DoublesGradient()) as hooked:
        hooked(torch.ones(1, 2)).backward(torch.ones(1, 2))
    assert hooked.cache["shift"].reshape(-1).tolist() == [1.0, 1.0]


def test_a_tensordict_module_goes_on_writing_to_the_tensordict_of_its_caller():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(2, 2), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.ReLU(), in_keys=["h"], out_keys=["y"]),
    )
    data = TensorDict({"x": torch.ones(1, 2, requires_grad=True)}, batch_size=[1])
    x = data["x"]
    with ActivationCaching(r"module\.\d", directions=["grad_in"]).prepare(model) as hooked:
        out = hooked(data)
        out["y"].sum().backward()
    assert data["x"] is x
    assert set(data.keys()) == {"x", "h", "y"}
    assert set(hooked.cache.keys()) == {"module.0", "module.1"}


class HandsOnWithoutGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.Sequential(nn.Identity())

    def forward(self, x):
        with torch.no_grad():
            same = self.same(x)
        return 2 * x + 3 * same


@pytest.mark.filterwarnings("ignore::tdcache.UnfiredSiteWarning")  # without a graph nothing is watched
@pytest.mark.parametrize("direction", GRADIENTS)
@pytest.mark.parametrize("callback", [None, lambda module, key, direction, **grads: torch.zeros(1)])
def test_an_input_that_is_handed_on_under_no_grad_stays_in_the_graph(direction, callback):
    x = torch.ones(2, requires_grad=True)
    with ActivationCaching("same.*", directions=[direction], callback=callback).prepare(
        HandsOnWithoutGraph()
    ) as hooked:
        hooked(x).sum().backward()
    assert x.grad.tolist() == [5.0, 5.0]
    assert hooked.cache.is_empty()


class WritesIntoView(nn.Module):
    def __init__(self):
        super().__init__()
        self.front = Front()

    def forward(self, x):
        front = self.front(x * 1)
        front.mul_(2)
        return front.sum()


@pytest.mark.parametrize("hold", ["detached", "snapshot"])
@pytest.mark.parametrize("pick", [None, "all"])
def test_the_gradient_of_an_input_whose_view_is_changed_in_place_is_refused(hold, pick):
    recipe = ActivationCaching("front", directions=["grad_in"], hold=hold, pick=pick)
    message = "the input of 'front' was changed in place after"
    with pytest.raises(InplaceModificationError, match=message), recipe.prepare(WritesIntoView()) as hooked:
        hooked(torch.ones(2, 4, requires_grad=True)).backward()


class Shares(nn.Module):
    """Two modules whose inputs get one and the same gradient, which autograd goes on adding to."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(nn.Identity(), nn.Tanh())

    def forward(self, x):
        return x + self.outer(x)


@pytest.mark.parametrize("times", [1, 3])
def test_gradients_that_share_their_memory_are_copies_that_nobody_overwrites(times):
    x = torch.zeros(2, requires_grad=True) * 1
    with ActivationCaching("outer.*", directions=["bwd", "grad_in"], pick="all").prepare(Shares()) as hooked:
        for _ in range(times):
            hooked(x).sum().backward(retain_graph=True)
    assert all((each == 1).all() for each in hooked.cache.values(include_nested=True, leaves_only=True))
