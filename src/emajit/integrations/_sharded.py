"""Averages of a model that `fully_shard` has sharded, in the checkpoints of transformers' Trainer.

All processes call these functions together.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, _shards, checkpoint
from emajit.checkpoint import saved

_OF = "trained"


def check(model: nn.Module) -> None:
    """Raise ValueError, with the way out, unless all parameters are whole or of `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "model: expected whole parameters or those of fully_shard, found FSDP 1; "
            "set version=2 in fsdp_config"
        )
    is_fsdp = _shards.has_fsdp(model)
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(
                f"{name}: expected a whole parameter, found one in shards of DeepSpeed ZeRO 3; "
                "use ZeRO 2, or FSDP with version=2 in fsdp_config"
            )
        if _shards.is_one(p) and not is_fsdp:
            raise ValueError(
                f"{name}: expected a whole parameter or one of fully_shard, found "
                f"{_shards.described(p)}"
            )


def is_whole(optimizer: Any) -> bool:
    """Whether the Trainer saves whole states: without shards, and with FULL_STATE_DICT."""
    plugin = getattr(getattr(optimizer, "accelerator_state", None), "fsdp_plugin", None)
    return plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type)


def before_state(model: nn.Module, call: Callable[[], None]) -> Callable[[], None]:
    """Call a function before each `state_dict` of a model that it does not ask for by itself.

    Returns the function that removes the hook.
    """
    is_within = False

    def hook(*_: Any) -> None:
        nonlocal is_within
        if not is_within:
            is_within = True
            try:
                call()
            finally:
                is_within = False

    bare: Any = getattr(model, "_orig_mod", model)
    remove: Callable[[], None] = bare.register_state_dict_pre_hook(hook).remove
    return remove


def weights(model: nn.Module, *, keeps: bool) -> dict[str, Tensor] | None:
    """The whole state of a model in shards, in host memory; None for a model without shards.

    It is gathered tensor by tensor; only a process that `keeps` it has more than one at a time.
    """
    if not _shards.has_fsdp(model):
        return None
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415, as in `native`

    return _gathered(get_model_state_dict(model), keeps=keeps)


def _gathered(tensors: Mapping[str, Any], *, keeps: bool) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        whole = _shards.whole(tensor)
        if keeps:
            kept[name] = whole
    return kept


def save(
    path: Path, shadow: Mapping[str, Tensor], step: int, of: str, *, is_whole: bool, writes: bool
) -> None:
    """Write averages and the fingerprint of their trained weights into a checkpoint.

    Whole averages are gathered, and a process that `writes` saves them in a file; else every
    process writes its shards into a folder. Raises as `checkpoint.save` and `save_sharded`.
    """
    if is_whole:
        whole = _gathered(shadow, keeps=writes)
        if writes:
            checkpoint.save(path, whole, step, metadata={_OF: of})
        return
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    if writes:
        shutil.rmtree(path, ignore_errors=True)  # of a run that this one repeats
    tensors = {saved.SHADOW + name: average.detach() for name, average in shadow.items()}
    counts = {"step": torch.tensor(step), _OF: torch.tensor(int(of, 16))}
    sharded.write(path, {**tensors, **counts})


def told(path: Path) -> tuple[list[str], str | None]:
    """The names of the averages in a file or folder, and the fingerprint of the trained weights."""
    if path.is_file():
        with saved.opened(path) as file:
            return file.names(), file.record.metadata.get(_OF)
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    held = sharded.Folder(path)
    of = torch.zeros((), dtype=torch.int64)
    held.read_into({_OF: of}, alone=True)
    return [*_names.below(saved.SHADOW, held.forms)], f"{int(of):08x}"


def load(path: Path, like: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Read the averages, in shards where `like` has shards, and their step; raises as the loaders.

    The number of processes may have changed since saving.
    """
    return checkpoint.load(path, like) if path.is_file() else checkpoint.load_sharded(path, like)
