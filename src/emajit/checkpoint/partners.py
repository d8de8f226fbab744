"""Name averages by the trained weights beside them.

A partner of an average is a part of the file with the same names and shapes, without the prefixes
of wrappers and of the modules around it. Averages without names fit if their shapes match the
parameters' shapes in order, in exactly one way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from emajit import _alias, _names, _paths
from emajit.checkpoint.averaged import (
    BUFFERS,
    MOST,
    NO_NAMES,
    Averaged,
    Names,
    State,
    by_position,
    completed,
)
from emajit.checkpoint.files import Unordered
from emajit.checkpoint.layouts.litema import names_from, renamed, unflattened
from emajit.checkpoint.marks import role, trained_names
from emajit.checkpoint.search import Found, Part


class Partner(NamedTuple):
    """Trained weights under their final names, and averages of some of them."""

    path: str
    raw: dict[str, Tensor]
    averages: dict[str, Tensor]

    def misfits(self) -> list[str]:
        """The names of averages of another shape than the trained weights."""
        raw = self.raw
        return [name for name, v in self.averages.items() if _shape(v) != raw[name].shape]


def named(found: Found, others: Sequence[Part], names: Names, *, alone: bool = False) -> Averaged:
    """An average, under the names of the trained weights, which are in one of `others`.

    `names`, if given, name an average without names. With `alone` an average needs no partner.
    Raises ValueError where it fits more than one of the others, or none.
    """
    reading = found.reading
    averages: Any = reading.averages
    rest = (reading.layout, reading.step, reading.decay)
    if reading.raw is not None:
        if reading.flat:
            averages = renamed(averages, names_from(averages, reading.raw)[1])
        return _described(completed(dict(averages), reading.raw, *rest), found)
    is_named = isinstance(averages, Mapping) and not reading.flat
    if names.parameters is not None and not is_named:
        if reading.flat:
            full = [*names.parameters, *names.buffers]
            averages = renamed(averages, unflattened(averages, {name: name for name in full}))
        else:
            averages = by_position(reading.layout, averages, names)
        is_named = alone = True
    fit = _by_name if is_named else _by_flat_name if reading.flat else _by_position
    fitting = [each for part in others for each in fit(averages, part)]
    if not fitting and is_named and [*averages] == [*map(str, range(len(averages)))]:
        fitting = [each for part in others for each in _by_position([*averages.values()], part)]
    partner = _one(found, fitting, alone=alone)
    if partner is not None:
        done = completed(partner.averages, partner.raw, *rest)
        return _described(done, found, partner.path)
    if not is_named:
        reason = "which its keys do not tell" if reading.flat else "since its averages have none"
        raise ValueError(f"{reading.layout}: expected names, {reason}, {NO_NAMES}")
    if not alone and any(value.ndim for part in others for value in part.values()):
        raise ValueError(
            f"{found.path}: expected trained weights of the same names beside it, found others; "
            f"read it without them with key={found.path}, on the command line --key {found.path}"
        )
    return _described(Averaged(dict(averages), *rest), found)


def _described(averaged: Averaged, found: Found, raw_path: str = "") -> Averaged:
    """The averages with their paths in the file, and without the prefixes of wrappers."""
    bare = _names.unwrapped({**averaged.raw, **averaged.weights})
    return averaged._replace(
        weights={bare[name]: v for name, v in averaged.weights.items()},
        raw={bare[name]: v for name, v in averaged.raw.items()},
        raw_only=tuple(bare[name] for name in averaged.raw_only),
        path=found.path,
        raw_path=raw_path,
        why=found.why,
        sigma_rel=found.reading.sigma_rel,
        options=found.reading.options,
    )


def _one(found: Found, partners: Sequence[Partner], *, alone: bool) -> Partner | None:
    """The partner that fits, or None; ValueError if several fit, or if only shapes differ."""
    fitting = [partner for partner in partners if not partner.misfits()]
    own = _called(partners, found)
    if own and all(partner.misfits() for partner in own):  # others fit by chance
        fitting = []
    if partners and not fitting:
        if alone:
            return None
        partner = next(each for each in [*own, *partners] if each.misfits())
        name = partner.misfits()[0]
        expected, shape = (tuple(part[name].shape) for part in partner[1:])
        raise ValueError(f"{name!r}: expected an average of shape {expected}, found {shape}")
    distinct: dict[frozenset[int], Partner] = {}
    for partner in fitting:
        key = frozenset(id(partner.raw[name]) for name in partner.averages)
        if key not in distinct or len(partner.path) > len(distinct[key].path):
            distinct[key] = partner
    several = [*distinct.values()]
    if len(several) > 1:
        called = _called(several, found)
        several = called if len(called) == 1 else several
    if len(several) > 1:
        paths = [repr(partner.path) for partner in several]
        places = " and ".join(paths) if len(paths) < 5 else _paths.some(paths)
        raise ValueError(
            f"{found.path}: expected trained weights in one place, found them at {places}; choose "
            "with raw_key=PATH, on the command line --raw-key PATH"
        )
    return several[0] if several else None


def _called(several: Sequence[Partner], found: Found) -> list[Partner]:
    """The partners named like the average without its mark: "g" for "g_ema" and "ema.g"."""
    keys = found.path.split(".")
    names = [".".join([*keys[:i], n, ""]) for i, key in enumerate(keys) for n in trained_names(key)]
    called = [p for p in several if f"{p.path}.".startswith(tuple(names))]
    marked = [i for i, key in enumerate(keys) if role([key])[0] == "averaged"]
    above = {partner.path.rpartition(".")[0] for partner in several}
    if called or not marked or len(above) > 1:
        return called
    end = ".".join(["", *keys[marked[-1] + 1 :]])
    return [partner for partner in several if end and f".{partner.path}".endswith(end)]


def _by_name(averages: State, part: Part) -> list[Partner]:
    if not isinstance(part.tensors, dict) or len(part.tensors) < len(averages):
        return []
    raw, own = (_names.unwrap(tensors) for tensors in (part.tensors, averages))
    while True:
        longest = max(own, key=len)
        prefixes = [
            name.removesuffix(longest) for name in raw if f".{name}".endswith(f".{longest}")
        ]
        named = [each for each in prefixes if all(each + name in raw for name in own)]
        fitting = [
            each for each in named if all(raw[each + n].shape == v.shape for n, v in own.items())
        ]
        found = [
            Partner(_place(part, prefix), _names.below(prefix, raw), own)
            for prefix in (fitting or named[:1])[:MOST]
        ]
        around = _names.attribute(own)
        if found or not around:
            return found
        own = _names.below(around, own)


def _by_flat_name(averages: State, part: Part) -> list[Partner]:
    if not isinstance(part.tensors, dict):
        return []
    raw = _names.unwrap(part.tensors)
    try:
        module, full = names_from(averages, raw)
    except ValueError:  # the names do not fit, or there are none
        return []
    named = renamed(averages, full)
    return [Partner(_place(part, module), *(_names.below(module, each) for each in (raw, named)))]


def _by_position(averages: Sequence[Tensor], part: Part) -> list[Partner]:
    """Match by the order of the parameters, without known buffers and tied names.

    In a file of Lightning the names lose the attribute of the module that holds the model.
    """
    if not isinstance(part.tensors, dict):
        return []
    raw = _names.unwrap(part.tensors)
    tied = _alias.ties(raw)
    names = [
        name
        for name, value in raw.items()
        if value.is_floating_point() and name not in tied and name.rpartition(".")[2] not in BUFFERS
    ]
    wanted, held = [_shape(average) for average in averages], [raw[name].shape for name in names]
    first = _places(wanted, held)
    if first is None:
        return []
    if isinstance(part.above[-1], Unordered):
        raise ValueError(  # noqa: TRY004, it is a file, not an argument
            f"expected the parameters at {part.name!r} in their order, found them in a file that "
            "keeps none; pass names=model, on the command line --names FILE"
        )
    last = [len(held) - 1 - i for i in reversed(_places(wanted[::-1], held[::-1]) or [])]
    if first != last:
        i = next(i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b)
        raise ValueError(
            f"expected averages of all parameters at {part.name!r}, or of some whose shapes tell "
            f"which; found {len(wanted)} for {len(held)}, and the one at {i} may be that of "
            f"{names[first[i]]!r} or of {names[last[i]]!r}; pass names=model, on the command line "
            "--names FILE"
        )
    around = _names.attribute(raw) if _is_of_lightning(part) else ""
    full = {names[i]: average for i, average in zip(first, averages, strict=True)}
    return [Partner(_place(part, around), *(_names.below(around, each) for each in (raw, full)))]


def _places(wanted: Iterable[Any], held: Sequence[Any]) -> list[int] | None:
    """The first indices in `held` of the elements of `wanted`, in order; None if one is missing.

    >>> _places("bd", "abcbd"), _places("db", "abcbd")
    ([1, 4], None)
    """
    places: list[int] = []
    following = iter(enumerate(held))
    for each in wanted:
        place = next((i for i, other in following if other == each), None)
        if place is None:
            return None
        places.append(place)
    return places


def _is_of_lightning(part: Part) -> bool:
    marks = {"global_step", "pytorch-lightning_version"}
    return part.path[-1:] == ("state_dict",) and not marks.isdisjoint(part.above[-2])


def _place(part: Part, module: str) -> str:
    return ".".join([*part.path, *([module.rstrip(".")] if module else [])])


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
