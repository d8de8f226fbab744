"""What the callbacks have in common: the averages of a module, beside it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _module, _shards, _tree, functional
from emajit.functional import Decay, Schedule
from emajit.litema import LitEma


def checked(
    decay: Any, dtype: torch.dtype | None, buffers: _module.Policy, every: int
) -> dict[str, Any]:
    """The options of an `Average`; ValueError and TypeError name the one that is unusable."""
    functional.check_decay(decay)
    _tree.check_dtype(dtype)
    _module.check_policy(buffers)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every: expected a number of steps, >= 1, found {every!r}")
    return {"decay": decay, "dtype": dtype, "buffers": buffers}


class Average(LitEma):
    """A `LitEma` of any schedule, whose state has the parameters' own names."""

    def __init__(
        self,
        model: nn.Module,
        decay: Decay | Schedule,
        *,
        dtype: torch.dtype | None,
        buffers: _module.Policy,
    ) -> None:
        vars(self)["_schedule"] = decay  # before LitEma chooses keys that nothing has
        super().__init__(model, dtype=dtype, buffers=buffers)

    def _decay_at(self, updates: int | Tensor) -> Any:
        return self._schedule(updates) if callable(self._schedule) else self._schedule

    def state(self) -> dict[str, Any]:
        """What `restore_state` goes on from, in whole tensors; to be called by all processes."""
        averages = self.named_averages()
        return {
            "shadow": {name: _shards.whole(average) for name, average in averages.items()},
            "step": int(self.num_updates),
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; ValueError, and nothing changed, where it does not fit."""
        shadow, step = state["shadow"], torch.tensor(state["step"], dtype=torch.int32)
        keys = self._keys_by_name()
        missing, unknown = sorted(keys.keys() - shadow.keys()), sorted(shadow.keys() - keys.keys())
        if missing or unknown:
            raise ValueError(
                f"averages: expected those of the model and of the option buffers, found {missing} "
                f"missing and {unknown} unknown"
            )
        flat = {
            keys[name]: _shards.split_as(self.get_buffer(keys[name]), value)
            for name, value in shadow.items()
        }
        try:
            self.load_state_dict({**flat, "decay": self.decay, "num_updates": step})
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def fingerprint(weights: Iterable[Tensor], dtype: torch.dtype | None = None) -> str:
    """Of what this process has of some weights, or of them in a dtype.

    It tells the weights of one training from another's, by the sums of the bits, as integers, in
    each row and in each column.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    code = 0
    for weight in _shards.local([weight.detach() for weight in weights]):
        if weight.numel():
            cast = weight.to(dtype) if dtype and weight.is_floating_point() else weight
            plain = cast.resolve_conj().resolve_neg().contiguous()
            rows = plain.view(len(cast) if cast.ndim > 1 else 1, -1)
            rows = rows.view(integers.get(cast.itemsize, torch.int64))
            for dim in (0, 1):
                sums = rows.sum(dim, dtype=torch.int64).tolist()
                code = zlib.crc32(repr(sums).encode(), code)
    return f"{code:08x}"
