r"""Stochastic rounding to 16 bits: up or down at random, so that the mean is the number itself.

A number between two neighbours $a < x < b$ becomes $b$ with probability $(x - a) / (b - a)$, right
to $2^{-32}$. The number is a sum of two terms; the part that float32 rounds away counts too.
The noise is a hash of the step, the leaf's path and the element's row-major index: the same on
every device, eager or compiled, whole or in shards. The results are the same too, except for a
few elements in a million where a compiler fuses a product and a sum into one operation (FMA).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emajit import _torch
from emajit._shards import Region

SUPPORTED = torch.bfloat16, torch.float16, torch.complex32


def stochastic(
    base: Tensor, step: Tensor, dtype: torch.dtype, key: Tensor, region: Region | None = None
) -> Tensor:
    """Round `base + step`, of a leaf or a `region` of it, to `dtype` of `SUPPORTED`, at random.

    Sums that `dtype` holds exactly do not change, nor do infinities and NaN. Rounding is to nearest
    beyond the largest finite number of float16, and in bfloat16 above 2^110, where `_nearest` is
    NaN, and below 2^-126.
    """
    if dtype.is_complex:
        base, step = torch.view_as_real(base), torch.view_as_real(step)
        region = region and Region(2 * region.first, (*(2 * s for s in region.strides), 1))
        return torch.view_as_complex(stochastic(base, step, torch.float16, key, region))
    x = (base + step).to(torch.float32)
    side, drawn = _side_and_number(x, key, region, _DROPPED[dtype] - 1)
    nearest = _nearest(x, dtype)
    ulp = _ulp(nearest * side, dtype)
    # Each side is drawn with probability 1/2, and |rest| is at most half an ulp: the neighbour on
    # the drawn side is taken with probability 2 |rest| / ulp if the rest points there, else never.
    rest = (base - nearest).add_(step).to(torch.float32).mul_(side)
    is_taken = drawn * ulp < rest
    del drawn, rest  # keeps the peak at 80 bytes an element
    if dtype == torch.float16:
        is_taken.logical_and_(x.abs() <= torch.finfo(dtype).max)
    neighbour = torch.add(nearest, ulp.mul_(side), alpha=2.0 ** _DROPPED[dtype])
    return torch.where(is_taken, neighbour, x).to(dtype)


# The functions below use floating-point arithmetic: on a CPU Inductor does not vectorise a bit view
# of a float or a conversion from integers. In-place methods write only tensors made here, which
# halves the time in eager mode; they are methods because `functionalize` does not support `&=` and
# `^=`.

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # mantissa bits of float32 that rounding drops


def _nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to nearest in `dtype`, as float32, by Veltkamp's splitting; NaN on overflow.

    `x + c x` and not a product, which a compiler would fuse with one of the differences.
    """
    scaled = torch.add(x, x, alpha=2.0 ** _DROPPED[dtype])
    nearest = scaled.sub_(scaled - x)
    if dtype == torch.float16:  # whose subnormals are multiples of 2^-24
        nearest = torch.where(x.abs() < 2**-14, (x + 0.75).sub_(0.75), nearest)
    return nearest


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The ulp of `x` in float32: 2^-dropped of its ulp in `dtype`."""
    size = x.abs().mul_(2**-24 * (1 + 2**-20))  # between half an ulp of float32 and one
    if dtype == torch.float16:
        size = size.clamp(min=2**-37)
    return size.add_(x).sub_(x)


def _side_and_number(
    x: Tensor, key: Tensor, region: Region | None, exponent: int
) -> tuple[Tensor, Tensor]:
    """For each element of `x` a random side, 1 or -1, and a random number below 2^exponent."""
    noise = _noise(x, key, region)
    return _as_float(noise, -(2**31), 1.0), _uniform(noise, exponent)


def _uniform(noise: Tensor, exponent: int) -> Tensor:
    """The lower 31 bits as a number in (0, 2^exponent), spaced by 2^(exponent - 30) near 0.

    The bits are put, 23 and 8, into the mantissas of two floats, whose sum is rounded once.
    """
    first, second = 2.0**exponent, 2.0 ** (exponent - 8)
    upper = _as_float(noise >> 8, 0x7FFFFF, first)
    return upper.sub_(first + second).add_(_as_float(noise, 0xFE, second * (1 + 2**-23)))


def _as_float(noise: Tensor, mask: int, number: float) -> Tensor:
    """The float32 `number` with the masked bits of the noise set in it."""
    return (noise & mask).bitwise_or_(_bits(number)).view(torch.float32)


@_torch.constant_in_traces
def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")


class Keys(NamedTuple):
    """The hash keys of leaves: two words each, int32, of shape (leaves, 2), and their regions."""

    words: Tensor
    regions: Sequence[Region | None]

    def part(self, leaves: Sequence[int]) -> Keys:
        words = torch.stack([self.words[i] for i in leaves]) if leaves else self.words[:0]
        return Keys(words, [self.regions[i] for i in leaves])

    def at(self, step: int | Tensor) -> Keys:
        """The keys of one step: the paths' keys xor the hash of the step."""
        device = self.words.device
        is_traced = torch.compiler.is_compiling() or _torch.in_transform()
        if device.type == "cpu" or is_traced or (isinstance(step, Tensor) and not step.is_cpu):
            mixed = _mixed(step, device)
        else:  # the host knows the step: hash it there, without a launch for each operator
            words = _mixed(step, torch.device("cpu")).tolist()
            # `torch.tensor` would copy from the host to the device.
            each = [torch.full((), w, dtype=torch.int32, device=device) for w in words]
            mixed = torch.stack(each)
        if _torch.is_capturing(device):
            _captured.append(self.words)
        return Keys(self.words ^ mixed, self.regions)


# Keeps alive the tensors that a captured graph reads at each replay.
_captured: list[Tensor] = []


def of_paths(paths: Sequence[str], regions: Sequence[Region | None], device: torch.device) -> Keys:
    """The keys of the paths, before the step is hashed in."""
    words = torch.tensor([_digest(path) for path in paths], dtype=torch.int32, device=device)
    return Keys(words.view(len(paths), 2), regions)


def _mixed(step: int | Tensor, device: torch.device) -> Tensor:
    """Two hash words of the step."""
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
    """32 random bits for each element of `x`; the upper bits are the best mixed."""
    return _multiplied(_index(x, region) ^ key[0], key[1])


def _index(x: Tensor, region: Region | None) -> Tensor:
    """The lower 32 bits of each element's row-major index in the whole leaf."""
    if region is None:
        counter = torch.int32 if x.numel() < 2**31 else torch.int64
        return torch.arange(x.numel(), dtype=counter, device=x.device).to(torch.int32).view(x.shape)
    index = torch.full((), region.first, dtype=torch.int64, device=x.device).to(torch.int32)
    for n, stride in zip(x.shape, region.strides, strict=True):
        steps = torch.arange(n, device=x.device) * stride
        index = index[..., None] + steps.to(torch.int32)
    return index


def _hash(x: Tensor) -> Tensor:
    """`lowbias32` of skeeto's hash-prospector."""
    x = _multiplied(x, 0)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _multiplied(x: Tensor, key: Tensor | int) -> Tensor:
    """Fold and multiply `x` twice, and add a key in between.

    The masks undo the sign extension of int32 shifts; without them the bits are not uniform.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x *= 0x7FEB352D
    x += key
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x *= -0x7B935975
    return x
