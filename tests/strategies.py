"""Hypothesis strategies: pytrees of tensors of many shapes, layouts and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (*FLOATS, *COMPLEX, *WHOLE)
LAYOUTS = ("dense", "transposed", "channels_last", "sliced")

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
betas = st.one_of(st.sampled_from((0.0, 0.5, 0.9999, 1.0)), st.floats(0, 1))
seeds = st.integers(0, 2**31 - 1)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return (scale * torch.randn(shape, dtype=wide, generator=generator)).to(dtype)
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


def shadow_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Those that can hold the averages of parameters in `dtype`."""
    if dtype in FLOATS:
        return FLOATS
    if dtype in COMPLEX:
        return COMPLEX
    return (dtype, torch.int64, torch.float32)


@st.composite
def leaf_pairs(draw: st.DrawFn) -> tuple[Tensor | None, Tensor | None]:
    """A leaf of a shadow and one of its params, which may differ in dtype, size and layout."""
    if draw(st.integers(0, 9)) == 0:
        return None, None
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    scales = st.sampled_from((1.0, 1e-6, 1e3))
    shadow_dtype = draw(st.sampled_from(shadow_dtypes(dtype)))
    shadow = random(shape, shadow_dtype, draw(seeds), draw(scales))
    param = random(shape, dtype, draw(seeds), draw(scales))
    kind = draw(st.sampled_from((*LAYOUTS, "expanded")))
    param = param[..., :1].expand(shape) if kind == "expanded" and shape else layout(param, kind)
    return layout(shadow, draw(st.sampled_from(LAYOUTS))), param


@st.composite
def tree_pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    """A shadow and its params: nested dicts, lists and tuples with the same structure.

    A leaf may occur more than once, tied in both.
    """
    pool = draw(st.lists(leaf_pairs(), min_size=1, max_size=5))
    names = st.text("abc", min_size=1, max_size=3)
    return draw(
        st.recursive(
            st.sampled_from(pool),
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
