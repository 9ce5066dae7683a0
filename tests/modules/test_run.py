"""Runs: what is declared in the block happens when it ends, and the model is left as it was."""

import gc
import inspect

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from model_state import state_of
from small_models import Pair, Residual, Tied, by_hand, input_gradients, output_gradients
from tdcache import (
    ActivationCaching,
    CacheProxy,
    ContextError,
    DirectionError,
    EditError,
    HookedModule,
    HookSignatureError,
    InplaceModificationError,
    PathError,
    RepeatedCallWarning,
    TdcacheWarning,
    UnfiredSiteWarning,
)


@pytest.fixture
def hooked(model):
    return HookedModule.from_module(model, in_keys=["input"], out_keys=["output"])


def backward(hooked, data):
    hooked(data)["output"].sum().backward()


def needing_grad(x):
    return TensorDict({"input": x.clone().requires_grad_()})


def fail(error):
    raise error


def with_edit(model, path, edit, call):
    """What ``call()`` gives with the output at ``path`` replaced by ``edit(output)``, by a plain hook."""
    handle = dict(model.named_modules())[path].register_forward_hook(lambda module, args, output: edit(output))
    try:
        return call()
    finally:
        handle.remove()


def test_the_model_runs_when_the_block_ends(hooked, model, x):
    data = TensorDict({"input": x})
    with hooked.run(data) as run:
        assert "output" not in data
    assert torch.equal(data["output"], model(x))
    assert run.result is data


def test_the_model_does_not_run_when_the_block_raises(hooked, x):
    data, before = TensorDict({"input": x}), state_of(hooked.model)
    with pytest.raises(KeyError, match="the user's"), hooked.run(data) as run:
        run.set("head", torch.zeros(5, 2) / fail(KeyError("the user's")))
    assert "output" not in data
    assert state_of(hooked.model) == before


def test_a_value_is_got_and_saved(hooked, model, x):
    kept = TensorDict()
    with hooked.run(TensorDict({"input": x}), cache=kept) as run:
        got, saved = run.get("layers.1"), run.save("layers.1")
        assert got.resolve() is None
    (expected,) = by_hand(model, ["layers.1"], lambda: model(x))["layers.1"]
    assert torch.equal(got.resolve(), expected)
    assert got.resolve() is run.cache["layers.1_output"]
    assert saved.resolve() is kept["run.layers.1_output"]
    assert saved.resolve() is got.resolve()
    assert isinstance(got, CacheProxy)


def test_without_a_cache_saves_land_in_the_runs_own(hooked, x):
    with hooked.run(TensorDict({"input": x})) as run:
        run.cache = TensorDict()
        run.save("head")
    assert list(run.cache.keys()) == ["run.head_output"]


def test_several_runs_share_one_cache_under_their_names(hooked, model, x):
    kept = TensorDict()
    for name, data in (("clean", x), ("other", x + 1)):
        with hooked.run(data, cache=kept, run_name=name) as run:
            run.save("head")
    assert sorted(kept.keys()) == ["clean.head_output", "other.head_output"]
    assert torch.equal(kept["other.head_output"], model(x + 1))


def test_the_run_cache_may_be_given_and_the_key_chosen(hooked, x):
    kept = TensorDict()
    with hooked.run(x, run_cache=kept) as run:
        run.get("head", cache_key=("nested", "head"))
    assert run.cache is kept
    assert kept["nested", "head"].shape == (5, 2)


def test_a_locked_cache_is_written_in_place(hooked, model, x):
    kept = TensorDict({"head_output": torch.zeros(5, 2)}).lock_()
    room = kept["head_output"]
    with hooked.run(x, run_cache=kept) as run:
        run.get("head")
    assert kept["head_output"] is room
    assert torch.equal(room, model(x).detach())


def test_a_value_is_set(hooked, model, x):
    new = torch.randn(5, 4)
    with hooked.run(x) as run:
        run.set("layers.1", new)
    assert torch.equal(run.result, with_edit(model, "layers.1", lambda output: new, lambda: model(x)))


