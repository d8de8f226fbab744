"""EDM2's training state: power-function averages in `emas`, their relative lengths in `stds`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading, tensors_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"stds", "emas"} <= tree.keys():
        return []
    return [
        Reading("EDM2", tensors_of(state), path=f"emas.{i}", sigma_rel=float(std))
        for i, (std, state) in enumerate(zip(tree["stds"], tree["emas"], strict=True))
    ]


LAYOUT = Layout(_read)
