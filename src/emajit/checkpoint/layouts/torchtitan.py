"""torchtitan: the average of each parameter in `state.NAME.ema_params`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    begin, end = "state.", ".ema_params"
    keys = [key for key in map(str, tree) if key.startswith(begin) and key.endswith(end)]
    averages = {key.removeprefix(begin).removesuffix(end): tree[key] for key in keys}
    return [Reading("torchtitan", averages)] if averages else []


LAYOUT = Layout(_read)
