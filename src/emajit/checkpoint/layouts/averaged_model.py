"""torch's `AveragedModel`: `n_averaged`, and the averages below `module.`."""

from __future__ import annotations

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
    for prefix in prefixes(state, "n_averaged"):
        averages = _names.below(f"{prefix}module.", state)
        if averages:  # else it is only the count, as Lightning keeps it
            step = step_of(state[f"{prefix}n_averaged"])
            found.append(Reading("AveragedModel", averages, step, path=f"{prefix}module"))
    return found


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    count = torch.tensor(required("step", "averaged-model", averaged))
    return {"n_averaged": count} | {f"module.{n}": v for n, v in averaged.weights.items()}


LAYOUT = Layout(_read, Writer("averaged-model", _state))
