"""`{"shadow": shadow, "step": step}`, as `torch.save` writes it, and what `checkpoint.save` writes.

`checkpoint.read` brings a file or folder of `save` and `save_sharded` into this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emajit import _paths
from emajit.checkpoint.averaged import Averaged, Layout, Names, check_unique, step_of


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    if not {"shadow", "step"} <= tree.keys():
        return None
    _check_one(tree["shadow"])
    named = _paths.named_leaves("shadow", tree["shadow"])
    check_unique("emajit", [name for _, name, _ in named])
    return Averaged({name: leaf for _, name, leaf in named}, "emajit", step_of(tree["step"]))


def _check_one(shadow: Any) -> None:
    """Raise ValueError for a list of shadows, as `update_many_` takes it."""
    if not isinstance(shadow, list | tuple) or len(shadow) < 2:
        return
    forms = [
        [(key, v.shape) for key, v in each.items() if isinstance(v, Tensor)]
        if isinstance(each, Mapping)
        else []
        for each in shadow
    ]
    if forms[0] and all(form == forms[0] for form in forms):
        raise ValueError(
            f"emajit: expected one average, found a list of {len(shadow)} of the same names; pass "
            '{"shadow": shadow[i], "step": step}'
        )


LAYOUT = Layout(_read)
