r"""Stochastic rounding to 16 bits: up or down at random, so that the mean is the number itself.

A number between two neighbours $a < x < b$ becomes $b$ with probability $(x - a) / (b - a)$. The
noise is a hash of the step, the leaf's path and the element's index, in row-major order: the same
on every device, eager or compiled, in one piece or in shards. So are the results, but for a few
elements in a million, whose average itself differs in its last bit of float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emajit import _torch
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
    """The hash keys of leaves: two words each, int32, of shape (leaves, 2), and their regions."""

    words: Tensor
    regions: Sequence[Region | None]

    def part(self, leaves: Sequence[int]) -> Keys:
        words = torch.stack([self.words[i] for i in leaves]) if leaves else self.words[:0]
        return Keys(words, [self.regions[i] for i in leaves])

    def at(self, step: int | Tensor) -> Keys:
        """The keys of one step, of those of the paths."""
        device = self.words.device
        is_traced = torch.compiler.is_compiling() or _torch.in_transform()
        if device.type == "cpu" or is_traced or (isinstance(step, Tensor) and not step.is_cpu):
            mixed = _mixed(step, device)
        else:  # the host knows the step: hash it there, without a launch for each operator
            words = _mixed(step, torch.device("cpu")).tolist()
            # `tensor` would copy them from the host.
            each = [torch.full((), w, dtype=torch.int32, device=device) for w in words]
            mixed = torch.stack(each)
        if _torch.is_capturing(device):
            _captured.append(self.words)
        return Keys(self.words ^ mixed, self.regions)


# What a captured graph reads at each replay, as long as it may be replayed.
_captured: list[Tensor] = []


def of_paths(paths: Sequence[str], regions: Sequence[Region | None], device: torch.device) -> Keys:
    """The part of the keys that no step changes."""
    words = torch.tensor([_digest(path) for path in paths], dtype=torch.int32, device=device)
    return Keys(words.view(len(paths), 2), regions)


def _mixed(step: int | Tensor, device: torch.device) -> Tensor:
    """Two words, of which each bit depends on all of the step."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    step = step.to(device, torch.int64)
    first = _hash((step ^ 0x3C6EF372).to(torch.int32))
    second = _hash(first ^ (step >> 32).to(torch.int32))
    return torch.stack([first, second])


@_torch.constant_in_traces
def _digest(path: str) -> list[int]:
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])]


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
