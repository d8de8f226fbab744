"""The decay that a `LitEma` holds in float32, as the number that it was made of."""

from __future__ import annotations

import struct
from functools import lru_cache


@lru_cache
def decimal(held: float) -> float:
    """The number of 7 decimals that has this float32, if there is one, or what is held itself.

    >>> decimal(0.9998999834060669)
    0.9999
    """
    short = round(held, 7)
    return short if float32(short) == held else held


def float32(number: float) -> float:
    """The number as float32 has it."""
    return float(struct.unpack("f", struct.pack("f", number))[0])
