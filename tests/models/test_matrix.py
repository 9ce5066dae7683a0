"""Every kind of site of every family of models, under every method, against hooks written by hand.

``TDCACHE_MATRIX=all`` tries every module that runs once; without it a few of each family, of other classes in each.
"""

import os
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import hand_hooks as hand
from model_zoo import ZOO
from tdcache import (
    Ablation,
    ActivationCaching,
    ActivationPatching,
    CompositeHookingContextFactory,
    HookedModule,
    Stack,
    SteeringVectors,
)
from tdcache.attribution import AttributionPatching, GradientXActivation

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32: one clone more changes the order in which gradients are summed


@pytest.fixture(params=ZOO)
def family(request):
    return replace(ZOO[request.param](), name=request.param)


def sites_of(family, *, inputs=False):
    """Sites, each with every tensor that it returns and can be picked."""
    found = hand.sites(family.model, family.batch)
    if os.environ.get("TDCACHE_MATRIX") != "all":
        one_of_each_class = list({type(site.module): site for site in found}.values())
        start = list(ZOO).index(family.name) % 4
        found = one_of_each_class[start::4]
    if inputs:
        return [(site, None) for site in found if site.reads]
    return [(site, pick) for site in found for pick in site.picks]


def exact(path):
    return path.replace(".", r"\.")


def score(logits):
    """A number per row."""
    weights = torch.linspace(-1, 1, logits[0].numel()).reshape(logits[0].shape).cos()
    return (logits * weights).flatten(1).sum(1)


def places(family):
    """Direction, site and pick of everything that can be edited, with the options that say so and the oracle's."""
    for site, pick in sites_of(family):
        yield site, {"pick": pick}, {"pick": pick}
    for site, _ in sites_of(family, inputs=True):
        yield site, {"direction": "fwd_pre"}, {"inputs": True}


def plain_run(family, recipe):
    with torch.no_grad(), recipe.prepare(family.model) as hooked:
        return hand.logits(hooked(**family.batch))


def test_values_at_outputs_and_inputs(family):
    for site, options, where in places(family):
        direction = options.pop("direction", "fwd")
        recipe = ActivationCaching(exact(site.path), directions=[direction], hold="snapshot", **options)
        with torch.no_grad(), recipe.prepare(family.model) as hooked:
            hooked(**family.batch)
        assert torch.equal(hooked.cache[site.path], hand.value(family, site, **where)), (site, direction)


def test_gradients_at_outputs_and_inputs(family):
    for site, options, where in places(family):
        direction = "bwd" if "pick" in options else "grad_in"
        expected = hand.gradient(family, site, score, **where)
        if expected is None or (direction == "grad_in" and getattr(site.module, "inplace", False)):
            continue
        recipe = ActivationCaching(exact(site.path), directions=[direction], pick=options.get("pick"))
        with recipe.prepare(family.model) as hooked:
            score(hand.logits(hooked(**family.batch))).sum().backward()
        torch.testing.assert_close(hooked.cache[site.path], expected, **CLOSE, msg=f"{site} {direction}")


@pytest.mark.filterwarnings("ignore:nothing reads the edited value")
def test_zeros_patches_and_vectors_at_outputs_and_inputs(family):
    for site, options, where in places(family):
        path, plain = exact(site.path), hand.value(family, site, **where)
        source = hand.value(family, site, batch=family.other, **where)
        vector = torch.linspace(-1, 1, plain.shape[-1])
        found = (
            (Ablation(path, **options), torch.zeros_like),
            (ActivationPatching(path, {site.path: source}, **options), lambda _, source=source: source.clone()),
            (SteeringVectors(path, vector, coefficient=2.0, **options), lambda x, vector=vector: x + 2 * vector),
        )
        for recipe, edit in found:
            if not (isinstance(recipe, SteeringVectors) and has_channels(site, plain)):
                expected = hand.run(family, site, edit, **where)
                assert torch.equal(plain_run(family, recipe), expected), (site, recipe)


def unsided(path):
    """Whether a site may be of the encoder's sequence or of the decoder's, as a head or a cross-attention may."""
    return "coder" not in path or "encoder_attn" in path


def has_channels(site, value):
    """Whether a vector for the last axis is refused, since features are along another one."""
    return value.ndim > 3 or isinstance(site.module, torch.nn.Conv1d)


