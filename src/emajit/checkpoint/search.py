"""Where a file holds averages.

All containers of a file are walked once. An average is whatever the layout of a library recognises,
at any depth, and else a mapping or a list of tensors whose path says so: "ema", "model_avg",
"teacher".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from emajit import _names
from emajit.checkpoint.averaged import Reading, step_of
from emajit.checkpoint.layouts import LAYOUTS

# Words in a path, between dots, underscores and changes of case.
_AVERAGED = {"ave", "average", "averaged", "averages", "avg", "ema", "emas", "polyak"}
_AVERAGED |= {"shadow", "shadows", "swa", "target", "teacher"}
_TRAINED = {"backup", "collected", "online", "student"}  # weights in a state of averages
_NEITHER = {"opt", "optim", "optimizer", "optimizers", "optims", "scaler", "sched", "scheduler"}
# The word in place of that of the averaged module, in the name of the trained one.
_TRAINED_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_AVERAGED, ("",)),
    "momentum": ("",),
    "target": ("online", ""),
    "teacher": ("student", ""),
}
_CONTROLS = {"decay", "initted", "n_averaged", "num_updates", "step", "steps", "updates"}
_STEPS = "num_updates", "updates", "optimization_step", "steps", "step"
_STEPS_OF_RUN = "global_step", "batch_idx_train", "step", "iteration"
_DEEPEST = 100

Path = tuple[str, ...]


class Part(NamedTuple):
    """The tensors in one mapping or list of a file.

    path: the keys that lead there.
    tensors: by name, or in order.
    above: the containers on the way, from the file's own to this one.
    """

    path: Path
    tensors: dict[str, Tensor] | list[Tensor]
    above: tuple[Any, ...] = ()

    def values(self) -> list[Tensor]:
        return listed(self.tensors)

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def said(self) -> set[str]:
        """The words of its path."""
        return {word for key in self.path for word in words(key)}


class Found(NamedTuple):
    """An average in a file: as its layout holds it, where, and what tells that it is one."""

    reading: Reading
    path: str
    why: str

    def values(self) -> list[Any]:
        return listed(self.reading.averages)


def words(key: str) -> list[str]:
    """The words of a key, in lower case.

    >>> words("emaModel_fp32.avgpool")
    ['ema', 'model', 'fp32', 'avgpool']
    """
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", key)]


def listed(tensors: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)


def containers(tree: Any) -> Iterator[tuple[Path, Any, tuple[Any, ...]]]:
    """The path and the value of each mapping and list in `tree`, and the containers above it.

    A shared one is met once if there are containers in it. Raises ValueError for one in itself, or
    below more than a hundred others.
    """
    met: set[int] = set()
    waiting: list[tuple[Path, Any, tuple[Any, ...]]] = [((), tree, ())]
    while waiting:
        path, value, above = waiting.pop()
        if any(value is container for container in above):
            raise ValueError("expected averages in a layout that is known, found one in itself")
        if len(above) > _DEEPEST:
            raise ValueError(f"expected at most {_DEEPEST} containers in each other, found more")
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inner = [(str(k), v) for k, v in items if isinstance(v, Mapping | list | tuple)]
        if inner and id(value) in met:
            continue
        met.add(id(value))
        yield path, value, above
        waiting += [((*path, key), child, (*above, value)) for key, child in reversed(inner)]


def parts(tree: Any) -> list[Part]:
    """All parts of `tree`, in its order, but those of optimizers."""
    found = []
    for path, value, around in containers(tree):
        above = (*around, value)
        if any(isinstance(each, Mapping) and "param_groups" in each for each in above):
            continue
        if isinstance(value, Mapping):
            named = {str(key): v for key, v in value.items() if isinstance(v, Tensor)}
            part = Part(path, named, above)
            if named.keys() <= _CONTROLS:
                continue
        else:
            part = Part(path, list(value), above)
            if not (value and all(isinstance(each, Tensor) for each in value)):
                continue
        if part.said.isdisjoint(_NEITHER):
            found.append(part)
    return found


def averages(tree: Any, held: Sequence[Part]) -> list[Found]:
    """All averages in `tree`, whose parts are `held`.

    Raises ValueError for a layout that is broken.
    """
    places: dict[str, Found] = {}
    for path, value, _ in containers(tree):
        for reading in _readings(value) if isinstance(value, Mapping) else ():
            place = ".".join([*path, *([reading.path] if reading.path else [])])
            length = reading.sigma_rel
            told = "" if length is None else f", sigma_rel {length:g}"
            why = f"the layout is that of {reading.layout}{told}"
            places.setdefault(place, Found(reading, place, why))  # the outer layout knows more
    found = [*places.values()]
    used = {id(v) for each in found for v in [*each.values(), *listed(each.reading.raw or {})]}
    for part in held:  # buffers that do not change may be shared
        if 2 * sum(id(value) in used for value in part.values()) <= len(part.tensors):
            found += _marked(part)
    return _widest(found)


def _readings(tree: Mapping[str, Any]) -> list[Reading]:
    """The averages in a mapping that the layouts of libraries recognise."""
    try:
        found = [reading for layout in LAYOUTS if layout.read for reading in layout.read(tree)]
        for layout, averages, step, decay, raw, *_ in found:
            for values in (averages, raw or {}):
                named = values if isinstance(values, Mapping) else dict(enumerate(values))
                if broken := [key for key, v in named.items() if not isinstance(v, Tensor)]:
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


def is_marked(part: Part) -> bool:
    """Whether the path of a part says that it is an average, or is kept beside one."""
    return not part.said.isdisjoint(_AVERAGED)


def marks(path: str) -> list[str]:
    """The words in a path which say that it is that of an average."""
    return [word for word in words(path) if word in _AVERAGED]


def _marked(part: Part) -> list[Found]:
    """The averages that a part is or has, by its path and its names."""
    step, decay = told(part)
    if said := marks(part.name):
        if part.said & _TRAINED:
            return []
        tensors = part.tensors
        if isinstance(tensors, dict):
            tensors = {name: v for name, v in tensors.items() if name not in _CONTROLS or v.ndim}
        reading = Reading(f"state at {part.name}", tensors, step, decay)
        return [Found(reading, part.name, f"its path says {said[0]!r}")]
    found = []
    if isinstance(part.tensors, dict):
        for module, partner in _averaged_modules(part.tensors):
            average, raw = (_names.below(f"{each}.", part.tensors) for each in (module, partner))
            place = ".".join([*part.path, module])
            reading = Reading(f"state at {place}", average, step, decay, raw=raw)
            found.append(Found(reading, place, f"its name says that it follows {partner!r}"))
    return found


def _averaged_modules(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The modules that average another one, as their names say, each with the other one.

    Together they must be the larger part of the state.

    >>> _averaged_modules({"net.w": 0, "net_ema.w": 1, "target_table.w": 2})
    [('net_ema', 'net')]
    """
    modules: dict[str, set[str]] = {}
    for name in state:
        parts = name.split(".")
        for i in range(1, len(parts)):
            modules.setdefault(".".join(parts[:i]), set()).add(".".join(parts[i:]))
    pairs: list[tuple[str, str]] = []
    for module, names in modules.items():
        if any(module.startswith(f"{averaged}.") for averaged, _ in pairs):
            continue
        above, dot, own = module.rpartition(".")
        trained = [above + dot + other for other in trained_names(own)]
        pairs += [(module, other) for other in trained if names <= modules.get(other, set())][:1]
    paired = sum(len(modules[module]) + len(modules[other]) for module, other in pairs)
    return pairs if 2 * paired > len(state) else []  # else they are layers of a model


