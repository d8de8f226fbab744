"""Pairing leaves and ordering them; the errors are tested through the public functions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import emajit
from emajit import _paths, _plan, _tree


@given(st.integers(1, 4), st.integers(0, 5))
def test_deinterleave_is_the_inverse(parts: int, size: int) -> None:
    tensors = [torch.tensor(i) for i in range(parts * size)]
    mixed = _tree.interleave(tensors, parts)
    assert [int(t) for t in mixed] == [k * size + i for i in range(size) for k in range(parts)]
    assert _tree.deinterleave(mixed, parts) == tensors


def test_paths_are_those_of_pytree() -> None:
    w = torch.ones(1)
    trees: list[Any] = [{"a.b": w, "c'd": None, 3: w}, {}, {"a": {"b": w}}, {"a": 1.0}, [{"a": w}]]
    for tree in trees:
        keys = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(tree)[0]]
        assert _paths.paths(tree) == keys


def test_the_cache_of_plans_is_bounded() -> None:
    for size in range(1, 200):
        emajit.update_([torch.zeros(size)], [torch.zeros(size)], 0, decay=0.5)
    assert len(_plan._plans) <= _plan.MOST_PLANS


def test_flat_and_nested_trees_pair_alike() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    flat = {"a": a, "b": b}, {"b": b + 1, "a": a + 1}
    nested = ({"a": a}, [b]), ({"a": a + 1}, [b + 1])
    for shadow, params in (flat, nested):
        pairs = _tree.pair([shadow], params)
        assert all(x is y for x, y in zip(pairs.shadows, (a, b), strict=True))
        assert list(pairs.slots) == [0, 1]
