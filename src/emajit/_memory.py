"""Where tensors lie, if anywhere: which are the same view, and which have bytes in common."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether the call is part of somebody's `torch.compile` or of a `torch.func` transform.

    Addresses mean nothing there, and `foreach` operators have no batching rule.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` is on, such as one that counts or records operators.

    Dynamo runs no graph inside of one; it raises after it has run the function as it is.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def identity(tensor: Tensor) -> Hashable:
    """What two leaves have in common if they are one tensor, or the same view of one memory.

    A leaf without memory of its own (empty, fake, inside a `torch.func` transform) is like no
    other. Inside a trace it is the tensor: `data_ptr()` and `id()` would become guards on it.
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
    """Of the names that one tensor has, each but the first, with the first.

    >>> w = torch.ones(1)
    >>> ties({"a": w, "b": torch.ones(1), "c": w.detach()})
    {'c': 'a'}
    """
    first: dict[Hashable, str] = {}
    firsts = {name: first.setdefault(identity(tensor), name) for name, tensor in named.items()}
    return {name: other for name, other in firsts.items() if name != other}


def tied(a: Tensor, b: Tensor) -> bool:
    # A trace sees objects, not memory: what is tied there cannot be told from what is not.
    return a is b or torch.compiler.is_compiling() or identity(a) == identity(b)


def ranges(leaves: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The addresses where each leaf starts and stops."""
    starts = tuple([leaf.data_ptr() for leaf in leaves])
    if all(map(Tensor.is_contiguous, leaves)):
        return starts, tuple([a + leaf.nbytes for a, leaf in zip(starts, leaves, strict=True)])
    return starts, tuple([end(view(leaf)) for leaf in leaves])


@lru_cache(maxsize=64)
def touching(
    starts: tuple[int, ...], stops: tuple[int, ...], shadows: int
) -> list[tuple[int, int]]:
    """The pairs of leaves whose addresses intersect, at least one among the first `shadows`."""
    pairs: list[tuple[int, int]] = []
    reached: list[int] = []
    for i in sorted(range(len(starts)), key=starts.__getitem__):
        if starts[i] == stops[i] or not starts[i]:  # nothing there; a meta tensor
            continue
        reached = [j for j in reached if stops[j] > starts[i]]
        pairs += [(min(i, j), max(i, j)) for j in reached if min(i, j) < shadows]
        reached.append(i)
    return pairs


def overlaps(leaves: Sequence[Tensor], first: int) -> Iterator[tuple[int, int]]:
    """The pairs of leaves that have a byte in common, at least one among the `first` ones."""
    for i, j in touching(*ranges(leaves), first):
        if leaves[i].device == leaves[j].device and share_memory(
            *map(view, (leaves[i], leaves[j]))
        ):
            yield i, j


@lru_cache(maxsize=1024)
def repeats_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices may mean one element: a step does not clear all smaller ones together."""
    reach = 0
    for step, n in sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.itemsize


@lru_cache(maxsize=1024)
def share_memory(a: View, b: View) -> bool:
    """Whether two views have a byte in common: exact, at the cost of a mask over both."""
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
