"""The arithmetic on flat lists; that it is the equation is tested through `update`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from emajit import _choose, _kernels, _rounding
from emajit._kernels import Update
from tests.counting import Operators


def test_a_tensor_alpha_is_cast_once_for_all_leaves_of_a_dtype() -> None:
    """Each cast is a launch on a GPU."""
    shadows = [torch.zeros(3) for _ in range(5)] + [torch.zeros(3, dtype=torch.float64)]
    params, alpha = [torch.ones_like(s) for s in shadows], torch.tensor(0.25, dtype=torch.float64)
    with Operators() as operators:
        _kernels.single_tensor_(Update(shadows, params, [alpha] * 6))
    assert operators.counts["aten._to_copy.default"] == 1
    assert all(bool((s == 0.25).all()) for s in shadows)


@pytest.mark.parametrize(
    ("dtypes", "alphas", "skip", "multi"),
    [
        ("ff dd", [0.5, 0.1], False, [0, 1]),
        ("ff dd", [0.5], False, [0, 1]),
        ("ff", [0.5], True, []),
        ("fh ff", [0.5], False, [1]),
        ("hh", [0.5], False, []),
        ("ff dd", [torch.tensor(0.5), 0.5], False, [1]),
    ],
)
def test_one_operator_updates_what_needs_no_temporary(
    dtypes: str, alphas: Any, skip: bool, multi: list[int]
) -> None:
    names = {"f": torch.float32, "d": torch.float64, "h": torch.bfloat16}
    shadows, params = (
        [torch.zeros(2, dtype=names[pair[i]]) for pair in dtypes.split()] for i in (0, 1)
    )
    groups = _choose.groups(Update(shadows, params, alphas, skip), "eager", in_place=True)
    found = [i for leaves, kernel in groups for i in leaves if kernel == _kernels.multi_tensor_]
    assert found == multi
    assert sorted(i for leaves, _ in groups for i in leaves) == [*range(len(shadows))]


def test_multi_tensor_equals_single_tensor() -> None:
    shadows, params = ([torch.randn(5), torch.randn(3).double()] for _ in range(2))
    update = Update(shadows, params, [0.3])
    expected = _kernels.single_tensor(update)
    found = _kernels.multi_tensor(update)
    _kernels.multi_tensor_(update)
    for a, b, c in zip(expected, found, shadows, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


FORMS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.complex64, torch.complex64),
    (torch.complex64, torch.float32),
    (torch.int64, torch.int64),
]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0, 0.3])
def test_the_form_to_trace_equals_single_tensor(alpha: float, skip: bool, noise: bool) -> None:
    """To the bit for an alpha of one bit: the product is exact, and the sum rounded once."""
    shadows = [(4 * torch.randn(7, dtype=torch.complex128)).to(s) for s, _ in FORMS]
    params = [(4 * torch.randn(7, dtype=torch.complex128)).to(p) for _, p in FORMS]
    params[0][3] = params[2][3] = float("nan")
    keys = _rounding.of_paths([str(f) for f in FORMS], [None] * len(FORMS), torch.device("cpu"))
    given = [alpha], [torch.tensor(alpha, dtype=torch.float64)], [alpha] * len(FORMS)
    mixed = [alpha if i % 2 else given[1][0] for i in range(len(FORMS))]
    for alphas in (*given, mixed):
        update = Update(shadows, params, alphas, skip, keys.at(3) if noise else None)
        expected = _kernels.single_tensor(update)
        pure = _kernels.traced(update)
        written = [s.clone() for s in shadows]
        _kernels.traced_(update._replace(shadows=written))
        for e, a, b in zip(expected, pure, written, strict=True):
            exact: dict[str, Any] = {} if alpha == 0.3 else {"rtol": 0.0, "atol": 0.0}
            if alpha == 0.3 and noise and e.dtype.itemsize == 2:
                exact = {"rtol": 2 * torch.finfo(e.dtype).eps, "atol": 1e-3}
            assert_close(a, e, equal_nan=True, **exact)
            assert_close(b, e, equal_nan=True, **exact)
