"""The decay and the number of updates of a `LitEma`: buffers, and their values on the host."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _devices, _shards, _torch, schedules
from emajit.functional import Decay, Schedule


@lru_cache
def decimal(held: float) -> float:
    """The number with 7 decimals that rounds to this float32 if one does, else the float32.

    >>> decimal(0.9998999834060669)
    0.9999
    """
    short = round(held, 7)
    return short if float32(short) == held else held


def float32(number: float) -> float:
    """The number rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def check_first(updates: Any) -> None:
    """Raise ValueError unless `updates` is a number of updates."""
    if not isinstance(updates, int) or isinstance(updates, bool) or not 0 <= updates < 2**31:
        raise ValueError(f"init_num_updates: expected a number of updates, found {updates!r}")


def check_steps(name: str, steps: Any) -> None:
    """Raise ValueError unless `steps` is a number of steps."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{name}: expected a number of steps, >= 1, found {steps!r}")


class HostNumber:
    """The number in a 0-d buffer, read back from a device only after somebody else has written it.

    The host's number is valid while the buffer is the same tensor at the same version as at the
    last read or write. A write through `.data` changes no version: on a device it goes unnoticed.
    Host memory is read each time.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int] | None = None
        self._number: Any = None

    def wrote(self, buffer: Tensor, number: float | None) -> None:
        """Remember the number written to the buffer; None if only the device knows it."""
        if not is_on_host(buffer):
            self._seen = None if buffer.is_inference() else (buffer, buffer._version)
            self._number = number

    def read(self, buffer: Tensor) -> Any:
        """The number, or None if only the device knows."""
        if is_on_host(buffer):
            return buffer.item()
        seen = self._seen
        if seen is None or seen[0] is not buffer or seen[1] != buffer._version:
            self.wrote(buffer, buffer.item())
        return self._number

    def moved(self, old: Tensor, new: Tensor) -> None:
        """Carry the number over from `old` to its copy `new`, without a read from the device."""
        if old.is_meta or new.is_meta:
            return
        if is_on_host(old):
            self.wrote(new, old.item())
        elif self._seen is not None and self._seen[0] is old and self._seen[1] == old._version:
            self.wrote(new, self._number)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostNumber:
        """A fresh one: the copied buffer has another version, and is read."""
        return HostNumber()

    def __reduce__(self) -> Any:
        return HostNumber, ()


def last_of(averages: dict[str, Tensor], updates: int | Tensor) -> tuple[Tensor, int] | None:
    """The last average, of a DTensor the shard, and its version, to tell later if it was written.

    None where the host does not know the number of updates, as in a trace.
    """
    if isinstance(updates, Tensor) or not averages:
        return None
    (last,) = _shards.local([next(reversed(averages.values()))])
    return None if last.is_inference() else (last, last._version)


def is_on_host(buffer: Tensor) -> bool:
    return buffer.is_cpu


_warmup = lru_cache(schedules.warmup)


class _Known:
    """A schedule with a given float32 alpha."""

    def __init__(self, alpha: Tensor) -> None:
        self._alpha = alpha

    def __call__(self, step: Any) -> Tensor:  # noqa: ARG002
        return 1 - self._alpha

    def alpha(self, step: Any) -> Tensor:  # noqa: ARG002
        return self._alpha