def test_a_value_of_one_run_is_pasted_into_another(hooked, model, x):
    with hooked.run(x) as clean:
        value = clean.get("layers.1")
    with hooked.run(x + 1) as patched:
        patched.set("layers.1", value)
    assert torch.equal(patched.result, clean.result)
    assert not torch.equal(model(x + 1), model(x))


def test_a_value_moves_forward_in_one_run(hooked, model, x):
    with hooked.run(x) as run:
        run.set("layers.2", run.get("layers.0"))
    (early,) = by_hand(model, ["layers.0"], lambda: model(x))["layers.0"]
    assert torch.equal(run.result, with_edit(model, "layers.2", lambda output: early, lambda: model(x)))


def test_a_value_that_is_not_there_yet_is_an_error_that_says_what_to_do(hooked, x):
    before = state_of(hooked.model)
    message = (
        r"'layers.2_output'.*no value yet when 'layers.0' needs it; get it in an earlier run, or at a path that runs"
    )
    with pytest.raises(EditError, match=message), hooked.run(x) as run:
        run.set("layers.0", run.get("layers.2"))
    assert state_of(hooked.model) == before


def test_a_proxy_outlives_its_run(hooked, model, x):
    with hooked.run(x) as run:
        value = run.get("head")
    del run
    gc.collect()
    assert torch.equal(value.resolve(), model(x))


def test_a_callback_edits_in_place_of_a_value(hooked, model, x):
    seen = {}

    def double(**kwargs):
        seen.update(kwargs)
        return kwargs["output"] * kwargs["value"]

    with hooked.run(x) as run:
        run.set("layers.1", 2.0, callback=double)
    assert torch.equal(run.result, with_edit(model, "layers.1", lambda output: output * 2, lambda: model(x)))
    assert sorted(seen) == ["args", "direction", "module", "output", "value"]
    assert seen["module"] is model.layers[1]
    assert seen["direction"] == "fwd"


def test_a_callback_that_returns_none_changes_nothing(hooked, model, x):
    with hooked.run(x) as run:
        run.set("layers.1", callback=lambda **kwargs: None)
    assert torch.equal(run.result, model(x))


def test_a_callback_decides_what_is_kept(hooked, model, x):
    with hooked.run(x) as run:
        run.get("head", callback=lambda *, output, **rest: output.mean(0))
    assert torch.equal(run.cache["head_output"], model(x).mean(0))


def test_inputs_are_read_and_set(hooked, model, x):
    new = torch.randn(5, 4)
    with hooked.run(x) as run:
        run.get_input("layers.0")
        run.save_input("layers.0", callback=lambda **kwargs: kwargs["args"][0])
        run.set_input("head", (new,))
    assert torch.equal(run.cache["layers.0_input"], x)
    assert torch.equal(run.cache["run.layers.0_input"], x)
    assert torch.equal(run.result, model.head(new))
    with hooked.run(x) as run:
        run.set_input("head", new)
    assert torch.equal(run.result, model.head(new))


class ByKeyword(nn.Module):
    """Calls its layer with keyword arguments only."""

    def __init__(self):
        super().__init__()
        self.inner = Scaled()

    def forward(self, x):
        return self.inner(scale=2, hidden=x)


class Scaled(nn.Module):
    def forward(self, scale, hidden):
        return scale * hidden


def test_an_input_may_be_a_keyword_argument(x):
    hooked = HookedModule.from_module(ByKeyword())
    with hooked.run(x) as run:
        run.get_input("inner")
        run.set_input("inner", x + 1)
    assert torch.equal(run.result, 2 * (x + 1))
    assert torch.equal(run.cache["inner_input"], x + 1)  # a capture sees the value after the edit
    with hooked.run(x) as run:
        run.get_input("inner", pick="hidden")
        run.set_input("inner", x + 2, pick="hidden")
    assert torch.equal(run.result, 2 * (x + 2))