@pytest.mark.filterwarnings("ignore:nothing reads the edited value")
def test_positions_of_real_tokens(family):
    if family.position_dim is None:
        pytest.skip("no positions")
    for site, options, where in places(family):
        value = hand.value(family, site, **where)
        mask = family.mask_of(value)
        if mask is None:
            continue
        columns = [row.nonzero()[:, 0][[0, -1]].tolist() for row in mask]
        options = {**options, "positions": [0, -1], "position_dim": family.position_dim}
        if "decoder_input_ids" in family.batch and value.shape[1] == 4 and unsided(site.path):  # its side is not known
            options["mask_key"] = "decoder_attention_mask"

        def edit(value, change, columns=columns):
            new = value.clone().movedim(family.position_dim, 1)
            for row, chosen in enumerate(columns):
                new[row, chosen] = change(new[row, chosen])
            return new.movedim(1, family.position_dim)

        vector = torch.linspace(-1, 1, value.shape[-1])
        expected = hand.run(family, site, lambda x, edit=edit: edit(x, torch.zeros_like), **where)
        assert torch.equal(plain_run(family, Ablation(exact(site.path), **options)), expected), site
        expected = hand.run(family, site, lambda x, edit=edit, v=vector: edit(x, lambda part: part + v), **where)
        assert torch.equal(plain_run(family, SteeringVectors(exact(site.path), vector, **options)), expected), site
        direction = options.pop("direction", "fwd")
        recipe = ActivationCaching(exact(site.path), directions=[direction], hold="snapshot", **options)
        with torch.no_grad(), recipe.prepare(family.model) as hooked:
            hooked(**family.batch)
        moved = value.movedim(family.position_dim, 1)
        expected = torch.stack([moved[row, chosen] for row, chosen in enumerate(columns)])
        assert torch.equal(hooked.cache[site.path].movedim(family.position_dim, 1), expected), site


@pytest.mark.filterwarnings("ignore:nothing reads the edited value")
def test_runs_get_and_set(family):
    hooked = HookedModule.from_module(family.model)
    for site, options, where in places(family):
        verb = "_input" if options.pop("direction", None) else ""
        with torch.no_grad():
            with hooked.run(dict(family.other)) as clean:
                value = getattr(clean, f"get{verb}")(site.path, hold="snapshot", **options)
            with hooked.run(dict(family.batch)) as patched:
                getattr(patched, f"set{verb}")(site.path, value, **options)
        source = hand.value(family, site, batch=family.other, **where)
        assert torch.equal(value.value, source), site
        assert torch.equal(
            hand.logits(patched.result), hand.run(family, site, lambda _, s=source: s.clone(), **where)
        ), site


def target(data):
    return score(data["logits"])


def has_own_gradient(site, inputs):
    """Whether the gradient of what the module reads can be told from that of what it returns."""
    return not (inputs and getattr(site.module, "inplace", False))


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_gradient_x_activation_and_attribution_patching(family, direction):
    inputs, found = direction == "fwd_pre", {}
    for site, pick in sites_of(family, inputs=inputs):
        where = {"inputs": True} if inputs else {"pick": pick}
        gradient = hand.gradient(family, site, score, **where) if has_own_gradient(site, inputs) else None
        if gradient is not None and (inputs or pick == site.picks[0]):
            other = hand.value(family, site, batch=family.other, **where)
            found[site.path] = gradient, hand.value(family, site, **where), other
    sizes = {path: [3] if len(value) == 3 and family.position_dim != 0 else [] for path, (_, value, _) in found.items()}
    for size in ([3], []):
        paths = [path for path in found if sizes[path] == size]
        options = {"target": target, "direction": direction, "snapshot": True}
        kinds = GradientXActivation, AttributionPatching
        methods = [kind([exact(path) for path in paths], name=kind.__name__, **options) for kind in kinds]
        keys = {name: name for name in family.batch}
        if paths:
            data = TensorDict({**family.batch, "corrupt": dict(family.other)}, batch_size=size)
            with CompositeHookingContextFactory(*methods).prepare(family.model, keys, ["logits"]) as hooked:
                scores = hooked(data)["attr"]
        for path in paths:
            gradient, value, other = found[path]
            torch.testing.assert_close(scores["GradientXActivation", path], gradient * value, **CLOSE, msg=path)
            torch.testing.assert_close(
                scores["AttributionPatching", path], gradient * (other - value), **CLOSE, msg=path
            )


@pytest.mark.filterwarnings("ignore:nothing reads the edited value")
def test_sweeps_over_sites_and_positions(family):
    found = [site for site, pick in sites_of(family) if pick == site.picks[0]]
    values = {site.path: hand.value(family, site, pick=site.picks[0]) for site in found}
    keys = {name: name for name in family.batch}

    def metric(data):
        return target(data).mean()

    def swept(paths, **options):
        recipe = ActivationPatching([exact(path) for path in paths], metric=metric, **options)
        with torch.no_grad(), recipe.prepare(family.model, keys, ["logits"]) as hooked:
            return hooked(TensorDict({**family.batch, "patched": dict(family.other)}))

    def expected(site, index):
        def paste(value):
            new = value.clone()
            new[index] = values[site.path][index]
            return new

        return score(hand.run(family, site, paste, batch=family.other, pick=site.picks[0])).mean()

    stacked = {path for path, value in values.items() if len(value) == 3 and family.position_dim != 0}
    for paths, chunk in ((stacked, 32), (values.keys() - stacked, 1)):
        effects = swept(sorted(paths), sweep=True, chunk=chunk) if paths else {}
        for site in found:
            if site.path in paths:
                torch.testing.assert_close(effects[site.path].squeeze(), expected(site, ...), **CLOSE, msg=site.path)
    some = [site for site in found if family.mask_of(values[site.path]) is not None][:2]
    if some:
        axis = family.position_dim
        effects = swept([site.path for site in some], sweep="position", position_dim=axis, chunk=32 if axis else 1)
    for site in some:
        columns = range(values[site.path].shape[axis])
        numbers = torch.stack([expected(site, (*(slice(None),) * axis, at)) for at in columns])
        torch.testing.assert_close(effects[site.path], numbers, **CLOSE, msg=site.path)


