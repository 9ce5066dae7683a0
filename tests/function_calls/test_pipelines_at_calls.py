"""Pipelines, splices and dictionaries at calls inside forwards, as at the modules of the twin model."""

import pytest
import torch
from torch import nn

from call_twins import data, inputs, pair, twin_name, twin_selector
from model_state import state_of
from tdcache import Ablation, ActivationCaching, Splice
from tdcache.attribution import GradientXActivation
from tdcache.errors import SelectionError, UnfiredSiteWarning
from tdcache.pipeline import AttachedPipeline, FwdBwdHooks, Hooks, attach

SITES = [r"layers\.\d::gelu", r"layers\.\d\.attn::pattern", r"layers\.\d::add\.1", r"layers\.0\.attn::(q|k)"]


def close(mine, its):
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)  # the kernel sums in another order than the twin


def target(found):
    return found["output"][:, -1, 0]


def run(model, context):
    x = inputs().requires_grad_()
    with context:
        y = model(x)
        y[:, -1, 0].sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("site", SITES)
def test_a_pipeline_at_calls_is_that_at_modules(site):
    model, twin = pair()
    before = state_of(model)
    pipeline = FwdBwdHooks().append_to_path("fwd", lambda x: x * 1.5).append_to_path("bwd", lambda grad: grad * 0.5)
    mine = run(model, attach(model, site, pipeline))
    its = run(twin, attach(twin, twin_selector(site), pipeline))
    for one, other in zip(mine, its, strict=True):
        close(one, other)
    model.zero_grad()
    assert state_of(model) == before
    assert not torch.allclose(mine[0], model(inputs()))


def test_a_pipeline_is_told_where_it_is():
    model, _ = pair()
    seen = []
    with attach(
        model, r"layers\.(?P<layer>\d)::gelu", Hooks(lambda x, path, layer, call: seen.append((path, layer, call)))
    ):
        model(inputs())
    assert seen == [(f"layers.{layer}::gelu", layer, 0) for layer in range(3)]


def test_arguments_go_through_a_pipeline():
    model, twin = pair()
    mine = run(model, attach(model, r"layers\.\d::add\.1", lambda x: x * 2, direction="fwd_pre", pick=1))
    its = run(twin, attach(twin, r"layers\.\d\.add_1", lambda x: x * 2, direction="fwd_pre", pick=1))
    for one, other in zip(mine, its, strict=True):
        close(one, other)


def test_a_pattern_of_calls_is_refused_where_each_needs_a_copy_of_the_pipeline():
    with pytest.raises(SelectionError, match="here they must be known before"):
        AttachedPipeline(r"layers\.0::ge.*", lambda x: x)


class Basis(nn.Module):
    def __init__(self, width, latents):
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(width, latents), nn.Linear(latents, width)

    def encode(self, x):
        return self.up(x).relu()

    def decode(self, latents):
        return self.down(latents)


@pytest.mark.parametrize("add_error", [True, False])
@pytest.mark.parametrize("name", ["layers.1::gelu", "layers.1::add.1", "layers.1.attn::z"])
def test_a_splice_at_a_call_is_that_at_a_module(name, add_error):
    model, twin = pair()
    before = state_of(model)
    basis = Basis({"gelu": 16, "add.1": 8, "z": 4}[name.partition("::")[2]], 6)
    found = []
    for each, path in ((model, name), (twin, twin_name(name))):
        shown = path.replace("::", ".")
        pattern = shown.replace(".", r"\.")
        with (
            Splice(path.replace(".", r"\."), basis, add_error=add_error).prepare(each),
            ActivationCaching(rf"{pattern}/sae\.latents", directions=["fwd", "bwd"]).prepare(each) as hooked,
        ):
            hooked(inputs())[:, -1, 0].sum().backward()
            assert f"{shown}/sae.latents" in dict(each.named_modules())
            with Ablation(rf"{pattern}/sae\.latents", units=[2]).prepare(each), torch.no_grad():
                edited = each(inputs())
            found.append([hooked.cache["fwd", f"{shown}/sae.latents"], edited])
        with Splice(path.replace(".", r"\."), basis, add_error=add_error).prepare(each):
            found[-1].append(each(inputs()).detach())
    for mine, its in zip(*found, strict=True):
        close(mine, its)
    model.zero_grad()
    assert state_of(model) == before
    assert all("sae" not in path for path, _ in model.named_modules())
    if add_error:
        assert torch.equal(found[0][2], model(inputs()).detach())  # with the error term, to the last bit


def test_latents_at_a_call_are_attributed():
    model, twin = pair()
    basis, found = Basis(16, 6), []
    for each, path in ((model, "layers.1::gelu"), (twin, "layers.1.gelu")):
        with (
            Splice(path, basis).prepare(each) as outer,
            GradientXActivation(r".*/sae\.latents", target=target).prepare(outer) as hooked,
        ):
            found.append(hooked(data())["attr", "layers.1.gelu/sae.latents"])
    assert found[0].any()
    close(*found)


def test_a_call_of_the_root_is_spliced():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.lin(x)) * 2

    model, basis = Root(), Basis(8, 4)
    with (
        Splice("::relu", basis, add_error=False).prepare(model),
        ActivationCaching(r"relu/sae\.latents").prepare(model) as hooked,
    ):
        y = hooked(inputs())
    hidden = model.lin(inputs()).relu()
    assert torch.equal(y, basis.decode(basis.encode(hidden)) * 2)
    assert torch.equal(hooked.cache["relu/sae.latents"], basis.encode(hidden))
    assert list(dict(model.named_modules())) == ["", "lin"]


def test_a_pipeline_at_a_call_that_is_not_made_is_reported_with_what_is_called():
    model, _ = pair()
    context = attach(model, r"layers\.0::gelo", lambda x: x)
    said = r"'layers.0::gelo' means a call that its module did not make: layers.0 calls 'gelu'"
    with pytest.warns(UnfiredSiteWarning, match=said), context:
        model(inputs())


def test_a_pipeline_that_did_not_run_reports_nothing():
    model, _ = pair()
    with attach(model, r"layers\.0::gelo", lambda x: x):
        pass


def test_an_exception_is_not_followed_by_a_report():
    model, _ = pair()
    context = attach(model, r"layers\.0::(gelo|gelu)", lambda x: x / 0 if isinstance(x, int) else 1 // 0)
    with pytest.raises(ZeroDivisionError), context:
        model(inputs())
