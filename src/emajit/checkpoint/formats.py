"""Everybody's checkpoints: where each library keeps the averages, one small reader a layout.

A reader takes what a file holds, as nested mappings, and the names of the parameters if they were
given. It returns None where the layout is not its own, and raises ValueError where it is, but is
broken or lacks names. Nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emajit import _decay, _memory, _names, _tree
from emajit.checkpoint.files import Opaque

State = Mapping[str, Tensor]
Names = Sequence[str] | None
_NO_NAMES = "found none; pass names=model, on the command line --names FILE"


class Averaged(NamedTuple):
    """The averages of a checkpoint.

    weights: averaged parameters, with what is not averaged (buffers, frozen parameters) as it was
        trained, under the names that the model's own `state_dict` has.
    layout: whose layout it was.
    step: how many updates the averages have taken, where that is known.
    decay: the share that an update keeps, where that is known.
    raw_only: the names in `weights` that are not averages.
    raw: the trained weights that the averages are of, by the same names, where they are there too.
    others: how many tensors of the checkpoint are neither.
    """

    weights: dict[str, Tensor]
    layout: str
    step: int | None = None
    decay: float | None = None
    raw_only: tuple[str, ...] = ()
    raw: Mapping[str, Tensor] = {}
    others: int = 0


def recognise(tree: Any, names: Names, buffers: Sequence[str]) -> Averaged:
    """The one average that is in `tree`; ValueError for none, for two, and for a broken one.

    Only a `LitEma` on its own, whose keys are flattened names, may have averages of `buffers`.
    """
    try:
        leaves = pytree.tree_leaves(tree)
    except RecursionError:
        raise ValueError(
            "expected averages in a layout that is known, found one in itself"
        ) from None
    if not isinstance(tree, Mapping):
        found_type = type(tree).__qualname__
        raise ValueError(  # noqa: TRY004, as below
            f"expected a mapping of names, found {found_type}{_pickled(leaves)}"
        )
    try:
        candidates = [
            *(reader(tree, names) for reader in _READERS),
            _lit_ema(tree, names and [*names, *buffers]),
        ]
        found = [averaged for averaged in candidates if averaged is not None]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"expected averages in a layout that is known, found {error!r}") from None
    if not found:
        keys = _tree.some([str(key) for key in tree])
        raise ValueError(
            "expected averages in a layout that is known, found none among "
            f"{keys}{_pickled(leaves)}"
        )
    if len(found) > 1:
        layouts = " and ".join([averaged.layout for averaged in found])
        raise ValueError(f"expected one average, found two: {layouts}")
    _check_values(found[0])
    used = {id(value) for part in (found[0].weights, found[0].raw) for value in part.values()}
    held = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    _check_beside(tree, used)
    return found[0]._replace(others=len(held - used))


def _pickled(leaves: Sequence[Any]) -> str:
    """The classes of pickled objects, in words for an error; nothing if there is none."""
    kinds = {type(leaf) for leaf in leaves if isinstance(leaf, Opaque)}
    names = sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    return f", beside what is not unpickled: {_tree.some(names)}" if names else ""


def _step(value: Any) -> int | None:
    """A number of updates, which a file may not tell."""
    try:
        return None if value is None else int(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"step: expected a whole number, found {value!r:.100}") from None


def _check_values(found: Averaged) -> None:
    broken = [name for name, value in found.weights.items() if not isinstance(value, Tensor)]
    if broken:
        raise ValueError(f"{found.layout}: expected tensors, found others at {broken[:5]}")
    for what, kind, value in (("step", int, found.step), ("decay", int | float, found.decay)):
        if not isinstance(value, kind | None):
            told = type(value).__qualname__
            raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
                f"{found.layout}: {what}: expected a number, found {told}"
            )
    for name in found.weights.keys() & found.raw.keys():
        expected, shape = (tuple(part[name].shape) for part in (found.raw, found.weights))
        if shape != expected:
            raise ValueError(f"{name!r}: expected an average of shape {expected}, found {shape}")


def _check_beside(tree: Any, used: set[int]) -> None:
    """Raise ValueError where a pickled object stands among tensors that are used."""
    if not isinstance(tree, Mapping):
        return
    opaque = [
        key
        for key, value in tree.items()
        if isinstance(value, Opaque) and not str(key).endswith("_extra_state")
    ]
    if opaque and any(id(value) in used for value in tree.values()):
        found = type(tree[opaque[0]]).__name__
        raise ValueError(f"{opaque[0]!r}: expected a tensor, found a pickled {found}")
    for value in tree.values():
        _check_beside(value, used)


def _lit_ema(tree: Mapping[str, Any], names: Names) -> Averaged | None:
    """`decay`, `num_updates` and flattened names, in a full checkpoint below `model_ema.`."""
    state = _state(tree.get("state_dict", tree))
    prefixes = [
        key.removesuffix("num_updates")
        for key in state
        if key.rpartition(".")[2] == "num_updates"
        and key.removesuffix("num_updates") + "decay" in state
    ]
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise ValueError(f"expected one LitEma, found several: {prefixes}")
    prefix = prefixes[0]
    flat = _names.below(prefix, state)
    decay, updates = flat.pop("decay"), flat.pop("num_updates")
    if not flat:
        raise ValueError(f"LitEma: expected averages beside {prefix}decay, found none")
    trusted = min(decay.dtype.itemsize, updates.dtype.itemsize) >= 4  # in 16 bits, 0.9999 is 1
    count = _step(updates) if trusted else None
    layout = f"LitEma at {prefix.rstrip('.')}" if prefix else "LitEma"
    step = None if count is None or count < 0 else count
    share = _decay.decimal(float(decay)) if trusted else None
    raw = {key: v for key, v in state.items() if not key.startswith(prefix)} if prefix else {}
    if not raw and names is None:
        raise ValueError(f"LitEma: expected names, which its keys do not tell, {_NO_NAMES}")
    if not raw:
        found = _unflatten(flat, {name: name for name in names or ()})
        return Averaged(_by_name(flat, found), layout, step, share)
    return _merged(_by_name(flat, _invert(flat, raw)), raw, layout, step, share)


def _invert(flat: State, raw: State) -> dict[str, str]:
    """For each key of a LitEma the one of `raw` that it is the average of.

    What was averaged is the host itself or one of its modules: the names are all below one.
    """
    first = next(iter(flat))
    hosts = {
        ".".join([*parts[:i], ""]) if i else ""
        for parts in (name.split(".") for name in raw)
        for i in range(len(parts))
        if not _spellings(".".join(parts[i:])).isdisjoint(_readings(first))
    }
    found, errors = [], []
    for host in sorted(hosts):
        below = {name.removeprefix(host): name for name in raw if name.startswith(host)}
        try:
            found.append(_unflatten(flat, below))
        except _AmbiguityError:
            raise
        except ValueError as error:
            errors.append(error)
    if len(found) == 1:
        return found[0]
    if errors and not found:
        raise errors[0]
    raise ValueError(f"LitEma: {first!r}: expected its parameter in one place, found {len(found)}")


class _AmbiguityError(ValueError):
    """The averaged module may be this one, so that no other is to be taken for it."""


def _unflatten(flat: State, names: Mapping[str, str]) -> dict[str, str]:
    """For each key of a LitEma the full one of `names`, which are as the averaged module has them.

    Where dots alone do not tell two names apart, emajit's LitEma has slashes.
    """
    by_spelling: dict[str, list[str]] = {}
    for name, full in names.items():
        for spelling in _spellings(name):
            by_spelling.setdefault(spelling, []).append(full)
    slashed = {key: key.rstrip("/").replace("/", ".") for key in flat if "/" in key}
    apart = {names[name] for name in slashed.values() if name in names}
    found = {}
    for key in flat:
        if key in slashed:
            fitting = [names[slashed[key]]] if slashed[key] in names else []
        else:
            fitting = by_spelling.get(key) or by_spelling.get(_names.bare(key), [])
            fitting = [full for full in fitting if full not in apart]
        if len(fitting) != 1:
            told = (
                f"LitEma: {key!r}: expected one parameter of that name, found {fitting or 'none'}"
            )
            raise _AmbiguityError(told) if fitting else ValueError(told)
        found[key] = fitting[0]
    return found


def _readings(key: str) -> set[str]:
    """What a key of a LitEma may be as one of the `_spellings` of its name."""
    return {key, _names.bare(key), key.replace("/", "")}


def _spellings(name: str) -> set[str]:
    """The keys that a name may have in a LitEma: without its dots, and without wrappers."""
    plain = name.replace(".", "")
    return {plain, _names.bare(plain), _names.canonical(name).replace(".", "")}


def _by_name(flat: State, found: Mapping[str, str]) -> dict[str, Tensor]:
    return {found[key]: average for key, average in flat.items()}


def _averaged_model(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """torch's `AveragedModel`: `n_averaged` and `module.*`."""
    state = _state(tree)
    if "n_averaged" not in state:
        return None
    return Averaged(_below("module.", state), "AveragedModel", _step(state["n_averaged"]))


