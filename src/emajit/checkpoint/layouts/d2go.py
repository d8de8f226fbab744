"""d2go: the averages by name in `ema_state`, beside the trained weights in `model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, completed, tensors_of


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    if "ema_state" not in tree:
        return None
    averages = tensors_of(tree["ema_state"])
    return completed(averages, tensors_of(tree.get("model", {})), "d2go")


LAYOUT = Layout(_read)
