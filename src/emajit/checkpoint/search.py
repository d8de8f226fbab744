"""Where a file holds averages.

All containers of a file are walked once. An average is whatever the layout of a library recognises,
at any depth, and else a mapping or a list of tensors whose path says so: "ema", "model_avg",
"teacher".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _controls, _names
from emajit.checkpoint.averaged import MOST, Reading, step_of
from emajit.checkpoint.layouts import LAYOUTS

# Words in a path, between dots, underscores, digits and changes of case.
_AVERAGED = {"ave", "average", "averaged", "averages", "avg", "ema", "emas", "polyak", "swa"}
_ROLES = {
    **dict.fromkeys([*_AVERAGED, "shadow", "shadows", "target", "teacher"], "averaged"),
    **dict.fromkeys(["online", "student"], "trained"),
    **dict.fromkeys(["backup", "collected"], "aside"),  # trained weights in a state of averages
}
_NEITHER = {"opt", "optim", "optimizer", "optimizers", "optims", "scaler", "sched", "scheduler"}
_NEITHER |= {"exp", "grad", "gradient", "gradients", "grads", "sq"}  # as in Adam's `exp_avg`
# The word in place of that of the averaged module, in the name of the trained one.
_TRAINED_WORDS: dict[str, tuple[str, ...]] = {
    **{word: ("",) for word, role in _ROLES.items() if role == "averaged"},
    "target": ("online", ""),
    "teacher": ("student", ""),
}
_CONTROLS = {"decay", "initted", "n_averaged", "num_updates", "step", "steps", "updates"}
_STEPS = "num_updates", "updates", "optimization_step", "steps", "step"
_STEPS_OF_RUN = "global_step", "batch_idx_train", "step", "iteration"
_DEEPEST = 100
_MAPPINGS = dict, Mapping  # most are dicts, which is quicker to tell
_CONTAINERS = dict, list, tuple, Mapping
_PLAIN = int, float, str, bytes, type(None)

Path = tuple[str, ...]


class Container(NamedTuple):
    """A mapping or a list in a file, the keys that lead there, and the containers on the way."""

    path: Path
    value: Any
    above: tuple[Any, ...]

    def leaves(self) -> list[Any]:
        return listed(self.value)

    def is_of_optimizer(self) -> bool:
        return any(isinstance(each, Mapping) and "param_groups" in each for each in self.above)


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

    def role(self) -> tuple[str, str]:
        """What the path says of the tensors, "averaged" or another of `_ROLES`; and the first word.

        The last key that says something decides.
        """
        said = [{_ROLES[word]: word for word in words(key) if word in _ROLES} for key in self.path]
        last = next((each for each in reversed(said) if each), {})
        role = next((role for role in ("aside", "averaged", "trained") if role in last), "")
        return role, next((each[role] for each in said if role in each), "")


class Found(NamedTuple):
    """An average in a file: as its layout holds it, where, and what tells that it is one."""

    reading: Reading
    path: str
    why: str

    def values(self) -> list[Any]:
        return listed(self.reading.averages)

    def is_copy_of(self, other: Found) -> bool:
        """Whether these are the numbers of another average, maybe cast, as a model is saved."""
        mine, theirs = self.reading.averages, other.reading.averages
        if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
            return False
        same = [name for name in theirs if name in mine and mine[name].ndim]
        return 2 * len(same) > len(theirs) and all(
            mine[name].shape == theirs[name].shape
            and torch.equal(mine[name], theirs[name].to(mine[name].dtype))
            for name in same
        )


def words(key: str) -> list[str]:
    """The words of a key, in lower case.

    >>> words("emaModel2_fp32.avgpool")
    ['ema', 'model', 'fp', 'avgpool']
    """
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]


def listed(tensors: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)


def containers(tree: Any) -> list[Container]:
    """Each mapping and list in `tree` that holds more than numbers and text, in its order.

    A shared one is met once if there are containers in it. Raises ValueError for one in itself, or
    below more than a hundred others.
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
    """All tensors in the containers of a file, but those of optimizers."""
    found = []
    for each in walked:
        path, value, around = each
        above = (*around, value)
        tensors: Any = [v for v in each.leaves() if isinstance(v, Tensor)]
        # A mapping of numbers is none of weights.
        if not any(v.ndim for v in tensors) or "param_groups" in value or each.is_of_optimizer():
            continue
        if isinstance(value, Mapping):
            tensors = {str(key): v for key, v in value.items() if isinstance(v, Tensor)}
            if any(name.count(".") > _DEEPEST for name in tensors):
                raise ValueError(f"expected at most {_DEEPEST} dots in a name, found more")
        elif len(tensors) < len(value):
            continue
        if _NEITHER.isdisjoint(word for key in path for word in words(key)):
            found.append(Part(path, tensors, above))
    return found


def averages(walked: Sequence[Container], held: Sequence[Part]) -> list[Found]:
    """All averages in the containers of a file, whose parts are `held`.

    Raises ValueError for a layout that is broken.
    """
    found: list[Found] = []
    for each in walked:
        if not isinstance(each.value, Mapping) or each.is_of_optimizer():
            continue
        for reading in _readings(each.value):
            place = ".".join([*each.path, *([reading.path] if reading.path else [])])
            length = reading.sigma_rel
            told = "" if length is None else f", sigma_rel {length:g}"
            if place not in {other.path for other in found}:  # in a layout that is part of another
                found.append(Found(reading, place, f"the layout is that of {reading.layout}{told}"))
    used = {id(v) for each in found for v in [*each.values(), *listed(each.reading.raw or {})]}
    for part in held:  # buffers that do not change may be shared
        weights = [value for value in part.values() if value.ndim]
        if 2 * sum(id(value) in used for value in weights) <= len(weights):
            found += [each for each in _marked(part) if not any(map(each.is_copy_of, found))]
    return _widest(found)


