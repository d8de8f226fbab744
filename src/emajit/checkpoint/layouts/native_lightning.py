"""`emajit.integrations.lightning`: `emajit` beside a `state_dict` of trained or averaged weights.

Where `state_dict` holds the averages, the trained weights are under `raw` in `emajit`. A single
average is under `shadow`, several are under `shadows` by name.

"emajit-lightning" writes a copy of a checkpoint of Lightning in which `EMACallback` finds these
averages: in the place of its single average, or of none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emajit import _names
from emajit.checkpoint.averaged import Layout, Place, Reading, Writer, step_of, tensors_of
from emajit.checkpoint.patching import Changes


def read(tree: Mapping[str, Any]) -> list[Reading]:
    if "emajit" not in tree:
        return []
    ours = tree["emajit"]
    raw = tensors_of(tree["state_dict"]) | tensors_of(ours.get("raw", {}))
    step = step_of(ours["step"])
    shadows = {"emajit.shadow": ours["shadow"]} if "shadow" in ours else {}
    shadows |= {
        f"emajit.shadows.{name}": shadow for name, shadow in ours.get("shadows", {}).items()
    }
    readings = []
    for path, shadow in shadows.items():
        partners = _names.match(raw, shadow)
        averages = {partners.get(name, name): v for name, v in tensors_of(shadow).items()}
        readings.append(Reading("emajit in Lightning", averages, step, raw=raw, path=path))
    return readings


def _place(tree: Mapping[str, Any]) -> Place:
    if not {"state_dict", "pytorch-lightning_version"} <= tree.keys():
        raise ValueError(f"expected a checkpoint of Lightning, found {[*tree][:5]}")
    if "current_model_state" in tree:
        raise ValueError(
            "expected averages of EMACallback or none, found those of Lightning's "
            "WeightAveraging; write the layout lightning, with which EMACallback resumes too"
        )
    state = tree["state_dict"]
    if "emajit" not in tree:
        at = tree["global_step"]

        def add(averages: dict[str, Tensor], step: int | None) -> Changes:
            bare = _names.canonical_of(averages)
            # The callback averages a tied parameter under its first name.
            first = {state[name]: name for name in reversed([*averages])}
            shadow = {bare[n]: v for n, v in averages.items() if first[state[n]] == n}
            return Changes({"emajit": {"shadow": shadow, "step": step, "averaged_at": at}})

        return Place(state, None, add)
    ours = tree["emajit"]
    shadows = [*ours.get("shadows", {}).values(), *([ours["shadow"]] if "shadow" in ours else [])]
    if len(shadows) != 1:
        raise ValueError(
            f"expected one average, found {len(shadows)}, which share their number of updates"
        )
    partners = _names.match(state, shadows[0])
    held = {partners.get(name, name): value for name, value in shadows[0].items()}
    trained = ours.get("raw") or {}  # then `state_dict` has the averages too, under all their names
    saved = {name: state[name] for name in trained if name in state}

    def put(averages: dict[str, Tensor], step: int | None) -> Changes:
        numbers = [(held[name], value) for name, value in averages.items() if name in held]
        numbers += [(saved[name], value) for name, value in averages.items() if name in saved]
        return Changes({"emajit": {**ours, **({} if step is None else {"step": step})}}, numbers)

    return Place({**state, **trained}, {**saved, **held}, put)


LAYOUT = Layout(read, Writer("emajit-lightning", None, place=_place))