def test_gradients_are_read_as_autograd_says(hooked, model, x):
    data = needing_grad(x)
    with hooked.run(data, run_callback=backward) as run:
        run.get_grad("layers.1")
        run.save_grad("layers.1", callback=lambda **kwargs: kwargs["grad_input"][0])
        run.get_grad_output("layers.1")
        run.save_grad_output("layers.1", callback=lambda **kwargs: kwargs["grad_output"][0])

    def call():
        return model(x).sum()

    of_input, of_output = input_gradients(model, ["layers.1"], call), output_gradients(model, ["layers.1"], call)
    for prefix in ("", "run."):
        torch.testing.assert_close(run.cache[f"{prefix}layers.1_grad_input"], of_input["layers.1"])
        torch.testing.assert_close(run.cache[f"{prefix}layers.1_grad_output"], of_output["layers.1"])


def test_gradients_are_off_unless_they_are_asked_for(hooked, x):
    for grad_enabled in (False, True):
        with hooked.run(x, grad_enabled=grad_enabled) as run:
            run.get("head")
        assert run.result.requires_grad is grad_enabled
        assert run.cache["head_output"].requires_grad is grad_enabled
    with hooked.run(needing_grad(x), run_callback=backward) as run:
        run.get_grad("head")
    assert run.cache["head_grad_input"].shape == (5, 4)


@pytest.mark.parametrize("as_tuple", [True, False])
@pytest.mark.parametrize("verb", ["set_grad", "set_grad_output"])
def test_a_gradient_that_is_set_goes_upstream(hooked, model, x, verb, as_tuple):
    new = torch.randn(5, 4)
    with hooked.run(needing_grad(x), run_callback=backward) as run:
        getattr(run, verb)("layers.1", (new,) if as_tuple else new)
    found = model.layers[0].weight.grad.clone()

    hidden = nn.functional.gelu(model.layers[0](x))
    seed = new if verb == "set_grad" else new @ model.layers[1].weight
    (expected,) = torch.autograd.grad(hidden, model.layers[0].weight, seed)
    torch.testing.assert_close(found, expected)


def test_a_gradient_that_is_set_is_seen_by_a_get(hooked, x):
    with hooked.run(needing_grad(x), run_callback=backward) as run:
        run.get_grad_output("layers.1")
        run.set_grad_output("layers.1", torch.ones(5, 4))
    assert torch.equal(run.cache["layers.1_grad_output"], torch.ones(5, 4))


def test_a_get_with_prepend_sees_the_value_before_the_edit(hooked, model, x):
    with hooked.run(x) as run:
        run.set("head", torch.zeros(5, 2))
        run.get("head", cache_key="before", prepend=True)
        run.get("head", cache_key="after")
    assert torch.equal(run.cache["before"], model(x))
    assert torch.equal(run.cache["after"], torch.zeros(5, 2))


def test_stop_ends_the_forward(hooked, model, x):
    called = []
    handle = model.head.register_forward_pre_hook(lambda module, args: called.append(module))
    data = TensorDict({"input": x})
    with hooked.run(data) as run:
        run.get("layers.0")
        run.stop("layers.1")
    handle.remove()
    assert (called, run.result) == ([], data)
    assert "output" not in data
    assert run.cache["layers.0_output"].shape == (5, 4)


