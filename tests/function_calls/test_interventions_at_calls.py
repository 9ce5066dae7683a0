"""Interventions and runs at calls inside forwards give what they give at modules of the twin model."""

import pytest
import torch
from tensordict import TensorDict

from call_twins import data, inputs, pair, twin_name, twin_selector
from model_state import state_of
from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    CausalTracing,
    DirectionError,
    HookedModule,
    PathError,
    PathPatching,
    ResumeFrom,
    SteeringVectors,
)

PLACES = ["layers.1.attn::q", "layers.1.attn::v", "layers.1.attn::pattern", "layers.1.attn::z", "layers.1::gelu"]
PLACES += ["layers.0::add", "layers.1::add.1"]


def close(mine, its):
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)  # the kernel sums in another order than the twin


def both(make, run):
    """What a recipe gives at calls, and at the modules of the twin."""
    model, twin = pair()
    before = state_of(model), state_of(twin)
    found = [run(make(lambda text: text), model), run(make(_at_module), twin)]
    assert (state_of(model), state_of(twin)) == before
    return found


def _at_module(text):
    return twin_selector(text) if "\\" in text else twin_name(text)


def output(recipe, model):
    with recipe.prepare(model) as hooked, torch.no_grad():
        return hooked(inputs())


def pattern_of(name):
    return name.replace(".", r"\.") if "." in name else name


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ["zero", "mean", "steering"])
def test_an_edit_at_a_call_is_that_at_a_module(kind, name):
    def make(at):
        if kind == "steering":
            return SteeringVectors(at(pattern_of(name)), torch.tensor(0.5))
        return Ablation(at(pattern_of(name)), kind)

    mine, its = both(make, output)
    close(mine, its)
    assert not torch.allclose(mine, pair()[0](inputs()))


PATCHED = {"input": inputs(seed=2)}


def patched(recipe, model):
    batch = data(patched=TensorDict(PATCHED, batch_size=[3]))
    with recipe.prepare(model) as hooked:
        found = hooked(batch)
    return found if isinstance(recipe, ActivationPatching) and recipe.sweep else found["patched", "output"]


@pytest.mark.parametrize("name", PLACES)
def test_activations_are_patched_from_a_second_input(name):
    mine, its = both(lambda at: ActivationPatching(at(pattern_of(name))), patched)
    close(mine, its)


def metric(found):
    return found["output"][:, -1, 0].sum()


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"replay": False}, {"sweep": "position"}], ids=str)
def test_a_sweep_over_calls_is_that_over_modules(options):
    sites = r"layers\.\d\.attn::(q|v|z)", r"layers\.\d::(gelu|add|add\.1)"
    sites = sites[1:] if "sweep" in options else sites  # the twin does not know that heads come before positions

    def make(at):
        return ActivationPatching([at(each) for each in sites], **{"sweep": True, "metric": metric, **options})

    mine, its = both(make, patched)
    mine = {twin_name(key): value for key, value in mine.items()}
    assert mine.keys() == set(its.keys())
    assert len(mine) == 9 * len(sites)
    for key, value in mine.items():
        close(value, its[key])


def test_a_sweep_over_heads_and_positions_at_calls_is_a_loop_by_hand():
    model, twin = pair()
    sweep = ActivationPatching(r"layers\.1\.attn::(v|z)", sweep=["position", "head"], heads=2, metric=metric)
    found = patched(sweep, model)
    with torch.no_grad():
        for place in ("v", "z"):
            module, kept = getattr(twin.layers[1].attn, place), []
            handle = module.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
            twin(inputs())
            handle.remove()
            for position in range(5):
                for head in range(2):

                    def paste(module, args, out, at=(slice(None), head, position), kept=kept):
                        new = out.clone()
                        new[at] = kept[0][at]
                        return new

                    handle = module.register_forward_hook(paste)
                    expected = metric({"output": twin(PATCHED["input"])})
                    handle.remove()
                    close(found[f"layers.1.attn::{place}"][position, head], expected)


def test_a_path_between_calls_is_that_between_modules():
    def make(at):
        return PathPatching(
            at(r"layers\.0\.attn::z"), at(r"layers\.2\.attn::q"), freeze=at(r"layers\.\d::gelu"),
            receiver_direction="fwd",
        )  # fmt: skip

    mine, its = both(make, patched)
    close(mine, its)


def test_the_arguments_of_a_call_receive_a_path():
    def make(at):
        return PathPatching(at(r"layers\.0::gelu"), at(r"layers\.2::add\.1"), freeze=at(r"layers\.1::add\.1"))

    mine, its = both(make, patched)
    close(mine, its)


def test_a_module_is_not_held_where_a_call_in_it_sends():
    mine, its = both(
        lambda at: PathPatching(at(r"layers\.0\.attn::z"), r"head", freeze=r"layers\.\d\.(attn|down)"), patched
    )
    close(mine, its)
    assert not torch.allclose(mine, pair()[0](PATCHED["input"]))


def test_causal_tracing_restores_at_calls():
    def make(at):
        return CausalTracing(
            at(r"layers\.\d::(gelu|add\.1)"), embedding="embed", subject=[1, 2], metric=metric, samples=2
        )

    def run(recipe, model):
        with recipe.prepare(model) as hooked:
            return hooked(data())["restored"]

    mine, its = both(make, run)
    assert len(mine.keys()) == 6
    for key, value in mine.items():
        close(value, its[twin_name(key)])


