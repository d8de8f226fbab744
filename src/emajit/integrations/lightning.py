"""A callback for Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from emajit import _buffers, _names, _shards, schedules
from emajit.functional import Decay, Schedule
from emajit.integrations._average import Average

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.trainer.states import TrainerFn
except ModuleNotFoundError as error:
    message = (
        "emajit.integrations.lightning needs lightning; pip install 'emajit[lightning]' brings it"
    )
    raise ModuleNotFoundError(message, name=error.name) from None

_KEY = "emajit"


class EMACallback(Callback):
    """Averages the weights in training; validates, tests and predicts with the averages.

    After each optimizer step the trainable parameters are averaged, not after the other batches of
    an accumulated gradient. In training and after it the module has its trained weights, and the
    averages only in validation, test and prediction; `averaged` gives them outside of the Trainer.

    A checkpoint has both. `checkpoint["state_dict"]` are the weights that `save` says, which are
    what `load_from_checkpoint` loads; resuming goes on bit for bit with either. The averages in
    their own dtype are `checkpoint["emajit"]["shadow"]`, and beside averaged weights the trained
    ones are `checkpoint["emajit"]["raw"]`; `emajit.checkpoint.read` knows both. Lightning calls no
    callback for `ModelCheckpoint(save_weights_only=True)`, whose files have the trained weights.

    Args:
        decay: as in `emajit.update`.
        dtype, buffers: as in `LitEma`.
        every: average after each optimizer step of so many; `decay` counts the averaged ones.
        save: which weights a checkpoint's `state_dict` has.

    Raises ValueError for an unknown option, and what `LitEma` raises for the module at the start
    of training.
    """

    def __init__(
        self,
        decay: Decay | Schedule = schedules.warmup(0.9999),  # noqa: B008, a function without state
        *,
        dtype: torch.dtype | None = None,
        buffers: _buffers.Policy = "ignore",
        every: int = 1,
        save: Literal["raw", "averaged"] = "raw",
    ) -> None:
        if save not in ("raw", "averaged"):
            raise ValueError(f"save: expected raw or averaged, found {save!r}")
        if every < 1:
            raise ValueError(f"every: expected a number of steps, >= 1, found {every}")
        self._options: Any = {"decay": decay, "dtype": dtype, "buffers": buffers}
        self._every, self._save = every, save
        self._average: Average | None = None
        self._loaded: dict[str, Any] | None = None
        self._averaged_at = 0
        self._inside: AbstractContextManager[None] | None = None

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """A context in which `module` has the averaged weights, as `emajit.ema_scope`."""
        with self._of(module).ema_scope(module):
            yield

    def _of(self, module: nn.Module) -> Average:
        """The averages, which start from the module, or from what was loaded."""
        if self._average is None:
            self._average = Average(module, **self._options)
        if self._loaded is not None:
            self._average.restore_state(self._loaded)
            self._averaged_at = self._loaded["averaged_at"]
            self._loaded = None
        return self._average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn of checkpoints that would have no averages."""
        alone = [
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only
        ]
        if stage == "fit" and alone:
            warnings.warn(
                "ModelCheckpoint(save_weights_only=True) saves the trained weights alone, since "
                "Lightning calls no callback for it",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the module's weights, or go on."""
        self._of(pl_module)
        if not 0 <= trainer.global_step - self._averaged_at < self._every:  # of another run
            self._averaged_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Average, if the optimizer has stepped often enough."""
        if trainer.global_step - self._averaged_at >= self._every:
            self._of(pl_module)(pl_module)
            self._averaged_at = trainer.global_step

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING
        if training or self._average is not None or self._loaded is not None:
            self._leave()
            self._inside = self.averaged(pl_module)
            self._inside.__enter__()

    def _leave(self, *_: Any, **__: Any) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(None, None, None)

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = on_exception = teardown = _leave

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put trained and averaged weights into the checkpoint."""
        if self._average is None and self._loaded is None:
            return
        if self._inside is not None:  # in the middle of a validation
            self._leave()
            trained = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {name: value.clone() for name, value in trained.items()}
            self._enter(trainer, pl_module)
        state, raw = self._of(pl_module).state(), checkpoint["state_dict"]
        ours = checkpoint[_KEY] = {**state, "averaged_at": self._averaged_at}
        if self._save == "averaged":
            partners = _names.match(raw, state["shadow"])
            ours["raw"] = {name: _shards.whole(raw[name]) for name in partners.values()}
            checkpoint["state_dict"] = raw | {
                name: _shards.split_as(raw[name], state["shadow"][bare].to(raw[name].dtype))
                for bare, name in partners.items()
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages from the checkpoint, and to go on training the trained weights."""
        self._loaded = checkpoint.get(_KEY)
        training = trainer.state.fn == TrainerFn.FITTING
        if self._loaded is None:
            self._average = None
            if training:
                warnings.warn(
                    "the checkpoint has no averages of EMACallback; they start from its weights",
                    stacklevel=2,
                )
        elif training and "raw" in self._loaded:
            state = pl_module.state_dict()  # as Lightning has loaded it
            for name, value in self._loaded["raw"].items():
                state[name] = _shards.split_as(state.get(name), value)
            pl_module.load_state_dict(state, strict=pl_module.strict_loading)
