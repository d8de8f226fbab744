"""Find the averages in a file.

All containers of a file are walked once. The layouts of libraries recognise averages at any
depth; else a mapping or a list of tensors is an average if its path says so: "ema", "model_avg",
"teacher".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _controls, _names, _paths
from emajit.checkpoint import followers, marks
from emajit.checkpoint.averaged import Reading, step_of
from emajit.checkpoint.layouts import LAYOUTS
from emajit.checkpoint.layouts.diffusers import options_in

_STEPS = "num_updates", "updates", "optimization_step", "steps", "step"
_STEPS_OF_RUN = "global_step", "global_steps", "batch_idx_train", "step", "iteration"
_DECAYS_OF_AVERAGE = "ema_decay", "ema.decay"  # a "decay" may be that of something else
# Counts over the whole run; a "step" may be one within its epoch.
_GLOBAL_STEPS = "global_step", "global_steps", "batch_idx_train", "iteration"
_EPOCHS = "epoch", "current_epoch", "cur_epoch"
_DEEPEST = 100
_MAPPINGS = dict, Mapping  # most are dicts, which is quicker to tell
_CONTAINERS = dict, list, tuple, Mapping
_PLAIN = int, float, str, bytes, type(None)

# An average for snapshots, in the callbacks' files.
_OF_SNAPSHOT = re.compile(r"(^|\.)(emajit\.shadows\.|averages-)posthoc-[\d.e-]+(\.shadow)?$")

Path = tuple[str, ...]


class Container(NamedTuple):
    """A mapping or a list in a file, its path, and the containers above it."""

    path: Path
    value: Any
    above: tuple[Any, ...]

    def leaves(self) -> list[Any]:
        return listed(self.value)

    def is_of_optimizer(self) -> bool:
        return any(isinstance(each, Mapping) and "param_groups" in each for each in self.above)


class Part(NamedTuple):
    """The tensors in one mapping or list of a file.

    path: the keys that lead to it.
    tensors: by name, or in order.
    above: the containers on the path, from the outermost to this one.
    """

    path: Path
    tensors: dict[str, Tensor] | list[Tensor]
    above: tuple[Any, ...] = ()

    def values(self) -> list[Tensor]:
        return listed(self.tensors)

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def role(self) -> tuple[str, str]:
        return marks.role(self.path)


class Found(NamedTuple):
    """An average in a file: as its layout holds it, its path, and why it is an average."""

    reading: Reading
    path: str
    why: str

    def values(self) -> list[Any]:
        return listed(self.reading.averages)

    def is_copy_of(self, other: Found) -> bool:
        """Whether another average has the same numbers, perhaps cast for a saved model."""
        mine, theirs = self.reading.averages, other.reading.averages
        if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
            return False
        same = [name for name in theirs if name in mine and mine[name].ndim]
        return 2 * len(same) > len(theirs) and all(
            mine[name].shape == theirs[name].shape
            and torch.equal(mine[name], theirs[name].to(mine[name].dtype))
            for name in same
        )


class Moment(NamedTuple):
    """When in its run a checkpoint was saved; one of `step` and `epoch` may be None."""

    step: int | None
    epoch: float | None
    is_global: bool

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f"epoch {self.epoch:g}"
        return " of ".join(str(each) for each in (self.step, epoch) if each not in (None, ""))


def listed(tensors: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)


def containers(tree: Any) -> list[Container]:
    """Each mapping and list in `tree` that holds more than numbers and text, in order.

    A shared container that holds containers is visited once. Raises ValueError for a container
    within itself, and for more than a hundred levels.
    """
    return [*_walked(tree)]


def _walked(tree: Any) -> Iterator[Container]:
    met: set[int] = set()
    waiting = [Container((), tree, ())]
    while waiting:
        path, value, above = here = waiting.pop()
        if any(value is container for container in above):
            raise ValueError("expected averages in a layout that is known, found one in itself")
        if len(above) > _DEEPEST:
            raise ValueError(f"expected at most {_DEEPEST} containers in each other, found more")
        items = value.items() if isinstance(value, _MAPPINGS) else enumerate(value)
        inner = [
            (str(key), v) for key, v in items if isinstance(v, _CONTAINERS) and not _is_plain(v)
        ]
        if inner and id(value) in met:
            continue
        met.add(id(value))
        yield here
        around = (*above, value)
        waiting += [Container((*path, key), child, around) for key, child in reversed(inner)]


def _is_plain(container: Any) -> bool:
    values = container.values() if isinstance(container, _MAPPINGS) else container
    return all(isinstance(value, _PLAIN) for value in values)


def parts(walked: Sequence[Container]) -> list[Part]:
    """All tensors in the containers of a file, except in optimizers' states."""
    found = []
    for each in walked:
        path, value, around = each
        above = (*around, value)
        tensors: Any = [v for v in each.leaves() if isinstance(v, Tensor)]
        # A mapping of 0-d tensors alone holds no weights.
        if not any(v.ndim for v in tensors) or "param_groups" in value or each.is_of_optimizer():
            continue
        if isinstance(value, Mapping):
            tensors = {str(key): v for key, v in value.items() if isinstance(v, Tensor)}
            if any(name.count(".") > _DEEPEST for name in tensors):
                raise ValueError(f"expected at most {_DEEPEST} dots in a name, found more")
        elif len(tensors) < len(value):
            continue
        if not marks.is_of_neither(path):
            found.append(Part(path, tensors, above))
    return found


