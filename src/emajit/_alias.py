"""Aliases: tensors that are the same view of one memory, and tensors that overlap."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


def identity(tensor: Tensor) -> Hashable:
    """A key that is equal for one tensor, and for the same view of one memory.

    A tensor without an address (empty, fake, inside a `torch.func` transform) has its `id` as
    key. Inside a trace the key is the tensor: `data_ptr()` and `id()` would become guards.
    """
    if torch.compiler.is_compiling():
        return tensor
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0
    if not address:
        return id(tensor)
    bits = tensor.is_conj(), tensor.is_neg()
    return address, tensor.shape, tensor.stride(), tensor.dtype, bits


def ties(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each further name of a tied tensor to its first name.

    >>> w = torch.ones(1)
    >>> ties({"a": w, "b": torch.ones(1), "c": w.detach()})
    {'c': 'a'}
    """
    first: dict[Hashable, str] = {}
    firsts = {name: first.setdefault(identity(tensor), name) for name, tensor in named.items()}
    return {name: other for name, other in firsts.items() if name != other}


def tied(a: Tensor, b: Tensor) -> bool:
    # A trace sees objects, not memory: two views of one memory look like any two tensors.
    return a is b or torch.compiler.is_compiling() or identity(a) == identity(b)


def touching(starts: Sequence[int], stops: Sequence[int], first: int) -> list[tuple[int, int]]:
    """The pairs of ranges that intersect, at least one index of each pair below `first`."""
    pairs: list[tuple[int, int]] = []
    reached: list[int] = []
    for i in sorted(range(len(starts)), key=starts.__getitem__):
        if starts[i] == stops[i] or not starts[i]:  # empty; a meta tensor
            continue
        reached = [j for j in reached if stops[j] > starts[i]]
        pairs += [(min(i, j), max(i, j)) for j in reached if min(i, j) < first]
        reached.append(i)
    return pairs


def overlaps(tensors: Sequence[Tensor], first: int) -> Iterator[tuple[int, int]]:
    """The pairs of tensors that share a byte, at least one index of each pair below `first`."""
    starts = [tensor.data_ptr() for tensor in tensors]
    stops = [
        start + tensor.nbytes if tensor.is_contiguous() else end(view(tensor))
        for start, tensor in zip(starts, tensors, strict=True)
    ]
    for i, j in touching(starts, stops, first):
        if tensors[i].device == tensors[j].device and share_memory(
            *map(view, (tensors[i], tensors[j]))
        ):
            yield i, j


def repeats_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices may be one element: a stride is within the reach of the smaller ones."""
    reach = 0
    for step, n in sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


def can_be_written(tensor: Tensor) -> bool:
    """Whether a tensor is dense and no two elements share memory."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or not repeats_itself(tensor.shape, tensor.stride())


View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.itemsize


def share_memory(a: View, b: View) -> bool:
    """Whether two views share a byte: exact, at the cost of a mask over both."""
    start = min(a[0], b[0])
    mask = torch.zeros(max(map(end, (a, b))) - start, dtype=torch.bool, device="cpu")

    def seen(view: View) -> Tensor:
        address, shape, strides, itemsize = view
        steps = [step * itemsize for step in strides]
        return mask.as_strided((*shape, itemsize), (*steps, 1), address - start)

    seen(a).fill_(True)
    return bool(seen(b).any())


def end(view: View) -> int:
    """The address behind the last byte of a view."""
    address, shape, strides, itemsize = view
    if 0 in shape:
        return address
    last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return address + (last + 1) * itemsize
