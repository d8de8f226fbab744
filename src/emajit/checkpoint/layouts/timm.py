"""A checkpoint of timm's training script: `state_dict_ema` beside the trained `state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    State,
    Writer,
    tensors_below,
    tensors_of,
)


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    if "state_dict_ema" not in tree:
        return None
    raw = _unwrapped(tensors_of(tree.get("state_dict", {})))
    return Averaged(_unwrapped(tensors_of(tree["state_dict_ema"])), "timm", raw=raw)


def _unwrapped(state: State) -> dict[str, Tensor]:
    """`state` without the prefix `module.`, if all of its names have it."""
    is_wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return tensors_below("module.", state) if is_wrapped else dict(state)


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    return {"state_dict": dict(averaged.raw), "state_dict_ema": dict(averaged.weights)}


LAYOUT = Layout(_read, Writer("timm", _state))