def _timm(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """timm's training script: `state_dict_ema` beside `state_dict`."""
    if "state_dict_ema" not in tree:
        return None
    raw = _without_module(_state(tree.get("state_dict", {})))
    return Averaged(_without_module(_state(tree["state_dict_ema"])), "timm", raw=raw)


def _ema_pytorch(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """ema-pytorch's `EMA` and `KarrasEMA`; `PostHocEMA` has several below `ema_models.`."""
    state = _state(tree)
    several = sorted({key.split(".")[1] for key in state if key.startswith("ema_models.")})
    if len(several) > 1:
        raise ValueError(
            f"ema-pytorch: expected one average, found {len(several)} below 'ema_models.'; pass "
            "those below one of them"
        )
    if several:
        state = _below(f"ema_models.{several[0]}.", state)
    if not {"initted", "step"} <= state.keys():
        return None
    step = None if state["step"].is_floating_point() else _step(state["step"])  # float16 overflows
    online = any(key.startswith("online_model.") for key in state)
    raw = _below("online_model.", state) if online else {}
    return Averaged(_below("ema_model.", state), "ema-pytorch", step, raw=raw)


def _diffusers(tree: Mapping[str, Any], names: Names) -> Averaged | None:
    """diffusers' `EMAModel`: `shadow_params` by position, `optimization_step`."""
    if not {"shadow_params", "optimization_step"} <= tree.keys():
        return None
    weights = _by_position("diffusers EMAModel", tree["shadow_params"], names)
    return Averaged(weights, "diffusers EMAModel", tree["optimization_step"], tree.get("decay"))


def _torch_ema(tree: Mapping[str, Any], names: Names) -> Averaged | None:
    """torch_ema: `shadow_params` by position, `num_updates`."""
    if not {"shadow_params", "num_updates"} <= tree.keys():
        return None
    weights = _by_position("torch_ema", tree["shadow_params"], names)
    return Averaged(weights, "torch_ema", tree["num_updates"], tree.get("decay"))


def _lightning(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """Lightning's weight averaging: `state_dict` is the average, the raw one stands aside."""
    if "current_model_state" not in tree:
        return None
    step = _step(tree.get("averaging_state", {}).get("n_averaged"))
    raw = _state(tree["current_model_state"])
    return Averaged(_state(tree["state_dict"]), "Lightning weight averaging", step, raw=raw)


def _emajit_lightning(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """Of `emajit.integrations.lightning`: `emajit`, beside trained or averaged weights."""
    if "emajit" not in tree:
        return None
    ours = tree["emajit"]
    raw = _state(tree["state_dict"]) | _state(ours.get("raw", {}))
    partners = _names.match(raw, ours["shadow"])
    averages = {partners.get(name, name): v for name, v in _state(ours["shadow"]).items()}
    return _merged(averages, raw, "emajit in Lightning", _step(ours["step"]))


def _nemo(tree: Mapping[str, Any], names: Names) -> Averaged | None:
    """NeMo: `ema` by position in the state of an optimizer."""
    states = tree.get("optimizer_states", [tree])
    found = [s for s in states if isinstance(s, Mapping) and {"ema", "current_step"} <= s.keys()]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"NeMo: expected one average, found {len(found)} optimizers with one")
    weights = _by_position("NeMo", found[0]["ema"], names)
    return Averaged(weights, "NeMo", found[0]["current_step"], found[0].get("decay"))


def _d2go(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """d2go: `ema_state` by name, beside `model`."""
    if "ema_state" not in tree:
        return None
    averages = _state(tree["ema_state"])
    return _merged(averages, _state(tree.get("model", {})), "d2go")


def _mmengine(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """mmengine swaps on saving: `state_dict` is the average, `ema_state_dict` the raw weights."""
    if "ema_state_dict" not in tree:
        return None
    step = _step(tree["ema_state_dict"].get("steps"))
    raw = _below("module.", _state(tree["ema_state_dict"]))
    return Averaged(_state(tree["state_dict"]), "mmengine", step, raw=raw)


def _composer(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """Composer: in the state of the algorithm `EMA`; the weights are swapped while it is active."""
    state = tree.get("state", tree)
    algorithms = dict(state.get("algorithms", {})) if isinstance(state, Mapping) else {}
    if "EMA" not in algorithms:
        return None
    ema, raw = algorithms["EMA"], _state(state.get("model", {}))
    aside = {**ema["ema_model"]["named_parameters_dict"]}
    aside |= ema["ema_model"].get("named_buffers_dict", {})
    if ema["ema_weights_active"]:
        return Averaged(raw, "Composer", raw=aside)
    return _merged(aside, raw, "Composer")


def _torchtitan(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """torchtitan: `state.NAME.ema_params`."""
    begin, end = "state.", ".ema_params"
    keys = [key for key in map(str, tree) if key.startswith(begin) and key.endswith(end)]
    if not keys:
        return None
    weights = {key.removeprefix(begin).removesuffix(end): tree[key] for key in keys}
    return Averaged(weights, "torchtitan")


def _emajit(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    """`{"shadow": shadow, "step": step}`, as torch.save writes it."""
    if not {"shadow", "step"} <= tree.keys():
        return None
    named = _tree.named_leaves("shadow", tree["shadow"])
    _check_different("emajit", [name for _, name, _ in named])
    return Averaged({name: leaf for _, name, leaf in named}, "emajit", _step(tree["step"]))


_READERS: list[Callable[[Mapping[str, Any], Names], Averaged | None]] = [
    _emajit,
    _emajit_lightning,
    _averaged_model,
    _timm,
    _ema_pytorch,
    _diffusers,
    _torch_ema,
    _lightning,
    _nemo,
    _d2go,
    _mmengine,
    _composer,
    _torchtitan,
]


def _state(tree: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, by name."""
    if not isinstance(tree, Mapping):
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a state_dict, found {type(tree).__qualname__}"
        )
    return {key: v for key, v in tree.items() if isinstance(key, str) and isinstance(v, Tensor)}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    found = _names.below(prefix, state)
    if not found:
        raise ValueError(f"expected averages below {prefix!r}, found none")
    return found


def _without_module(state: State) -> dict[str, Tensor]:
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return _below("module.", state) if wrapped else dict(state)


def _by_position(layout: str, averages: Any, names: Names) -> dict[str, Tensor]:
    if names is None:
        raise ValueError(f"{layout}: expected names, since its averages have none, {_NO_NAMES}")
    if len(averages) != len(names):
        raise ValueError(f"{layout}: expected {len(averages)} names, found {len(names)}")
    _check_different(layout, names)
    return dict(zip(names, averages, strict=True))


def _check_different(layout: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{layout}: expected a name of its own for each, found twice {twice[:5]}")


def _merged(
    averages: dict[str, Tensor],
    raw: State,
    layout: str,
    step: int | None = None,
    decay: float | None = None,
) -> Averaged:
    """Averages, under all names of what is tied, and the raw values of what has none."""
    tied = {
        _memory.identity(raw[name]): average for name, average in averages.items() if name in raw
    }
    ties = {n: tied[i] for n, v in raw.items() if (i := _memory.identity(v)) in tied}
    averages = ties | averages
    missing = [name for name in raw if name not in averages]
    weights = {name: averages.get(name, value) for name, value in raw.items()} | averages
    return Averaged(weights, layout, step, decay, tuple(missing), raw)


CONTROLS = "model_ema.decay", "model_ema.num_updates"


def _as_state_dict(averaged: Averaged, _: Names) -> dict[str, Any]:
    return dict(averaged.weights)


def _as_lit_ema(averaged: Averaged, _: Names) -> dict[str, Any]:
    """A full checkpoint of latent-diffusion: the trained weights, averages below `model_ema.`.

    The averages are those of the module `model`, if all of them are in it, else of the host.
    """
    averages = _averages(averaged)
    if not averaged.raw.keys() >= averages.keys():
        raise ValueError("litema: expected the trained weights beside the averages, found none")
    host = "model." if all(name.startswith("model.") for name in averages) else ""
    names = [name.removeprefix(host) for name in averages]
    keys = _names.flat_keys(names, lambda key: key in ("decay", "num_updates"))
    count = -1 if averaged.step is None else averaged.step
    if count >= 2**31:
        raise ValueError(f"litema: expected a step below 2**31, which it counts to, found {count}")
    controls = {
        CONTROLS[0]: torch.tensor(_known("decay", "litema", averaged), dtype=torch.float32),
        CONTROLS[1]: torch.tensor(count, dtype=torch.int32),
    }
    flat = {f"model_ema.{keys[name]}": averages[host + name] for name in names}
    return {**averaged.raw, **controls, **flat}


def _as_averaged_model(averaged: Averaged, _: Names) -> dict[str, Any]:
    count = torch.tensor(_known("step", "averaged-model", averaged))
    return {"n_averaged": count} | {f"module.{n}": v for n, v in averaged.weights.items()}


def _as_ema_pytorch(averaged: Averaged, _: Names) -> dict[str, Any]:
    step = torch.tensor(_known("step", "ema-pytorch", averaged))
    online = {f"online_model.{name}": value for name, value in averaged.raw.items()}
    average = {f"ema_model.{name}": value for name, value in averaged.weights.items()}
    return {"initted": torch.tensor(True), "step": step, **online, **average}


def _as_timm(averaged: Averaged, _: Names) -> dict[str, Any]:
    return {"state_dict": dict(averaged.raw), "state_dict_ema": dict(averaged.weights)}


def _as_diffusers(averaged: Averaged, names: Names) -> dict[str, Any]:
    return {
        "decay": _known("decay", "diffusers-ema", averaged),
        "min_decay": 0.0,
        "optimization_step": _known("step", "diffusers-ema", averaged),
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
        "shadow_params": _in_order("diffusers-ema", averaged, names),
    }


def _as_torch_ema(averaged: Averaged, names: Names) -> dict[str, Any]:
    return {
        "decay": _known("decay", "torch-ema", averaged),
        "num_updates": averaged.step,
        "shadow_params": _in_order("torch-ema", averaged, names),
        "collected_params": None,
    }


_WRITERS: dict[str, Callable[[Averaged, Names], dict[str, Any]]] = {
    "state_dict": _as_state_dict,
    "litema": _as_lit_ema,
    "averaged-model": _as_averaged_model,
    "ema-pytorch": _as_ema_pytorch,
    "timm": _as_timm,
    "diffusers-ema": _as_diffusers,
    "torch-ema": _as_torch_ema,
}
LAYOUTS = tuple(_WRITERS)
OF_SAFETENSORS = "state_dict", "litema"
BY_POSITION = "diffusers-ema", "torch-ema"


def written(averaged: Averaged, layout: str, names: Names) -> dict[str, Any]:
    """What a file in one of the `LAYOUTS` holds.

    Raises ValueError for another layout, and where the layout needs what was not there: "litema"
    the trained weights and a decay; "averaged-model", "ema-pytorch" and "diffusers-ema" the step,
    without which they would start from the model again; "diffusers-ema" and "torch-ema" a decay,
    and names, whose order a file may have lost.
    """
    if layout not in _WRITERS:
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, found {layout!r}")
    return _WRITERS[layout](averaged, names)


def _averages(averaged: Averaged) -> dict[str, Tensor]:
    """The averages, of what is tied under its first name."""
    named = {n: v for n, v in averaged.weights.items() if n not in averaged.raw_only}
    tied = _memory.ties(named)
    return {name: value for name, value in named.items() if name not in tied}


def _known(what: str, layout: str, averaged: Averaged) -> Any:
    """The "step" or the "decay"."""
    value = getattr(averaged, what)
    if value is None:
        raise ValueError(
            f"{layout}: expected a checkpoint that tells its {what}, or a {what} to write, "
            "found none"
        )
    return value


def _in_order(layout: str, averaged: Averaged, names: Names) -> list[Tensor]:
    if names is None:
        raise ValueError(
            f"{layout}: expected names of the averages in the order of the model's parameters, "
            f"{_NO_NAMES}"
        )
    _check_different(layout, names)
    held = {n: v for n, v in averaged.weights.items() if n not in averaged.raw_only}
    unknown = [name for name in names if name not in held]
    named = {_memory.identity(held[name]) for name in names if name in held}
    averages = _averages(averaged)
    left_out = [name for name, v in averages.items() if _memory.identity(v) not in named]
    if unknown or left_out:
        hint = "; of the parameters of a model alone with names=model" * bool(left_out)
        told = [f"without {_tree.some(left_out)}"] * bool(left_out)
        told += [f"with {_tree.some(unknown)}, which is no average"] * bool(unknown)
        raise ValueError(
            f"{layout}: expected names of all averages, found them {' and '.join(told)}{hint}"
        )
    return [held[name] for name in names]