def test_stop_ends_a_forward_that_the_callback_began(hooked, x):
    with hooked.run(x, run_callback=lambda hooked, data: hooked.model(data)) as run:
        run.stop("layers.1")
    assert run.result is None


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_of_a_structured_value_the_picked_tensor_is_replaced_and_the_rest_kept(kind, x):
    model = Pair(kind)
    hooked, new = HookedModule.from_module(model), torch.randn(5, 4)
    left, right = model.inner.left(x), model.inner.right(x)
    with hooked.run(x) as run:
        run.set("inner", new)
    assert torch.equal(run.result, new + right)
    with hooked.run(x) as run:
        run.set("inner", new, pick="right" if kind is dict else 1)
        run.get("inner", pick=1 if kind is not dict else "right")
    assert torch.equal(run.result, left + new)
    assert torch.equal(run.cache["inner_output"], new)


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (torch.zeros(5, 3), r"shape \(5, 4\), torch.float32, cpu\n.*shape \(5, 3\), torch.float32, cpu"),
        (torch.zeros(5, 4).double(), r"torch.float32, cpu\n.*torch.float64"),
        (torch.zeros(5, 4, device="meta"), r"cpu\n.*meta"),
        ((torch.zeros(5, 4),), r"output of 'layers.1' of type Tensor cannot be replaced by tuple"),
    ],
)
def test_a_replacement_that_does_not_fit_is_an_error_that_names_both(hooked, x, new, named):
    before = state_of(hooked.model)
    with pytest.raises(EditError, match=f"(?s)'layers.1'.*{named}|{named}"), hooked.run(x) as run:
        run.set("layers.1", new)
    assert state_of(hooked.model) == before


def test_a_tuple_of_arguments_that_does_not_fit_is_an_error(hooked, x):
    with pytest.raises(EditError, match=r"(?s)'head'.*shape \(5, 4\).*shape \(5, 3\)"), hooked.run(x) as run:
        run.set_input("head", (torch.zeros(5, 3),))


def test_what_was_set_is_not_written_to_by_the_model(x):
    hooked, new = HookedModule.from_module(Residual()), torch.randn(5, 4)
    before = new.clone()
    with hooked.run(x) as run:
        run.set("first", new)  # an in-place ReLU comes next
    assert torch.equal(new, before)
    assert run.result.shape == (5, 4)


def test_a_kept_value_that_is_overwritten_is_an_error_and_a_snapshot_is_none(x):
    model = Residual()
    hooked = HookedModule.from_module(model)
    with (
        pytest.raises(InplaceModificationError, match=r"'first' was overwritten.*hold='snapshot'"),
        hooked.run(x) as run,
    ):
        run.get("first")
    with hooked.run(x) as run:
        run.get("first", hold="snapshot")
    assert torch.equal(run.cache["first_output"], model.first(x))


def test_a_value_that_was_overwritten_is_refused_where_it_is_set(x):
    hooked = HookedModule.from_module(Residual())
    with pytest.raises(InplaceModificationError, match="'first'"), hooked.run(x) as run:
        run.set("second", run.get("first"))


def test_a_module_that_runs_twice_warns_once_and_keeps_the_last(x):
    model = Tied()
    hooked = HookedModule.from_module(model)
    with pytest.warns(RepeatedCallWarning, match="'encode' ran more than once.*Stack") as caught, hooked.run(x) as run:
        run.get("encode")
    assert len(caught) == 1
    assert torch.equal(run.cache["encode_output"], model(x))


def test_of_two_forwards_in_one_run_the_last_is_kept_with_a_warning(hooked, model, x):
    with (
        pytest.warns(RepeatedCallWarning, match="'head' ran more than once in this run.*reducer=Stack"),
        hooked.run(x, run_callback=lambda hooked, data: (hooked(data), hooked(data + 1))) as run,
    ):
        run.get("head")
    assert torch.equal(run.cache["head_output"], model(x + 1))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_stop_ends_the_callback_too(hooked, x):
    with hooked.run(needing_grad(x), run_callback=backward) as run:  # there is no output that it could sum
        run.stop("layers.1")
    assert hooked.model.head.weight.grad is None


def test_a_path_that_never_ran_is_reported(x):
    hooked = HookedModule.from_module(Optional())
    with (
        pytest.warns(UnfiredSiteWarning, match=r"no value at 'unused \(output\)', 'unused \(input\)'"),
        hooked.run(x) as run,
    ):
        run.get("unused"), run.set_input("unused", x), run.get("used")


