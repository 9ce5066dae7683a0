"""What the errors and warnings of caching, contexts and hooked modules say: what is wrong, and what to type instead."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdcache import (
    ActivationCaching,
    CaptureError,
    CompositeHookingContextFactory,
    ContextError,
    HookedModule,
    HookingContextFactory,
    UnfiredSiteWarning,
    cache_activations,
)

X = torch.ones(1, 2)


def linears():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))


def overwriting():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))


class Skips(nn.Module):
    """Never calls some of what it has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x):
        x = self.layers[0](x)
        return self.attention(x, x, x, need_weights=False)[0]


class Fused(nn.TransformerEncoderLayer):
    def forward(self, src, **rest):
        return src * 1


class Count(nn.Module):
    def forward(self, x):
        return {"rows": x.shape[0]}


class Named(nn.Module):
    def forward(self, x):
        return {"left": x}


class RunsItself(HookingContextFactory):
    def _run_module(self, module, data, forward):
        return forward(data)

    def __repr__(self):
        return "RunsItself()"


def run(model, x=X, body=lambda hooked: None, keys=(None, None), **options):
    """One forward in a context (of ``pattern=``, by default of every child), then ``body``."""
    with ActivationCaching(options.pop("pattern", r"\d"), **options).prepare(model, *keys) as hooked:
        hooked(x)
        body(hooked)


def closed():
    with ActivationCaching("0").prepare(linears()) as hooked:
        pass
    return hooked


def entered_twice():
    context = ActivationCaching("0").prepare(linears())
    with context, context:
        pass


def paused_twice():
    with (
        ActivationCaching("0").prepare(linears()) as hooked,
        hooked.hooking_context.paused(),
        hooked.hooking_context.paused(),
    ):
        pass


def restored_inside():
    with ActivationCaching("0").prepare(linears()) as hooked:
        hooked.restore()


def missing_entry():
    cache = TensorDict({"0": torch.zeros(1, 2)}).lock_()
    with ActivationCaching("0|1", cache=cache).prepare(linears()):
        pass


def collision():
    data = TensorDict({"input": X})
    run(linears(), data, cache=data, clear_cache=False, keys=(None, ["1"]))


def clash():
    with CompositeHookingContextFactory(ActivationCaching("0"), ActivationCaching("0|1")).prepare(linears()):
        pass


def no_tensordict():
    with RunsItself().prepare(linears()) as hooked:
        hooked(X)


