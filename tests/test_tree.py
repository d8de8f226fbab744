"""Pairing leaves and ordering them; the errors are tested through the public functions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from emajit import _tree


@given(st.integers(1, 4), st.integers(0, 5))
def test_deinterleave_is_the_inverse(parts: int, size: int) -> None:
    tensors = [torch.tensor(i) for i in range(parts * size)]
    mixed = _tree.interleave(tensors, parts)
    assert [int(t) for t in mixed] == [k * size + i for i in range(size) for k in range(parts)]
    assert _tree.deinterleave(mixed, parts) == tensors


def test_paths_and_leaves_are_those_of_pytree() -> None:
    w = torch.ones(1)
    trees: list[Any] = [{"a.b": w, "c'd": None, 3: w}, {}, {"a": {"b": w}}, {"a": 1.0}, [{"a": w}]]
    for tree in trees:
        keys = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(tree)[0]]
        assert _tree._paths(tree) == keys
        assert _tree._leaves(tree) == pytree.tree_leaves(tree)


def test_the_memos_are_bounded() -> None:
    for size in range(1, 200):
        _tree.align([torch.zeros(size)], [torch.zeros(size)], writable=True)
    assert len(_tree._memos) <= 64


def test_flat_and_nested_trees_pair_alike() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    flat = _tree.align({"a": a, "b": b}, {"a": a + 1, "b": b + 1})
    nested = _tree.align(({"a": a}, [b]), ({"a": a + 1}, [b + 1]))
    for pairs in (flat, nested):
        assert all(x is y for x, y in zip(pairs.shadows, (a, b), strict=True))
        assert list(pairs.slots) == [0, 1]