def _readings(tree: Mapping[str, Any]) -> list[Reading]:
    """The averages in a mapping that the layouts of libraries recognise."""
    try:
        read = [reading for layout in LAYOUTS if layout.read for reading in layout.read(tree)]
        found = [reading for reading in read if reading.averages]
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


def mark_of_file(name: str) -> str:
    """The word in the name of a file which says that all of it is an average, or "".

    A "teacher" or a "target" is one only beside what follows it.
    """
    return next((word for word in words(name) if word in _AVERAGED), "")


def _marked(part: Part) -> list[Found]:
    """The averages that a part is or has, by its path and its names."""
    role, word = part.role()
    if role == "averaged":
        step, decay = told(part)
        tensors = part.tensors
        if isinstance(tensors, dict):
            tensors = {name: v for name, v in tensors.items() if name not in _CONTROLS or v.ndim}
        reading = Reading(f"state at {part.name}", tensors, step, decay)
        return [Found(reading, part.name, f"its path says {word!r}")]
    found = []
    if isinstance(part.tensors, dict) and role != "aside":
        for module, partner, average, raw in _averaged_modules(part.tensors):
            place = ".".join([*part.path, module])
            reading = Reading(f"state at {place}", average, *told(part), raw=raw)
            beside = f"follows {partner!r}" if partner else "follows what is beside it"
            found.append(Found(reading, place, f"its name says that it {beside}"))
    return found


class _Follower(NamedTuple):
    """A module in a state that averages another one: both, and their tensors, without wrappers."""

    module: str
    partner: str
    averages: dict[str, Tensor]
    raw: dict[str, Tensor]


def _averaged_modules(state: Mapping[str, Tensor]) -> list[_Follower]:
    """The modules that average another one of the same shapes, as their names say.

    Together they must be the larger part of the state, else they are layers of a model; or the only
    one is a whole network that says "ema", beside which there may be frozen ones.

    >>> import torch
    >>> names = "net.w", "net_ema.w", "target_table.w", "source_table.w"
    >>> [each[:2] for each in _averaged_modules({name: torch.ones(2) for name in names})]
    [('net_ema', 'net')]
    """
    bare = _names.canonical_of(state)
    held = {short: state[name] for name, short in bare.items()}
    marked: dict[str, dict[str, Tensor]] = {}
    for name, short in bare.items():
        keys = name.split(".")
        for i, key in enumerate(keys[:-1]):
            if trained_names(key) or "ema" in words(key):
                module = ".".join(keys[: i + 1])
                rest = short.removeprefix(_names.canonical(f"{module}."))
                marked.setdefault(module, {})[rest] = state[name]
    found: list[_Follower] = []
    for module, averages in marked.items():
        if any(module.startswith(f"{each.module}.") for each in found):
            continue
        own = _names.canonical(f"{module}.")
        partner = _followed(own, averages, held)
        if partner is not None:
            others = {name: v for name, v in held.items() if not name.startswith(own)}
            raw = _names.below(partner, others)
            found.append(_Follower(module, partner.rstrip("."), averages, raw))
        if len(found) > MOST:
            return []
    paired = sum(len(each.averages) + len(each.raw) for each in found)
    names = [_names.canonical(f"{each.module}.").rstrip(".") for each in found]
    is_ema = len(names) == 1 and "ema" in words(names[0]) and "." not in names[0]
    return found if is_ema or 2 * paired > len(state) else []


def _followed(
    module: str, averages: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> str | None:
    """The module, with its dot, that another one averages: by its name; or, of an "ema", beside it.

    "" is the whole state.
    """
    above, dot, own = module.rstrip(".").rpartition(".")
    above += dot
    named = [f"{above}{other}." for other in trained_names(own)]
    if fitting := [each for each in named if _fits(averages, each, held)]:
        return fitting[0]
    network = [name for name in averages if "." in name]  # else it is a layer
    if "ema" not in words(own) or not network:
        return None
    end = f".{network[0]}"
    beside = [name.removesuffix(end[1:]) for name in held if f".{name}".endswith(end)]
    fitting = [
        each
        for each in beside[:MOST]
        if each.startswith(above)
        and each.removeprefix(above).count(".") < 2
        and "ema" not in words(each.removeprefix(above))
        and _fits(averages, each, held)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _fits(averages: Mapping[str, Tensor], module: str, held: Mapping[str, Tensor]) -> bool:
    partners = (held.get(module + name) for name in averages)
    return all(
        partner is not None and partner.shape == value.shape
        for partner, value in zip(partners, averages.values(), strict=True)
    )


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
    narrow = {re.sub(r"_?fp32(_params)?", "", f.path) for f in found if "fp32" in f.path}
    return [each for each in found if each.path not in narrow]


def told(part: Part) -> tuple[int | None, float | None]:
    """The number of updates beside an average, or the step of its run; and the decay beside it."""
    mappings = [each for each in reversed(part.above) if isinstance(each, Mapping)]
    own = [each for each in reversed(part.above[-2:]) if isinstance(each, Mapping)]
    steps = [each.get(key) for each in own for key in _STEPS]
    steps += [each.get(key) for each in mappings for key in _STEPS_OF_RUN]
    step = next((step for step in steps if _is_number(step, int)), None)
    decay = next((d for each in own if _is_number(d := each.get("decay"), float)), None)
    if isinstance(decay, Tensor):
        decay = _controls.decimal(float(decay))
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
            raise ValueError(f"expected a place in the file, found none at {key!r}")
        value = following
    return value
