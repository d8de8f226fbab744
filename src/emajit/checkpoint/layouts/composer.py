"""Composer: averages in the state of the algorithm `EMA`, beside the trained weights in `model`.

While `ema_weights_active` the two are swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, completed, tensors_of


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    state = tree.get("state", tree)
    algorithms = dict(state.get("algorithms", {})) if isinstance(state, Mapping) else {}
    if "EMA" not in algorithms:
        return None
    ema, model = algorithms["EMA"], tensors_of(state.get("model", {}))
    aside = {**ema["ema_model"]["named_parameters_dict"]}
    aside |= ema["ema_model"].get("named_buffers_dict", {})
    if ema["ema_weights_active"]:
        return Averaged(model, "Composer", raw=aside)
    return completed(aside, model, "Composer")


LAYOUT = Layout(_read)
