"""Values that no counter sees change, odd types, and dtypes that are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from tdcache import ActivationCaching, CaptureError, Concatenate, First, InplaceModificationError, Mean


def through_data(y):
    y.data.add_(1)


def through_numpy(y):
    y.detach().numpy()[:] = 0


def through_dlpack(y):
    np.from_dlpack(y.detach())[:] = 0


WRITES = [through_data, through_numpy]


class Written(nn.Module):
    """Overwrites the output of its first module past the version counter."""

    def __init__(self, write):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.write = write

    def forward(self, x):
        y = self.first(x)
        self.write(y)
        return self.second(y)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("options", [{}, {"reducer": First()}, {"pick": "all"}])
def test_check_values_finds_writes_that_no_counter_sees(write, options):
    model = Written(write)
    with (
        pytest.raises(InplaceModificationError, match="'first' was overwritten") as caught,
        ActivationCaching("first|second", check="values", **options).prepare(model) as hooked,
        torch.no_grad(),
    ):
        hooked(torch.ones(2, 3))
    assert caught.value.paths == ("first",)


def test_check_values_looks_again_when_the_cache_is_read():
    model = nn.Sequential(nn.Linear(3, 3))
    with ActivationCaching("0", check="values").prepare(model) as hooked, torch.no_grad():
        y = hooked(torch.ones(2, 3))
        assert torch.equal(hooked.cache["0"], y)
        y.data.zero_()
        with pytest.raises(InplaceModificationError, match="'0'"):
            hooked.cache  # noqa: B018
        hooked(torch.ones(2, 3))  # which replaces it


def test_check_values_lets_pass_what_nobody_wrote_to():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    with ActivationCaching(".+", check="values", directions=["fwd", "bwd", "fwd_pre"]).prepare(model) as hooked:
        y = hooked(torch.ones(2, 3))
        y.sum().backward()
    assert torch.equal(hooked.cache["fwd", "1"], y)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="check is one of 'versions', 'values', got 'all'"):
        ActivationCaching("0", check="all")


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_dtype_may_be_given_by_name(dtype):
    model = nn.Sequential(nn.Linear(3, 3))
    with ActivationCaching("0", dtype=dtype).prepare(model) as hooked:
        hooked(torch.ones(2, 3))
    assert hooked.cache["0"].dtype == torch.float16


@pytest.mark.parametrize("dtype", ["flot16", "nn", 16])
def test_a_dtype_that_is_none_is_refused_at_once(dtype):
    with pytest.raises(ValueError, match=r"dtype= is a torch.dtype or the name of one, such as 'float16', got "):
        ActivationCaching("0", dtype=dtype)


def test_a_real_dtype_for_complex_values_is_refused():
    with (
        pytest.raises(CaptureError, match=r"would discard the imaginary part of a torch\.complex64 value"),
        ActivationCaching("0", dtype=torch.float32).prepare(nn.Sequential(nn.Identity())) as hooked,
    ):
        hooked(torch.ones(2, dtype=torch.complex64))
    with ActivationCaching("0", dtype="complex128").prepare(nn.Sequential(nn.Identity())) as hooked:
        hooked(torch.ones(2, dtype=torch.complex64))
    assert hooked.cache["0"].dtype == torch.complex128


class Versioned:
    """An object of another library that counts versions of its own."""

    _version = 0

    def __init__(self, tensor):
        self.tensor = tensor


class Wraps(nn.Module):
    def forward(self, x):
        return Versioned(x)


class Unwraps(nn.Module):
    def forward(self, value):
        return value.tensor


@pytest.mark.parametrize("directions", [["fwd"], ["fwd", "bwd"]])
def test_an_output_that_has_versions_and_is_no_tensor_is_named(directions):
    with (
        pytest.raises(CaptureError, match="the value at '0' is Versioned and holds no tensor"),
        ActivationCaching("0", directions=directions).prepare(nn.Sequential(Wraps(), Unwraps())) as hooked,
    ):
        hooked(torch.ones(2))


class Experts(nn.Module):
    """Sends every row to its first expert."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        return torch.cat([self.experts[0](x), self.experts[1](x[:0])])


@pytest.mark.parametrize("reducer", [Mean(), Concatenate(), None])
def test_an_expert_that_got_no_row_is_no_error(reducer):
    with ActivationCaching(r"experts\.\d", reducer=reducer).prepare(Experts()) as hooked:
        y = hooked(torch.randn(4, 3)).detach()
    torch.testing.assert_close(hooked.cache["experts.0"], y.mean(0) if isinstance(reducer, Mean) else y)
    assert hooked.cache["experts.1"].isnan().all()