class Cells(nn.Module):
    """A recurrent cell that runs once per position."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), 6)
        for at in range(x.shape[1]):
            state = self.cell(x[:, at], state)
        return self.head(state)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_each_call_of_a_recurrent_cell(call):
    model, x, other = Cells(), torch.randn(3, 3, 4), torch.randn(3, 3, 4)

    def run(edit, x=x):
        """The logits with the state after one call edited, and the states."""
        states = []

        def hook(module, args, output):
            states.append(edit(output) if len(states) == call else output)
            return states[-1]

        handle = model.cell.register_forward_hook(hook)
        logits = model(x)
        handle.remove()
        return logits, states

    vector, source = torch.linspace(-1, 1, 6), run(lambda state: state, other)[1][call].detach()
    edits = (
        (Ablation("cell", calls=call), torch.zeros_like),
        (SteeringVectors("cell", vector, calls=call), lambda state: state + vector),
        (ActivationPatching("cell", {"cell": source}, calls=call), lambda state: source),
    )
    for recipe, edit in edits:
        expected = run(edit)[0]
        with torch.no_grad(), recipe.prepare(model) as hooked:
            assert torch.equal(hooked(x), expected), recipe
    logits, states = run(lambda state: state)
    (gradient,) = torch.autograd.grad(score(logits).sum(), states[call])
    with ActivationCaching("cell", directions=["fwd", "bwd"], reducer=Stack()).prepare(model) as hooked:
        score(hooked(x)).sum().backward()
    assert torch.equal(hooked.cache["fwd", "cell"][call], states[call].detach())
    torch.testing.assert_close(hooked.cache["bwd", "cell"][call], gradient, **CLOSE)
    method = GradientXActivation("cell", target=lambda data: score(data["output"]), call=call)
    with method.prepare(model) as hooked:
        scores = hooked(TensorDict({"input": x}, batch_size=[3]))["attr", "cell"]
    torch.testing.assert_close(scores, gradient * states[call].detach(), **CLOSE)


def test_a_policy_of_tensordict_modules():
    policy = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 6), ["observation"], ["hidden"]),
        TensorDictModule(nn.Tanh(), ["hidden"], ["hidden"]),
        TensorDictModule(nn.Linear(6, 2), ["hidden"], ["action"]),
    )
    x, other, vector = torch.randn(3, 4), torch.randn(3, 4), torch.linspace(-1, 1, 6)
    first, act, last = (policy.module[at].module for at in range(3))
    hidden, source = act(first(x)), act(first(other)).detach()

    def run(recipe, data):
        with recipe.prepare(policy) as hooked:
            return hooked(TensorDict(data, batch_size=[3]))

    given = {"observation": x}
    for path in ("module.1", "module.1.module"):
        edits = (
            (Ablation(exact(path)), hidden * 0),
            (SteeringVectors(exact(path), vector), hidden + vector),
            (ActivationPatching(exact(path), {path: source}), source),
        )
        for recipe, expected in edits:
            assert torch.equal(run(recipe, given)["action"], last(expected)), recipe
        recipe = ActivationPatching(exact(path), sweep=True, metric=lambda data: data["action"].sum())
        effects = run(recipe, {"observation": other, "patched": given})
        torch.testing.assert_close(effects[path].squeeze(), last(source).sum(), **CLOSE)
        with ActivationCaching(exact(path), directions=["fwd", "bwd"]).prepare(policy) as hooked:
            hooked(TensorDict(given, batch_size=[3]))["action"].sum().backward()
        assert torch.equal(hooked.cache["fwd", path], hidden.detach())
        gradient = last.weight.sum(0).expand(3, 6)
        torch.testing.assert_close(hooked.cache["bwd", path], gradient, **CLOSE)
        method = AttributionPatching(exact(path), target=lambda data: data["action"].sum(1))
        scores = run(method, {**given, "corrupt": {"observation": other}})["attr", path]
        torch.testing.assert_close(scores, gradient * (source - hidden), **CLOSE)
