"""Averages of a model in shards, of FSDP or ZeRO 3, in the checkpoints of transformers' Trainer.

All processes call these functions together.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, _shards, checkpoint
from emajit.checkpoint import saved
from emajit.integrations import _zero

_OF = "trained"


def prepare(model: nn.Module, optimizer: Any, pull: object) -> bool:
    """Whether the model is in shards, of `fully_shard` or ZeRO 3.

    Raises ValueError, with the way out, for other shards, and for `pull` with DeepSpeed.
    """
    _zero.check_pull(optimizer, pull)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "model: expected whole parameters or those of fully_shard, found FSDP 1; "
            "set version=2 in fsdp_config"
        )
    is_fsdp = _shards.has_fsdp(model)
    for name, p in model.named_parameters():
        if _shards.is_one(p) and not is_fsdp:
            raise ValueError(
                f"{name}: expected a whole parameter or one of fully_shard, found "
                f"{_shards.described(p)}"
            )
    return _zero.prepare(model) or is_fsdp


def is_whole(optimizer: Any) -> bool:
    """Whether the Trainer saves whole states: without shards, and with FULL_STATE_DICT."""
    plugin = getattr(getattr(optimizer, "accelerator_state", None), "fsdp_plugin", None)
    return plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type)


def before_state(model: nn.Module, call: Callable[[], None]) -> AbstractContextManager[None]:
    """A context with a call of a function before each `state_dict` of a model in shards.

    Not before those that the function asks for. With ZeRO 3 before each checkpoint of DeepSpeed.
    """
    if _zero.is_prepared(model):
        return _zero.before_checkpoints(model, call)
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
    handle: AbstractContextManager[None] = bare.register_state_dict_pre_hook(hook)
    return handle


def guarded(model: nn.Module, call: Callable[[], None]) -> AbstractContextManager[object]:
    """A context with a call of a function before each `state_dict` and `load_state_dict`.

    With ZeRO 3 without one: `before_state` sees all, and a model's own state is empty.
    """
    hooks = ExitStack()
    if not _zero.is_prepared(model):
        bare = getattr(model, "_orig_mod", model)
        for register in (bare.register_state_dict_pre_hook, bare.register_load_state_dict_pre_hook):
            hooks.enter_context(register(lambda *_: call()))
    return hooks


def weights(model: nn.Module, *, keeps: bool) -> dict[str, Tensor] | None:
    """The whole state of a model in shards, in host memory; None for a model without shards.

    It is gathered tensor by tensor; only a process that `keeps` it has more than one at a time.
    """
    if _zero.is_prepared(model):
        mirror: Any = _zero.mirror(getattr(model, "_orig_mod", model))
        return _gathered(mirror.state_dict(), _zero.shapes(model), keeps=keeps)
    if not _shards.has_fsdp(model):
        return None
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415, as in `native`

    return _gathered(get_model_state_dict(model), {}, keeps=keeps)


def _gathered(
    tensors: Mapping[str, Any], shapes: Mapping[str, torch.Size], *, keeps: bool
) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        whole = _zero.whole(name, tensor, shapes)
        if keeps:
            kept[name] = whole
    return kept


def save(
    path: Path,
    shadow: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    step: int,
    of: str,
    *,
    is_whole: bool,
    writes: bool,
) -> None:
    """Write averages and the fingerprint of their trained weights into a checkpoint.

    Whole averages are gathered, and a process that `writes` saves them in a file; else every
    process writes its shards into a folder. Raises as `checkpoint.save` and `save_sharded`.
    """
    if is_whole:
        whole = _gathered(shadow, shapes, keeps=writes)
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


def load(
    path: Path, like: dict[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], int]:
    """Read the averages, in shards where `like` has shards, and their step; raises as the loaders.

    `shapes` are those of averages that `like` has flat. The number of processes may have changed
    since saving.
    """
    if not path.is_file():
        return checkpoint.load_sharded(path, like)
    if not shapes:
        return checkpoint.load(path, like)
    loaded = {}
    with saved.opened(path) as file:
        for name, average in like.items():
            expected = tuple(shapes.get(name, average.shape)), average.dtype
            if file.form(name) != expected:
                found = file.form(name)
                raise ValueError(f"{path}: {name!r}: expected {expected}, found {found}")
            loaded[name] = _shards.split_as(average, file.read(name).reshape(average.shape))
        return loaded, file.record.step
