"""Whatever raises, the model is as it was, and the error that is seen is the body's."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from model_state import state_of
from small_models import MLP
from tdcache import (
    ActivationCaching,
    CaptureError,
    HookFactory,
    HookingContextFactory,
    HookSignatureError,
    InplaceModificationError,
    MultiHookHandle,
    MultiHookManager,
    SelectionError,
)

EVERYTHING = ["fwd", "fwd_pre", "bwd", "grad_in"]


@pytest.fixture
def model():
    model = MLP()
    model.layers[1].requires_grad_(False)
    model.act.eval()
    model.head.register_forward_hook(lambda *args, **kwargs: None, with_kwargs=True, always_call=True)
    return model


@pytest.fixture
def x():
    return torch.randn(5, 4, requires_grad=True)


class Boom(Exception):
    pass


def boom(*args, **kwargs):
    raise Boom("here")


@pytest.fixture
def unchanged(model):
    """Compare the model at the end of the test with what it was at its beginning."""
    before = state_of(model)
    yield
    model.zero_grad()
    assert state_of(model) == before


@pytest.mark.usefixtures("unchanged")
def test_leaving_restores_the_model(model, x):
    with ActivationCaching(r"act|head|layers\.\d", directions=EVERYTHING).prepare(model) as hooked:
        hooked(x).sum().backward()


@pytest.mark.usefixtures("unchanged")
def test_the_bodys_exception_is_the_one_that_is_seen(model, x):
    error = Boom("body")

    def body(hooked):
        hooked(x)
        raise error

    with pytest.raises(Boom) as caught, ActivationCaching(".*").prepare(model) as hooked:
        body(hooked)
    assert caught.value is error


@pytest.mark.usefixtures("unchanged")
def test_the_bodys_exception_wins_over_one_that_leaving_finds_which_becomes_a_note(model, x):
    def body(hooked):
        hooked(x).add_(1)
        raise Boom("body")

    with (
        pytest.raises(Boom, match="body") as caught,
        torch.no_grad(),
        ActivationCaching("head").prepare(model) as hooked,
    ):
        body(hooked)
    (note,) = caught.value.__notes__
    assert "while leaving the context: InplaceModificationError" in note
    assert "'head'" in note


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("direction", EVERYTHING)
def test_a_failing_callback_is_seen_as_it_is(model, x, direction):
    with (
        pytest.raises(Boom, match="here"),
        ActivationCaching("head", callback=boom, directions=[direction]).prepare(model) as hooked,
    ):
        hooked(x).sum().backward()


@pytest.mark.usefixtures("unchanged")
def test_a_callback_that_returns_no_tensor_is_an_error_that_names_the_path(model, x):
    with (
        pytest.raises(CaptureError, match="returned str at 'head'") as caught,
        ActivationCaching("head", callback=lambda **named: "no tensor").prepare(model) as hooked,
    ):
        hooked(x)
    assert caught.value.paths == ("head",)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit])
def test_a_failing_forward_leaves_the_model_as_it_was(model, x, error):
    handle = model.act.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(error()))
    with pytest.raises(error), ActivationCaching(".*", directions=EVERYTHING).prepare(model) as hooked:
        hooked(x)
    handle.remove()


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("as_hooked", [True, False])
def test_a_fresh_forward_works_after_one_that_was_interrupted(model, x, error, as_hooked):
    with ActivationCaching(r"head|layers\.\d").prepare(model) as hooked:
        call = hooked if as_hooked else model
        handle = model.act.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            call(x)
        handle.remove()
        y = call(2 * x)
        assert torch.equal(hooked.cache["head"], y)
        assert torch.equal(hooked.cache["layers.0"], model.layers[0](2 * x))
        y = call(3 * x)
        assert torch.equal(hooked.cache["head"], y)


def test_what_was_seen_before_a_keyboard_interrupt_can_be_read(model, x):
    with ActivationCaching(r"layers\.\d").prepare(model) as hooked:
        handle = model.layers[2].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            hooked(x)
        handle.remove()
        assert sorted(hooked.cache.keys()) == ["layers.0", "layers.1"]
        hooked(x)


def test_an_interrupted_forward_does_not_make_the_next_one_a_nested_one(model, x):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        handle = model.act.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(x)
        handle.remove()
        y = model(x)
        y.sum().backward()
        assert torch.equal(hooked.cache["fwd", "head"], y)
        assert torch.equal(hooked.cache["bwd", "head"], torch.ones(5, 2))


@pytest.mark.usefixtures("unchanged")
def test_a_failing_backward_leaves_the_model_as_it_was(model, x):
    def body(hooked):
        y = hooked(x)
        y.register_hook(boom)
        y.sum().backward()

    with pytest.raises(Boom), ActivationCaching("head", directions=EVERYTHING).prepare(model) as hooked:
        body(hooked)


@pytest.mark.usefixtures("unchanged")
def test_a_selector_that_matches_nothing_leaves_no_hook(model):
    with pytest.raises(SelectionError, match=r"did you mean 'layers\.0'"), ActivationCaching("layer.0").prepare(model):
        pass


@pytest.mark.usefixtures("unchanged")
def test_a_pattern_that_backtracks_without_end_is_bounded_and_leaves_no_hook(model, monkeypatch):
    monkeypatch.setattr("tdcache.selection._MATCH_SECONDS", 0.05)
    model.add_module("a" * 50, nn.Identity())
    with pytest.raises(SelectionError, match="backtracks"), ActivationCaching("(a|aa)+[!?]").prepare(model):
        pass
    del model._modules["a" * 50]


@pytest.mark.usefixtures("unchanged")
def test_the_first_recipe_is_undone_when_the_second_of_a_with_fails(model):
    with (
        pytest.raises(SelectionError),
        ActivationCaching("head").prepare(model),
        ActivationCaching("nowhere").prepare(model),
    ):
        pass


@pytest.mark.usefixtures("unchanged")
def test_a_context_that_failed_to_open_can_be_opened_later(model, x):
    factory = ActivationCaching("nowhere")
    context = factory.prepare(model)
    with pytest.raises(SelectionError):
        context.__enter__()
    factory.key_pattern = "head"
    with context as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y)


class Fragile(HookingContextFactory):
    """Fails where it is told to, after it has changed something."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _prepare_module(self, module, in_keys, out_keys, extra_relative_path):
        if self.at == "prepare":
            raise Boom("prepare")
        return module

    def _restore_module(self, module, in_keys, out_keys, extra_relative_path):
        if self.at == "restore":
            raise Boom("restore")
        return module

    def _hook_module(self, module):
        hook = HookFactory.make_reading_hook(callback=boom if self.at == "hook" else lambda **named: None)
        handle = MultiHookManager("head").register_hook(module, lambda path: hook, relative_path=module.relative_path)
        if self.at == "half way":
            handle.remove()
            raise Boom("half way")
        return handle


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("at", ["prepare", "restore", "hook", "half way"])
def test_wherever_a_recipe_fails_the_model_is_restored(model, x, at):
    with pytest.raises(Boom), Fragile(at).prepare(model) as hooked:
        hooked(x)


