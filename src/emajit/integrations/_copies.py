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
    if "state_dict" not in checkpoint:  # but a folder of shards, which were loaded already
        return None
    for found in native_lightning.read(checkpoint):
        averages, raw = dict[str, Any](found.averages), found.raw or {}
        return completed(averages, raw, found.layout, found.step)
    for found in weight_averaging.read(checkpoint):  # whose averages are all that it has
        averages, raw = dict[str, Any](found.averages), found.raw or {}
        return Averaged(averages, found.layout, found.step, raw=raw)
    return None


def warn_of_changes(module: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Warn if the parameters are other numbers than were loaded, by a hook of torch's."""
    for name, p in module.named_parameters():
        if p.requires_grad and name in loaded and _differs(p, loaded[name]):
            _warn.warn(
                f"{name}: the module has changed trained weights as it loaded them, and its "
                "averages are as they were saved; on_load_checkpoint is shown both"
            )
            return


def _differs(param: Tensor, value: Tensor) -> bool:
    """Whether a parameter and a saved value of it differ, by more than a cast."""
    if _shards.is_one(param) or _shards.is_one(value) or not param.is_floating_point():
        return False
    return _average.fingerprint([param]) != _average.fingerprint([value], param.dtype)


def averages_in(
    state: Mapping[str, Any], module: nn.Module, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The averages in a whole state, which has the trained values of what is not averaged."""
    chosen = _names.Filter(options["include"], options["exclude"])
    params, buffers = _module.averaged(module, options["buffers"], chosen)
    tensors = _module.named_parameters(module) | buffers
    bare = _names.canonical_of(tensors)
    found: dict[str, Tensor] = {}
    for name, key in _names.match(state, tensors).items():
        # What is frozen was averaged before if its average is another than its value.
        is_average = name in params or name in buffers or _differs(tensors[name], state[key])
        if is_average and chosen.keeps(bare[name]):
            found[bare[name]] = state[key]
    return found


def whole(averaged: Averaged, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's copies of the weights, each with all that a `state_dict` has."""
    ours = checkpoint.get(KEY, {})
    # Before its first update an `AveragedModel` has the weights that it was made with.
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