def test_a_gradient_without_a_backward_is_reported_with_the_remedy(hooked, x):
    with (
        pytest.warns(UnfiredSiteWarning, match=r"'head \(grad_input\)'; call backward\(\) in run_callback="),
        hooked.run(x) as run,
    ):
        run.get_grad("head")


def test_a_path_behind_the_stop_is_reported(hooked, x):
    with (
        pytest.warns(UnfiredSiteWarning, match="'head .output.'; the forward was stopped at 'layers.0'"),
        hooked.run(x) as run,
    ):
        run.get("head"), run.stop("layers.0")


@pytest.mark.parametrize("verb", ["get", "save", "set", "stop", "get_input", "set_grad", "save_grad_output"])
def test_the_verbs_are_for_inside_the_block(hooked, x, verb):
    run = hooked.run(x)
    arguments = ("head", x) if "set" in verb else ("head",)
    for _ in range(2):
        with pytest.raises(ContextError, match="is for inside the block"):
            getattr(run, verb)(*arguments)
        with run:
            pass


def test_a_run_is_not_opened_inside_itself(hooked, x):
    with hooked.run(x) as run, pytest.raises(ContextError, match="open already"):
        run.__enter__()


@pytest.mark.parametrize(
    ("verb", "arguments", "options", "error", "message"),
    [
        ("get", ("layer.0",), {}, PathError, "did you mean 'layers.0'"),
        ("set", ("head", 1.0), {"direction": "sideways"}, DirectionError, "unknown direction 'sideways'"),
        ("get", ("head",), {"callback": lambda module: None}, HookSignatureError, "lacks the parameters"),
        ("set", ("head",), {}, EditError, "nothing to set at 'head'"),
        ("set", ("head", 1.0), {"pick": len}, EditError, "callable pick="),
        ("get", ("head",), {"hold": "tight"}, ValueError, "hold is one of"),
    ],
)
def test_bad_arguments_are_refused_at_once(hooked, x, verb, arguments, options, error, message):
    before = state_of(hooked.model)
    with pytest.raises(error, match=message), hooked.run(x) as run:
        getattr(run, verb)(*arguments, **options)
    assert state_of(hooked.model) == before


def test_an_exception_in_a_callback_is_seen_and_leaves_nothing(hooked, x):
    before = state_of(hooked.model)

    def fails(**kwargs):
        raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"), hooked.run(x) as run:
        run.set("layers.1", run.get("layers.0"), callback=fails)
    assert state_of(hooked.model) == before


def test_an_exception_of_the_run_callback_is_seen(hooked, x):
    def fails(hooked, data):
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom"), hooked.run(x, run_callback=fails):
        pass


def test_after_a_run_the_model_is_as_it_was(hooked, x):
    before = state_of(hooked.model)
    with hooked.run(needing_grad(x), run_callback=backward) as run:
        run.set("layers.0", torch.zeros(5, 4, requires_grad=True))
        run.set_input("layers.1", torch.zeros(5, 4, requires_grad=True))
        run.get_grad("layers.2")
        run.save_grad_output("head")
    hooked.model.zero_grad()
    assert state_of(hooked.model) == before


def test_a_mapping_is_passed_as_keyword_arguments(x):
    hooked = HookedModule.from_module(Scaled())
    with hooked.run({"scale": 3, "hidden": x}) as run:
        pass
    assert torch.equal(run.result, 3 * x)


def test_a_run_inside_a_caching_context_feeds_both(model, x):
    with ActivationCaching(r"layers\.\d").prepare(model) as hooked:
        with hooked.run(x) as run:
            run.set("layers.1", torch.zeros(5, 4))
            run.get("layers.1")
        cached = hooked.cache["layers.1"]
    assert torch.equal(cached, torch.zeros(5, 4))
    assert torch.equal(run.cache["layers.1_output"], cached)


def test_a_run_shows_what_it_is(hooked, x):
    with hooked.run(x, run_name="clean") as run:
        value = run.get("head")
        assert repr(run) == "<HookedModuleRun 'clean.' of MLP, 1 verbs>"
        assert "head_output" in repr(value)


