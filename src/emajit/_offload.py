"""Averages in host memory: copied to the parameters' device, averaged there, and copied back.

In pieces, so that the device needs little memory whatever the size of the model, and by a stream of
their own, so that neither the host nor the training waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emajit import _compile, _host
from emajit._compile import Work
from emajit._shards import Region

# How many numbers a piece has. It takes at most 80 bytes for each on the device, 160 MiB.
_PIECE = 2**21


def average_(work: Work) -> Work:
    """Average the leaves that are in host memory; the rest of the work."""
    homes = [p.device for p in work.params]
    away = [s.device != home for s, home in zip(work.shadows, homes, strict=True)]
    for home in {home for home, is_away in zip(homes, away, strict=True) if is_away}:
        leaves = [i for i, is_away in enumerate(away) if is_away and homes[i] == home]
        _average_away_(work.part(leaves), home)
    return work.part([i for i, is_away in enumerate(away) if not is_away])


def _average_away_(work: Work, home: torch.device) -> None:
    """Launch the pieces in the side stream.

    What does not require grad, such as buffers, no optimizer will hold back from being written: the
    training waits for those, on the device.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("update_: expected no capture of a CUDA graph for a shadow on the host")
    # Whatever else may change soon is read here, in the stream of the training: the step.
    work = work._replace(noise=work.noise and work.noise.keys(home))
    training, side = torch.cuda.current_stream(home), _host.side_stream(home)
    for tensor in (*work.params, *work.weights, *(work.noise or ())):
        if isinstance(tensor, Tensor):
            tensor.record_stream(side)
    side.wait_stream(training)
    trained = [p.requires_grad for p in work.params]
    for is_trained in (False, True):
        part = work.part(
            [i for i, requires_grad in enumerate(trained) if requires_grad == is_trained]
        )
        with torch.cuda.stream(side):
            for piece in _pieces(part):
                _average_piece_(piece, home)
        if part.shadows and not is_trained:
            training.wait_stream(side)


def _average_piece_(piece: Work, home: torch.device) -> None:
    there = [s.to(home, non_blocking=True) for s in piece.shadows]
    _compile.average_(piece._replace(shadows=there), "eager")
    for held, average in zip(piece.shadows, there, strict=True):
        held.copy_(average, non_blocking=True)


class _Slice(NamedTuple):
    """Of the leaf of that index in the work, all or a `region`."""

    leaf: int
    shadow: Tensor
    param: Tensor
    region: Region | None


def _pieces(work: Work) -> Iterator[Work]:
    """The same work in parts of at most `_PIECE` numbers, or of one leaf that is not contiguous."""
    slices: list[_Slice] = []
    count = 0
    for i in range(len(work.shadows)):
        for part in _slices(work, i):
            if slices and count + part.shadow.numel() > _PIECE:
                yield _of(work, slices)
                slices, count = [], 0
            slices.append(part)
            count += part.shadow.numel()
    if slices:
        yield _of(work, slices)


def _slices(work: Work, leaf: int) -> Iterator[_Slice]:
    s, p = work.shadows[leaf], work.params[leaf]
    if s.numel() <= _PIECE or not (s.is_contiguous() and p.is_contiguous()):
        yield _Slice(leaf, s, p, None)
        return
    for begin in range(0, s.numel(), _PIECE):
        part = slice(begin, begin + _PIECE)
        yield _Slice(leaf, s.view(-1)[part], p.view(-1)[part], Region(begin, (1,)))


def _of(work: Work, slices: list[_Slice]) -> Work:
    leaves, shadows, params, regions = map(list, zip(*slices, strict=True))
    noise = work.noise and work.noise.part(leaves)._replace(regions=regions)
    return Work(shadows, params, work.part(leaves).weights, work.skip, noise)
