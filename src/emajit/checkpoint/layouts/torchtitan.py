"""torchtitan: the average of each parameter in `state.NAME.ema_params`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    begin, end = "state.", ".ema_params"
    keys = [key for key in map(str, tree) if key.startswith(begin) and key.endswith(end)]
    if not keys:
        return None
    weights = {key.removeprefix(begin).removesuffix(end): tree[key] for key in keys}
    return Averaged(weights, "torchtitan")


LAYOUT = Layout(_read)
