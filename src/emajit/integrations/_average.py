"""The averages of the callbacks: the options, the state in whole tensors, and a fingerprint."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from emajit import _controls, _devices, _module, _shards, _tree, functional, schedules
from emajit.litema import LitEma


def checked(
    decay: Any, dtype: torch.dtype | None, buffers: _module.Policy, every: int
) -> dict[str, Any]:
    """The options of a `LitEma`; ValueError and TypeError name the one that is unusable."""
    functional.check_decay(decay)
    _tree.check_dtype(dtype)
    _module.check_policy(buffers)
    _controls.check_every(every)
    # A number is the decay of every update, and is counted all the same.
    schedule = decay if callable(decay) else schedules.constant(decay)
    return {"decay": schedule, "dtype": dtype, "buffers": buffers}


def state_of(ema: LitEma) -> dict[str, Any]:
    """What `restore` goes on from, in whole tensors; to be called by all processes."""
    averages = ema.named_averages()
    return {
        "shadow": {name: _shards.whole(average) for name, average in averages.items()},
        "step": int(ema.num_updates),
    }


def restore(ema: LitEma, state: Mapping[str, Any]) -> None:
    """Go on from what `state_of` gave; ValueError, and nothing changed, where it does not fit."""
    shadow, step = state["shadow"], torch.tensor(state["step"], dtype=torch.int32)
    keys = ema._keys_by_name()
    missing, unknown = sorted(keys.keys() - shadow.keys()), sorted(shadow.keys() - keys.keys())
    if missing or unknown:
        raise ValueError(
            f"averages: expected those of the model and of the option buffers, found {missing} "
            f"missing and {unknown} unknown"
        )
    flat = {
        keys[name]: _shards.split_as(ema.get_buffer(keys[name]), value)
        for name, value in shadow.items()
    }
    try:
        ema.load_state_dict({**flat, "decay": ema.decay, "num_updates": step})
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def fingerprint(weights: Iterable[Tensor], dtype: torch.dtype | None = None) -> str:
    """A fingerprint of this process's part of some weights, cast to `dtype` if that is given.

    It tells the weights of one training from another's: a hash of the sums of the bits, as
    integers, in each row and in each column.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    code = 0
    for weight in _shards.local([weight.detach() for weight in weights]):
        if weight.numel():
            if dtype == torch.float64 != _devices.widest(weight.device):
                weight = weight.cpu()  # noqa: PLW2901
            cast = weight.to(dtype) if dtype and weight.is_floating_point() else weight
            plain = cast.resolve_conj().resolve_neg().contiguous()
            rows = plain.view(len(cast) if cast.ndim > 1 else 1, -1)
            rows = rows.view(integers.get(cast.itemsize, torch.int64))
            for dim in (0, 1):
                sums = rows.sum(dim, dtype=torch.int64).tolist()
                code = zlib.crc32(repr(sums).encode(), code)
    return f"{code:08x}"
