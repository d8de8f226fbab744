"""The copies of the weights in a checkpoint of Lightning, and other parts of its callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from emajit import _module, _names, _shards, _warn
from emajit.checkpoint.averaged import completed
from emajit.checkpoint.layouts import lightning as weight_averaging
from emajit.checkpoint.layouts import native_lightning
from emajit.integrations import _average

KEY = "emajit"


def written(
    shadows: Mapping[str, Mapping[str, Tensor]], step: int, averaged_at: int
) -> dict[str, Any]:
    """The part of a checkpoint with averages: a single one is "shadow", others in "shadows"."""
    named = {name: shadow for name, shadow in shadows.items() if name != _average.ONLY}
    single = {"shadow": shadows[_average.ONLY]} if _average.ONLY in shadows else {}
    return {
        **single,
        **({"shadows": named} if named else {}),
        "step": step,
        "averaged_at": averaged_at,
    }


def read(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The averages by name, and what is saved beside them; None where there are none.

    They are of this callback, or of Lightning's `WeightAveraging` and `EMAWeightAveraging`.
    """
    ours = checkpoint.get(KEY)
    if ours is None:
        return completed_in(checkpoint)
    single = {_average.ONLY: ours["shadow"]} if "shadow" in ours else {}
    shadows = {**single, **ours.get("shadows", {})}
    return {"raw": None, "is_whole": False, **ours, "shadows": shadows}


def completed_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `read`, with each copy of the weights completed to a whole `state_dict`."""
    if "state_dict" not in checkpoint:  # from a folder of shards, which are loaded already
        return None
    if KEY in checkpoint and (ours := read(checkpoint)):
        for name, found in zip(ours["shadows"], native_lightning.read(checkpoint), strict=True):
            raw = found.raw or {}
            whole = completed(dict[str, Any](found.averages), raw, found.layout)
            ours["shadows"][name] = whole.weights
            ours["raw"] = raw if ours["raw"] is not None else None
        return {**ours, "is_whole": True}
    for found in weight_averaging.read(checkpoint):  # all its weights are averages
        # Before its first update an `AveragedModel` holds its initial weights.
        shadow = dict[str, Any]((found.averages if found.step else found.raw) or {})
        return {
            "shadows": {_average.ONLY: shadow},
            "step": found.step or 0,
            "averaged_at": checkpoint["global_step"],
            "raw": found.raw,
            "is_whole": True,
        }
    return None


def warn_of_changes(module: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Warn if a hook has changed parameters while they were loaded."""
    for name, p in module.named_parameters():
        if p.requires_grad and name in loaded and _differs(p, loaded[name]):
            _warn.warn(
                f"{name}: the module has changed trained weights while loading them, but not its "
                "averages; change both in on_load_checkpoint"
            )
            return


def _differs(param: Tensor, value: Tensor) -> bool:
    """Whether a parameter differs from its saved value by more than a cast."""
    if _shards.is_one(param) or _shards.is_one(value) or not param.is_floating_point():
        return False
    return _average.fingerprint([param]) != _average.fingerprint([value], param.dtype)


def averages_in(
    state: Mapping[str, Any], module: nn.Module, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The averages in a whole state, which holds trained values for all other tensors."""
    chosen = _names.Filter(options["include"], options["exclude"])
    params, buffers = _module.averaged(module, options["buffers"], chosen)
    tensors = _module.named_parameters(module) | buffers
    bare = _names.canonical_of(tensors)
    found: dict[str, Tensor] = {}
    for name, key in _names.match(state, tensors).items():
        # A frozen parameter was averaged before if its average differs from its value.
        is_average = name in params or name in buffers or _differs(tensors[name], state[key])
        if is_average and chosen.keeps(bare[name]):
            found[bare[name]] = state[key]
    return found


def with_ties(module: nn.Module, partners: Mapping[str, str]) -> dict[str, str]:
    """The inverse of `partners`, with all names of tied tensors in the module's state."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    bare = {name: bare for bare, name in partners.items()}
    tied = {
        other: bare[name]
        for same in names.values()
        for name in same
        if name in bare
        for other in same
    }
    return bare | tied


def without_ties(module: nn.Module, shadow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`shadow` without equal averages under further names of the module's tied parameters.

    They come from a file that had each weight of its own, as of shards that were gathered.
    """
    named = _names.named(module, "parameters", twice=True)
    bare, first = _names.canonical_of(named), dict[int, str]()
    firsts = {bare[name]: first.setdefault(id(p), bare[name]) for name, p in named.items()}
    return {
        name: value
        for name, value in shadow.items()
        if (other := firsts.get(name, name)) == name
        or other not in shadow
        or not value.equal(shadow[other])
    }


def log_as(log: Callable[..., None], suffix: str, name: str, *args: Any, **kwargs: Any) -> None:
    """Log a metric under its name and a suffix."""
    log(f"{name}_{suffix}", *args, **kwargs)
