"""A callback for Lightning."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from emajit import _module, _names, _shards, _warn, schedules, scope
from emajit._context import contextmanager
from emajit._torch import pytree
from emajit.functional import Decay, Nonfinite, Rounding, Schedule
from emajit.integrations import _average, _copies
from emajit.integrations._average import Averages
from emajit.posthoc import PostHoc

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    message = "emajit.integrations.lightning needs lightning; pip install lightning"
    raise ModuleNotFoundError(message, name=error.name) from None

_DEFAULT = schedules.warmup(0.9999)
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

    With several averages, `EMACallback({"short": 0.99, "long": 0.9999})`, one pass updates all, and
    they are saved as `checkpoint["emajit"]["shadows"][name]`, for `emajit.checkpoint.read_all` and
    `emajit extract --key emajit.shadows.long`. A checkpoint is resumed with the same names.

    If the module has an `on_load_checkpoint`, for example to convert old layers, it is called for
    each kind of weights, each time with a copy of the checkpoint that has this kind as
    `checkpoint["state_dict"]`, last for the kind that Lightning loads. A checkpoint of Lightning's
    own `WeightAveraging` is resumed with its trained weights, its averages and the number of
    updates.

    Args:
        decay: as in `emajit.update`; or for several averages a dict of decays by name.
        evaluate: the average in evaluations, by name; default, the first. With "all", each
            validation and test runs once for each average, all with the same random numbers. Of
            the first, a metric keeps its name, `val_loss`; of the others it is `val_loss_long`.
            The runs for the others come before, and call hooks of the module but not of other
            callbacks, so that those (`ModelCheckpoint`, `EarlyStopping`) find all metrics.
        dtype, buffers, include, exclude, rounding, nonfinite, backend: as in `LitEma`. Saving
            warns once of averages that are not finite.
        every: average after each `every`-th optimizer step, at most once a batch; `decay` counts
            the averaged steps. Before the first average, evaluations and the `state_dict` of a
            checkpoint use the trained weights.
        posthoc: write snapshots of averages of other lengths, kept beside these and saved in
            checkpoints too, to choose the length after the training (see `emajit.posthoc`).
        pull: `(share, steps)`, averages back into training: after each `steps`-th average the
            trainable parameters become `(1 - share) parameter + share average`, of the (first)
            average that is evaluated; the optimizer keeps its state. (1.0, steps) is Switch EMA
            (arXiv 2402.09240), a smaller share is like lookahead (arXiv 1907.08610).
        save: "raw" or "averaged", the weights in a checkpoint's `state_dict`; of several averages,
            the (first) one that is evaluated.

    Raises ValueError and TypeError for an unusable option, ValueError for a second `EMACallback` of
    the Trainer and for the strategy "fsdp" (use "model_parallel", which shards by `fully_shard`),
    and as `LitEma` for the module at the start of training.
    """

    def __init__(
        self,
        decay: Decay | Schedule | Mapping[str, Decay | Schedule] = _DEFAULT,
        *,
        evaluate: str | None = None,
        dtype: torch.dtype | None = None,
        buffers: _module.Policy = "ignore",
        include: _names.Patterns | None = None,
        exclude: _names.Patterns | None = None,
        every: int = 1,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
        backend: str = "auto",
        posthoc: PostHoc | None = None,
        pull: tuple[float, int] | None = None,
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
            pull=pull,
            posthoc=posthoc,
        )
        self._every, self._save = every, save
        self._evaluated = _average.evaluated(self._options, evaluate)
        self._shown = self._evaluated[0]  # the average that the module has in an evaluation
        self._averages: Averages | None = None
        # The averaged module, and fingerprints of its weights after the training.
        self._trained: tuple[weakref.ref[nn.Module] | None, set[str]] | None = None
        self._training: weakref.ref[Trainer] | None = None
        self._loaded: dict[str, Any] | None = None
        self._loaded_for: weakref.ref[nn.Module] | None = None
        self._runs = ExitStack()  # undoes the changes to a Trainer for `evaluate="all"`
        # The module's hook, called for each copy of the weights, and the copies it has returned.
        self._hook: Callable[[dict[str, Any]], None] | None = None
        self._migrated: dict[str, Any] | None = None
        self._averaged_at = 0
        self._inside: AbstractContextManager[object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        trained = (None, self._trained[1]) if self._trained else None  # a copy is another module
        gone = dict.fromkeys(("_training", "_loaded_for", "_inside", "_hook"))
        return {**vars(self), **gone, "_trained": trained, "_runs": ExitStack()}

    @contextmanager
    def averaged(self, module: nn.Module, name: str | None = None) -> Iterator[None]:
        """A context in which `module` has the averaged weights, as `emajit.ema_scope`.

        `name` is one of several averages; default, the (first) one that is evaluated. Before the
        first average, as with `every`, the module has its trained weights.

        Raises RuntimeError without averages: before a training, and in a process that only starts
        the training processes ("ddp_spawn"); and ValueError for an unknown name.
        """
        if self._averages is None and self._loaded is None:
            raise RuntimeError("expected averages, which fit() starts, found none")
        which = self._evaluated[0] if name is None else name
        with self._of(module).scope(module, which):
            yield

    def _of(self, module: nn.Module) -> Averages:
        """The averages, started from the module or from the loaded checkpoint."""
        with torch.inference_mode(False):
            if self._averages is None or self._loaded is not None:
                names = self._loaded["names"] if self._loaded else ()
                self._averages = Averages(module, self._options, names)
                if self._training is None:  # else set at the end of the training
                    self._trained = _average.identity(module)
            if self._loaded is not None:
                self._averages.restore(self._loaded["shadows"], self._loaded["step"])
                self._averaged_at = self._loaded["averaged_at"]
                self._loaded = None
        return self._averages

    def _followed(self, pl_module: LightningModule) -> Averages:
        """The averages, in training with the parameters that were unfrozen or added since."""
        averages = self._of(pl_module)
        if self._training is not None:
            with torch.inference_mode(False):
                averages.follow(pl_module)
        return averages

    def _is_of(self, trainer: Trainer, module: nn.Module) -> bool:
        """Whether the averages belong to the module's present weights, in all processes."""
        if self._loaded is not None and self._loaded_for and self._loaded_for() is module:
            return True
        self._loaded = None  # loaded for another module, whose run ended before it used them
        if self._averages is None or self._trained is None:
            return False
        return trainer.strategy.reduce_boolean_decision(_average.is_same(module, *self._trained))

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
        self._runs.close()
        if len(self._evaluated) > 1:
            fitting = trainer.fit_loop.epoch_loop.val_loop
            for loop in (fitting, trainer.validate_loop, trainer.test_loop):
                run = partial(self._run_each, loop.run, trainer, pl_module)
                self._runs.enter_context(_average.replaced(loop, "run", run))
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
            self._averages = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the module's weights, or go on."""
        self._show_no_more(pl_module)
        self._training = weakref.ref(trainer)
        self._of(pl_module)
        if not 0 <= trainer.global_step - self._averaged_at < self._every:  # of another run
            self._averaged_at = trainer.global_step
        if trainer.is_global_zero:
            self._of(pl_module).begin()

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
            averages = self._followed(pl_module)
            averages.update(pl_module)
            averages.snapshot(is_writer=trainer.is_global_zero)
            averages.pull(pl_module, self._evaluated[0])
            self._averaged_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last snapshots."""
        self._followed(pl_module).snapshot(is_writer=trainer.is_global_zero, at_end=True)

    def _run_each(
        self, run: Callable[[], list[Any]], trainer: Trainer, module: LightningModule
    ) -> list[Any]:
        """Run an evaluation with the other averages, then with the first; returns all metrics."""
        runs = []
        if not trainer.sanity_checking and self._is_for(trainer, module):
            try:
                for name in self._evaluated[1:]:
                    self._shown = name
                    log = partial(_copies.log_as, module.log, name)
                    with (
                        _average.isolated_rng(),
                        _average.replaced(trainer, "callbacks", [self]),
                        _average.replaced(module, "log", log),
                    ):
                        runs.append(run())
            finally:
                self._shown = self._evaluated[0]
        found = run()
        for others in runs:
            for metrics, more in zip(found, others, strict=True):
                metrics.update(more)
        return found

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        self._show_no_more(pl_module)
        if self._is_for(trainer, pl_module):
            self._inside = self._followed(pl_module).scope(pl_module, self._shown)
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
        self._runs.close()
        if self._training is not None and self._training() is trainer:  # not a nested Trainer
            self._training, self._trained = None, _average.identity(pl_module)

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
        averages, raw = self._followed(pl_module), checkpoint["state_dict"]
        shadows = averages.state()
        ours = _copies.written(shadows, averages.updates, self._averaged_at)
        checkpoint[_copies.KEY] = ours
        if self._save == "averaged" and averages.updates:
            shadow = shadows[self._evaluated[0]]
            named = _copies.with_ties(pl_module, _names.match(raw, shadow))
            ours["raw"] = {name: _shards.whole(raw[name]) for name in named}
            checkpoint["state_dict"] = raw | {
                name: _shards.split_as(raw[name], shadow[bare].to(raw[name].dtype))
                for name, bare in named.items()
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages from the checkpoint, and for the module the trained weights."""
        self._show_no_more(pl_module)
        self._loaded = self._migrated or _copies.read(checkpoint)
        self._migrated, self._loaded_for = None, weakref.ref(pl_module)
        if self._loaded is None:
            self._averages = None
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
        _average.check_alike(_average.names_of(self._options), self._loaded["shadows"])
        for name, state in self._loaded["shadows"].items():
            self._loaded["shadows"][name] = (
                _copies.averages_in(state, pl_module, self._options)
                if self._loaded["is_whole"]
                else _copies.without_ties(pl_module, state)
            )
        self._loaded["names"] = {n for shadow in self._loaded["shadows"].values() for n in shadow}

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
        self._migrated = None
        copies = _copies.completed_in(checkpoint)
        if copies is not None:
            kinds = [(copies["shadows"], name) for name in copies["shadows"]]
            for holder, key in [*kinds, *([(copies, "raw")] if copies["raw"] else [])]:
                held, trained = holder[key], checkpoint["state_dict"]
                rest = {name: value for name, value in trained.items() if name not in held}
                seen = pytree.tree_map(lambda leaf: leaf, checkpoint)
                seen["state_dict"] = copy.deepcopy({**held, **rest})
                hook(seen)
                holder[key] = seen["state_dict"]
            self._migrated = copies
        hook(checkpoint)


def _is_a(name: str, value: object) -> bool:
    """Whether a class of this name is in the MRO: two packages have Lightning's classes."""
    return name in [kind.__name__ for kind in type(value).__mro__]