class Controls(nn.Module):
    """The buffers `decay` (float32, 0-d) and `num_updates` (int32, 0-d; -1 without warm-up)."""

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self, decay: float | Schedule, *, first_update: int, must_count: bool, every: int
    ) -> None:
        super().__init__()
        self.schedule: Schedule | None = decay if callable(decay) else None
        first = float(decay(0) if callable(decay) else decay)
        self._written_decay = first, float32(first)
        self._first_update = first_update
        # Whether the number of updates is needed, also after a load of a state without it.
        self._must_count = must_count or callable(decay)
        self.every, self._calls = every, 0
        self._host_decay, self._host_updates = HostNumber(), HostNumber()
        self.register_buffer("decay", torch.tensor(first, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(self._first_update, dtype=torch.int32))

    # The decay is the Python number from the constructor as long as the buffer holds its float32.
    # Any other float32, from a file, stands for the number with 7 decimals that rounds to it, if
    # there is one: 1 minus the float32 of 0.9999 exceeds 1e-4 by a relative 1.7e-4.

    def _decay_at(self, updates: int | Tensor) -> Decay | Schedule:
        """The decay or schedule of the next update, as a Python number if `updates` is a number.

        Python numbers take a tenth of the time of a dozen 0-d tensor operators.
        """
        if self.schedule is not None:
            return self.schedule
        if isinstance(updates, Tensor):
            on_device: Decay | Schedule = self._decay_on_device()
            return on_device
        held = self._host_decay.read(self._buffers["decay"])  # type: ignore[arg-type]
        written, as_held = self._written_decay
        decay = written if held == as_held else decimal(held)
        return decay if updates < 0 else float(_warmup(decay)(updates))

    def _decay_on_device(self) -> Any:
        """In tensors that are never read back."""
        written, as_held = self._written_decay
        if _devices.is_narrow(self.decay.device):
            alpha = torch.round((1 - self.decay) * 1e7) / 1e7
            alpha = torch.where(1 - alpha == self.decay, alpha, 1 - self.decay)
            alpha = torch.where(self.decay == as_held, 1 - written, alpha)
            warm = torch.maximum(alpha, 9 / (11 + self.num_updates))
            return _Known(torch.where(self.num_updates < 0, alpha, warm))
        held = self.decay.to(torch.float64)
        short = torch.round(held, decimals=7)
        decay = torch.where(short.to(torch.float32) == self.decay, short, held)
        decay = torch.where(self.decay == as_held, written, decay)
        warm = torch.as_tensor(schedules.warmup(decay)(self.num_updates))
        return torch.where(self.num_updates < 0, decay, warm)

    def _updates(self, device: torch.device) -> int | Tensor:
        """The number of updates, as an int where the host knows it or may read it."""
        buffer: Tensor = self._buffers["num_updates"]  # type: ignore[assignment]
        if torch.compiler.is_compiling() or buffer.is_meta:
            return buffer
        if device.type == "cpu" or not _torch.is_capturing(device):
            updates: int | None = self._host_updates.read(buffer)
            return buffer if updates is None else updates
        if not is_on_host(buffer):
            return buffer
        if buffer.item() >= 0:
            raise RuntimeError(
                "num_updates is on the CPU during CUDA graph capture, so replays would repeat this "
                "warm-up step; move the LitEma to the GPU first"
            )
        return -1

    def _count(self, updates: int | Tensor, unless: Tensor | None) -> None:
        """Count an update unless the flag `unless`, a tensor on a device, says it was skipped."""
        if unless is not None:  # only the device knows the flag, so it counts the updates
            self.decay, self.num_updates = (
                control.to(unless.device) for control in (self.decay, self.num_updates)
            )
            self.num_updates.add_((self.num_updates >= 0) & ~unless)
            self._host_updates.wrote(self.num_updates, None)
        elif isinstance(updates, Tensor):
            updates.add_(updates >= 0)
            if not torch.compiler.is_compiling():
                self._host_updates.wrote(updates, None)
        elif updates >= 0:
            # `add_` takes three times as long, and an attribute of a module as long as `fill_`.
            buffer: Tensor = self._buffers["num_updates"]  # type: ignore[assignment]
            buffer.fill_(updates + 1)
            self._host_updates.wrote(buffer, updates + 1)

    def _count_if_written(self, last: tuple[Tensor, int] | None, updates: int | Tensor) -> None:
        """Count an update that was interrupted after it wrote the last average."""
        if last is not None and last[0]._version != last[1]:
            self._count(updates, None)

    def _is_due(self, device: torch.device) -> bool:
        """Count a call, and return whether it updates."""
        if torch.compiler.is_compiling() or _torch.is_capturing(device):
            raise RuntimeError(
                f"every: expected 1 in a compiled or captured step, found {self.every}; call the "
                f"LitEma at every {self.every}th step only"
            )
        self._calls += 1
        return self._calls % self.every == 0

    def reset_num_updates(self) -> None:
        """Start the warm-up again; without warm-up there is nothing to reset."""
        self.num_updates.clamp_(max=0)
