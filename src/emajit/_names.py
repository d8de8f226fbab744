"""Parameter names: the prefixes of wrappers, and LitEma's flattened keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# Names with wildcards, as in file names, or a predicate.
Patterns = str | Sequence[str] | Callable[[str], bool]

# torch.compile; DataParallel and DistributedDataParallel; activation checkpointing; FSDP.
_WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical(name: str) -> str:
    """A parameter's name without the components that wrappers add.

    >>> canonical("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
    'encoder.weight'
    """
    *modules, parameter = name.split(".")
    return ".".join([part for part in modules if part not in _WRAPPERS] + [parameter])


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Map each name to the name without the components of wrappers, for an unwrapped model.

    `module.` may be the model's own name: it is removed only if all names begin with it. Names
    that would become equal stay as they are.

    >>> unwrapped(["module._orig_mod.a.w", "module.module.b"])
    {'module._orig_mod.a.w': 'a.w', 'module.module.b': 'module.b'}
    """
    bare = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS - {"module"})
        for name in names
    }
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {name: short.removeprefix("module.") for name, short in bare.items()}
    same = _grouped(bare)
    return {name: short if len(same[short]) == 1 else name for name, short in bare.items()}


def unwrap(held: Mapping[str, T]) -> dict[str, T]:
    """`held` under its `unwrapped` names."""
    bare = unwrapped(held)
    return {bare[name]: value for name, value in held.items()}


def canonical_of(names: Collection[str]) -> dict[str, str]:
    """Map each name to its `canonical` name, or to itself if two would become equal.

    >>> canonical_of(["_orig_mod.a", "b", "module.b"])
    {'_orig_mod.a': 'a', 'b': 'b', 'module.b': 'module.b'}
    """
    bare = {name: canonical(name) for name in names}
    same = _grouped(bare)
    return {name: it if len(same[it]) == 1 else name for name, it in bare.items()}


def named(model: Any, kind: str, *, twice: bool = False) -> dict[str, Any]:
    """The "parameters" or "buffers" of a module by name; with `twice` also the names of ties.

    An override of `named_parameters` may lack the argument `remove_duplicate`.
    """
    ask = getattr(model, f"named_{kind}")
    if twice and "remove_duplicate" in signature(ask).parameters:
        return dict(ask(remove_duplicate=False))
    return dict(ask())


def _grouped(pairs: Mapping[str, str]) -> dict[str, list[str]]:
    """Map each value to its keys. Dynamo of torch 2.6 cannot trace a `Counter`."""
    found: dict[str, list[str]] = {}
    for key, value in pairs.items():
        found.setdefault(value, []).append(key)
    return found


def below(prefix: str, held: Mapping[str, T]) -> dict[str, T]:
    """The items whose names begin with `prefix`, without the prefix.

    >>> below("ema.", {"ema.w": 1, "w": 2})
    {'w': 1}
    """
    return {key.removeprefix(prefix): v for key, v in held.items() if key.startswith(prefix)}


def attribute(names: Iterable[str]) -> str:
    """The attribute that all names share, with its dot; "" for none, or an index of a list.

    >>> attribute(["a.b.w", "a.b.c.w"]), attribute(["a.w", "b.w"]), attribute(["0.w"])
    ('a.', '', '')
    """
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    (attribute,) = first if len(first) == 1 else [""]
    return f"{attribute}." if attribute and not attribute.isdecimal() else ""


