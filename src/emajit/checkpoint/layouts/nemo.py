"""NeMo: `ema` by position, `current_step` and `decay`, in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"ema", "current_step"} <= tree.keys():
        return []
    return [Reading("NeMo", tree["ema"], tree["current_step"], tree.get("decay"), path="ema")]


LAYOUT = Layout(_read)
