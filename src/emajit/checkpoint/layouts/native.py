"""`{"shadow": shadow, "step": step}`, as `torch.save` writes it, and what `checkpoint.save` writes.

`checkpoint.read` brings a file or folder of `save` and `save_sharded` into this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit import _paths
from emajit.checkpoint.averaged import Layout, Reading, check_unique, step_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"shadow", "step"} <= tree.keys():
        return []
    named = _paths.named_leaves("shadow", tree["shadow"])
    check_unique("emajit", [name for _, name, _ in named])
    averages = {name: leaf for _, name, leaf in named}
    return [Reading("emajit", averages, step_of(tree["step"]), path="shadow")]


LAYOUT = Layout(_read)
