"""A checkpoint of timm's training script: `state_dict_ema` beside the trained `state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, Reading, Writer, tensors_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not tree.get("state_dict_ema"):
        return []
    return [Reading("timm", tensors_of(tree["state_dict_ema"]), path="state_dict_ema")]


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    return {"state_dict": dict(averaged.raw), "state_dict_ema": dict(averaged.weights)}


LAYOUT = Layout(_read, Writer("timm", _state))
