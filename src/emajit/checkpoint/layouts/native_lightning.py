"""`emajit.integrations.lightning`: `emajit` beside a `state_dict` of trained or averaged weights.

Where `state_dict` holds the averages, the trained weights are under `raw` in `emajit`. A single
average is under `shadow`, several are under `shadows` by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit import _names
from emajit.checkpoint.averaged import Layout, Reading, step_of, tensors_of


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


LAYOUT = Layout(read)
