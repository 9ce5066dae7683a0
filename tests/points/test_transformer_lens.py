"""Beside TransformerLens itself: one class body on either library's classes, and its own models read by our regex.

Skipped where it is not installed. ``HookedTransformer`` exists up to 3.x, ``TransformerBridge`` from 3.0 on.
"""

import warnings
from functools import partial
from importlib.metadata import version

import pytest
import torch

from points.point_models import small_transformer, some_tokens
from tdcache import ActivationCaching
from tdcache.points import HookedRootModule, HookPoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of its own, on import
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens.hook_points import HookPoint as LensHookPoint

MAJOR = int(version("transformer-lens").partition(".")[0])

pytestmark = pytest.mark.filterwarnings("ignore")  # its models warn of themselves

Q, MID = "blocks.0.attn.hook_q", "blocks.1.hook_resid_mid"


def add(amount, tensor, hook):
    return tensor + amount


def erase(tensor, hook):
    tensor[:, 0] = 0
    return tensor


def note(seen, tensor, hook):
    seen.append((hook.name, hook.layer() if "blocks" in hook.name else None, tensor.detach().clone()))


# Scripts as its users write them: each takes a model and gives data to compare.


def cache_everything(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    return [logits, *sorted(cache.keys()), *(cache[name] for name in sorted(cache.keys()))]


def cache_by_filter(model, tokens):
    chosen = []
    for names in (Q, [Q, MID], lambda name: name.endswith("hook_z")):
        _, cache = model.run_with_cache(tokens, names_filter=names, device="cpu")
        chosen += [*sorted(cache.keys()), *(cache[name] for name in sorted(cache.keys()))]
    return chosen


def cache_positions(model, tokens):
    found = []
    for positions in (0, -1, (1, 4), [0, 2]):
        _, cache = model.run_with_cache(tokens, pos_slice=positions)
        found += [cache[name] for name in sorted(cache.keys())]
    return found


def cache_without_batch(model, tokens):
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    return [cache[name] for name in sorted(cache.keys())]


def cache_gradients(model, tokens):
    loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    return [loss, *sorted(cache.keys()), *(cache[name] for name in sorted(cache.keys()))]


def edit_in_place_and_by_return(model, tokens):
    hooks = [(MID, erase), (lambda name: name.endswith("hook_pattern"), lambda tensor, hook: tensor * 0.5)]
    return [
        model.run_with_hooks(tokens, fwd_hooks=hooks),
        model.run_with_hooks(tokens, fwd_hooks=[(Q, partial(add, 1.0))]),
    ]


def edit_gradients(model, tokens):
    seen = []
    with model.hooks(
        fwd_hooks=[(Q, partial(note, seen))],
        bwd_hooks=[(MID, lambda grad, hook: 3 * grad), ("hook_embed", partial(note, seen))],
    ):
        model(tokens, return_type="loss").backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return [*gradients, *(part for call in seen for part in call)]


def nest(model, tokens):
    with model.hooks([(Q, partial(add, 1.0))]):
        with model.hooks([(MID, partial(add, 2.0))]):
            inner, cache = model.run_with_cache(tokens, names_filter=[Q, MID])
        outer = model(tokens)
    return [inner, outer, model(tokens), cache[Q], cache[MID], model.context_level]


def standing_hooks(model, tokens):
    model.add_hook(Q, partial(add, 1.0), "fwd", False, 2)
    model.add_hook(lambda name: name == MID, partial(add, 5.0), dir="fwd", prepend=True)
    model.add_perma_hook(MID, partial(add, 3.0))
    found = [model(tokens), [len(point.fwd_hooks) for point in model.hook_points()]]
    model.reset_hooks(True, "both", False, 2)
    found += [model(tokens), model.hook_dict[Q].has_hooks(), model.hook_dict[MID].has_hooks("fwd", False)]
    model.remove_all_hook_fns("fwd")
    found += [model(tokens), repr(model.hook_dict[MID])]
    model.reset_hooks(including_permanent=True)
    return [*found, model(tokens), [len(handles) for handles in model.list_hooks().values()]]


def caching_hooks_that_stay(model, tokens):
    mine = {}
    cache = model.add_caching_hooks([Q, MID], False, None, False, mine)
    model(tokens)
    found = [cache is mine, *(mine[name].clone() for name in sorted(mine))]
    model((tokens + 1) % 11)
    found += [mine[name].clone() for name in sorted(mine)]
    model.reset_hooks()
    cache, fwd, bwd = model.get_caching_hooks(MID, incl_bwd=True)
    with model.hooks(fwd, bwd):
        model(tokens, return_type="loss").backward()
    model.zero_grad()
    return [*found, *(cache[name] for name in sorted(cache.keys()))]


def scratch_space(model, tokens):
    def keep(tensor, hook):
        hook.ctx["mean"] = tensor.mean().item()

    model.run_with_hooks(tokens, fwd_hooks=[(Q, keep)])
    kept = dict(model.hook_dict[Q].ctx)
    model.clear_contexts()
    return [kept, model.hook_dict[Q].ctx]


def names(model, tokens):
    return [
        list(model.hook_dict),
        sorted(model.mod_dict),
        [point.name for point in model.hook_points()],
        model.is_caching,
    ]


SCRIPTS = [
    cache_everything,
    cache_by_filter,
    cache_positions,
    cache_without_batch,
    cache_gradients,
    edit_in_place_and_by_return,
    edit_gradients,
    nest,
    standing_hooks,
    caching_hooks_that_stay,
    scratch_space,
    names,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_gives_the_same_on_a_changed_import(script):
    theirs = script(small_transformer(lens.HookedRootModule, LensHookPoint), some_tokens())
    ours = script(small_transformer(HookedRootModule, HookPoint), some_tokens())
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(other, torch.Tensor):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
        else:
            assert mine == other


def test_its_cache_object_takes_our_tensordict():
    model, tokens = small_transformer(HookedRootModule, HookPoint), some_tokens()
    _, cache = model.run_with_cache(tokens[:1])
    kept = {name: value.clone() for name, value in cache.items()}
    theirs = lens.ActivationCache(cache, model)
    assert theirs.has_embed
    assert torch.equal(theirs["q", 0], kept[Q])
    assert torch.equal(theirs["resid_mid", 1], kept[MID])
    assert list(theirs) == list(kept)
    theirs.remove_batch_dim()
    assert torch.equal(theirs[Q], kept[Q][0])


def test_a_subclass_that_guards_its_hooks_runs_on_a_changed_import():
    def guarded(root, point):
        made = small_transformer(root, point)

        class Guarded(type(made)):
            def check_hooks_to_add(self, hook_point, hook_point_name, hook, **rest):
                if hook_point_name.endswith("hook_z"):
                    raise ValueError("hook_z is switched off")

        made.__class__ = Guarded
        return made

    for model in (guarded(lens.HookedRootModule, LensHookPoint), guarded(HookedRootModule, HookPoint)):
        model.add_hook(Q, erase)
        with pytest.raises(ValueError, match="switched off"):
            model.add_hook("blocks.0.attn.hook_z", erase)


@pytest.mark.skipif(MAJOR > 3, reason="HookedTransformer was removed in 4.0")
@pytest.mark.parametrize("kind", ["gelu", "solu_ln", "gated"])
def test_a_hooked_transformer_cached_by_our_regex_equals_its_own_cache(kind):
    options = {"act_fn": "silu", "gated_mlp": True} if kind == "gated" else {"act_fn": kind}
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4, "d_vocab": 20, "seed": 0}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, **options, use_attn_result=True))
    tokens = some_tokens(2, 8, 20)
    _, theirs = model.run_with_cache(tokens, return_cache_object=False)
    with ActivationCaching(r"(?:.*\.)?hook_\w+").prepare(model) as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of points that are switched off
        model(tokens)
    assert len(theirs) > 30
    assert sorted(hooked.cache.keys()) == sorted(theirs)
    for name, value in theirs.items():
        assert torch.equal(hooked.cache[name], value), name


@pytest.mark.skipif(MAJOR < 4, reason="in 3.x the bridge is in the making")
def test_a_bridged_model_cached_by_our_regex_equals_its_own_cache(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    wrapped = transformers.GPT2LMHeadModel(config).eval()
    wrapped.save_pretrained(tmp_path)
    model = lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=wrapped, tokenizer=None)
    tokens = some_tokens(2, 8, 20)
    _, theirs = model.run_with_cache(tokens, return_cache_object=False)
    with ActivationCaching(r"(?:.*\.)?hook_\w+").prepare(model) as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of points that are switched off
        model(tokens)
    path_of = {id(module): path for path, module in model.named_modules()}
    points = {name: point for name, point in model.hook_dict.items() if id(point) in path_of and name in theirs}
    assert len(points) > 30
    for name, point in points.items():
        value = hooked.cache[path_of[id(point)]]
        shown = value if point.hook_conversion is None else point.hook_conversion.convert(value)  # as its hooks see it
        assert torch.equal(shown, theirs[name]), name
