"""The averages in a checkpoint of any library, read from a file or from its content."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _paths
from emajit.checkpoint import partners, search, sources
from emajit.checkpoint.averaged import Averaged, NotOneError, Reading, listed, tensors_of
from emajit.checkpoint.files import Opaque
from emajit.checkpoint.search import Found, Part

_SHOWN = 12  # candidates in an error


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    key: str | None = None,
    raw_key: str | None = None,
) -> Averaged:
    """The averaged weights in a checkpoint, under the names of the trained weights beside them.

    The averages are searched at any depth. The modules in `emajit.checkpoint.layouts` describe what
    libraries write, from `LitEma` and torch's `AveragedModel` to diffusers, Lightning and NeMo.
    Everything else is an average if its path says so, as "ema", "model_avg" or "teacher" does. The
    trained weights are the tensors elsewhere with the same names and shapes. The prefixes of
    wrappers (`module.`, `_orig_mod.`) are removed.

    Args:
        source: a file of safetensors or `torch.save`, a folder of `torch.distributed.checkpoint`,
            or the content of one. Nothing but tensors and plain containers is unpickled.
        names: the names of the averaged parameters in order, or the model, where neither the
            averages nor the trained weights beside them tell the names: averages by position
            (diffusers, torch_ema, NeMo), a `LitEma` on its own.
        key: where the averages are, if the file does not tell: the keys that lead there, with dots,
            such as "ema.module"; also a module in a state, such as "state_dict.teacher".
        raw_key: where the trained weights are, likewise.

    The tensors may lie in the file, which is mapped into memory: clone those that are to outlive
    it.

    Raises:
        ValueError: there is no average, or more than one (a table of the candidates says which);
            the trained weights may be in two places, or have other names or shapes; `names` are
            missing, or too few or too many; the file is broken, or holds pickled objects.
        TypeError: `source` or `names` is of another type.
        OSError: the file cannot be read.
    """
    (found,) = _found(source, names, key, raw_key)
    return found


def read_all(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
) -> list[Averaged]:
    """All averages in a checkpoint, such as those of several lengths; arguments as in `read`."""
    return _found(source, names, None, None, several=True)


class Candidate(NamedTuple):
    """Tensors in a checkpoint that may be averages.

    path: where they are, as `key` of `read` takes it; "" for the whole file.
    tensors: in the order of the file.
    why: what tells that they are averages, or "".
    """

    path: str
    tensors: list[Tensor]
    why: str


def candidates(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Candidate]:
    """What in a checkpoint may be averages: the tensors of each container but an optimizer's.

    Raises as `read`, but not where there are none or several.
    """
    tree = source if isinstance(source, Mapping) else sources.content(Path(source))
    if not isinstance(tree, Mapping):
        return []
    held = search.parts(tree)
    return _candidates(held, search.averages(tree, held))


def _found(
    source: str | os.PathLike[str] | Mapping[str, Any],
    names: Iterable[str] | torch.nn.Module | None,
    key: str | None,
    raw_key: str | None,
    *,
    several: bool = False,
) -> list[Averaged]:
    """The averages in a checkpoint: one, or `several`."""
    if isinstance(source, Mapping):
        return _in_tree(source, "", names, key, raw_key, several=several)
    if not isinstance(source, str | os.PathLike):
        found = type(source).__qualname__
        raise TypeError(f"source: expected a path, or a mapping as a file holds one, found {found}")
    path = Path(source)
    tree = sources.content(path)
    try:
        return _in_tree(tree, path.name, names, key, raw_key, several=several)
    except NotOneError as error:
        raise NotOneError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _in_tree(
    tree: Any,
    name: str,
    names: Iterable[str] | torch.nn.Module | None,
    key: str | None,
    raw_key: str | None,
    *,
    several: bool,
) -> list[Averaged]:
    """The averages in the content of a file of this `name`."""
    given = listed(names)
    if not isinstance(tree, Mapping):
        kind = type(tree).__qualname__
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a mapping of names, found {kind}{_pickled(tree)}"
        )
    held = search.parts(tree)
    found = search.averages(tree, held)
    if key is not None:
        chosen = [_at(tree, found, key)]
    elif not found and len(held) == 1 and search.marks(name):
        reading = Reading("state", held[0].tensors, *search.told(held[0]))
        chosen = [
            Found(reading, held[0].name, f"the name of the file says {search.marks(name)[0]!r}")
        ]
    else:
        chosen = found
    if not chosen or (len(chosen) > 1 and not several):
        raise NotOneError(_not_one(tree, held, found))
    beside = others(held, [*found, *chosen])
    if raw_key is not None:
        beside = [Part((raw_key,), tensors_at(tree, raw_key))]
    averaged = [partners.named(each, beside, given, alone=key is not None) for each in chosen]
    used: set[int] = set()
    for each in averaged:
        _check_shapes(each, names)
        used |= {id(value) for part in (each.weights, each.raw) for value in part.values()}
    present = _check_beside(tree, used)
    return [each._replace(others=len(present - used)) for each in averaged]


def _at(tree: Any, found: Sequence[Found], key: str) -> Found:
    """The average at a key, or the one below it."""
    below = [each for each in found if _is_below(each.path, key)]
    if len(below) == 1:
        return below[0]._replace(why="the key was given")
    return Found(
        Reading(f"state at {key}" if key else "state", tensors_at(tree, key)),
        key,
        "the key was given",
    )


def tensors_at(tree: Any, key: str) -> dict[str, Tensor] | list[Tensor]:
    value = search.at(tree, key)
    tensors: Any = tensors_of(value) if isinstance(value, Mapping) else list(value)
    if not tensors or not all(isinstance(each, Tensor) for each in search.listed(tensors)):
        raise ValueError(f"{key}: expected tensors there, found none")
    return tensors  # type: ignore[no-any-return]


def others(held: Sequence[Part], found: Sequence[Found]) -> list[Part]:
    """The parts that may hold trained weights, without the averages that are found in them."""
    parts: list[Part] = []
    for part in held:
        if not isinstance(part.tensors, dict) or search.is_marked(part):
            continue
        rest = part.tensors
        for path in (each.path for each in found if _is_below(each.path, part.name)):
            module = path[len(part.name) :].strip(".")
            rest = {name: v for name, v in rest.items() if not _is_below(name, module)}
        parts += [part._replace(tensors=rest)] if rest else []
    return parts


def _is_below(path: str, above: str) -> bool:
    return not above or f"{path}.".startswith(f"{above}.")


def _not_one(tree: Mapping[str, Any], held: Sequence[Part], found: Sequence[Found]) -> str:
    """The error where not one average was found: a table of what may be one."""
    if found:
        layouts = " and ".join(dict.fromkeys(each.reading.layout for each in found))
        count = "two" if len(found) == 2 else f"{len(found)}"
        lines = [f"expected one average, found {count}: {layouts}"]
    else:
        keys = _paths.some([str(key) for key in tree])
        reason = f"found none among {keys}{_pickled(tree)}"
        lines = [f"expected averages in a layout that is known, or at a key that says so, {reason}"]
    rows = _candidates(held, found)
    for path, tensors, why in rows[:_SHOWN]:
        sizes = f"{len(tensors):,} tensors, {sum(v.numel() for v in tensors):,} numbers"
        place, remark = path or '"" (the file)', why and f"; {why}"
        lines.append(f"  {place}: {sizes}, {dtypes_of(tensors)}{remark}")
    if len(rows) > _SHOWN:
        lines.append(f"  and {len(rows) - _SHOWN:,} more")
    if rows:
        lines.append("choose one with key=PATH, on the command line --key PATH")
    return "\n".join(lines)


def _candidates(held: Sequence[Part], found: Sequence[Found]) -> list[Candidate]:
    rows = [Candidate(each.path, each.values(), each.why) for each in found]
    return rows + [
        Candidate(part.name, part.values(), "")
        for part in held
        if part.name not in {each.path for each in found}
    ]


def dtypes_of(tensors: Iterable[Tensor]) -> str:
    return " and ".join(sorted({str(v.dtype).removeprefix("torch.") for v in tensors}))


def _pickled(tree: Any) -> str:
    """The end of an error message: the classes of pickled objects, or nothing if there is none."""
    leaves = [tree] if isinstance(tree, Opaque) else []
    if isinstance(tree, Mapping):
        for _, value, _ in search.containers(tree):
            leaves += [leaf for leaf in search.listed(value) if isinstance(leaf, Opaque)]
    names = sorted({f"{type(leaf).__module__}.{type(leaf).__name__}" for leaf in leaves})
    hint = "; load it where these classes are, and save a state_dict()"
    return f", beside what is not unpickled: {_paths.some(names)}{hint}" if names else ""


def _check_shapes(found: Averaged, names: Any) -> None:
    """Raise ValueError for an average of another shape than its parameter, here or in a model."""
    params = dict(names.named_parameters()) if isinstance(names, torch.nn.Module) else {}
    for name, average in found.weights.items():
        for part in (found.raw, params):
            if name in part and part[name].shape != average.shape:
                expected, shape = tuple(part[name].shape), tuple(average.shape)
                raise ValueError(
                    f"{name!r}: expected an average of shape {expected}, found {shape}"
                )


def _check_beside(tree: Any, used: set[int]) -> set[int]:
    """The ids of all tensors; ValueError for a pickled object in a mapping with a used tensor."""
    present = set()
    for _, value, _ in search.containers(tree):
        leaves = search.listed(value)
        here = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        present |= here
        if isinstance(value, Mapping) and not used.isdisjoint(here):
            for key, leaf in value.items():
                if isinstance(leaf, Opaque) and not str(key).endswith("_extra_state"):
                    kind = type(leaf).__name__
                    raise ValueError(f"{key!r}: expected a tensor, found a pickled {kind}")
    return present