ERRORS = {
    "an unknown way to hold": (
        lambda: ActivationCaching("0", hold="frozen"),
        "hold is one of 'detached', 'live', 'snapshot', got 'frozen'",
    ),
    "an unknown direction": (
        lambda: ActivationCaching("0", directions=["forward"]),
        "unknown direction 'forward'; use one of 'fwd', 'bwd', 'fwd_pre', 'bwd_pre', 'grad_in', 'fwd_kwargs', "
        "'fwd_pre_kwargs'",
    ),
    "a direction that is no sequence": (
        lambda: ActivationCaching("0", directions="bwd"),
        "directions is a sequence: write directions=['bwd']",
    ),
    "a gradient of a stopped forward": (
        lambda: ActivationCaching("0", directions=["bwd"], stop_early=True),
        "stop_early ends the forward, so no backward can bring 'bwd'; leave one of them out",
    ),
    "a callback without its parameters": (
        lambda: ActivationCaching("0", callback=lambda output: output),
        "the callback lacks the parameters 'module', 'args', 'key', 'direction'; it is called with module=, args=, "
        "output=, key=, direction= (take **kwargs for those you do not need)",
    ),
    "a gradient callback with those of a forward": (
        lambda: ActivationCaching(
            "0", directions=["bwd"], callback=lambda module, args, output, key, direction: output
        ),
        "the callback lacks the parameters 'grad_input', 'grad_output'; it is called with module=, "
        "grad_input=, grad_output=, key=, direction= (take **kwargs for those you do not need)",
    ),
    "a callback with positional-only parameters": (
        lambda: ActivationCaching("0", callback=lambda output, /: output),
        "a callback is called with keyword arguments only; it cannot have positional-only parameters",
    ),
    "something that is no selector": (
        lambda: ActivationCaching(3),
        "a selector is a regex string, a compiled pattern, a module class, a predicate (path, module) -> bool, "
        "or a sequence of these; got 3 (int)",
    ),
    "a pattern that is no regex": (
        lambda: ActivationCaching("layers.("),
        "pattern 'layers.(' is not a valid regex: missing ) at position 8",
    ),
    "an unknown way to match": (
        lambda: ActivationCaching("0", match="glob"),
        "match is 'full', 'prefix' or 'search', got 'glob'",
    ),
    "a pattern that matches nothing": (
        lambda: run(Skips(), pattern="layer.0"),
        "pattern 'layer.0' matches none of the 5 modules of Skips; did you mean 'layers.0', 'layers'? "
        "(patterns match the whole path; match='search' finds them anywhere in it)",
    ),
    "a value without a tensor": (
        lambda: run(nn.Sequential(Count())),
        "the value at '0' is dict and holds no tensor; say what to keep with pick= (an index, a key or a "
        "callable), or select another module",
    ),
    "a pick that is not there": (
        lambda: run(nn.Sequential(Named()), pick="right"),
        "pick='right' finds nothing at '0': the value is dict; use one of ['left']",
    ),
    "a pick that gives no tensor": (
        lambda: run(nn.Sequential(Named()), pick=list),
        "pick=<class 'list'> gives list at '0'; a cache holds tensors (or TensorDicts of them)",
    ),
    "a callback that returns no tensor": (
        lambda: run(linears(), callback=lambda **named: "text"),
        "callback= returned str at '0'; a cache holds tensors (or TensorDicts of them)",
    ),
    "a value overwritten in the forward": (
        lambda: run(overwriting()),
        "the value kept at '0' was overwritten by a later in-place operation (such as ReLU(inplace=True)), so "
        "it is no longer the activation; keep a copy with hold='snapshot'",
    ),
    "a value overwritten after it": (
        lambda: run(linears(), body=lambda hooked: hooked.cache["1"].zero_()),
        "the value kept at '1' was overwritten by a later in-place operation (such as ReLU(inplace=True)), so "
        "it is no longer the activation; keep a copy with hold='snapshot'",
    ),
    "an in-place module's input gradient": (
        lambda: run(overwriting(), pattern="1", directions=["grad_in"]),
        "'1' changes its input in place, so the gradient of that input cannot be told from the gradient of its "
        "output; capture direction 'bwd' of the module that produces it instead",
    ),
    "a locked cache without the entry": (
        missing_entry,
        "the cache is locked and has no preallocated entry for '1'; allocate them before locking it, or call "
        "cache.unlock_()",
    ),
    "a locked cache with an entry of another shape": (
        lambda: run(linears(), pattern="1", cache=TensorDict({"1": torch.zeros(1, 2)}).lock_()),
        "the locked cache's entry '1' does not fit its value:\n  "
        "cache: shape (1, 2), torch.float32\n  "
        "value: shape (1, 3), torch.float32\n"
        "allocate it in this shape and dtype, or use index= and dtype= to change what is kept",
    ),
    "a locked cache with an entry of another dtype": (
        lambda: run(linears(), pattern="1", cache=TensorDict({"1": torch.zeros(1, 3).double()}).lock_()),
        "the locked cache's entry '1' does not fit its value:\n  "
        "cache: shape (1, 3), torch.float64\n  "
        "value: shape (1, 3), torch.float32\n"
        "allocate it in this shape and dtype, or use index= and dtype= to change what is kept",
    ),
    "a cache key that is an output key": (
        collision,
        "the cache is the TensorDict that the model writes to, and ['1'] name both a site and an input or "
        "output; rename those with in_keys= and out_keys=, or hand in another cache",
    ),
    "leading dims that disagree": (
        lambda: run(linears(), batch_dims=2),
        "batch_dims=2 needs the same leading dims at every site; most have (1, 2), but '1' (1, 3); select "
        "other sites, lower batch_dims, or bring them in line with callback=",
    ),
    "a group that the pattern does not have": (
        lambda: run(linears(), pattern=r"(?P<layer>\d)", stack_by="block"),
        "stack_by='block' needs a named group (?P<block>...) in the pattern; '0', '1' have only 'layer'",
    ),
    "a pattern without groups": (
        lambda: run(linears(), stack_by="layer"),
        "stack_by='layer' needs a named group (?P<layer>...) in the pattern; '0', '1' have no named groups",
    ),
    "shapes that cannot be stacked": (
        lambda: run(linears(), pattern=r"(?P<layer>\d)", stack_by="layer"),
        "stack_by='layer' cannot stack '*': the sites differ in shape, '0' (1, 2), '1' (1, 3); use index= or callback=",
    ),
    "a member of a stack that did not fire": (
        lambda: run(Skips(), X[None], pattern=r"layers\.(?P<layer>\d)", stack_by="layer"),
        "stack_by='layer' cannot stack 'layers.*': 'layers.1' saw no value in this forward; select only what "
        "runs, or leave stack_by= out",
    ),
    "two children of a composite at one site": (
        clash,
        "children 0 and 1 of the composite both cache '0'; give one of them a cache of its own with "
        "cache=TensorDict(), or other sites",
    ),
    "a composite of something else": (
        lambda: CompositeHookingContextFactory(ActivationCaching("0"), "1"),
        "a composite is made of factories such as ActivationCaching(...), got '1'",
    ),
    "a model that is no module": (
        lambda: ActivationCaching("0").prepare(torch.relu),
        "prepare() takes an nn.Module, got builtin_function_or_method",
    ),
    "an in_key that a TensorDict module does not have": (
        lambda: ActivationCaching("0").prepare(TensorDictModule(linears(), ["x"], ["y"]), in_keys=["z"]),
        "in_keys=['z']: the TensorDict module has ['x'], but not ['z']",
    ),
    "entering inside itself": (
        entered_twice,
        "this context is open already; it can be entered again after it was left, not inside itself: prepare a "
        "second one for nesting",
    ),
    "pausing a paused context": (paused_twice, "this context is paused already"),
    "restoring inside a with block": (
        restored_inside,
        "this context belongs to a with block, which leaves it at its end",
    ),
    "calling after exit": (
        lambda: closed()(X),
        "this hooked module's context is closed; enter it again, or call your own model",
    ),
    "using a closed context": (
        lambda: closed().restore(),
        "this context is closed; enter it first: with context as hooked: ...",
    ),
    "a cache that a recipe does not have": (
        lambda: HookedModule.from_module(linears()).cache,
        "this hooked module has no cache; prepare a caching factory such as ActivationCaching (scores of an "
        "attribution are in the TensorDict that the call returns)",
    ),
    "a context that a hooked module does not have": (
        lambda: HookedModule.from_module(linears()).restore(),
        "this hooked module has no context; get one from factory.prepare(model)",
    ),
    "tensors for a recipe that runs the model": (
        no_tensordict,
        "RunsItself() needs a TensorDict: call hooked(TensorDict({...})) with the entries ['input']",
    ),
    "an input that is not there": (
        lambda: run(linears(), TensorDict({"tokens": X})),
        "the TensorDict has no entry 'input' for the model's input; it has ['tokens']: choose with in_keys=",
    ),
    "an output that is not there": (
        lambda: run(Named(), TensorDict({"input": X}), keys=(None, ["left", "right"]), allow_empty=True),
        "the model returned dict with ['left'], nothing to write to out_key 'right'; choose with out_keys=",
    ),
}


