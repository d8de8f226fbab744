"""Addresses and overlap."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emajit import _alias


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, set[int]]:
    """A strided view of one fixed buffer, and the elements that it covers."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    strides = tuple(draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape))))
    offset = draw(st.integers(0, 10))
    covered = [offset]
    for n, step in zip(shape, strides, strict=True):
        covered = [c + i * step for c in covered for i in range(n)]
    return BUFFER.as_strided(shape, strides, offset), set(covered)


BUFFER = torch.zeros(64)


@given(views(), views())
def test_overlap_is_exact(a: tuple[Tensor, set[int]], b: tuple[Tensor, set[int]]) -> None:
    both = [_alias.view(tensor) for tensor, _ in (a, b)]
    starts, stops = tuple(view[0] for view in both), tuple(map(_alias.end, both))
    touching = _alias.touching(starts, stops, 2)
    shares = any(_alias.share_memory(both[i], both[j]) for i, j in touching)
    assert shares == bool(a[1] & b[1])


@given(views())
def test_a_view_that_repeats_an_element_is_seen(view: tuple[Tensor, set[int]]) -> None:
    tensor, covered = view
    if len(covered) < tensor.numel():
        assert _alias.repeats_itself(tensor.shape, tensor.stride())


def test_dense_layouts_do_not_repeat() -> None:
    x = torch.zeros(2, 3, 4, 5)
    for t in (x, x.transpose(0, 2), x.to(memory_format=torch.channels_last), x[..., ::2], x[:1]):
        assert not _alias.repeats_itself(t.shape, t.stride())


def test_touching_names_pairs_with_a_shadow_only() -> None:
    assert _alias.touching((1, 20, 5, 6), (10, 30, 8, 9), 2) == [(0, 2), (0, 3)]
    assert _alias.touching((1, 4, 2), (4, 8, 2), 3) == []