def one_model(held: Sequence[Part]) -> tuple[Part, dict[str, Tensor]]:
    """The one state among some parts, and its tensors without the prefixes of wrappers.

    Raises ValueError where there is none, or more than one.
    """
    models = [(part, part.tensors) for part in held if isinstance(part.tensors, dict)]
    if len(models) != 1:
        places = _paths.some([part.name for part, _ in models]) or "none"
        raise ValueError(f"expected the weights of one model, found {places}")
    ((part, tensors),) = models
    return part, _names.unwrap(tensors)


def averages(walked: Sequence[Container], held: Sequence[Part]) -> list[Found]:
    """All averages in the containers of a file, whose parts are `held`.

    Raises ValueError for a layout that is broken.
    """
    places: dict[str, Found] = {}
    for each in walked:
        if not isinstance(each.value, Mapping) or each.is_of_optimizer():
            continue
        for reading in _readings(each.value):
            place = ".".join([*each.path, *([reading.path] if reading.path else [])])
            length = reading.sigma_rel
            told = "" if length is None else f", sigma_rel {length:g}"
            why = f"the layout is that of {reading.layout}{told}"
            places.setdefault(place, Found(reading, place, why))  # the outer layout knows more
    found = [*places.values()]
    used = {id(v) for each in found for v in [*each.values(), *listed(each.reading.raw or {})]}
    for part in held:  # constant buffers may be shared with an average that was found
        weights = [value for value in part.values() if value.ndim]
        if 2 * sum(id(value) in used for value in weights) <= len(weights):
            known = places.values()
            found += [each for each in _marked(part) if not any(map(each.is_copy_of, known))]
    found = _widest(found)
    # With several averages, the number may be of any of them.
    return [_with_decay(each, walked) for each in found] if len(main(found)) == 1 else found


def _with_decay(found: Found, walked: Sequence[Container]) -> Found:
    """The average with the decay that a mapping above it has, if there is one value only."""
    reading = found.reading
    if reading.decay is not None or reading.sigma_rel is not None:
        return found
    of_average: set[float | None] = set()
    others: set[float | None] = set()
    for each in walked:
        place = ".".join([*each.path, ""])
        if isinstance(each.value, Mapping) and f"{found.path}.".startswith(place):
            own = f"{found.path.removeprefix(place)}.decay"  # of a module in a state
            of_average |= {_decay_in(each.value.get(key)) for key in (*_DECAYS_OF_AVERAGE, own)}
            others.add(_decay_in(each.value.get("decay")))
    held = of_average - {None} or others - {None}
    return found._replace(reading=reading._replace(decay=held.pop())) if len(held) == 1 else found


def _decay_in(value: Any) -> float | None:
    """A decay between 0 and 1, or None; in 16 bits 0.9999 would be 1."""
    if not _is_number(value, float) or not 0 <= value <= 1:
        return None
    if isinstance(value, Tensor) and value.dtype.itemsize < 4:
        return None
    return _controls.decimal(float(value)) if isinstance(value, Tensor) else float(value)


def main(found: Sequence[Found]) -> list[Found]:
    """The averages, without those that emajit's callbacks keep for snapshots beside a single one.

    >>> reading = Reading("emajit", {})
    >>> paths = "averages.shadow", "averages-posthoc-0.05.shadow"
    >>> [each.path for each in main([Found(reading, path, "") for path in paths])]
    ['averages.shadow']
    """
    own = [each for each in found if not _OF_SNAPSHOT.search(each.path)]
    return own if len(own) == 1 else [*found]


def _readings(tree: Mapping[str, Any]) -> list[Reading]:
    """The averages in a mapping that the layouts of libraries recognise."""
    try:
        read = [reading for layout in LAYOUTS if layout.read for reading in layout.read(tree)]
        found = [reading for reading in read if reading.averages]
        for layout, averages, step, decay, raw, *_ in found:
            for values in (averages, raw or {}):
                named = values if isinstance(values, Mapping) else _numbered(values)
                broken = [
                    key
                    for key, value in named.items()
                    if not (isinstance(key, str) and isinstance(value, Tensor))
                ]
                if broken:
                    raise ValueError(f"{layout}: expected tensors, found others at {broken[:5]}")
            for what, kind, value in (("step", int, step), ("decay", int | float, decay)):
                if not isinstance(value, kind | None):
                    kinds = type(value).__qualname__
                    raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
                        f"{layout}: {what}: expected a number, found {kinds}"
                    )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"expected averages in a layout that is known, found {error!r}") from None
    return found


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


