"""`{"shadow": shadow, "step": step}` of `torch.save`, and the files of `checkpoint.save`.

`checkpoint.read` brings a file or folder of `save` and `save_sharded` into this form. The shadow
may be a list of several, as `update_many_` takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emajit import _paths
from emajit.checkpoint.averaged import Layout, Reading, check_unique, step_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"shadow", "step"} <= tree.keys():
        return []
    shadow, step = tree["shadow"], step_of(tree["step"])
    if _is_list_of_shadows(shadow):
        several = {f"shadow.{i}": each for i, each in enumerate(shadow)}
    else:
        several = {"shadow": shadow}
    return [Reading("emajit", _named(each), step, path=path) for path, each in several.items()]


def _named(shadow: Any) -> dict[str, Tensor]:
    named = _paths.named_leaves("shadow", shadow)
    check_unique("emajit", [name for _, name, _ in named])
    return {name: leaf for _, name, leaf in named}


def _is_list_of_shadows(shadow: Any) -> bool:
    """Whether a shadow is a list of mappings with the same names and shapes, not of layers."""
    if not isinstance(shadow, list | tuple) or len(shadow) < 2:
        return False
    forms = [
        [(key, v.shape) for key, v in each.items() if isinstance(v, Tensor)]
        if isinstance(each, Mapping)
        else []
        for each in shadow
    ]
    return bool(forms[0]) and all(form == forms[0] for form in forms)


LAYOUT = Layout(_read)