def test_vectors_are_fitted_and_added_at_calls():
    def make(at):
        return ActivationAddition(at(r"layers\.\d::gelu"))

    def run(recipe, model):
        batch = data(positive=TensorDict(PATCHED, batch_size=[3]), negative=data(seed=4))
        with recipe.prepare(model) as hooked:
            return hooked(batch)

    mine, its = both(make, run)
    close(mine["output"], its["output"])


@pytest.mark.parametrize("name", ["layers.0::gelu", "layers.1.attn::pattern", "layers.1.attn::q"])
def test_the_verbs_of_a_run_work_at_calls(name):
    def run(at, model):
        key, other = at(name), at(name.replace("1", "2") if "attn" in name else "layers.1::gelu")
        hooked = HookedModule.from_module(model)
        with hooked.run(inputs(), run_callback=lambda hooked, data: hooked(data)[:, -1, 0].sum().backward()) as run:
            run.save(key)
            run.set(other, run.get(key) * 0.5)
            grad = run.get(key, direction="bwd")
        return run.cache[f"run.{key}_output"], grad.resolve()

    model, twin = pair()
    for mine, its in zip(run(lambda text: text, model), run(twin_name, twin), strict=True):
        close(mine, its)


def test_a_run_skips_a_function_and_stops_after_one():
    model, twin = pair()
    found = []
    for each, at in ((model, str), (twin, twin_name)):
        hooked = HookedModule.from_module(each)
        with hooked.run(inputs()) as run:
            run.skip(at("layers.0::gelu"), lambda x: x * 2)
            run.skip(at("layers.1::add"), lambda x, y: y)
            run.save(at("layers.0::gelu"))
        found.append((run.result, run.cache["run." + at("layers.0::gelu") + "_output"]))
        with hooked.run(inputs()) as run:
            run.save(at("layers.1.attn::z"))
            run.stop(at("layers.1.attn::z"))
        found[-1] += (run.cache["run." + at("layers.1.attn::z") + "_output"],)
    for mine, its in zip(*found, strict=True):
        close(mine, its)


def test_a_function_that_is_skipped_is_not_called():
    model, _ = pair()
    calls = []
    with HookedModule.from_module(model).run(inputs()) as run:
        run.skip("layers.0::gelu", lambda x: calls.append(x.shape) or torch.zeros_like(x))
    assert calls == [(3, 5, 16)]


def test_a_pattern_is_skipped_by_a_function_of_its_value():
    model, twin = pair()
    with HookedModule.from_module(model).run(inputs()) as run:
        run.skip("layers.0.attn::pattern", lambda pattern: pattern.flip(1))
    twin.layers[0].attn.pattern.register_forward_hook(lambda module, args, out: out.flip(1))
    close(run.result, twin(inputs()).detach())


def test_a_hook_is_registered_at_a_call():
    model, _ = pair()
    before, seen = state_of(model), []
    hooked = HookedModule.from_module(model)
    handle = hooked.register_submodule_hook(
        "layers.0::add", lambda module, args, kwargs, output: seen.append(len(args)), "fwd_kwargs"
    )
    model(inputs())
    handle.remove()
    model(inputs())
    assert seen == [2]
    assert state_of(model) == before


def test_gradients_of_the_arguments_of_a_call():
    def run(at, model):
        with ActivationCaching(at(r"layers\.\d::(gelu|add\.1)"), directions=["fwd", "bwd", "grad_in"]).prepare(
            model
        ) as hooked:
            hooked(inputs())[:, -1, 0].sum().backward()
        return hooked.cache

    model, twin = pair()
    mine, its = run(str, model), run(twin_selector, twin)
    for direction in ("fwd", "bwd", "grad_in"):
        assert len(mine[direction].keys()) == 6
        for key, value in mine[direction].items():
            close(value, its[direction, twin_name(key)])


def test_a_callback_gets_the_gradients_of_a_call():
    def note(*, grad_output, **rest):
        return grad_output[0] * 2

    model, twin = pair()
    with ActivationCaching(r"layers\.\d::gelu", directions=["bwd_pre"], callback=note).prepare(model) as hooked:
        hooked(inputs())[:, -1, 0].sum().backward()
    with ActivationCaching(r"layers\.\d\.gelu", directions=["bwd"]).prepare(twin) as other:
        other(inputs())[:, -1, 0].sum().backward()
    assert set(hooked.cache.keys()) == {f"layers.{layer}::gelu" for layer in range(3)}
    for key, value in hooked.cache.items():
        close(value, 2 * other.cache[twin_name(key)])


def test_what_comes_before_a_value_of_an_attention_call_is_refused():
    hooked = HookedModule.from_module(pair()[0])
    with pytest.raises(DirectionError, match="has no arguments of its own"):
        hooked.register_submodule_hook("layers.0.attn::pattern", lambda module, args: None, "fwd_pre")
    with pytest.raises(DirectionError, match="has no arguments of its own: direction 'fwd' is the value itself"):
        ActivationCaching("layers.0.attn::q", directions=["grad_in"])


def test_resuming_in_the_middle_of_a_forward_is_refused():
    with pytest.raises(PathError, match="names a call inside a forward, and a module is needed here"):
        ResumeFrom("layers.0::add", torch.zeros(3, 5, 8)).prepare(pair()[0]).open()
