"""Leaves in host memory, of parameters on a CUDA device, a side stream of which writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

_is_used = False
_streams: dict[torch.device, torch.cuda.Stream] = {}
_hooks: list[Any] = []


class Offloaded(Tensor):
    """A tensor in host memory that a device may still be writing; whatever reads it waits for that.

    So do its views. `plain` is the same memory without that care, and `home` the device of the
    parameters.
    """

    plain: Tensor
    home: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        homes: dict[int, torch.device] = {}

        def waited_for(leaf: Offloaded) -> Tensor:
            if leaf.home in _streams:
                _streams[leaf.home].synchronize()
            homes[leaf.plain.untyped_storage().data_ptr()] = leaf.home
            return leaf.plain

        args, kwargs = pytree.tree_map_only(Offloaded, waited_for, (args, kwargs or {}))
        result = func(*args, **kwargs)

        def careful(value: Any) -> Any:
            if type(value) is Tensor and value.is_cpu:
                home = homes.get(value.untyped_storage().data_ptr())
                return value if home is None else offloaded(value, home)
            return value

        return result if isinstance(result, torch.Size) else pytree.tree_map(careful, result)

    def __copy__(self) -> Tensor:
        return self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = like(self, self.clone())
        return copied


def offloaded(plain: Tensor, home: torch.device) -> Offloaded:
    """The host tensor `plain` as the average of a parameter on the device `home`."""
    global _is_used  # noqa: PLW0603, while there is none, no update looks for one
    _is_used = True
    leaf = plain.as_subclass(Offloaded)
    leaf.plain, leaf.home = plain, home
    return leaf


def is_used() -> bool:
    """Whether there has been an offloaded leaf yet."""
    return _is_used


def are_in(leaves: Iterable[Any]) -> bool:
    """Whether an offloaded one is among the leaves."""
    return _is_used and Offloaded in set(map(type, leaves))


def split(leaf: Any) -> tuple[Any, torch.device]:
    """The memory of a leaf, without waiting, and the device on which its parameter is expected."""
    return (leaf.plain, leaf.home) if type(leaf) is Offloaded else (leaf, leaf.device)


def at_home(leaf: Any) -> Any:
    """A copy of an offloaded leaf on the device of its parameter; others as they are."""
    return leaf.to(leaf.home) if type(leaf) is Offloaded else leaf


def like(leaf: Any, held: Tensor) -> Tensor:
    """`held`, offloaded and page-locked if `leaf` is."""
    if type(leaf) is not Offloaded:
        return held
    return offloaded(held.pin_memory() if leaf.plain.is_pinned() else held, leaf.home)


def refuse(shadows: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    """Raise ValueError for a shadow in host memory of parameters that are elsewhere."""
    if any(s.device != p.device for s, p in zip(shadows, params, strict=True)):
        raise ValueError(
            "shadow: expected one on the device of the parameters, found one in host memory, which "
            "only update_ averages, outside of torch.compile and of FusedOptimizer"
        )


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """That of a device. From the first one on, `torch.optim` waits for them before it steps."""
    if not _hooks:
        _hooks.append(torch.compiler.disable(hold_training))  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(_hooks[0])
    if device not in _streams:
        _streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return _streams[device]


def is_hook(hook: Any) -> bool:
    """Whether it is the one of an optimizer by which it waits."""
    return hook in _hooks


def hold_training(*_: object) -> None:
    """Let what is launched from now on wait, on the device, for what the side streams still read.

    A CUDA graph that is captured does not.
    """
    for device, stream in _streams.items():
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).wait_stream(stream)
