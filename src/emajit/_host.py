"""Leaves in host memory, of parameters on a CUDA device whose stream still writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

_is_used = False


class Offloaded(Tensor):
    """A tensor in host memory, written by the `Lane` of a device; whatever reads it waits for that.

    `plain` is the same memory without that care, and `home` the device of the parameters.
    """

    plain: Tensor
    home: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Offloaded, _waited_for, (args, kwargs or {}))
        return func(*args, **kwargs)


def _waited_for(leaf: Offloaded) -> Tensor:
    lane_of(leaf.home).hold_host()
    return leaf.plain


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


def refuse(shadows: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    """Raise ValueError for a shadow in host memory of parameters that are elsewhere."""
    if any(s.device != p.device for s, p in zip(shadows, params, strict=True)):
        raise ValueError(
            "shadow: expected one on the device of the parameters, found one in host memory, which "
            "only update_ averages, outside of torch.compile and of FusedOptimizer"
        )


def plain(leaf: Any) -> Any:
    """The memory of an offloaded leaf, without waiting; others as they are."""
    return leaf.plain if type(leaf) is Offloaded else leaf


def home(leaf: Any) -> torch.device:
    """The device on which the parameter of a leaf is expected."""
    device: torch.device = leaf.home if type(leaf) is Offloaded else leaf.device
    return device


def at_home(leaf: Any) -> Any:
    """A copy of an offloaded leaf on the device of its parameter; others as they are."""
    return leaf.to(leaf.home) if type(leaf) is Offloaded else leaf


def like(leaf: Any, held: Tensor) -> Tensor:
    """`held`, offloaded and page-locked if `leaf` is."""
    if type(leaf) is not Offloaded:
        return held
    return offloaded(held.pin_memory() if leaf.plain.is_pinned() else held, leaf.home)


class Lane:
    """A stream of a device beside the one that trains, and when it has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def running(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """What is launched inside runs here, after what the training has launched so far.

        The `inputs` are kept from being freed before. The training must not write them before: see
        `hold_training`.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._done = self._stream.record_event()
        for tensor in inputs:
            tensor.record_stream(self._stream)

    def hold_training(self) -> None:
        """Let what the training launches from now on wait on the device; the host goes on."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def hold_host(self) -> None:
        if self._done is not None:
            self._done.synchronize()


_lanes: dict[torch.device, Lane] = {}


def lane_of(device: torch.device) -> Lane:
    """The lane of a device. From the first one on, optimizers wait for it before they step."""
    if device not in _lanes:
        _lanes[device] = Lane(device)
        _hold_optimizers()
    return _lanes[device]


@lru_cache
def _hold_optimizers() -> None:
    register_optimizer_step_pre_hook(_hold_optimizer)


def _hold_optimizer(*_: object) -> None:
    for lane in _lanes.values():
        lane.hold_training()
