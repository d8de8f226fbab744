"""torch's `AveragedModel`: `n_averaged`, and the averages below `module.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    Writer,
    required,
    step_of,
    tensors_below,
    tensors_of,
)


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    state = tensors_of(tree)
    if "n_averaged" not in state:
        return None
    return Averaged(tensors_below("module.", state), "AveragedModel", step_of(state["n_averaged"]))


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    count = torch.tensor(required("step", "averaged-model", averaged))
    return {"n_averaged": count} | {f"module.{n}": v for n, v in averaged.weights.items()}


LAYOUT = Layout(_read, Writer("averaged-model", _state))
