"""Lightning's weight averaging: averages in `state_dict`, trained in `current_model_state`.

"lightning" writes a copy of a checkpoint of Lightning in which `WeightAveraging` and
`EMAWeightAveraging`, and emajit's `EMACallback`, find these averages: in the place of those of
`WeightAveraging`, or of none. The decay is an argument of the callback, which no file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emajit.checkpoint.averaged import Layout, Place, Reading, Writer, step_of, tensors_of
from emajit.checkpoint.patching import Changes


def read(tree: Mapping[str, Any]) -> list[Reading]:
    if "current_model_state" not in tree:
        return []
    step = step_of(tree.get("averaging_state", {}).get("n_averaged"))
    averages, raw = (tensors_of(tree[key]) for key in ("state_dict", "current_model_state"))
    return [Reading("Lightning weight averaging", averages, step, raw=raw, path="state_dict")]


def _place(tree: Mapping[str, Any]) -> Place:
    if not {"state_dict", "pytorch-lightning_version"} <= tree.keys():
        raise ValueError(f"expected a checkpoint of Lightning, found {[*tree][:5]}")
    if "emajit" in tree:
        raise ValueError(
            "expected averages of Lightning's WeightAveraging or none, found those of "
            "EMACallback, which have the layout emajit-lightning"
        )
    state = tree["state_dict"]
    if "current_model_state" in tree:
        count = tree["averaging_state"]["n_averaged"]

        def put(averages: dict[str, Tensor], step: int | None) -> Changes:
            steps = [] if step is None else [(count, torch.tensor(step))]
            return Changes({}, [(state[name], v) for name, v in averages.items()] + steps)

        return Place(tree["current_model_state"], state, put)

    def add(averages: dict[str, Tensor], step: int | None) -> Changes:
        averaged = copy.copy(state)  # also its versions of modules
        averaged.update(averages)
        told = {"n_averaged": torch.tensor(step)}
        both = {"state_dict": averaged, "current_model_state": state}
        return Changes({**both, "averaging_state": told})

    return Place(state, None, add)


LAYOUT = Layout(read, Writer("lightning", None, place=_place))
