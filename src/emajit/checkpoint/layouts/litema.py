"""`LitEma`, on its own or in a checkpoint of latent-diffusion, SGM or CogVideo.

`decay`, `num_updates` and an average for each parameter under the parameter's name without its
dots. In a full checkpoint they are below a prefix, mostly `model_ema.`, beside the trained
weights. "litema" writes such a full checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emajit import _controls, _names
from emajit.checkpoint.averaged import (
    MOST,
    Averaged,
    Layout,
    Names,
    Reading,
    State,
    Writer,
    of_parameters,
    prefixes,
    required,
    required_raw,
    step_of,
    tensors_of,
)

CONTROLS = "model_ema.decay", "model_ema.num_updates"


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if "shadow_params" in tree:  # of another library, which has the same controls
        return []
    state = tensors_of(tree)
    found = []
    for prefix in prefixes(state, "num_updates", "decay"):
        flat = _names.below(prefix, state)
        held_decay, held_updates = flat.pop("decay"), flat.pop("num_updates")
        if not flat and not prefix:
            continue  # the controls of another layout
        if not flat:
            raise ValueError(f"LitEma: expected averages beside {prefix}decay, found none")
        # 16 bits round a decay of 0.9999 to 1.
        is_exact = min(held_decay.dtype.itemsize, held_updates.dtype.itemsize) >= 4
        updates = step_of(held_updates) if is_exact else None
        step = None if updates is None or updates < 0 else updates
        decay = _controls.decimal(float(held_decay)) if is_exact else None
        module = prefix.rstrip(".")
        layout = f"LitEma at {module}" if module else "LitEma"
        raw = {key: v for key, v in state.items() if not key.startswith(prefix)}
        found.append(Reading(layout, flat, step, decay, raw or None, flat=True, path=module))
    return found


def renamed(flat: State, full: Mapping[str, str]) -> dict[str, Tensor]:
    return {full[key]: average for key, average in flat.items()}


def names_from(flat: State, raw: State) -> tuple[str, dict[str, str]]:
    """Map each key of a LitEma to the name of its parameter in `raw`; the module's prefix first.

    The averaged module is the whole model or one module in it: all names share a prefix.
    """
    first = next(iter(flat))
    prefixes = {
        ".".join([*parts[:i], ""]) if i else ""
        for parts in (name.split(".") for name in raw)
        for i in range(len(parts))
        if not _spellings(".".join(parts[i:])).isdisjoint(_spellings_of_key(first))
    }
    if len(prefixes) > MOST:
        raise ValueError(f"LitEma: {first!r}: expected one place, found {len(prefixes):,}")
    found, errors = [], []
    for prefix in sorted(prefixes):
        below = {name.removeprefix(prefix): name for name in raw if name.startswith(prefix)}
        try:
            found.append((prefix, unflattened(flat, below)))
        except _AmbiguityError:
            raise
        except ValueError as error:
            errors.append(error)
    if found and all(each == found[0][1] for _, each in found):  # with and without a wrapper
        return found[-1]
    if errors and not found:
        raise errors[0]
    raise ValueError(f"LitEma: {first!r}: expected its parameter in one place, found {len(found)}")


class _AmbiguityError(ValueError):
    """A module matches ambiguously, so that no other module may be taken instead."""


def unflattened(flat: State, names: Mapping[str, str]) -> dict[str, str]:
    """Map each key of a LitEma to a full name.

    `names` maps the names within the averaged module to the full names. If two names differ only
    in their dots, emajit's LitEma has slashes in its keys. If two differ only in wrappers, the
    names with wrappers decide if the state has a key for each.
    """
    by_spelling: dict[str, list[str]] = {}
    for name, full in names.items():
        for spelling in _spellings(name):
            by_spelling.setdefault(spelling, []).append(full)
    plain = {full: name.replace(".", "") for name, full in names.items()}
    slashed = {key: key.rstrip("/").replace("/", ".") for key in flat if "/" in key}
    apart = {names[name] for name in slashed.values() if name in names}
    found: dict[str, str] = {}
    keys: dict[str, str] = {}
    for key in flat:
        if key in slashed:
            fitting = [names[slashed[key]]] if slashed[key] in names else []
        else:
            fitting = by_spelling.get(key) or by_spelling.get(_names.bare(key), [])
            fitting = [full for full in fitting if full not in apart]
            if len(fitting) > 1 and all(plain[full] in flat for full in fitting):
                fitting = [full for full in fitting if plain[full] == key]
        if len(fitting) != 1:
            message = (
                f"LitEma: {key!r}: expected one parameter of that name, found {fitting or 'none'}"
            )
            raise _AmbiguityError(message) if fitting else ValueError(message)
        found[key] = fitting[0]
        first = keys.setdefault(fitting[0], key)
        if first != key and not torch.equal(flat[first], flat[key]):
            raise ValueError(
                f"LitEma: {key!r}: expected one average of {fitting[0]!r}, found another, {first!r}"
            )
    return found


def _spellings(name: str) -> set[str]:
    """The keys that a name may have in a LitEma: without its dots, and without wrappers."""
    plain = name.replace(".", "")
    return {plain, _names.bare(plain), _names.canonical(name).replace(".", "")}


def _spellings_of_key(key: str) -> set[str]:
    """The `_spellings` of a name that a key may match."""
    return {key, _names.bare(key), key.replace("/", "")}


def _state(averaged: Averaged, names: Names) -> dict[str, Any]:
    """The trained weights, and the averages below `model_ema.`.

    Averages of buffers are left out. The averages are of the module `model` if it holds all of
    them, else of the whole model.
    """
    averages = of_parameters(averaged, names)
    raw = required_raw("litema", averaged, averages)
    prefix = "model." if all(name.startswith("model.") for name in averages) else ""
    bare = [name.removeprefix(prefix) for name in averages]
    keys = _names.flat_keys(bare, lambda key: key in ("decay", "num_updates"))
    updates = -1 if averaged.step is None else averaged.step  # -1: without warm-up
    if updates >= 2**31:
        found = f"found {updates}"
        raise ValueError(f"litema: expected a step below 2**31, the limit of its int32, {found}")
    controls = {
        CONTROLS[0]: torch.tensor(required("decay", "litema", averaged), dtype=torch.float32),
        CONTROLS[1]: torch.tensor(updates, dtype=torch.int32),
    }
    flat = {f"model_ema.{keys[name]}": averages[prefix + name] for name in bare}
    return {**raw, **controls, **flat}


LAYOUT = Layout(_read, Writer("litema", _state, safetensors=True, torch_key="state_dict"))