def match(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Match each name in `others` with the name in `names` of the same parameter.

    Equal names match first, then names that are equal without the components of wrappers. Names
    in `others` without a partner are left out. Raises ValueError where more than one match exists.

    >>> match(["a.weight", "b.weight"], ["_orig_mod.a.weight", "c.weight"])
    {'_orig_mod.a.weight': 'a.weight'}
    >>> match(["a.weight"], ["a.weight", "a.module.weight"])
    {'a.weight': 'a.weight'}
    """
    by_canonical = _grouped({name: canonical(name) for name in names})
    same_name = set(names).intersection(others)
    partners: dict[str, str] = {}
    for other in others:
        if other in same_name:
            partners[other] = other
            continue
        same = by_canonical.get(canonical(other), [])
        if same_name.issuperset(same):
            continue
        if len(same) > 1:
            raise ValueError(f"{other}: expected one parameter of that name, found {same}")
        partners[other] = same[0]
    for name, claims in _grouped(partners).items():
        if len(claims) > 1:
            raise ValueError(f"{name}: expected one partner, found {claims}")
    return partners


class Filter(NamedTuple):
    """Chooses the averaged parameters: all included names (by default all) except the excluded.

    >>> [name for name in ("a.weight", "a.bias", "b.bias") if Filter("a.*", "*.bias").keeps(name)]
    ['a.weight']
    """

    include: Patterns | None = None
    exclude: Patterns | None = None

    def keeps(self, name: str) -> bool:
        included = self.include is None or _matches(self.include, name)
        return included and not (self.exclude is not None and _matches(self.exclude, name))

    def check(self, names: Collection[str]) -> None:
        """Raise TypeError for another type, ValueError for a pattern that matches no name."""
        for option, patterns in self._asdict().items():
            if patterns is None or callable(patterns):
                continue
            for pattern in _listed(option, patterns):
                if names and not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{option}: expected names, found none that match {pattern!r}")


def select(
    named: Mapping[str, T] | Iterable[tuple[str, T]],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> dict[str, T]:
    """The entries of `named` that are to be averaged, in their order, under their own names.

    Where parameters are left out, enter `ema_scope` with `strict=False`: they keep their training
    weights there, and an `averaged_module` shares them with the model.

    Args:
        named: named tensors, such as `model.named_parameters()` or a `state_dict()`.
        include: names with wildcards such as "encoder.*", one or a list, or a predicate on the
            name. They are compared with the names without the prefixes of `torch.compile`,
            `DistributedDataParallel`, FSDP and activation checkpointing. By default all.
        exclude: in the same form, names to leave out of those.

    Raises:
        ValueError: a pattern matches no name, or no entry is left.
        TypeError: another type of pattern, or a module in place of its parameters.

    >>> params = {"router.bias": 1, "expert.bias": 2, "expert.weight": 3}
    >>> select(params, include="*.bias", exclude="router.*")
    {'expert.bias': 2}
    """
    if hasattr(named, "named_parameters"):
        found = type(named).__qualname__
        raise TypeError(f"named: expected model.named_parameters(), found the module {found}")
    entries = dict(named)
    chosen, bare = Filter(include, exclude), canonical_of(entries)
    chosen.check(bare.values())
    kept = {name: value for name, value in entries.items() if chosen.keeps(bare[name])}
    if entries and not kept:
        raise ValueError("include, exclude: expected entries of named, found that none is left")
    return kept


def _matches(patterns: Patterns, name: str) -> bool:
    if callable(patterns):
        return bool(patterns(name))
    each = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in each)


def _listed(option: str, patterns: Any) -> Sequence[str]:
    if isinstance(patterns, str):
        return [patterns]
    if isinstance(patterns, list | tuple) and all(isinstance(each, str) for each in patterns):
        return patterns
    found = type(patterns).__qualname__
    raise TypeError(f"{option}: expected names with wildcards or a predicate, found {found}")


def flat_keys(names: Collection[str], is_taken: Callable[[str], bool]) -> dict[str, str]:
    """Map each parameter name to the key of its buffer in LitEma: the name without its dots.

    If that key is not unique among `names`, or `is_taken` by another attribute, dots become
    slashes instead, and slashes are appended until the key is unique.

    >>> flat_keys(["a.weight", "a.bias"], lambda key: False)
    {'a.weight': 'aweight', 'a.bias': 'abias'}
    >>> flat_keys(["a.bc", "ab.c", "decay"], lambda key: key == "decay")
    {'a.bc': 'a/bc', 'ab.c': 'ab/c', 'decay': 'decay/'}
    """
    flat = {name: name.replace(".", "") for name in names}
    count = Counter(flat.values())
    keys = {name: key for name, key in flat.items() if count[key] == 1 and not is_taken(key)}
    used = set(keys.values())
    for name in names:
        if name not in keys:
            key = name.replace(".", "/")
            while key in used or is_taken(key):
                key += "/"
            used.add(key)
            keys[name] = key
    return {name: keys[name] for name in names}


def unwrap_flat_keys(state: Mapping[str, T], keys: Collection[str]) -> dict[str, T]:
    """`state`, with the keys of a wrapped model renamed to the matching `keys`.

    A flat key contains the names of wrappers without dots. A key is renamed only if the match is
    unambiguous.

    >>> unwrap_flat_keys({"ema._orig_modaweight": 1, "ema.decay": 2}, ["ema.aweight", "ema.decay"])
    {'ema.aweight': 1, 'ema.decay': 2}
    """
    by_bare = _grouped({key: bare(key) for key in keys})
    renamed: dict[str, T] = {}
    for key, value in state.items():
        same = [] if key in keys else by_bare.get(bare(key), [])
        fits = len(same) == 1 and same[0] not in state and same[0] not in renamed
        renamed[same[0] if fits else key] = value
    return renamed


def bare(key: str) -> str:
    """A flat key without the names of wrappers, which it contains without dots."""
    prefix, dot, flat = key.rpartition(".")
    for wrapper in _WRAPPERS - {"module"}:
        flat = flat.replace(wrapper, "")
    return prefix + dot + flat.removeprefix("module")
