r"""Stochastic rounding to 16 bits: up or down at random, so that the mean is the number itself.

A number between two neighbours $a < x < b$ becomes $b$ with probability $(x - a) / (b - a)$. The
noise is a hash of the step, the leaf's path and the element's index, in row-major order: the same
on every device, eager or compiled, in one piece or in shards. So are the results, but for a few
elements in a million, whose average itself differs in its last bit of float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from emajit import _memory
from emajit._shards import Region

SUPPORTED = torch.bfloat16, torch.float16, torch.complex32


def stochastic(x: Tensor, dtype: torch.dtype, key: Tensor, region: Region | None = None) -> Tensor:
    """Round `x`, all of a leaf or a `region` of it, to `dtype`, one of `SUPPORTED`, at random.

    What `dtype` holds exactly stays, and so do zeros, infinities and NaN. Beyond the largest finite
    number there is no second neighbour, and rounding is to nearest.
    """
    if dtype.is_complex:
        region = region and Region(2 * region.first, (*(2 * s for s in region.strides), 1))
        return torch.view_as_complex(stochastic(torch.view_as_real(x), torch.float16, key, region))
    x = x.to(torch.float32)
    noise = _noise(x, key, region)
    rounded = _without(16, x, noise) if dtype == torch.bfloat16 else _to_float16(x, noise)
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x).to(dtype)


# What is in place here is on tensors of these functions' own: it halves the time in eager mode. By
# the methods, since `functionalize` does not know `&=` and `^=`.


def _to_float16(x: Tensor, noise: Tensor) -> Tensor:
    """Below 2^-14 the numbers of float16 are as far apart as just above: lift what is below.

    In float32 the lift keeps 13 bits of the distance, as many as are random.
    """
    size = x.abs()
    lift = (size < 2**-14).to(torch.float32).mul_(2**-14)
    size += lift
    rounded = _without(13, size, noise)
    rounded -= lift
    return torch.copysign(rounded, x)


def _without(bits: int, x: Tensor, noise: Tensor) -> Tensor:
    """Carry as many random bits into the last of a float32, and drop those: 16 for bfloat16."""
    noise.bitwise_and_((1 << bits) - 1)
    carried = x.view(torch.int32) + noise
    carried.bitwise_and_(-(1 << bits))
    return carried.view(torch.float32)


class Keys(NamedTuple):
    """Of each leaf two words, int32, of shape (leaves, 2), and which part of it is there."""

    words: Tensor
    regions: list[Region | None]

    def part(self, leaves: Sequence[int]) -> Keys:
        words = torch.stack([self.words[i] for i in leaves]) if leaves else self.words[:0]
        return Keys(words, [self.regions[i] for i in leaves])

    def keys(self, device: torch.device) -> Keys:  # noqa: ARG002, as `Noise.keys`
        return self


class Noise(NamedTuple):
    """What tells the noise of one call from that of any other; its parts share `mixed`."""

    paths: list[str]
    regions: list[Region | None]
    step: int | Tensor
    mixed: dict[torch.device, Tensor]

    def part(self, leaves: Sequence[int]) -> Noise:
        paths, regions = [self.paths[i] for i in leaves], [self.regions[i] for i in leaves]
        return Noise(paths, regions, self.step, self.mixed)

    def keys(self, device: torch.device) -> Keys:
        """Those of the leaves. A graph that was compiled or captured serves every step."""
        # In a trace, or in a mode, such as that of fake tensors, they are not what others want.
        one_time = _memory.is_traced() or _memory.in_dispatch_mode()
        if device not in self.mixed:
            mixed = _mixed_by_number if device.type == "cuda" and not one_time else _mixed
            self.mixed[device] = mixed(self.step, device)
        words = (_words.__wrapped__ if one_time else _words)(tuple(self.paths), device)
        if not one_time and words.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.append(words)
        return Keys(words ^ self.mixed[device], self.regions)


def _mixed(step: int | Tensor, device: torch.device) -> Tensor:
    """Two words, of which each bit depends on all of the step."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    step = step.to(device, torch.int64)
    first = _hash((step ^ 0x3C6EF372).to(torch.int32))
    second = _hash(first ^ (step >> 32).to(torch.int32))
    return torch.stack([first, second])


def _mixed_by_number(step: int | Tensor, device: torch.device) -> Tensor:
    """`_mixed`, without the launches of a hash on a GPU where the host knows the step."""
    if isinstance(step, Tensor) and not step.is_cpu:
        return _mixed(step, device)
    words = _mixed(int(step), torch.device("cpu")).tolist()
    # `tensor` would copy them from the host.
    return torch.stack([torch.full((), w, dtype=torch.int32, device=device) for w in words])


# What a captured CUDA graph reads at each replay, as long as it may be replayed.
_captured: list[Tensor] = []


@lru_cache(maxsize=64)
def _words(paths: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([_digest(path) for path in paths], dtype=torch.int32, device=device)


def _digest(path: str) -> list[int]:
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])]


# Called while tracing, its result is a constant: `torch.compiler.assume_constant_result`, which
# would import all of dynamo, sets the same mark.
_digest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _noise(x: Tensor, key: Tensor, region: Region | None) -> Tensor:
    """32 random bits for each element of `x`."""
    return _hash(_index(x, region) ^ key[0], key[1])


def _index(x: Tensor, region: Region | None) -> Tensor:
    """The index of each element in the row-major order of the leaf, its lower 32 bits."""
    if region is None:
        counter = torch.int32 if x.numel() < 2**31 else torch.int64
        return torch.arange(x.numel(), dtype=counter, device=x.device).to(torch.int32).view(x.shape)
    index = torch.full((), region.first, dtype=torch.int64, device=x.device).to(torch.int32)
    for n, stride in zip(x.shape, region.strides, strict=True):
        steps = torch.arange(n, device=x.device) * stride
        index = index[..., None] + steps.to(torch.int32)
    return index


def _hash(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """Multiply and fold `x` twice: `lowbias32` of skeeto's hash-prospector, a key in between.

    In int32, whose shifts repeat the sign: without the masks the result is visibly not uniform.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x *= 0x7FEB352D
    x += key
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x *= -0x7B935975
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return x
