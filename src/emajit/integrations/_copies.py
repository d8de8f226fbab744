"""The copies of the weights in a checkpoint of Lightning, and the averages among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from emajit import _module, _names, _shards, _warn
from emajit.checkpoint.averaged import Averaged, completed
from emajit.checkpoint.layouts import lightning as weight_averaging
from emajit.checkpoint.layouts import native_lightning
from emajit.integrations import _average

KEY = "emajit"


def averaged_in(checkpoint: Mapping[str, Any]) -> Averaged | None:
    """Averages of this callback, or of Lightning's `WeightAveraging` and `EMAWeightAveraging`."""
    if "state_dict" not in checkpoint:  # from a folder of shards, which are loaded already
        return None
    for found in native_lightning.read(checkpoint):
        averages, raw = dict[str, Any](found.averages), found.raw or {}
        return completed(averages, raw, found.layout, found.step)
    for found in weight_averaging.read(checkpoint):  # all its weights are averages
        averages, raw = dict[str, Any](found.averages), found.raw or {}
        return Averaged(averages, found.layout, found.step, raw=raw)
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


def whole(averaged: Averaged, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's copies of the weights, each completed to a whole `state_dict`."""
    ours = checkpoint.get(KEY, {})
    # Before its first update an `AveragedModel` holds its initial weights.
    is_none = not ours and not averaged.step
    copies: dict[str, Any] = {
        "shadow": averaged.raw if is_none else averaged.weights,
        "step": averaged.step or 0,
        "averaged_at": ours.get("averaged_at", checkpoint["global_step"]),
        "is_whole": True,
    }
    if not ours or "raw" in ours:
        copies["raw"] = averaged.raw
    return copies
