"""MMCV 1: an average of each parameter in a buffer of the model, `ema_` and the name with `_`.

Its hook swaps parameters and averages around an evaluation. A checkpoint that is saved in between
(YOLOX, whose hook runs before the saving hook) has the averages under the parameters' own names:
read it with `key` and `raw_key`. "mmcv" leaves averages of buffers out, as the hook does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    Reading,
    Writer,
    of_parameters,
    required_raw,
    tensors_of,
)


def _key(name: str) -> str:
    return "ema_" + name.replace(".", "_")


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    state = tensors_of(tree)
    held = {name for name in state if name.startswith("ema_")}
    names = [name for name in state if _key(name) in held and name not in held]
    if not held or {_key(name) for name in names} != held or len(names) > len(held):
        return []
    raw = {name: value for name, value in state.items() if name not in held}
    return [Reading("MMCV", {name: state[_key(name)] for name in names}, raw=raw)]


def _state(averaged: Averaged, names: Names) -> dict[str, Any]:
    averages = of_parameters(averaged, names)
    held = {_key(name): value for name, value in averages.items()}
    if len(held) < len(averages):
        raise ValueError("mmcv: expected names that stay apart with _ for their dots, found two")
    return {**required_raw("mmcv", averaged, averages), **held}


LAYOUT = Layout(_read, Writer("mmcv", _state, torch_key="state_dict"))
