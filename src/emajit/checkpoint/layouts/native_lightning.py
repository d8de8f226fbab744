"""`emajit.integrations.lightning`: `emajit` beside a `state_dict` of trained or averaged weights.

Where `state_dict` holds the averages, the trained weights are under `raw` in `emajit`.
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
    partners = _names.match(raw, ours["shadow"])
    averages = {partners.get(name, name): v for name, v in tensors_of(ours["shadow"]).items()}
    step = step_of(ours["step"])
    return [Reading("emajit in Lightning", averages, step, raw=raw, path="emajit.shadow")]


LAYOUT = Layout(read)
