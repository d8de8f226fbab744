"""The paths of leaves in a tree, and the errors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from emajit import _shards, _torch
from emajit._torch import pytree

PyTree = Any


def is_flat(tree: PyTree) -> bool:
    return type(tree) is dict and all(v is None or isinstance(v, Tensor) for v in tree.values())


def paths(tree: PyTree) -> list[str]:
    """The path of each leaf, as one would write it in Python."""
    if is_flat(tree):  # takes a tenth of the time
        return [f"[{name!r}]" for name in tree]
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a node whose class was registered without names for its children
        return [f"<leaf {i}>" for i in range(len(pytree.tree_leaves(tree)))]


def path(which: str, tree: PyTree, index: int) -> str:
    return which + paths(tree)[index]


def named_leaves(which: str, tree: PyTree) -> list[tuple[str, str, Tensor]]:
    """The path, the dotted name and the tensor of each leaf that is not None.

    Raises TypeError for a leaf that is no tensor, and ValueError for a node whose class was
    registered without names for its children; `which` is what errors call the tree.

    >>> [row[:2] for row in named_leaves("shadow", {"a": [torch.ones(1)], "b": None})]
    [("shadow['a'][0]", 'a.0')]
    """
    check_leaves(which, tree)
    found = [which + path for path in paths(tree)]
    try:
        keys = [key for key, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError as error:
        raise ValueError(f"{which}: expected names for all children, found {error}") from None
    names = [".".join(map(_word, key)) for key in keys]
    leaves = pytree.tree_leaves(tree)
    return [row for row in zip(found, names, leaves, strict=True) if row[2] is not None]


def _word(entry: Any) -> str:
    """The word for one entry of a path, which is of one of pytree's three key classes."""
    return str(next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)))


def check_leaves(which: str, tree: PyTree) -> None:
    """Raise TypeError if a leaf is neither a tensor nor None."""
    for i, leaf in enumerate(pytree.tree_leaves(tree)):
        if not (leaf is None or isinstance(leaf, Tensor)):
            raise TypeError(_not_a_leaf(which, tree, i, leaf))
        if _shards.is_absent(leaf):
            _shards.check_present(path(which, tree, i), leaf)


def _not_a_leaf(which: str, tree: PyTree, index: int, leaf: object) -> str:
    found = (
        f"{path(which, tree, index)}: expected a tensor or None, found {type(leaf).__qualname__}"
    )
    if isinstance(leaf, torch.nn.Module | Iterator):
        return f"{found}; {_hint(leaf) if which == 'params' else of_averages(leaf)}"
    return found


def of_averages(module: object) -> str:
    """What to pass in place of a module that has averages."""
    tensors = "named_averages" if hasattr(module, "named_averages") else "state_dict"
    return f"pass a dict of tensors, such as its {tensors}()"


def _hint(params: object) -> str:
    if hasattr(params, "to_tensordict"):  # TensorDictParams: a module, and no pytree
        return "pass its `data`, a TensorDict of the same memory"
    if hasattr(params, "named_averages"):
        return "pass its named_averages()"
    return "pass dict(model.named_parameters())"


def not_a_pair(shadow: PyTree, index: int, s: object, p: object) -> Exception:
    """The error for a leaf that is a tensor in only one of the two trees."""
    for which, leaf in (("shadow", s), ("params", p)):
        if not (leaf is None or isinstance(leaf, Tensor) or not _torch.is_leaf(leaf)):
            return TypeError(_not_a_leaf(which, shadow, index, leaf))
    expected, found = (
        "None" if x is None else "a tensor" if isinstance(x, Tensor) else type(x).__qualname__
        for x in (s, p)
    )
    where = path("params", shadow, index)
    return ValueError(f"{where}: expected {expected} as in shadow, found {found}")


class DeviceError(ValueError):
    """A parameter on another device than its average."""


def leaf_differs(shadow: PyTree, index: int, s: Tensor, p: Tensor) -> ValueError:
    """The error for two tensors that differ in shape, device, layout or kind of number."""
    if s.shape != p.shape:
        expected, found = f"shape {tuple(s.shape)} as in shadow", str(tuple(p.shape))
    elif s.device != p.device:
        expected, found = f"device {s.device} as in shadow", str(p.device)
    elif s.layout is not torch.strided or p.layout is not torch.strided:
        expected, found = "dense tensors", f"{s.layout} in shadow and {p.layout} in params"
    else:
        expected, found = f"a number that {s.dtype} as in shadow can hold", str(p.dtype)
    kind = DeviceError if found == str(p.device) else ValueError
    return kind(f"{path('params', shadow, index)}: expected {expected}, found {found}")


def placed_differently(shadow: PyTree, index: int, s: Tensor, p: Tensor) -> ValueError:
    """The error for DTensors that are not sharded alike."""
    hints = {
        (True, False): "; the reshard() of a module of FSDP makes its parameters shards again",
        (False, True): "; make the shadow of the sharded parameters",
    }
    hint = hints.get((_shards.is_one(s), _shards.is_one(p)), "")
    return ValueError(f"{path('params', shadow, index)}: {_shards.misplaced(p, s)}{hint}")


def structure_differs(shadow: PyTree, params: PyTree, error: ValueError) -> ValueError:
    """The error for two trees of different structures."""
    if not (isinstance(params, Tensor) or params is None) and _torch.is_leaf(params):
        kind, other = type(shadow).__qualname__, type(params).__qualname__
        return ValueError(f"params: expected {kind} as shadow, found {other}; {_hint(params)}")
    ours, theirs = set(paths(shadow)), set(paths(params))
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if not missing and not extra:
        return ValueError(f"params: expected the structure of shadow, found another: {error}")
    told = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(extra)} too"] * bool(extra)
    return ValueError(
        f"params: expected the structure of shadow, found that it {' and '.join(told)}"
    )


def some(names: list[str]) -> str:
    """The first five of `names`, and how many more there are."""
    return ", ".join(names[:5]) + _more(names)


def few(names: list[str]) -> str:
    """As `some`, written as a Python list."""
    return f"{names[:5]}{_more(names)}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""
