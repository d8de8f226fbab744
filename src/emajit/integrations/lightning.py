"""A callback for Lightning."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from emajit import _module, _names, _shards, _warn, schedules, scope
from emajit._context import contextmanager
from emajit._torch import pytree
from emajit.functional import Decay, Nonfinite, Rounding, Schedule
from emajit.integrations import _average, _copies
from emajit.litema import LitEma

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    message = "emajit.integrations.lightning needs lightning; pip install lightning"
    raise ModuleNotFoundError(message, name=error.name) from None

_NO_AVERAGES = "the checkpoint has no averages of EMACallback; its weights stand for them"


class EMACallback(Callback):
    """Averages the weights in training; validates, tests and predicts with the averages.

    The trainable parameters are averaged after each batch in which the optimizer has stepped, not
    after the other batches of an accumulated gradient. The module has the averages only in
    validation, test and prediction, and its trained weights in training and afterwards; use
    `averaged` outside of the Trainer. A module with other weights is evaluated as it is; fitting it
    starts new averages. Lightning's `global_step` counts a step that a `GradScaler` skips, and it
    is averaged like the others. A parameter that is unfrozen in training (`BackboneFinetuning`) or
    added is averaged from the next step on, starting at its value (see `LitEma.track`); a frozen
    parameter keeps its average.

    A checkpoint has both. `checkpoint["state_dict"]` has the weights that `save` chooses, which
    `load_from_checkpoint` loads; resuming goes on bit for bit with either. The averages in
    their own dtype are `checkpoint["emajit"]["shadow"]`; if `state_dict` has the averages, the
    trained weights are `checkpoint["emajit"]["raw"]`. `emajit.checkpoint.read` reads both. The
    files of `ModelCheckpoint(save_weights_only=True)`, for which Lightning calls no callback, have
    the trained weights: to evaluate one warns. Put your own callbacks that save after batches
    behind this callback.

    If the module has an `on_load_checkpoint`, for example to convert old layers, it is called for
    each kind of weights, each time with a copy of the checkpoint that has this kind as
    `checkpoint["state_dict"]`, last for the kind that Lightning loads. A checkpoint of Lightning's
    own `WeightAveraging` is resumed with its trained weights, its averages and the number of
    updates.

    Args:
        decay: as in `emajit.update`.
        dtype, buffers, include, exclude, rounding, nonfinite, backend: as in `LitEma`. Saving
            warns once of averages that are not finite.
        every: average after each `every`-th optimizer step, at most once a batch; `decay` counts
            the averaged steps. Before the first average, evaluations and the `state_dict` of a
            checkpoint use the trained weights.
        save: "raw" or "averaged", the weights in a checkpoint's `state_dict`.

    Raises ValueError and TypeError for an unusable option, ValueError for a second `EMACallback` of
    the Trainer and for the strategy "fsdp" (use "model_parallel", which shards by `fully_shard`),
    and as `LitEma` for the module at the start of training.
    """

    def __init__(
        self,
        decay: Decay | Schedule = schedules.warmup(0.9999),  # noqa: B008, a function without state
        *,
        dtype: torch.dtype | None = None,
        buffers: _module.Policy = "ignore",
        include: _names.Patterns | None = None,
        exclude: _names.Patterns | None = None,
        every: int = 1,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
        backend: str = "auto",
        save: Literal["raw", "averaged"] = "raw",
    ) -> None:
        if save not in ("raw", "averaged"):
            raise ValueError(f"save: expected raw or averaged, found {save!r}")
        self._options = _average.checked(
            decay,
            every,
            dtype=dtype,
            buffers=buffers,
            include=include,
            exclude=exclude,
            rounding=rounding,
            nonfinite=nonfinite,
            backend=backend,
        )
        self._every, self._save = every, save
        self._average: LitEma | None = None
        self._known: set[str] = set()  # the parameters that have required grad
        # The averaged module, and fingerprints of its weights after the training.
        self._trained: tuple[weakref.ref[nn.Module] | None, set[str]] | None = None
        self._training: weakref.ref[Trainer] | None = None
        self._loaded: dict[str, Any] | None = None
        self._loaded_for: weakref.ref[nn.Module] | None = None
        # The module's hook, called for each copy of the weights, and the copies it has returned.
        self._hook: Callable[[dict[str, Any]], None] | None = None
        self._migrated: dict[str, Any] | None = None
        self._averaged_at = 0
        self._inside: AbstractContextManager[object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        trained = (None, self._trained[1]) if self._trained else None  # a copy is another module
        gone = dict.fromkeys(("_training", "_loaded_for", "_inside", "_hook"))
        return {**vars(self), **gone, "_trained": trained}

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """A context in which `module` has the averaged weights, as `emajit.ema_scope`.

        Before the first average, as with `every`, it has its trained weights.

        Raises RuntimeError without averages: before a training, and in a process that only starts
        the training processes ("ddp_spawn").
        """
        if self._average is None and self._loaded is None:
            raise RuntimeError("expected averages, which fit() starts, found none")
        with _average.averaged(self._of(module), module):
            yield

    def _of(self, module: nn.Module) -> LitEma:
        """The averages, started from the module or from the loaded checkpoint."""
        with torch.inference_mode(False):
            if self._average is None or self._loaded is not None:
                names = self._loaded["shadow"] if self._loaded else ()
                self._average, self._known = _average.started(module, self._options, names)
                if self._training is None:  # else set at the end of the training
                    self._trained = _identity(module)
            if self._loaded is not None:
                _average.restore(self._average, self._loaded)
                self._averaged_at = self._loaded["averaged_at"]
                self._loaded = None
        return self._average

    def _followed(self, pl_module: LightningModule) -> LitEma:
        """The averages, in training with the parameters that were unfrozen or added since."""
        average = self._of(pl_module)
        if self._training is not None:
            with torch.inference_mode(False):
                self._known = _average.follow(average, pl_module, self._known)
        return average

    def _is_of(self, trainer: Trainer, module: nn.Module) -> bool:
        """Whether the averages belong to the module's present weights, in all processes."""
        if self._loaded is not None and self._loaded_for and self._loaded_for() is module:
            return True
        self._loaded = None  # loaded for another module, whose run ended before it used them
        if self._average is None or self._trained is None:
            return False
        return trainer.strategy.reduce_boolean_decision(_is(module, *self._trained))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second `EMACallback`, and warn where the averages would be lost."""
        callbacks: list[Any] = vars(trainer)["callbacks"]
        if sum(isinstance(callback, EMACallback) for callback in callbacks) > 1:
            raise ValueError(
                "expected one EMACallback, found another; a checkpoint has room for one"
            )
        if _is_a("FSDPStrategy", trainer.strategy):
            raise ValueError(
                "strategy: expected ModelParallelStrategy to shard, found FSDPStrategy"
            )
        self._show_copies_to(pl_module)
        if stage != "fit":
            return
        if any(_is_a("ModelCheckpoint", c) and c.save_weights_only for c in callbacks):
            _warn.warn(
                "ModelCheckpoint(save_weights_only=True) saves the trained weights alone, since "
                "Lightning calls no callback for it"
            )
        if _is_a("_MultiProcessingLauncher", trainer.strategy.launcher):
            _warn.warn(
                "the averages end with the processes that this strategy starts for the training; "
                "only checkpoints keep them"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the averages of another training."""
        if not self._is_of(trainer, pl_module):
            self._average = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the module's weights, or go on."""
        self._show_no_more(pl_module)
        self._training = weakref.ref(trainer)
        self._of(pl_module)
        if not 0 <= trainer.global_step - self._averaged_at < self._every:  # of another run
            self._averaged_at = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Track new parameters before their first step, also those added in `training_step`."""
        self._followed(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Average, if the optimizer has stepped often enough."""
        if trainer.global_step - self._averaged_at >= self._every:
            self._followed(pl_module)(pl_module)
            self._averaged_at = trainer.global_step

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        self._show_no_more(pl_module)
        if self._is_for(trainer, pl_module):
            self._inside = _average.averaged(self._followed(pl_module), pl_module)
            self._inside.__enter__()
        elif trainer.ckpt_path:
            _warn.warn(_NO_AVERAGES)

    def _is_for(self, trainer: Trainer, module: nn.Module) -> bool:
        """Whether there are averages of the module; in a training there always are."""
        return self._training is not None or self._is_of(trainer, module)

    def _leave(self, *_: Any, **__: Any) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(None, None, None)

    def _end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._leave()
        self._show_no_more(pl_module)
        if self._training is not None and self._training() is trainer:  # not a nested Trainer
            self._training, self._trained = None, _identity(pl_module)

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave
    on_exception = teardown = _end

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put trained and averaged weights into the checkpoint."""
        if self._inside is None:
            scope.check_outside(pl_module.parameters())
            if not self._is_for(trainer, pl_module):
                return
        else:  # in the middle of a validation
            self._leave()
            trained = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {name: value.clone() for name, value in trained.items()}
            self._enter(trainer, pl_module)
        average = self._followed(pl_module)
        state, raw = _average.state_of(average), checkpoint["state_dict"]
        ours = checkpoint[_copies.KEY] = {**state, "averaged_at": self._averaged_at}
        if self._save == "averaged" and _average.has_begun(average):
            averages = _with_ties(pl_module, _names.match(raw, state["shadow"]))
            ours["raw"] = {name: _shards.whole(raw[name]) for name in averages}
            checkpoint["state_dict"] = raw | {
                name: _shards.split_as(raw[name], state["shadow"][bare].to(raw[name].dtype))
                for name, bare in averages.items()
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages from the checkpoint, and for the module the trained weights."""
        self._show_no_more(pl_module)
        self._loaded = self._migrated or checkpoint.get(_copies.KEY)
        if self._loaded is None and (averaged := _copies.averaged_in(checkpoint)):
            self._loaded = _copies.whole(averaged, checkpoint)
        self._migrated, self._loaded_for = None, weakref.ref(pl_module)
        if self._loaded is None:
            self._average = None
            # Not for one that Lightning has made for itself; an evaluation tells when it starts,
            # since of a file of ModelCheckpoint(save_weights_only=True) no callback is told.
            if trainer.ckpt_path and trainer.state.fn == "fit":
                _warn.warn(_NO_AVERAGES)
            return
        raw = self._loaded.get("raw")
        if raw is not None:
            state = pl_module.state_dict()  # as Lightning has loaded it
            for name, value in raw.items():
                state[name] = _shards.split_as(state.get(name), value)
            pl_module.load_state_dict(state, strict=pl_module.strict_loading)
        _copies.warn_of_changes(pl_module, raw or checkpoint.get("state_dict", {}))
        if self._loaded.get("is_whole"):
            shadow = _copies.averages_in(self._loaded["shadow"], pl_module, self._options)
            self._loaded = {**self._loaded, "shadow": shadow}

    def _show_copies_to(self, module: LightningModule) -> None:
        """Make the module's own `on_load_checkpoint` see each copy of the weights.

        Lightning calls it only once, before any callback, with one copy.
        """
        hook = module.on_load_checkpoint
        if getattr(hook, "__qualname__", "") != "CheckpointHooks.on_load_checkpoint":
            self._hook = partial(self._migrate, hook)
            vars(module)["on_load_checkpoint"] = self._hook

    def _show_no_more(self, module: LightningModule) -> None:
        hook, self._hook = self._hook, None
        if hook is not None and vars(module).get("on_load_checkpoint") is hook:
            del vars(module)["on_load_checkpoint"]

    def _migrate(self, hook: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        """Call a module's hook for each copy of the weights, last for the loaded copy."""
        averaged = _copies.averaged_in(checkpoint)
        self._migrated = None
        if averaged is not None:
            copies = _copies.whole(averaged, checkpoint)
            for key in copies.keys() & {"shadow", "raw"}:
                rest = {n: v for n, v in checkpoint["state_dict"].items() if n not in copies[key]}
                seen = pytree.tree_map(lambda leaf: leaf, checkpoint)
                seen["state_dict"] = copy.deepcopy({**copies[key], **rest})
                hook(seen)
                copies[key] = seen["state_dict"]
            self._migrated = copies
        hook(checkpoint)


def _identity(module: nn.Module) -> tuple[weakref.ref[nn.Module], set[str]]:
    """A module, and fingerprints of its weights: as they are, and cast as a Trainer may cast."""
    _shards.reshard(module)
    casts = None, torch.float16, torch.bfloat16, torch.float32, torch.float64
    return weakref.ref(module), {
        _average.fingerprint(module.parameters(), dtype) for dtype in casts
    }


def _is(module: nn.Module, seen: weakref.ref[nn.Module] | None, prints: set[str]) -> bool:
    _shards.reshard(module)
    is_it = seen is None or seen() is module
    return is_it and _average.fingerprint(module.parameters()) in prints


def _is_a(name: str, value: object) -> bool:
    """Whether a class of this name is in the MRO: two packages have Lightning's classes."""
    return name in [kind.__name__ for kind in type(value).__mro__]


def _with_ties(module: nn.Module, partners: Mapping[str, str]) -> dict[str, str]:
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
