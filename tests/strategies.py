"""Hypothesis strategies: pytrees of tensors of many shapes, layouts and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.complex64, torch.int64, torch.bool)

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
betas = st.one_of(st.sampled_from((0.0, 0.5, 0.9999, 1.0)), st.floats(0, 1))
seeds = st.integers(0, 2**31 - 1)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def layout(tensor: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout, where the shape has it."""
    if kind == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "sliced" and tensor.ndim >= 1:
        return torch.cat([tensor, tensor], dim=-1)[..., ::2].copy_(tensor)
    return tensor


@st.composite
def leaf_pairs(draw: st.DrawFn) -> tuple[Tensor | None, Tensor | None]:
    """A leaf of a shadow and one of its params, which may differ in dtype and layout."""
    if draw(st.integers(0, 9)) == 0:
        return None, None
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    shadow_dtype = draw(st.sampled_from(FLOATS)) if dtype in FLOATS else dtype
    kinds = st.sampled_from(("dense", "transposed", "channels_last", "sliced"))
    shadow = layout(random(shape, shadow_dtype, draw(seeds)), draw(kinds))
    return shadow, layout(random(shape, dtype, draw(seeds)), draw(kinds))


@st.composite
def tree_pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    """A shadow and its params: nested dicts, lists and tuples with the same structure."""
    names = st.text("abc", min_size=1, max_size=3)
    return draw(
        st.recursive(
            leaf_pairs(),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3).map(lambda pairs: _zip(list, pairs)),
                st.lists(inner, max_size=3).map(lambda pairs: _zip(tuple, pairs)),
                st.dictionaries(names, inner, max_size=3).map(
                    lambda d: ({k: v[0] for k, v in d.items()}, {k: v[1] for k, v in d.items()})
                ),
            ),
            max_leaves=6,
        )
    )


def _zip(container: type, pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return container(s for s, _ in pairs), container(p for _, p in pairs)