@pytest.fixture
def compiled(model, x):
    """A compiled model that has run, so that its graph knows no hooks."""
    made = torch.compile(model, backend="eager")
    made(x)
    yield HookedModule.from_module(made)
    torch._dynamo.reset()


def test_a_run_of_a_model_that_was_compiled_before_is_eager(compiled, model, x):
    with compiled.run(x) as run:
        run.set("layers.2", torch.zeros(5, 4))
        run.get("head")
    expected = model.head(model.act(torch.zeros(5, 4)))
    assert torch.equal(run.result, expected)
    assert torch.equal(run.cache["head_output"], expected)


def test_a_verb_on_a_model_that_was_compiled_before_says_that_it_is_skipped(compiled):
    with pytest.warns(TdcacheWarning, match="its graph skips the hook at 'head'; use a run or a context"):
        compiled.set("head", torch.zeros(5, 2)).remove()


def test_proxies_of_runs_that_share_a_cache_keep_their_own_values(hooked, model, x):
    kept = TensorDict()
    with hooked.run(x, run_cache=kept) as one:
        first = one.get("head")
        assert first.resolve() is None
    assert first.resolve() is kept["head_output"]
    with hooked.run(x + 1, run_cache=kept) as other:
        second = other.get("head")
    assert torch.equal(first.resolve(), model(x))
    assert torch.equal(second.resolve(), model(x + 1))
    assert second.resolve() is kept["head_output"]


def before_edits(**named):
    return named["output"] + 1


@pytest.mark.parametrize("options", [{"prepend": True}, {"callback": before_edits}, {"direction": "fwd_pre"}])
def test_two_values_for_one_key_of_the_cache_are_refused(hooked, model, x, options):
    before = state_of(model)
    with hooked.run(x) as run:
        run.get("head", cache_key="same")
        with pytest.raises(ContextError, match=r"writes another value to 'same' already.*cache_key="):
            run.get("head", cache_key="same", **options)
        with pytest.raises(ContextError, match=r"writes another value to 'same' already.*cache_key="):
            run.save("head", cache_key="same", **options)
    assert torch.equal(run.cache["same"], model(x))
    assert state_of(model) == before


def test_the_same_value_may_be_asked_for_twice(hooked, x):
    with hooked.run(x) as run:
        first, again = run.get("head"), run.get("head")
    assert first.resolve() is again.resolve() is run.cache["head_output"]


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_what_a_callback_returns_is_not_written_to_by_the_model(x, direction):
    model, mine = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), -torch.ones(5, 4)
    key = "0" if direction == "fwd" else "1"
    with HookedModule.from_module(model).run(x) as run:
        run.set(key, callback=lambda **named: mine, direction=direction)
    assert torch.equal(run.result, torch.zeros(5, 4))
    assert torch.equal(mine, -torch.ones(5, 4))


def test_a_run_that_is_opened_again_has_forgotten_its_stop_and_its_gradient(hooked, x):
    run = hooked.run(x)
    with run:
        run.stop("head")
    with pytest.warns(UnfiredSiteWarning), run:
        run.get_grad_output("head")
    with run:
        kept = run.get("head")
    assert not kept.resolve().requires_grad
    with pytest.warns(UnfiredSiteWarning) as warned, run:
        run.get_grad_output("head")
    assert "stopped" not in str(warned[0].message)


def test_save_takes_the_options_of_get(hooked, model, x):
    with hooked.run(x) as run:
        run.set("head", torch.zeros(5, 2))
        assert {"callback", "prepend", "relative", "direction"} <= set(inspect.signature(run.save).parameters)
        run.save("head", cache_key="before", prepend=True)
        run.save("head", cache_key="more", callback=before_edits, relative=True, direction="fwd")
    assert torch.equal(run.cache["before"], model(x))
    assert torch.equal(run.cache["more"], torch.ones(5, 2))
