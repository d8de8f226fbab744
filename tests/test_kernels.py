"""The arithmetic on flat lists; that it is the equation is tested through `update`."""

from __future__ import annotations

import torch

from emajit import _kernels
from tests.counting import Operators


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