def trained_names(key: str) -> list[str]:
    """The keys that the trained partner of an average may have.

    >>> trained_names("encoder_k"), trained_names("ema_model"), trained_names("teacher")
    (['encoder_q'], ['model'], ['student'])
    """
    if key == "encoder_k":  # "k" alone is that of attention
        return ["encoder_q"]
    spelled = re.split(r"([._])", key)
    found = []
    for i in range(0, len(spelled), 2):
        for word in _TRAINED_WORDS.get(spelled[i].lower(), ()):
            other = "".join([*spelled[:i], word, *spelled[i + 1 :]]).strip("._")
            found.append(re.sub(r"([._])[._]+", r"\1", other))
    return [other for other in found if other]


def _widest(found: list[Found]) -> list[Found]:
    """Without an average of 16 bits that is there in float32 as well, as fairseq has it."""
    narrow = {re.sub(r"_?fp32(_params)?", "", f.path) for f in found if "fp32" in words(f.path)}
    return [each for each in found if each.path not in narrow]


def told(part: Part) -> tuple[int | None, float | None]:
    """The number of updates beside an average, or the step of its run; and the decay beside it."""
    mappings = [each for each in reversed(part.above) if isinstance(each, Mapping)]
    own = [each for each in reversed(part.above[-2:]) if isinstance(each, Mapping)]
    steps = [each.get(key) for each in own for key in _STEPS]
    steps += [each.get(key) for each in mappings for key in _STEPS_OF_RUN]
    step = next((step for step in steps if _is_number(step, int)), None)
    decay = next((d for each in own if _is_number(d := each.get("decay"), float)), None)
    return step_of(step), None if decay is None else float(decay)


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
            raise ValueError(f"key: expected a place in the file, found none at {key!r}")
        value = following
    return value
