"""The averages in a checkpoint of any library, read from a file or from its content."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _paths, schedules
from emajit.checkpoint import marks, partners, search, sources
from emajit.checkpoint.averaged import Averaged, NotOneError, Reading, listed, tensors_of
from emajit.checkpoint.layouts import ema_pytorch
from emajit.checkpoint.pickled import Opaque
from emajit.checkpoint.search import Container, Found, Part

_SHOWN = 12  # candidates in an error


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    key: str | None = None,
    raw_key: str | None = None,
    sigma_rel: Sequence[float] | None = None,
) -> Averaged:
    """The averaged weights in a checkpoint, under the names of the trained weights beside them.

    The averages are searched at any depth. The modules in `emajit.checkpoint.layouts` describe the
    files of libraries, from `LitEma` and torch's `AveragedModel` to diffusers, Lightning and NeMo.
    Other tensors are an average if their path says so ("ema", "model_avg", "teacher"), or, in a
    file with one state, if the name of the file does ("ema_0.9999.pt"). The trained weights are the
    tensors elsewhere with the same names and shapes. The prefixes of wrappers (`module.`,
    `_orig_mod.`) are removed.

    Args:
        source: a file of safetensors or `torch.save`; a folder of accelerate, of the Trainer of
            transformers, of a diffusers pipeline or one of its models (`unet_ema/`), of shards with
            an index, of `torch.distributed.checkpoint` or of DeepSpeed's ZeRO; or the content of
            one. Only tensors and plain containers are unpickled.
        names: the names of the averaged parameters in order, or the model. Needed where the file
            has no names for the averages: averages by position (diffusers, torch_ema, NeMo) on
            their own, or beside trained weights in a file that does not keep their order, such as
            safetensors; a `LitEma` on its own.
        key: the path of the averages, if the file does not show it: keys joined by dots, such as
            "ema.module"; also a module in a state, such as "state_dict.teacher".
        raw_key: the path of the trained weights, likewise.
        sigma_rel: the lengths of all averages of ema-pytorch's `PostHocEMA`, in the order in which
            it got them: its state and its files hold their places alone.

    The tensors may lie in the file, which is mapped into memory: clone tensors that must outlive
    the file.

    Raises:
        ValueError: there is no average, or more than one (the message is a table of candidates);
            the trained weights may be in two places, or have other names or shapes; `names` are
            missing, or too few or too many; `sigma_rel` is of another number, or for another
            library; the file is broken, or holds pickled objects.
        TypeError: `source` or `names` is of another type.
        OSError: the file cannot be read.
    """
    (found,) = _found(source, names, key, raw_key, sigma_rel)
    return found


def read_all(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    sigma_rel: Sequence[float] | None = None,
) -> list[Averaged]:
    """All averages in a checkpoint, such as those of several lengths; arguments as in `read`."""
    return _found(source, names, None, None, sigma_rel, several=True)


class Candidate(NamedTuple):
    """Tensors in a checkpoint that may be averages.

    path: their path, as `key` of `read` takes it; "" for the whole file.
    tensors: in the order of the file.
    why: the reason why they are averages, or "".
    """

    path: str
    tensors: list[Tensor]
    why: str


def candidates(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Candidate]:
    """The tensors of each container in a checkpoint that may be averages, without optimizers.

    Raises as `read`, but allows none or several.
    """
    tree = _content(source)
    with told_of(source):
        return _candidates(searched_in(tree))


def inspected(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
    key: str | None = None,
    raw_key: str | None = None,
    sigma_rel: Sequence[float] | None = None,
) -> tuple[list[Candidate], Averaged | None]:
    """The `candidates` and the average that `read` finds, in one pass; None of several averages.

    Raises as `read`, but allows several.
    """
    tree = _content(source)
    with told_of(source) as name:
        searched = searched_in(tree, name, sigma_rel)
        several = key is None and len(search.main(searched.found)) > 1
        found = [] if several else _chosen(searched, names, key, raw_key, several=False)
        return _candidates(searched), found[0] if found else None


class Searched(NamedTuple):
    """The content of a checkpoint, the name of its file, and what was found in it."""

    tree: Mapping[str, Any]
    name: str
    walked: list[Container]
    held: list[Part]
    found: list[Found]


def _content(source: str | os.PathLike[str] | Mapping[str, Any]) -> Any:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        found = type(source).__qualname__
        raise TypeError(f"source: expected a path, or a mapping as a file holds one, found {found}")
    content = sources.content(path := Path(source))
    # The name of such a file tells which average it is, as the names in a folder do.
    is_one = path.suffix == ".pt" and ema_pytorch.is_file(path.stem, content)
    return {path.stem: content} if is_one else content


@contextmanager
def told_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[str]:
    """Name the file, if there is one, in the errors about its content; gives its name."""
    path = None if isinstance(source, Mapping) else Path(source)
    try:
        yield "" if path is None else path.name
    except ValueError as error:
        if path is None:
            raise
        kind = NotOneError if isinstance(error, NotOneError) else ValueError
        raise kind(f"{path}: {error}") from None


def searched_in(tree: Any, name: str = "", sigma_rel: Sequence[float] | None = None) -> Searched:
    if not isinstance(tree, Mapping):
        kind = type(tree).__qualname__
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a mapping of names, found {kind}{_pickled([tree])}"
        )
    walked = search.containers(tree)
    held = search.parts(walked)
    found = search.averages(walked, held)
    if sigma_rel is not None:
        found = _with_lengths(found, sigma_rel)
    return Searched(tree, name, walked, held, found)


def _with_lengths(found: Sequence[Found], sigma_rel: Sequence[float]) -> list[Found]:
    """The averages with their lengths, of which each has a place in `sigma_rel`."""
    lengths = [float(length) for length in sigma_rel]
    schedules.sigma_rel_to_gamma(lengths)  # raises ValueError for a length that none has
    places = {i for each in found if (i := each.reading.number) is not None}
    if not places:
        layouts = _paths.some([each.reading.layout for each in found]) or "none"
        raise ValueError(f"sigma_rel: expected averages of PostHocEMA, found {layouts}")
    count = max(places) + 1
    if len(lengths) < count or (len(places) > 1 and len(lengths) > count):
        raise ValueError(f"sigma_rel: expected {count} lengths, found {len(lengths)}")
    return [
        each
        if (i := each.reading.number) is None
        else each._replace(
            reading=each.reading._replace(sigma_rel=lengths[i]),
            why=f"{each.why}, sigma_rel {lengths[i]:g}",
        )
        for each in found
    ]


def _found(
    source: str | os.PathLike[str] | Mapping[str, Any],
    names: Iterable[str] | torch.nn.Module | None,
    key: str | None,
    raw_key: str | None,
    sigma_rel: Sequence[float] | None,
    *,
    several: bool = False,
) -> list[Averaged]:
    """The averages in a checkpoint: one, or `several`."""
    tree = _content(source)
    with told_of(source) as name:
        return _chosen(searched_in(tree, name, sigma_rel), names, key, raw_key, several=several)


def _chosen(
    searched: Searched,
    names: Iterable[str] | torch.nn.Module | None,
    key: str | None,
    raw_key: str | None,
    *,
    several: bool,
) -> list[Averaged]:
    """The one average that was found or that a key chooses, or `several`."""
    given = listed(names)
    tree, name, walked, held, found = searched
    if key is not None:
        chosen = [average_at(searched, key)]
    elif not found and (modules := _pickled_averages(walked)):
        raise NotOneError("\n".join(modules))
    elif not found and len(held) == 1 and (word := marks.mark_of_file(name)):
        told = search.told(held[0])
        reading = Reading("state", held[0].tensors, *told, options=search.options(held[0]))
        chosen = [Found(reading, held[0].name, f"the name of the file says {word!r}")]
    else:
        chosen = found if several else search.main(found)
    if not chosen or (len(chosen) > 1 and not several):
        raise NotOneError(not_one(searched))
    beside = others(held, [*found, *chosen])
    if raw_key is not None:
        raw = tensors_at(searched, raw_key, option="raw_key")
        beside = [Part((raw_key,), raw, (tree, search.at(tree, raw_key)))]
    averaged = [partners.named(each, beside, given, alone=key is not None) for each in chosen]
    used: set[int] = set()
    for each in averaged:
        _check_shapes(each, names)
        used |= {id(value) for part in (each.weights, each.raw) for value in part.values()}
    present = check_beside(walked, used)
    return [each._replace(others=len(present - used)) for each in averaged]


def average_at(searched: Searched, key: str) -> Found:
    """The average at a key, or the one below it; NotOneError where there are no tensors."""
    below = [each for each in searched.found if is_below(each.path, key)]
    if len(below) == 1:
        return below[0]._replace(why="the key was given")
    paths = [each.path for each in below]
    tensors = tensors_at(searched, key, f"those at {_paths.some(paths)}" if paths else "none")
    reading = Reading(f"state at {key}" if key else "state", tensors)
    return Found(reading, key, "the key was given")


def tensors_at(
    searched: Searched, key: str, others: str = "none", option: str = "key"
) -> dict[str, Tensor] | list[Tensor]:
    """The tensors at a key; NotOneError where there are none."""
    try:
        value = search.at(searched.tree, key)
    except ValueError as error:
        raise NotOneError("\n".join([str(error), *_table(searched, option)])) from None
    tensors: Any = tensors_of(value) if isinstance(value, Mapping) else list(value)
    if not tensors or not all(isinstance(each, Tensor) for each in search.listed(tensors)):
        line = f"{key!r}: expected tensors there, found {others}"
        raise NotOneError("\n".join([line, *_table(searched, option)]))
    return tensors  # type: ignore[no-any-return]


def others(held: Sequence[Part], found: Sequence[Found]) -> list[Part]:
    """The parts that may hold trained weights, without the averages that are found in them."""
    parts: list[Part] = []
    for part in held:
        if not isinstance(part.tensors, dict) or part.role()[0] in ("averaged", "aside"):
            continue
        rest = part.tensors
        for path in (each.path for each in found if is_below(each.path, part.name)):
            module = path[len(part.name) :].strip(".")
            rest = {name: v for name, v in rest.items() if not is_below(name, module)}
        parts += [part._replace(tensors=rest)] if rest else []
    return parts


def is_below(path: str, above: str) -> bool:
    return not above or f"{path}.".startswith(f"{above}.")


def not_one(searched: Searched) -> str:
    """The error if no average or several were found: a table of the candidates."""
    tree, _, walked, _, found = searched
    if found:
        names = [*dict.fromkeys(each.reading.layout for each in found)]
        layouts = " and ".join(names) if len(names) < 5 else _paths.some(names)
        count = "two" if len(found) == 2 else f"{len(found)}"
        lines = [f"expected one average, found {count}: {layouts}"]
    else:
        keys = _paths.some([str(key) for key in tree])
        leaves = [leaf for each in walked for leaf in each.leaves()]
        reason = f"found none among {keys}{_pickled(leaves)}"
        lines = [f"expected averages in a layout that is known, or at a key that says so, {reason}"]
    return "\n".join(lines + _table(searched))


def _table(searched: Searched, option: str = "key") -> list[str]:
    """The lines of a table of the candidates, among which an option chooses."""
    rows, lines = _candidates(searched), []
    for path, tensors, why in rows[:_SHOWN]:
        sizes = f"{len(tensors):,} tensors, {sum(v.numel() for v in tensors):,} numbers"
        place, remark = path or '"" (the file)', why and f"; {why}"
        lines.append(f"  {place}: {sizes}, {' and '.join(dtypes_of(tensors))}{remark}")
    if len(rows) > _SHOWN:
        lines.append(f"  and {len(rows) - _SHOWN:,} more")
    if rows:
        in_command = option.replace("_", "-")
        lines.append(f"choose one with {option}=PATH, on the command line --{in_command} PATH")
    return lines


def _candidates(searched: Searched) -> list[Candidate]:
    held, found = searched.held, searched.found
    rows = [Candidate(each.path, each.values(), each.why) for each in found]
    told = {(id(v), each.path) for each in found for v in each.values()}
    above = {(i, place) for i, path in told for place in _places(path)}

    def is_told(part: Part, value: Tensor) -> bool:
        below = ((id(value), place) in told for place in _places(part.name))
        return not value.ndim or (id(value), part.name) in above or any(below)

    rest = [part for part in held if not all(is_told(part, value) for value in part.values())]
    return rows + [Candidate(part.name, part.values(), "") for part in rest]


def _places(path: str) -> list[str]:
    """A path, and the paths of the containers around it.

    >>> _places("a.b")
    ['', 'a', 'a.b']
    """
    keys = path.split(".") if path else []
    return [".".join(keys[:i]) for i in range(len(keys) + 1)]


def dtypes_of(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(v.dtype).removeprefix("torch.") for v in tensors})


def _pickled(leaves: Iterable[Any]) -> str:
    """The end of an error message: the classes of pickled objects, or nothing if there is none."""
    kinds = {type(leaf) for leaf in leaves if isinstance(leaf, Opaque)}
    names = sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    hint = "; load it where these classes are, and save a state_dict()"
    return f", beside what is not unpickled: {_paths.some(names)}{hint}" if names else ""


def _pickled_averages(walked: Sequence[Container]) -> list[str]:
    """A line for each pickled object with weights in the place of averages."""
    lines = []
    for path, value, _ in walked:
        for key, leaf in value.items() if isinstance(value, Mapping) else enumerate(value):
            place = [*path, str(key)]
            if not isinstance(leaf, Opaque) or not leaf.holds_tensors:
                continue
            if marks.role(place)[0] == "averaged":
                kind = type(leaf)
                lines.append(
                    f"{'.'.join(place)} holds a pickled {kind.__name__}: save its state_dict(), "
                    f"where {kind.__module__} can be imported; nothing but tensors is unpickled"
                )
    return lines


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


def check_beside(walked: Sequence[Container], used: set[int]) -> set[int]:
    """The ids of all tensors; ValueError for a pickled object in a mapping with a used tensor."""
    present = set()
    for _, value, _ in walked:
        here = {id(leaf) for leaf in search.listed(value) if isinstance(leaf, Tensor)}
        present |= here
        if isinstance(value, Mapping) and not used.isdisjoint(here):
            for key, leaf in value.items():
                if isinstance(leaf, Opaque) and not str(key).endswith("_extra_state"):
                    kind = type(leaf).__name__
                    raise ValueError(f"{key!r}: expected a tensor, found a pickled {kind}")
    return present
