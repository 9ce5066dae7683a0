"""torch.compile: hooks that are there at the first run are part of the graph; later ones capture all the same.

What no graph can hold is in ``test_compile_eagerly.py``, the default backend in ``test_compile_inductor.py``.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from model_state import state_of
from small_models import MLP, UserModel
from tdcache import ActivationCaching, TdcacheWarning, cache_activations

# Both are torch's own, while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def sequential():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


MODELS = {UserModel: "first|second", sequential: "0|2", MLP: r"layers\.\d|head"}
models = pytest.mark.parametrize("make", MODELS)
calls = pytest.mark.parametrize("call", ["hooked", "model"])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def eager_cache(model, pattern, x):
    with ActivationCaching(pattern).prepare(model) as hooked, torch.no_grad():
        hooked(x)
    return hooked.cache.clone()


def assert_same(found, wanted):
    assert sorted(found.keys()) == sorted(wanted.keys())
    for path, value in wanted.items():
        # A backend that only interprets the graph runs the same kernels.
        assert torch.equal(found[path], value), path


@models
@calls
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_before_the_first_run_are_captured_inside_the_graph(make, call, grad, x):
    model, counter = make(), CompileCounter()
    wanted = [eager_cache(model, MODELS[make], scale * x) for scale in (1, 2, 3)]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with ActivationCaching(MODELS[make]).prepare(compiled) as hooked, torch.set_grad_enabled(grad):
        for scale in (1, 2, 3):
            (hooked if call == "hooked" else compiled)(scale * x)
            assert_same(hooked.cache, wanted[scale - 1])
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@calls
@pytest.mark.parametrize("make", [UserModel, MLP])
def test_a_model_compiled_in_place_is_captured_inside_the_graph(make, call, x):
    model, counter = make(), CompileCounter()
    wanted = eager_cache(model, MODELS[make], x)
    model.compile(backend=counter, fullgraph=True)
    with ActivationCaching(MODELS[make]).prepare(model) as hooked:
        (hooked if call == "hooked" else model)(x)
    assert_same(hooked.cache, wanted)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@models
@calls
@pytest.mark.parametrize("directions", [["fwd"], ["fwd", "bwd"]], ids=len)
def test_a_model_that_was_compiled_and_run_before_is_captured_all_the_same(make, call, directions, x):
    model = make()
    wanted = eager_cache(model, MODELS[make], x)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with ActivationCaching(MODELS[make], directions=directions, use_nested_keys=True).prepare(compiled) as hooked:
        y = (hooked if call == "hooked" else compiled)(x)
        y.sum().backward()
    assert torch.equal(y, plain)
    assert_same(hooked.cache["fwd"], wanted)
    if "bwd" in directions:
        assert sorted(hooked.cache["bwd"].keys()) == sorted(wanted.keys())


@models
@calls
def test_a_model_that_was_compiled_in_place_and_run_before_is_captured_all_the_same(make, call, x):
    model = make()
    wanted = eager_cache(model, MODELS[make], x)
    model.compile(backend="eager")
    model(x)
    with ActivationCaching(MODELS[make]).prepare(model) as hooked:
        (hooked if call == "hooked" else model)(x)
    assert_same(hooked.cache, wanted)


@pytest.mark.parametrize("run_before", [True, False])
def test_leaving_restores_a_compiled_model_and_later_runs_capture_nothing(run_before, x):
    model = UserModel()
    compiled = torch.compile(model, backend="eager")
    if run_before:
        compiled(x)
    before, own = state_of(compiled), dict(compiled.__dict__)
    with ActivationCaching("first").prepare(compiled) as hooked:
        hooked(x)
    kept = hooked.cache["first"].clone()
    assert state_of(compiled) == before
    assert compiled.__dict__ == own
    assert torch.equal(compiled(2 * x), model(2 * x))
    assert torch.equal(hooked.cache["first"], kept)


def test_leaving_restores_a_model_that_was_compiled_in_place(x):
    model = UserModel()
    model.compile(backend="eager")
    model(x)
    before, implementation = state_of(model), model._compiled_call_impl
    with ActivationCaching("first").prepare(model) as hooked:
        hooked(x)
    assert state_of(model) == before
    assert model._compiled_call_impl is implementation


def test_a_second_context_on_a_compiled_model_captures_again(x):
    model = UserModel()
    compiled = torch.compile(model, backend="eager")
    for pattern in ("first", "second", "first|second"):
        wanted = eager_cache(model, pattern, x)
        with ActivationCaching(pattern).prepare(compiled) as hooked:
            hooked(x)
        assert_same(hooked.cache, wanted)


def test_a_model_compiled_inside_the_block_is_captured(x):
    model = UserModel()
    wanted = eager_cache(model, "first", x)
    with ActivationCaching("first").prepare(model) as hooked:
        torch.compile(model, backend="eager", fullgraph=True)(x)
        assert_same(hooked.cache, wanted)


def test_a_compiled_part_of_a_model_is_captured(x):
    model = nn.Sequential(UserModel(), nn.Linear(2, 2))
    model[0].compile(backend="eager")
    model(x)
    wanted = eager_cache(nn.Sequential(*model), r"0\.first|1", x)
    with ActivationCaching(r"0\.first|1").prepare(model) as hooked:
        hooked(x)
    assert_same(hooked.cache, wanted)


def test_paths_of_a_compiled_model_are_those_of_the_users_own(x):
    compiled = torch.compile(UserModel(), backend="eager")
    with cache_activations(compiled, "first") as cache:
        compiled(x)
    assert list(cache.keys()) == ["first"]


def test_gradients_are_right_through_aot_autograd(x):
    model = UserModel()
    with ActivationCaching("first|second", directions=["bwd"]).prepare(model) as eager:
        eager(x).square().sum().backward()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with ActivationCaching("first|second", directions=["bwd"]).prepare(compiled) as hooked:
        hooked(x).square().sum().backward()
    for path, grad in eager.cache.items():
        # The partitioner may reorder a backward of a few products: rounding of single precision.
        torch.testing.assert_close(hooked.cache[path], grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_asked_for_before_the_first_run_arrive_and_the_block_says_that_it_runs_eagerly(backend, x):
    model = UserModel()
    with ActivationCaching("first|second", directions=["bwd"]).prepare(model) as eager:
        eager(x).square().sum().backward()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with (
        pytest.warns(TdcacheWarning, match="UserModel is compiled, and runs eagerly while this context is open"),
        ActivationCaching("first|second", directions=["bwd"]).prepare(compiled) as hooked,
    ):
        hooked(x).square().sum().backward()
    assert_same(hooked.cache, eager.cache)


def test_a_wrapper_that_was_traced_before_is_captured_when_only_the_inner_model_was_prepared(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    wanted = eager_cache(model, "0", x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with ActivationCaching("0").prepare(model) as hooked:
        compiled(x)
    assert_same(hooked.cache, wanted)
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("outer", ["function", "module"])
def test_a_model_inside_a_graph_of_somebody_else_is_captured(outer, x):
    model = UserModel()
    wanted = eager_cache(model, "first", x)
    called = torch.compile(nn.Sequential(model) if outer == "module" else lambda x: model(x) * 2, backend="eager")
    called(x)
    with ActivationCaching("first").prepare(model) as hooked:
        called(x)
    assert_same(hooked.cache, wanted)


def test_a_compiled_part_that_was_run_before_is_captured(x):
    model = nn.Sequential(torch.compile(UserModel(), backend="eager"), nn.Linear(2, 2))
    model(x)
    with ActivationCaching(r"0\._orig_mod\.first|1").prepare(model) as hooked:
        model(x)
    assert_same(hooked.cache, {r"0._orig_mod.first": model[0].first(x), "1": model(x)})


def test_in_a_graph_the_value_kept_is_the_one_before_it_was_overwritten(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with ActivationCaching("0").prepare(torch.compile(model, backend="aot_eager", fullgraph=True)) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["0"], model[0](x))


def test_a_forward_whose_graph_breaks_is_captured(x):
    class Broken(UserModel):
        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model = Broken()
    wanted = [eager_cache(model, "first|second", scale * x) for scale in (1, 2)]
    with ActivationCaching("first|second").prepare(torch.compile(model, backend="aot_eager")) as hooked:
        for scale in (1, 2):
            hooked(scale * x)
            assert_same(hooked.cache, wanted[scale - 1])


def test_entering_again_and_again_makes_no_more_graphs(x):
    model, counter = UserModel(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scale in range(12):
        with ActivationCaching("first").prepare(compiled) as hooked:
            hooked(scale * x)
        assert torch.equal(hooked.cache["first"], model.first(scale * x))
        compiled(x)
    assert counter.frame_count == 2  # one with the hooks of the first block, one without any


def test_beyond_the_recompile_limit_values_are_still_right(x):
    model, counter = UserModel(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), ActivationCaching("first").prepare(compiled) as hooked:
        for rows in (1, 2, 3, 4, 2, 5):
            hooked(x[:rows])
            assert torch.equal(hooked.cache["first"], model.first(x[:rows])), rows
    assert counter.frame_count == 2


def test_a_pause_holds_in_a_graph(x):
    model = UserModel()
    compiled = torch.compile(model, backend="eager")
    wanted = eager_cache(model, "first", x)
    with ActivationCaching("first").prepare(compiled) as hooked:
        compiled(x)
        with hooked.paused():
            compiled(2 * x)
            assert_same(hooked.cache, wanted)
        compiled(3 * x)
        assert torch.equal(hooked.cache["first"], model.first(3 * x))


@pytest.mark.parametrize("in_place", [False, True])
def test_contexts_on_a_model_that_was_traced_may_be_left_in_any_order(in_place, x):
    model = UserModel()
    if in_place:
        model.compile(backend="eager")
    called = model if in_place else torch.compile(model, backend="eager")
    called(x)
    before = dict(called.__dict__)
    first, second = (ActivationCaching("first").prepare(called) for _ in range(2))
    first.__enter__()
    hooked = second.__enter__()
    called(x)
    first.__exit__(None, None, None)
    called(2 * x)
    second.__exit__(None, None, None)
    assert torch.equal(hooked.hooking_context.cache["first"], model.first(2 * x))
    assert called.__dict__ == before


def test_a_traced_model_that_is_not_run_in_the_block_is_no_error(x):
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    compiled(x)
    with ActivationCaching("0").prepare(nn.Sequential(nn.Linear(4, 4))):
        pass
