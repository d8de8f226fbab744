"""ema-pytorch's `EMA` and `KarrasEMA`: `initted`, `step`, and the averages below `ema_model.`.

The trained weights may be below `online_model.`. "ema-pytorch" writes the state of an `EMA`, which
copies the model again until `step` exceeds its `update_after_step`. `step` counts all calls, but by
default only each tenth averages (`update_every`, which no file holds).

`PostHocEMA` has several averages below `ema_models.`, in the order of its `sigma_rels`, which no
file holds; it also writes files `INDEX.STEP.pt`. With `update_every=1` their profile is that of
`emajit.posthoc`, so that `posthoc.save` makes snapshots of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from emajit import _names
from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    Reading,
    Writer,
    prefixes,
    required,
    step_of,
    tensors_of,
)


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    state = tensors_of(tree)
    found = []
    places = sorted(prefixes(state, "initted", "step"), key=_numbers)
    for prefix in places:
        averages = _names.below(f"{prefix}ema_model.", state)
        if not averages:
            raise ValueError(f"ema-pytorch: expected averages below {prefix}ema_model, found none")
        step = state[f"{prefix}step"]
        # A float16 step is rounded, and infinite from 65520 on.
        taken = None if step.is_floating_point() else step_of(step)
        raw = _names.below(f"{prefix}online_model.", state) or None
        layout = "ema-pytorch"
        if number := re.search(r"(?:^|\.)ema_models\.(\d+)\.$", prefix):
            layout += f" PostHocEMA, length {number[1]} in the order of its sigma_rels"
        found.append(Reading(layout, averages, taken, raw=raw, path=f"{prefix}ema_model"))
    return found


def _numbers(prefix: str) -> list[int]:
    """The numbers in a prefix: safetensors puts 10 before 2."""
    return [int(number) for number in re.findall(r"\d+", prefix)]


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    step = torch.tensor(required("step", "ema-pytorch", averaged))
    online = {f"online_model.{name}": value for name, value in averaged.raw.items()}
    average = {f"ema_model.{name}": value for name, value in averaged.weights.items()}
    return {"initted": torch.tensor(True), "step": step, **online, **average}


LAYOUT = Layout(_read, Writer("ema-pytorch", _state))
