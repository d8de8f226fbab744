"""NeMo: `ema` by position, `current_step` and `decay`, in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, by_position


def _read(tree: Mapping[str, Any], names: Names) -> Averaged | None:
    states = tree.get("optimizer_states", [tree])
    found = [s for s in states if isinstance(s, Mapping) and {"ema", "current_step"} <= s.keys()]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"NeMo: expected one average, found {len(found)} optimizers with one")
    weights = by_position("NeMo", found[0]["ema"], names)
    return Averaged(weights, "NeMo", found[0]["current_step"], found[0].get("decay"))


LAYOUT = Layout(_read)