def _marked(part: Part) -> list[Found]:
    """A part as an average, or the averages in it, by its path and its names."""
    role, word = part.role()
    if word in ("target", "teacher") and not isinstance(part.tensors, dict):
        return []  # a batch
    if role == "averaged":
        step, decay = told(part)
        tensors = part.tensors
        if isinstance(tensors, dict):
            tensors = {
                name: v for name, v in tensors.items() if name not in marks.CONTROLS or v.ndim
            }
        reading = Reading(f"state at {part.name}", tensors, step, decay, options=options(part))
        return [Found(reading, part.name, f"its path says {word!r}")]
    found = []
    if isinstance(part.tensors, dict) and role != "aside":
        for module, partner, average, raw in followers.followers(part.tensors):
            place = ".".join([*part.path, module])
            reading = Reading(f"state at {place}", average, *told(part), raw=raw)
            beside = f"follows {partner!r}" if partner else "follows what is beside it"
            found.append(Found(reading, place, f"its name says that it {beside}"))
    return found


def _widest(found: list[Found]) -> list[Found]:
    """The averages, without 16-bit averages that the file also has in float32 (fairseq)."""
    narrow = {re.sub(r"_?fp32(_params)?", "", f.path) for f in found if "fp32" in f.path}
    return [each for each in found if each.path not in narrow]


def told(part: Part) -> tuple[int | None, float | None]:
    """The number of updates beside an average, or the step of its run; and the decay beside it."""
    mappings = [each for each in reversed(part.above) if isinstance(each, Mapping)]
    own = [each for each in reversed(part.above[-2:]) if isinstance(each, Mapping)]
    steps = [each.get(key) for each in own for key in _STEPS]
    steps += [each.get(key) for each in mappings for key in _STEPS_OF_RUN]
    step = next((step for step in steps if _is_number(step, int)), None)
    # Beside a decay of the average, which `_with_decay` finds, another may be of anything.
    plain = [each for each in own if not any(key in each for key in _DECAYS_OF_AVERAGE)]
    decays = [_decay_in(each.get("decay")) for each in plain]
    return step_of(step), next((decay for decay in decays if decay is not None), None)


def moment(held: Sequence[Part]) -> Moment | None:
    """When a file with these parts was saved; None where none has a step or an epoch above it."""
    above = [m for part in held for m in reversed(part.above) if isinstance(m, Mapping)]

    def first(keys: Sequence[str], *kinds: type) -> Any:
        found = (m.get(key) for m in above for key in keys)
        return next((v for v in found if any(_is_number(v, kind) for kind in kinds)), None)

    epoch = first(_EPOCHS, int, float)
    of_run = step_of(first(_GLOBAL_STEPS, int))
    steps = (of_run, *(told(part)[0] for part in held))
    step = next((step for step in steps if step is not None), None)
    known = None if epoch is None or not math.isfinite(epoch) else float(epoch)
    is_empty = step is None and known is None
    return None if is_empty else Moment(step, known, is_global=of_run is not None)


def options(part: Part) -> dict[str, Any]:
    """The options beside an average that diffusers keeps in the config.json of its weights."""
    own = [each for each in reversed(part.above[-2:]) if isinstance(each, Mapping)]
    return next((found for each in own if (found := options_in(each))), {})


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point() is (kind is float)
    return isinstance(value, kind) and not isinstance(value, bool)


def at(tree: Any, key: str) -> Any:
    """The container in `tree` at a path of keys with dots, or the tensors of a module in a state.

    Raises ValueError where there is none.

    >>> at({"ema": {"nets": [{"a.w": 1}]}}, "ema.nets.0")
    {'a.w': 1}
    """
    value, rest = tree, key.split(".") if key else []
    while rest:
        following = None
        for n in range(len(rest), 0, -1):
            name = ".".join(rest[:n])
            if isinstance(value, Mapping):
                inner = next((v for k, v in value.items() if str(k) == name), None)
            else:
                inner = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
            if isinstance(inner, Mapping | list | tuple):
                following, rest = inner, rest[n:]
                break
        if following is None and isinstance(value, Mapping):
            tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
            following, rest = _names.below(".".join(rest) + ".", tensors) or None, []
        if following is None:
            raise ValueError(f"expected a place in the file, found none at {key!r}")
        value = following
    return value
