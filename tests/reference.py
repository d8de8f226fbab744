"""Slow and obvious twins of what emajit computes fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def average(shadow: Tensor, param: Tensor, beta: float, *, skip: bool = False) -> Tensor:
    """beta s + (1 - beta) p in float64, rounded once to the shadow's dtype."""
    if not (param.is_floating_point() or param.is_complex()):
        return param.detach().to(shadow.dtype)
    wide = torch.complex128 if shadow.is_complex() else torch.float64
    s, p = shadow.detach().to(wide), param.detach().to(wide)
    new = s * beta + p * (1 - beta)
    if skip:
        new = torch.where(torch.isfinite(p), new, s)
    return new.to(shadow.dtype)


def update(shadow: Any, params: Any, beta: float, *, skip: bool = False) -> Any:
    """`emajit.update`, one leaf after another."""
    return pytree.tree_map(
        lambda s, p: None if s is None else average(s, p, beta, skip=skip), shadow, params
    )


def assert_within(ulps: float, found: Any, shadow: Any, params: Any, beta: float) -> float:
    """Each leaf of `found` is the average of the two, within some units in the last place.

    `s + w (p - s)`, `w = 1 - beta` in float64, is taken in 80-bit numbers. The unit is that of the
    arithmetic (float32, or float64 if a leaf is) at the greater of |s| and |p|; where the shadow is
    narrower than that, one rounding to it comes on top. Returns the largest error in these units.
    """
    worst = 0.0
    for f, s, p in zip(*map(pytree.tree_leaves, (found, shadow, params)), strict=True):
        if s is None:
            assert f is None
            continue
        assert (f.dtype, f.shape, f.device) == (s.dtype, s.shape, s.device)
        if not (p.is_floating_point() or p.is_complex()):
            assert torch.equal(f, p.to(s.dtype))
            continue
        for part in ("real", "imag") if s.is_complex() else ("real",):
            new, old, param = (_wide(getattr(x, part)) for x in (f, s, p))
            exact = old + np.longdouble(1.0 - beta) * (param - old)
            wide = torch.promote_types(torch.promote_types(s.dtype, p.dtype), torch.float32)
            unit = _unit(wide, np.maximum(abs(old), abs(param)))
            error = abs(new - exact)
            if torch.finfo(s.dtype).bits < torch.finfo(wide).bits:
                error = error - _unit(s.dtype, abs(exact)) / 2
            worst = max([worst, *(error / unit).ravel().tolist()])
    assert worst <= ulps
    return worst


def _wide(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy().astype(np.longdouble)


def _unit(dtype: torch.dtype, size: Any) -> Any:
    """The distance of two numbers of a dtype at most; at least that of the smallest ones."""
    limits = torch.finfo(dtype)
    return np.maximum(size, np.longdouble(limits.tiny)) * np.longdouble(limits.eps)


class LitEma(nn.Module):
    """The class of latent-diffusion, with its behaviour and its rounding, written anew."""

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True
    ) -> None:
        super().__init__()
        if decay < 0.0 or decay > 1.0:
            raise ValueError("Decay must be between 0 and 1")
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        count = torch.tensor(0 if use_num_upates else -1, dtype=torch.int)
        self.register_buffer("num_updates", count)
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(self.m_name2s_name[name], p.clone().detach().data)
        self.collected_params: list[Tensor] = []

    def forward(self, model: nn.Module) -> None:
        decay: Any = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        one_minus_decay = 1.0 - decay
        with torch.no_grad():
            params = dict(model.named_parameters())
            shadows = dict(self.named_buffers())
            for name, p in params.items():
                if p.requires_grad:
                    key = self.m_name2s_name[name]
                    shadows[key] = shadows[key].type_as(p)
                    shadows[key].sub_(one_minus_decay * (shadows[key] - p))
                else:
                    assert name not in self.m_name2s_name

    def copy_to(self, model: nn.Module) -> None:
        shadows = dict(self.named_buffers())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(shadows[self.m_name2s_name[name]].data)
            else:
                assert name not in self.m_name2s_name

    def store(self, parameters: Iterable[Tensor]) -> None:
        self.collected_params = [p.clone() for p in parameters]

    def restore(self, parameters: Iterable[Tensor]) -> None:
        for stored, p in zip(self.collected_params, parameters, strict=False):
            p.data.copy_(stored.data)