@pytest.mark.parametrize(("wrong", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_says(wrong, text):
    with pytest.raises(Exception) as caught:  # noqa: PT011  the text below is stricter than any class
        wrong()
    assert caught.value.args[0] == text


WARNINGS = {
    "a second call": (
        lambda: run(nn.Sequential(*[nn.Tanh()] * 2), pattern="0"),
        "'0' ran more than once in one forward and only the last value is kept; keep every call with "
        "reducer=Stack(), or the first with reducer=First()",
    ),
    "a container": (
        lambda: run(Skips(), X[None], pattern=r"layers(\.0)?"),
        "1 of 2 selected sites saw no 'fwd' value: 'layers'; ModuleList 'layers' is a container that is never "
        "called; select its members",
    ),
    "a projection of an attention": (
        lambda: run(Skips(), X[None], pattern=r"attention.*"),
        "1 of 2 selected sites saw no 'fwd' value: 'attention.out_proj'; nn.MultiheadAttention 'attention' "
        "uses the weights of its projections without calling them; select 'attention' itself",
    ),
    "a fused layer": (
        lambda: run(nn.Sequential(Fused(2, 1).eval()), X[None], pattern=r"0\.linear\d|0"),
        "2 of 3 selected sites saw no 'fwd' value: '0.linear1', '0.linear2'; the fused fast path of Fused '0' "
        "calls no submodules in eval mode; switch it off with torch.backends.mha.set_fastpath_enabled(False), "
        "or call model.train()",
    ),
    "a module that is not called": (
        lambda: run(Skips(), X[None], pattern=r"layers\.\d"),
        "1 of 2 selected sites saw no 'fwd' value: 'layers.1'",
    ),
    "no backward": (
        lambda: run(linears(), directions=["bwd"]),
        "2 of 2 selected sites saw no 'bwd' value: '0', '1'; no gradient came, or they did not require grad: "
        "was backward() called inside the block?",
    ),
    "an output without a gradient": (
        lambda: run(linears().requires_grad_(False), directions=["bwd"]),
        "2 of 2 selected sites saw no 'bwd' value: '0', '1'; the output of '0', '1' did not require grad "
        "(no_grad, frozen or integer-only input?)",
    ),
    "an input without a gradient": (
        lambda: run(linears(), pattern="0", directions=["grad_in"], body=lambda hooked: hooked(X).sum().backward()),
        "1 of 1 selected sites saw no 'grad_in' value: '0'; the input of '0' did not require grad (no_grad, "
        "frozen or integer-only input?)",
    ),
    "a hook on a container": (
        lambda: HookedModule.from_module(Skips()).register_submodule_hook("layers", lambda module, args, output: None),
        "'layers' is a ModuleList, which is never called; hook its members instead",
    ),
}


@pytest.mark.parametrize(("odd", "text"), WARNINGS.values(), ids=WARNINGS.keys())
def test_a_warning_says(odd, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odd()
    (warning,) = caught
    assert str(warning.message) == text
    assert warning.filename == __file__  # the user's line, not one of the library's


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ActivationCaching("0", reducer=3), r"reducer= is a Reducer such as Stack\(\), got 3"),
        (lambda: ActivationCaching("0", batch_dims=-1), "batch_dims is a number of leading dimensions, got -1"),
        (lambda: ActivationCaching("0", callback=3), r"callback= is a function .*, got 3; wrap it in one"),
        (
            lambda: ActivationCaching("0", callback=lambda mine, **rest: rest["output"]),
            "the callback wants 'mine', which it is not given",
        ),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_at_once(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_the_cache_of_a_context_that_was_never_entered_warns_once():
    model = linears()
    context = ActivationCaching("0").prepare(model)
    with pytest.warns(UnfiredSiteWarning, match=r"was never entered, so its cache is empty; write `with context as"):
        assert context.cache.is_empty()
    assert context.cache.is_empty()


def test_the_cache_of_a_block_without_a_forward_warns_when_it_is_read():
    context = ActivationCaching("0").prepare(linears())
    with context as hooked:
        assert hooked.cache.is_empty()
    with pytest.warns(UnfiredSiteWarning, match="no forward of the model was completed while this context was open"):
        hooked.cache  # noqa: B018
    with context as hooked:
        hooked(X)
    assert list(hooked.cache.keys()) == ["0"]


def test_a_block_that_raised_says_nothing_of_its_empty_cache():
    context = ActivationCaching("0").prepare(linears())
    with pytest.raises(KeyError), context:
        raise KeyError
    assert context.cache.is_empty()


def test_a_given_cache_may_be_empty():
    cache = TensorDict()
    assert ActivationCaching("0", cache=cache).prepare(linears()).cache is cache


@pytest.mark.parametrize("index", [(slice(None), 9), (0, 0, 0)])
def test_an_index_that_does_not_fit_names_the_site_and_its_shape(index):
    with pytest.raises(CaptureError) as raised:
        run(linears(), index=index)
    said = f"index={index!r} does not fit the value at '0', of shape (1, 2): "
    assert str(raised.value).startswith(said)
    assert raised.value.paths == ("0",)


def test_a_device_that_torch_does_not_know_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"device= is a torch.device or the name of one, such as 'cuda:0', got 'gpu'$"):
        ActivationCaching("0", device="gpu")


def test_a_context_that_is_called_says_how_it_is_entered():
    with pytest.raises(ContextError, match=r"a context is entered, not called: `with context as hooked: hooked\("):
        ActivationCaching("0").prepare(linears())(X)


@pytest.mark.parametrize("make", [ActivationCaching, lambda p, **k: cache_activations(linears(), p, **k)])
def test_a_misspelt_option_is_refused_at_the_call(make):
    with pytest.raises(TypeError, match=r"\(\) has no argument 'direction'; did you mean 'directions'\?"):
        make("0", direction=["fwd"])


def test_a_block_of_cache_activations_without_a_forward_warns():
    with pytest.warns(UnfiredSiteWarning, match="no forward of the model"), cache_activations(linears(), "0"):
        pass
