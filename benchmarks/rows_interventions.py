"""Changing a run: one edit, a sweep of edits over every site, and a run that is stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import peers
import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, rounds_note, settle_process
from tensordict import TensorDict
from torch import Tensor, nn
from zoo import narrow_gpt2, small_gpt2, token_ids

from tdcache import ActivationPatching, HookedModule

LAYERS = 12
PATH = "h.6.mlp"
SITES = [path for layer in range(LAYERS) for path in (f"h.{layer}.attn", f"h.{layer}.mlp", f"h.{layer}")]
PATTERN = r"h\.\d+(\.attn|\.mlp)?"


def _ids(length: int = 16) -> Tensor:
    return token_ids(1, length)


def _other_ids(length: int = 16) -> Tensor:
    return (_ids(length) + 7) % 1000


def _values(model: nn.Module, ids: Tensor, paths: list[str]) -> dict[str, Tensor]:
    """What is to be pasted: the activations of another input."""
    with ExitStack() as stack, torch.no_grad():
        kept = peers.hook_by_hand(stack, [(path, model.get_submodule(path)) for path in paths], peers.first)
        model(ids)
    return {path: value.clone() for path, value in kept.items()}


def _paste_hook(value: Tensor, copied: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = value.clone() if copied else value
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _built() -> tuple[nn.Module, Tensor, Tensor]:
    model = narrow_gpt2()
    return model, _other_ids(), _values(model, _ids(), [PATH])[PATH]


def _exact(call: Callable[[], Any], model: nn.Module, ids: Tensor, value: Tensor) -> Call:
    """``call`` itself, after one call that must have given what a hand-written hook gives."""
    handle = model.get_submodule(PATH).register_forward_hook(_paste_hook(value, copied=True))
    expected = model(ids).last_hidden_state
    handle.remove()
    found = call()
    torch.testing.assert_close(getattr(found, "last_hidden_state", found), expected)
    return call


# One edit, from registering it to removing it.


def _no_edit(stack: ExitStack) -> Call:
    model, ids, _ = _built()
    return partial(model, ids)


def _by_hand(stack: ExitStack, *, copied: bool) -> Call:
    model, ids, value = _built()

    def call() -> Any:
        handle = model.get_submodule(PATH).register_forward_hook(_paste_hook(value, copied))
        try:
            return model(ids)
        finally:
            handle.remove()

    return _exact(call, model, ids, value)


def _by_hand_matched(stack: ExitStack) -> Call:
    model, ids, value = _built()

    def call() -> Any:
        hook = _paste_hook(value, copied=True)
        handles = [module.register_forward_hook(hook) for _, module in peers.matching(model, PATH.replace(".", r"\."))]
        try:
            return model(ids)
        finally:
            for handle in handles:
                handle.remove()

    return _exact(call, model, ids, value)


def _run(stack: ExitStack) -> Call:
    model, ids, value = _built()
    hooked = HookedModule.from_module(model)

    def call() -> Any:
        with hooked.run(ids) as run:
            run.set(PATH, value)
        return run.result

    return _exact(call, model, ids, value)


def _context(stack: ExitStack, *, again: bool) -> Call:
    model, ids, value = _built()
    recipe = ActivationPatching(PATH.replace(".", r"\."), source={PATH: value})
    context = recipe.prepare(model)

    def call() -> Any:
        with context if again else recipe.prepare(model):
            return model(ids)

    return _exact(call, model, ids, value)


def _nnsight(stack: ExitStack) -> Call:
    import nnsight

    model, ids, value = _built()
    wrapped = peers.nnsight_model(model)
    module = wrapped.h[6].mlp

    def call() -> Any:
        with wrapped.trace(ids):
            module.output = value
            hidden = nnsight.save(wrapped.output.last_hidden_state)
        return hidden  # noqa: RET504  nnsight fills it when the block ends

    return _exact(call, model, ids, value)


def _pyvene(stack: ExitStack) -> Call:
    import pyvene

    model, ids, value = _built()
    expected = _exact(_context(ExitStack(), again=False), model, ids, value)().last_hidden_state
    place = pyvene.RepresentationConfig(layer=6, component="mlp_output", intervention_type=pyvene.VanillaIntervention)
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model)
    (key,) = wrapped.interventions
    where = {"sources->base": ([[list(range(ids.shape[1]))]],) * 2}

    def call() -> Any:
        return wrapped({"input_ids": ids}, source_representations={key: value}, unit_locations=where)[1]

    torch.testing.assert_close(call().last_hidden_state, expected)
    return call


def _hook_points(model: nn.Module) -> Any:
    """The model as TransformerLens wants it: a HookPoint behind every site."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Behind(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.point = inner, HookPoint()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.inner(*args, **kwargs)
            if isinstance(output, tuple):
                return (self.point(output[0]), *output[1:])
            return self.point(output)

    class Hooked(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            for block in model.h:
                block.attn, block.mlp = Behind(block.attn), Behind(block.mlp)
            model.h = nn.ModuleList(Behind(block) for block in model.h)
            self.model = model
            self.setup()

        def forward(self, ids: Tensor) -> Any:
            return self.model(ids)

    return Hooked()


def _point_of(path: str) -> str:
    layer, _, part = path.removeprefix("h.").partition(".")
    return f"model.h.{layer}.inner.{part}.point" if part else f"model.h.{layer}.point"


def _transformer_lens(stack: ExitStack) -> Call:
    model, ids, value = _built()
    hooked = _hook_points(narrow_gpt2())
    hooks = [(_point_of(PATH), lambda output, hook: value)]
    return _exact(partial(hooked.run_with_hooks, ids, fwd_hooks=hooks), model, ids, value)


def _transformer_lens_idle(stack: ExitStack) -> Call:
    return partial(_hook_points(narrow_gpt2()), _other_ids())


def _open_by_hand(stack: ExitStack, *, copied: bool) -> Call:
    model, ids, value = _built()
    stack.callback(model.get_submodule(PATH).register_forward_hook(_paste_hook(value, copied)).remove)
    return partial(model, ids)


def _open_context(stack: ExitStack) -> Call:
    model, ids, value = _built()
    stack.enter_context(ActivationPatching(PATH.replace(".", r"\."), source={PATH: value}).prepare(model))
    return partial(model, ids)


def _open_handle(stack: ExitStack) -> Call:
    model, ids, value = _built()
    stack.callback(HookedModule.from_module(model).set(PATH, value).remove)
    return partial(model, ids)


HAND, COPY = "hand-written", "hand-written, pasting a copy"
MATCHED = "hand-written, a copy, regex over the modules"
ONE_EDIT: Mapping[str, Maker] = {
    "no edit": _no_edit,
    HAND: partial(_by_hand, copied=False),
    COPY: partial(_by_hand, copied=True),
    MATCHED: _by_hand_matched,
    "tdcache, prepared context again": partial(_context, again=True),
    "tdcache, prepare and with": partial(_context, again=False),
    "tdcache, a run": _run,
    "nnsight, a trace": _nnsight,
    "pyvene, wrapped once": _pyvene,
    "TransformerLens without an edit": _transformer_lens_idle,
    "TransformerLens, run_with_hooks": _transformer_lens,
}
OPEN_EDIT: Mapping[str, Maker] = {
    "no edit": _no_edit,
    HAND: partial(_open_by_hand, copied=False),
    COPY: partial(_open_by_hand, copied=True),
    "tdcache, an open context": _open_context,
    "tdcache, hooked.set": _open_handle,
}


def _overheads(title: str, samples: Samples, floor: str, skipped: Mapping[str, str], bases: Mapping[str, str]) -> Table:
    table = Table(title, ["variant", "us", "us over no edit", "x floor"])
    for name in samples.seconds:
        if name in bases.values() or name == "no edit":
            continue
        base = bases.get(name, "no edit")
        cells = [f"**{name}**" if name == floor else name, f"{samples.time(name).median * 1e6:.0f}"]
        cells += [samples.over(name, base).show(1), samples.ratio(name, floor, base, "no edit").show()]
        table.rows.append(cells)
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append("a copy, because a later in-place operation would otherwise write into what was pasted")
    table.notes.append(rounds_note([samples]))
    return table


def one_edit(plan: Plan) -> list[Table]:
    """Patching one site of GPT-2's shape."""
    settle_process()
    skipped: dict[str, str] = {}
    with torch.no_grad():
        shot = measure_makers(ONE_EDIT, plan=plan, skipped=skipped)
        stays = measure_makers(OPEN_EDIT, plan=plan, skipped=skipped)
    bases = {"TransformerLens, run_with_hooks": "TransformerLens without an edit"}
    tables = [
        _overheads("One edit, GPT-2 shape: registered, run, removed", shot, MATCHED, skipped, bases),
        _overheads("One edit, GPT-2 shape: registered before", stays, COPY, {}, {}),
    ]
    for table, samples, name, floor in (
        (tables[0], shot, "tdcache, prepare and with", MATCHED),
        (tables[1], stays, "tdcache, an open context", COPY),
    ):
        if name in samples:
            ratio = samples.ratio(name, floor, "no edit").median
            table.goals.append(Goal(f"one edit, {name}, to hand-written", ratio, 1.5))
    return tables


# Every site alone, and a number for each.


def _metric(hidden: Tensor) -> Tensor:
    return hidden[:, -1, 0].mean()


def _sweep_built(length: int, depth: int) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    model = small_gpt2(depth)
    sites = [path for path in SITES if int(path.split(".")[1]) < depth]
    return model, _other_ids(length), _values(model, _ids(length), sites)


def _loop(stack: ExitStack, length: int, depth: int) -> Call:
    model, ids, values = _sweep_built(length, depth)

    def call() -> list[float]:
        found = []
        for path, value in values.items():
            handle = model.get_submodule(path).register_forward_hook(_paste_hook(value, copied=False))
            try:
                found.append(float(_metric(model(ids).last_hidden_state)))
            finally:
                handle.remove()
        return found

    return call


def _close_to_the_loop(call: Call, length: int, depth: int) -> Call:
    expected = _loop(ExitStack(), length, depth)()
    torch.testing.assert_close(torch.tensor(call()), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    return call


def _tdcache_sweep(stack: ExitStack, length: int, depth: int, **options: Any) -> Call:
    model, ids, values = _sweep_built(length, depth)
    recipe = ActivationPatching(
        PATTERN, source=values, sweep=True, metric=lambda data: _metric(data["hidden"]), **options
    )
    hooked = stack.enter_context(recipe.prepare(model, out_keys=["hidden"]))

    def call() -> list[float]:
        found = hooked(TensorDict({"input": ids}))
        return [float(found[path]) for path in values]

    return _close_to_the_loop(call, length, depth)


def _nnsight_sweep(stack: ExitStack, length: int, depth: int) -> Call:
    import nnsight

    model, ids, values = _sweep_built(length, depth)
    wrapped = peers.nnsight_model(model)
    modules = {}
    for path in values:
        layer, _, part = path.removeprefix("h.").partition(".")
        modules[path] = getattr(wrapped.h[int(layer)], part) if part else wrapped.h[int(layer)]

    def call() -> list[float]:
        found = []
        for path, value in values.items():
            module, is_tuple = modules[path], path.endswith("attn")
            with wrapped.trace(ids):
                module.output = (value, None) if is_tuple else value
                result = nnsight.save(wrapped.output.last_hidden_state)
            found.append(float(_metric(result)))
        return found

    return _close_to_the_loop(call, length, depth)


def _pyvene_sweep(stack: ExitStack, length: int, depth: int) -> Call:
    import pyvene

    model, ids, values = _sweep_built(length, depth)
    parts = {"": "block_output", "attn": "attention_output", "mlp": "mlp_output"}
    where = {"sources->base": ([[list(range(length))]],) * 2}
    wrapped = []
    for path, value in values.items():
        layer, _, part = path.removeprefix("h.").partition(".")
        place = pyvene.RepresentationConfig(
            layer=int(layer), component=parts[part], intervention_type=pyvene.VanillaIntervention
        )
        made = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model)
        wrapped.append((made, {next(iter(made.interventions)): value}))

    def call() -> list[float]:
        found = []
        for made, source in wrapped:
            result = made({"input_ids": ids}, source_representations=dict(source), unit_locations=where)[1]
            found.append(float(_metric(result.last_hidden_state)))
        return found

    return _close_to_the_loop(call, length, depth)


def _transformer_lens_sweep(stack: ExitStack, length: int, depth: int) -> Call:
    model, ids, values = _sweep_built(length, depth)
    hooked = _hook_points(model)

    def call() -> list[float]:
        found = []
        for path, value in values.items():
            hooks = [(_point_of(path), lambda output, hook, value=value: value)]
            found.append(float(_metric(hooked.run_with_hooks(ids, fwd_hooks=hooks).last_hidden_state)))
        return found

    return _close_to_the_loop(call, length, depth)


SWEEPS: Mapping[str, Callable[..., Call]] = {
    "loop, hand-written": _loop,
    "tdcache": _tdcache_sweep,
    "tdcache, one at a time": partial(_tdcache_sweep, chunk=1),
    "tdcache, without replay": partial(_tdcache_sweep, replay=False),
    "nnsight, a loop of traces": _nnsight_sweep,
    "pyvene, wrapped once": _pyvene_sweep,
    "TransformerLens, run_with_hooks": _transformer_lens_sweep,
}


def sweep(plan: Plan) -> list[Table]:
    """One metric for each of 36 sites of GPT-2 small, up to its vocabulary."""
    settle_process()
    length, depth = (8, 3) if plan.quick else (16, LAYERS)
    skipped: dict[str, str] = {}
    makers = {name: partial(make, length=length, depth=depth) for name, make in SWEEPS.items()}
    with torch.no_grad():
        samples = measure_makers(makers, plan=plan, skipped=skipped, rounds=3 if plan.quick else 9)
    floor = samples.time("loop, hand-written").median
    table = Table(
        f"Patching sweep: every block, attention and feed-forward output alone; {depth} layers, d=768, {length} tokens",
        ["variant", "ms", "ms a site", "x loop"],
    )
    for name in samples.seconds:
        spent = samples.time(name).median
        shown = f"**{name}**" if name.startswith("loop") else name
        table.rows.append([shown, f"{spent * 1e3:.0f}", f"{spent * 1e3 / (3 * depth):.1f}", f"{spent / floor:.2f}"])
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append("peers patch one site a forward; tdcache stacks them along the batch, and replays what is known")
    table.notes.append(rounds_note([samples]))
    others = [samples.time(name).median for name in samples.seconds if not name.startswith("tdcache")]
    if "tdcache" in samples and others:
        table.goals.append(
            Goal("sweep, to the best of loop and peers", samples.time("tdcache").median / min(others), 1.0)
        )
    return [table]


# A run that is stopped.


def _stop_by_hand(stack: ExitStack) -> Call:
    model, ids, kept = narrow_gpt2(), _ids(), {}

    def call() -> Any:
        handle = model.get_submodule("h.2").register_forward_hook(peers.stop_hook(kept, "h.2"))
        try:
            with suppress(peers.Reached):
                model(ids)
        finally:
            handle.remove()
        return kept

    return peers.checked(call, 1)


def _stop_run(stack: ExitStack) -> Call:
    ids = _ids()
    hooked = HookedModule.from_module(narrow_gpt2())

    def call() -> Any:
        with hooked.run(ids) as run:
            run.get("h.2")
            run.stop("h.2")
        return run.cache

    return peers.checked(call, 1, TensorDict.keys)


def _stop_nnsight(stack: ExitStack) -> Call:
    wrapped = peers.nnsight_model(narrow_gpt2())
    return partial(peers.nnsight_stop, wrapped, wrapped.h[2], _ids())


STOPS: Mapping[str, Maker] = {
    "full forward": lambda stack: partial(narrow_gpt2(), _ids()),
    HAND: _stop_by_hand,
    "tdcache, a run": _stop_run,
    "nnsight, a trace": _stop_nnsight,
}


def stopped_run(plan: Plan) -> list[Table]:
    """Reading one value at the third of twelve layers."""
    settle_process()
    skipped: dict[str, str] = {}
    with torch.no_grad():
        samples = measure_makers(STOPS, plan=plan, skipped=skipped)
    table = Table("A run that is stopped at layer 3 of 12, GPT-2 shape", ["variant", "us", "% of the full forward"])
    for name in samples.seconds:
        share = 100 * samples.time(name).median / samples.time("full forward").median
        table.rows.append([name, f"{samples.time(name).median * 1e6:.0f}", f"{share:.0f}"])
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append(rounds_note([samples]))
    if "tdcache, a run" in samples:
        full, hand, ours = (samples.time(name).median for name in ("full forward", HAND, "tdcache, a run"))
        saved = 100 * (full - ours) / (full - hand)
        table.goals.append(Goal("stopped run, part of the hand-written saving", saved, 90, "%", at_least=True))
    return [table]
