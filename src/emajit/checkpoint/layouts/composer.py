"""Composer: averages in the state of the algorithm `EMA`, beside the trained weights in `model`.

While `ema_weights_active` the two are swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading, tensors_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    algorithms = dict(tree["algorithms"]) if "algorithms" in tree else {}
    if "EMA" not in algorithms:
        return []
    ema, model = algorithms["EMA"], tensors_of(tree.get("model", {}))
    aside = {**ema["ema_model"]["named_parameters_dict"]}
    aside |= ema["ema_model"].get("named_buffers_dict", {})
    averages, raw = (model, aside) if ema["ema_weights_active"] else (aside, model)
    return [Reading("Composer", averages, raw=raw)]


LAYOUT = Layout(_read)
