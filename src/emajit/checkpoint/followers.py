"""Modules in a state that average another one in it, as their names say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from emajit import _names
from emajit.checkpoint import marks
from emajit.checkpoint.averaged import MOST


class Follower(NamedTuple):
    """A module in a state that averages another module: both names, and their tensors."""

    module: str
    partner: str
    averages: dict[str, Tensor]
    raw: dict[str, Tensor]


def followers(state: Mapping[str, Tensor]) -> list[Follower]:
    """The modules that average another module of the same shapes, as their names say.

    The pairs must be more than half of the state, else they are layers of a model; or there is only
    one follower, a top-level module named "ema", beside which there may be frozen networks.

    >>> import torch
    >>> names = "net.w", "net_ema.w", "target_table.w", "source_table.w"
    >>> [each[:2] for each in followers({name: torch.ones(2) for name in names})]
    [('net_ema', 'net')]
    """
    bare = _names.canonical_of(state)
    held = {short: state[name] for name, short in bare.items()}
    marked: dict[str, dict[str, Tensor]] = {}
    for name, short in bare.items():
        keys = name.split(".")
        for i, key in enumerate(keys[:-1]):
            if marks.trained_names(key) or "ema" in marks.words(key):
                module = ".".join(keys[: i + 1])
                rest = short.removeprefix(_names.canonical(f"{module}."))
                if rest not in marks.CONTROLS or state[name].ndim:
                    marked.setdefault(module, {})[rest] = state[name]
    found: list[Follower] = []
    for module, averages in marked.items():
        if any(module.startswith(f"{each.module}.") for each in found):
            continue
        own = _names.canonical(f"{module}.")
        partner = _followed(own, averages, held)
        if partner is not None:
            others = {name: v for name, v in held.items() if not name.startswith(own)}
            raw = _names.below(partner, others)
            found.append(Follower(module, partner.rstrip("."), averages, raw))
        if len(found) > MOST:
            return []
    paired = sum(len(each.averages) + len(each.raw) for each in found)
    names = [_names.canonical(f"{each.module}.").rstrip(".") for each in found]
    is_ema = len(names) == 1 and "ema" in marks.words(names[0]) and "." not in names[0]
    return found if is_ema or 2 * paired > len(state) else []


def _followed(
    module: str, averages: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> str | None:
    """The prefix of the module that `module` averages, found by name or, for an "ema", beside it.

    "" is the whole state; None means that there is none.
    """
    above, dot, own = module.rstrip(".").rpartition(".")
    above += dot
    named = [f"{above}{other}." for other in marks.trained_names(own)]
    if fitting := [each for each in named if _fits(averages, each, held)]:
        return fitting[0]
    network = [name for name in averages if "." in name]  # else it is a layer
    if "ema" not in marks.words(own) or not network:
        return None
    end = f".{network[0]}"
    beside = [name.removesuffix(end[1:]) for name in held if f".{name}".endswith(end)]
    fitting = [
        each
        for each in beside[:MOST]
        if each.startswith(above)
        and each.removeprefix(above).count(".") < 2
        and "ema" not in marks.words(each.removeprefix(above))
        and _fits(averages, each, held)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _fits(averages: Mapping[str, Tensor], module: str, held: Mapping[str, Tensor]) -> bool:
    partners = (held.get(module + name) for name in averages)
    return all(
        partner is not None and partner.shape == value.shape
        for partner, value in zip(partners, averages.values(), strict=True)
    )
