"""The arithmetic on single leaves and flat lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emajit import _kernels
from tests import reference, strategies
from tests.counting import Operators

DTYPES = (*strategies.FLOATS, torch.complex64, torch.complex128)


@given(st.sampled_from(DTYPES), st.floats(0, 1), strategies.seeds)
def test_blend_is_the_equation(dtype: torch.dtype, weight: float, seed: int) -> None:
    s, p = (strategies.random((20,), dtype, seed + i) for i in range(2))
    found = _kernels.blend(s, p, weight, skip=False)
    expected = reference.average(s, p, 1 - weight)
    assert found.dtype == dtype
    # Two roundings in float32 or wider, then one to the dtype.
    tolerance = max(torch.finfo(dtype).eps, 2**-50) * 4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@given(st.sampled_from(DTYPES), strategies.seeds)
def test_both_ends_are_exact(dtype: torch.dtype, seed: int) -> None:
    s = strategies.random((20,), dtype, seed) * 1000
    p = strategies.random((20,), dtype, seed + 1)
    assert torch.equal(_kernels.blend(s, p, 0.0, skip=False), s)
    assert torch.equal(_kernels.blend(s, p, 1.0, skip=False), p)


def test_skip_keeps_the_average_where_the_parameter_is_not_finite() -> None:
    s = torch.tensor([1.0, 2.0, math.inf, -0.0])
    p = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    for weight in (0.1, 0.9, torch.tensor(0.5, dtype=torch.float64)):
        found = _kernels.blend(s, p, weight, skip=True)
        assert torch.equal(found.view(torch.int32), s.view(torch.int32))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_in_place_equals_pure(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    shadows, params = ([strategies.random(shape, dtype, i)] for i in range(2))
    expected = _kernels.average(shadows, params, [0.3] * len(params), skip=False)
    _kernels.average_(shadows, params, [0.3] * len(params), skip=False)
    assert torch.equal(shadows[0], expected[0])


def test_a_tensor_weight_is_cast_once_for_all_leaves_of_a_dtype() -> None:
    """Each cast is a launch on a GPU."""
    shadows = [torch.zeros(3) for _ in range(5)] + [torch.zeros(3, dtype=torch.float64)]
    params, weight = [torch.ones_like(s) for s in shadows], torch.tensor(0.25, dtype=torch.float64)
    with Operators() as operators:
        _kernels.eager_average_(shadows, params, [weight] * 6, skip=False)
    assert operators.counts["aten._to_copy.default"] == 1
    assert all(bool((s == 0.25).all()) for s in shadows)


def test_lerps_only_what_needs_no_temporary() -> None:
    full, half = torch.float32, torch.bfloat16
    assert _kernels.lerps({(full, full), (torch.float64, torch.float64)}, [0.5, 0.1], skip=False)
    assert not _kernels.lerps({(full, full)}, [0.5], skip=True)
    assert not _kernels.lerps({(full, full), (full, half)}, [0.5], skip=False)
    assert not _kernels.lerps({(half, half)}, [0.5], skip=False)
    assert not _kernels.lerps({(full, full)}, [torch.tensor(0.5)], skip=False)


def test_foreach_equals_leaf_by_leaf() -> None:
    shadows, params = ([torch.randn(5), torch.randn(3).double()] for _ in range(2))
    expected = _kernels.average(shadows, params, [0.3] * len(params), skip=False)
    found = _kernels.foreach_average(shadows, params, [0.3] * 2)
    _kernels.foreach_average_(shadows, params, [0.3] * 2)
    for a, b, c in zip(expected, found, shadows, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