@pytest.mark.usefixtures("unchanged")
def test_a_failed_registration_leaves_no_hook(model):
    good, bad = (lambda module, args, output: None), (lambda module: None)

    class Second(HookingContextFactory):
        def _hook_module(self, module):
            return MultiHookManager(r"layers\.\d").register_hook(
                module, lambda path: bad if path.endswith("2") else good, relative_path=module.relative_path
            )

    with pytest.raises(HookSignatureError, match="takes \\(module\\)"), Second().prepare(model):
        pass


@pytest.mark.usefixtures("unchanged")
def test_every_hook_goes_even_if_removing_one_of_them_fails(model, x):
    class Sticky(HookingContextFactory):
        def _hook_module(self, module):
            hook = lambda module, args, output: None  # noqa: E731
            handles = [module.register_submodule_hook(path, hook) for path in ("head", "act")]
            stuck = MultiHookHandle()
            stuck.remove = boom
            return MultiHookHandle([handles[0], stuck, handles[1]])

    with pytest.raises(Boom, match="here"), Sticky().prepare(model) as hooked:
        hooked(x)


def test_an_in_place_error_of_the_forward_is_no_obstacle_to_leaving(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    before = state_of(model)
    with pytest.raises(InplaceModificationError), ActivationCaching("0").prepare(model) as hooked:
        hooked(x)
    assert state_of(model) == before


@pytest.mark.usefixtures("unchanged")
def test_a_missing_entry_of_the_data_names_those_there(model, x):
    with (
        ActivationCaching("head").prepare(model) as hooked,
        pytest.raises(KeyError, match=r"no entry 'input'.*\['tokens'\].*in_keys="),
    ):
        hooked(TensorDict({"tokens": x}))
