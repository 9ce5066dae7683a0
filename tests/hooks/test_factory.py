"""Ready hooks for one's own contexts: what they write, replace, show and refuse."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache.errors import CaptureError, EditError, HookSignatureError, StopForward
from tdcache.hooks import DIRECTIONS, CacheProxy, HookFactory, register_hook_to_module


def doubled(**named):
    """A callback that takes everything and returns twice the value that its direction is about."""
    row = DIRECTIONS[named["direction"]]
    value = named[row.value]
    return 2 * (value[0] if isinstance(value, tuple) else value)


def run(hook, direction):
    """One forward and backward of ``x ** 2`` at ``x = 3`` with the hook in place; gives output and gradient."""
    module, x = Square(), torch.tensor([3.0], requires_grad=True)
    handle = register_hook_to_module(module, hook, direction)
    output = module(x)
    output.sum().backward()
    handle.remove()
    return output.detach(), x.grad


class Square(nn.Module):
    def forward(self, x):
        return x**2


@pytest.mark.parametrize(
    ("direction", "value"),
    [
        ("fwd", 9.0),
        ("fwd_pre", 3.0),
        ("bwd", 1.0),
        ("bwd_pre", 1.0),
        ("grad_in", 6.0),
        ("fwd_kwargs", 9.0),
        ("fwd_pre_kwargs", 3.0),
    ],
)
def test_a_caching_hook_writes_the_value_of_its_direction(direction, value):
    cache = TensorDict()
    plain = run(lambda *args: None, direction)
    assert run(HookFactory.make_caching_hook(("run", "x.y"), cache, direction=direction), direction) == plain
    assert cache["run", "x.y"].item() == value
    run(HookFactory.make_caching_hook("twice", cache, callback=doubled, direction=direction), direction)
    assert cache["twice"].item() == 2 * value


def test_a_cached_value_keeps_its_graph():
    cache, x = TensorDict(), torch.ones(1, requires_grad=True)
    module = Square()
    register_hook_to_module(module, HookFactory.make_caching_hook("y", cache))
    module(x)
    assert cache["y"].requires_grad


def test_a_caching_callback_gets_the_parameters_of_its_direction_the_key_and_the_direction():
    seen, module = {}, Square()
    hook = HookFactory.make_caching_hook(
        "key", TensorDict(), callback=lambda **named: seen.update(named) or torch.ones(1)
    )
    hook(module, ("args",), "output")
    assert seen == {"module": module, "args": ("args",), "output": "output", "key": "key", "direction": "fwd"}


def test_a_caching_callback_may_return_a_tensordict():
    cache = TensorDict()
    HookFactory.make_caching_hook("td", cache, callback=lambda **named: TensorDict({"a": torch.ones(1)}))(None, (), 0)
    assert cache["td", "a"].item() == 1


def test_of_a_structured_value_the_first_tensor_is_cached():
    cache = TensorDict()
    HookFactory.make_caching_hook("first", cache)(None, (), (None, [torch.tensor(5.0)], torch.tensor(6.0)))
    assert cache["first"].item() == 5


@pytest.mark.parametrize(
    ("callback", "output"),
    [(None, (None, "text")), (lambda **named: "text", torch.ones(1)), (lambda **named: None, torch.ones(1))],
)
def test_what_is_no_tensor_is_not_cached(callback, output):
    cache = TensorDict()
    with pytest.raises(CaptureError):
        HookFactory.make_caching_hook("key", cache, callback=callback)(None, (), output)
    assert cache.is_empty()


class Reference:
    """Stands for a cache that is only there later, as contexts have them."""

    def __init__(self, cache=None):
        self.cache = cache

    def resolve(self):
        return self.cache


def test_a_cache_may_be_given_by_something_that_resolves_to_it():
    reference = Reference()
    hook, proxy = HookFactory.make_caching_hook("key", reference), CacheProxy("key", reference)
    for dead in (lambda: hook(None, (), torch.ones(1)), proxy.resolve):
        with pytest.raises(ValueError, match="no longer exists"):
            dead()
    reference.cache = TensorDict()
    assert proxy.resolve() is None
    hook(None, (), torch.ones(1))
    assert proxy.resolve().item() == 1


def test_a_proxy_keeps_no_cache_alive():
    cache = TensorDict({"key": torch.ones(1)})
    proxy = CacheProxy("key", cache)
    assert proxy.resolve() is cache["key"]
    del cache
    with pytest.raises(ValueError, match="'key' no longer exists"):
        proxy.resolve()


@pytest.mark.parametrize(
    ("direction", "output", "gradient"),
    [
        ("fwd", 5.0, None),
        ("fwd_kwargs", 5.0, None),
        ("fwd_pre", 25.0, None),
        ("fwd_pre_kwargs", 25.0, None),
        ("bwd", 9.0, 5.0),
        ("grad_in", 9.0, 5.0),
        ("bwd_pre", 9.0, 5.0 * 6),
    ],
)
def test_a_setting_hook_replaces_what_its_direction_returns(direction, output, gradient):
    value = torch.tensor([5.0], requires_grad=gradient is None)
    found, grad = run(HookFactory.make_setting_hook(value, direction=direction), direction)
    assert found.item() == output
    assert (grad if grad is None else grad.item()) == gradient


def test_a_setting_hook_resolves_a_proxy_when_it_runs():
    cache = TensorDict()
    hook = HookFactory.make_setting_hook(CacheProxy("later", cache))
    assert run(hook, "fwd")[0].item() == 9  # nothing was written yet: no change
    cache["later"] = torch.tensor([4.0], requires_grad=True)
    assert run(hook, "fwd")[0].item() == 4


def test_a_setting_callback_gets_the_value_and_makes_the_new_one():
    cache, seen = TensorDict({"x": torch.tensor([4.0])}), {}

    def mixed(*, module, args, output, value, direction):
        seen.update(module=type(module), direction=direction)
        return output + value

    assert run(HookFactory.make_setting_hook(CacheProxy("x", cache), callback=mixed), "fwd")[0].item() == 13
    assert seen == {"module": Square, "direction": "fwd"}


def test_none_from_a_setting_hook_is_no_change():
    assert run(HookFactory.make_setting_hook(None), "fwd")[0].item() == 9
    assert run(HookFactory.make_setting_hook(torch.ones(1), callback=lambda **named: None), "fwd")[0].item() == 9


def test_a_tensor_given_for_a_structured_value_replaces_its_first_tensor():
    new, rest = torch.ones(2), torch.full((3,), 2.0)
    after = HookFactory.make_setting_hook(new)(None, (), {"cache": None, "h": torch.zeros(2), "rest": rest})
    assert after["h"] is new
    assert after["rest"] is rest


def test_a_setting_hook_leaves_keyword_arguments_alone():
    new = torch.ones(1)
    hook = HookFactory.make_setting_hook(new, direction="fwd_pre_kwargs")
    assert hook(None, (torch.zeros(1), "text"), {"mask": None}) == ((new, "text"), {"mask": None})
    assert HookFactory.make_setting_hook((3, 4), direction="fwd_pre_kwargs")(None, (1, 2), {"a": 5}) == (
        (3, 4),
        {"a": 5},
    )


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ((1,), torch.ones(1)),
        ([1], (1,)),
        ("text", torch.ones(1)),
        (torch.ones(1), "text"),
        (torch.ones(2), torch.ones(1)),
    ],
)
def test_a_value_of_another_kind_or_shape_is_refused(new, old):
    with pytest.raises(EditError):
        HookFactory.make_setting_hook(new)(None, (), old)
    assert issubclass(EditError, RuntimeError)


def test_a_reading_hook_shows_the_value_and_changes_nothing():
    seen = []
    hook = HookFactory.make_reading_hook(callback=lambda **named: seen.append(named) or torch.zeros(1), direction="bwd")
    output, gradient = run(hook, "bwd")
    assert (output.item(), gradient.item()) == (9.0, 6.0)
    assert [sorted(named) for named in seen] == [["direction", "grad_input", "grad_output", "module"]]


def test_a_stopping_hook_ends_the_forward_with_its_key():
    model = nn.Sequential(Square(), nn.Linear(7, 7))  # the second would fail
    register_hook_to_module(model[0], HookFactory.make_stopping_hook("0"))
    with pytest.raises(StopForward) as caught:
        model(torch.ones(1))
    assert caught.value.key == "0"


MAKERS = [
    lambda callback, direction: HookFactory.make_caching_hook(
        "key", TensorDict(), callback=callback, direction=direction
    ),
    lambda callback, direction: HookFactory.make_setting_hook(None, callback=callback, direction=direction),
    lambda callback, direction: HookFactory.make_reading_hook(callback=callback, direction=direction),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("direction", "callback"),
    [
        ("fwd", lambda module, args, direction, key, value: None),
        ("fwd", lambda *args: None),
        ("fwd", lambda module, args, output, /: None),
        ("fwd", lambda module, args, output: None),
        ("bwd", lambda module, args, output, key, value, direction: None),
        ("fwd_kwargs", lambda module, args, output, key, value, direction: None),
    ],
)
def test_a_callback_that_could_not_be_called_is_refused_when_the_hook_is_made(make, direction, callback):
    with pytest.raises(HookSignatureError):
        make(callback, direction)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_callback_that_takes_keywords_fits_every_direction(make, direction):
    assert direction in repr(make(doubled, direction))


@pytest.mark.parametrize("make", MAKERS)
def test_an_unknown_direction_is_refused_when_the_hook_is_made(make):
    with pytest.raises(ValueError, match="unknown direction 'forward'"):
        make(doubled, "forward")


def test_hooks_are_frozen_values():
    hook = HookFactory.make_reading_hook(callback=doubled)
    assert hook == HookFactory.make_reading_hook(callback=doubled)
    assert pickle.loads(pickle.dumps(hook)) == hook
    with pytest.raises(AttributeError):
        hook.callback = None
