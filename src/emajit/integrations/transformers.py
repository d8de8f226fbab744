"""A callback for the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emajit import _module, _names, _warn, schedules
from emajit._context import contextmanager
from emajit.functional import Decay, Nonfinite, Rounding, Schedule
from emajit.integrations import _average, _folders, _sharded, _steps
from emajit.integrations._average import Averages
from emajit.posthoc import PostHoc

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ModuleNotFoundError as error:
    message = (
        "emajit.integrations.transformers needs transformers; "
        "pip install transformers accelerate safetensors"
    )
    raise ModuleNotFoundError(message, name=error.name) from None


_DEFAULT = schedules.warmup(0.9999)


class EMACallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Averages the weights in training; the Trainer's evaluations in training use the averages.

    After each optimizer step the trainable parameters are averaged: not after the other batches of
    an accumulated gradient, nor where a gradient scaler has skipped the step. Each `train()`
    starts the averages from the model's weights, or goes on bit for bit from the checkpoint that
    it resumes. The caller's own evaluations and predictions use the trained weights, except
    within `averaged`. Put this callback behind others that change weights or ask for evaluations.
    A parameter that another callback unfreezes or adds, such as an adapter, is averaged from the
    next step on (see `LitEma.track`); a frozen parameter keeps its average.

    A checkpoint has the trained weights where they always are, and beside them

    - `averages.safetensors`, to resume from: the averages in their own dtype, as
      `emajit.checkpoint.save` writes them;
    - `averaged/`, the averages in the model's dtype, with configuration and `processing_class`, for
      `from_pretrained`: of a `PreTrainedModel`, or of a `PeftModel` below it a folder for each
      adapter, `averaged/default/` where it was given no name.

    With FSDP (`version=2` in `fsdp_config`) the averages have the shards of their parameters, and
    another number of processes can resume them. They are saved as the Trainer saves the model, by
    `state_dict_type`: as above for FULL_STATE_DICT; for SHARDED_STATE_DICT as the folder
    `averages/`, which `emajit.checkpoint.load_sharded` and `read` know, without `averaged/`.

    With DeepSpeed the parameters of a bfloat16 model are averaged, in `dtype=torch.float32` if you
    say so, not the optimizer's float32 weights. With ZeRO 3 each process averages its parts, and
    saves as above.

    All are complete before the Trainer writes `trainer_state.json`, the last file of a
    checkpoint, and before it removes older ones: a job that is killed at any moment leaves averages
    beside the trained weights of the last complete checkpoint.

    The Trainer does not tell callbacks which folder it resumes. This callback looks into
    `TrainingArguments(resume_from_checkpoint=...)` and into `checkpoint-<step>` in `output_dir`,
    and loads the averages saved beside the trained weights that the model has now. A
    hyperparameter search saves nothing.

    With `load_best_model_at_end` the best checkpoint is the one whose averages evaluate best.
    Afterwards the model has the trained weights of this checkpoint, and `averaged` gives its
    averages, which are also in its folder `averaged/`.

    With several averages, `EMACallback({"short": 0.99, "long": 0.9999})`, one pass updates all, and
    a checkpoint has `averages-long.safetensors` and `averaged-long/` of each. It is resumed with
    the same names.

    An evaluation that raises leaves the averages in the model until the next call of a hook, of
    the model's `state_dict` or `load_state_dict`, or of `restore`.

    Args:
        decay: as in `emajit.update`; or for several averages a dict of decays by name.
        evaluate: the average that the Trainer's evaluations use, by name; default, the first. With
            "all", each evaluation runs once for each average, all with the same random numbers:
            the first has the metrics `eval_loss`, ..., and each other one `eval_long_loss`, ....
            All are in one log and in one call of `on_evaluate`.
        trainer: the Trainer, which "all" needs:
            `trainer.add_callback(EMACallback(..., evaluate="all", trainer=trainer))`.
        dtype, buffers, include, exclude, rounding, nonfinite, backend: as in `LitEma`. Saving
            warns once of averages that are not finite.
        every: average after each optimizer step whose number is a multiple of this; `decay` counts
            the averaged steps. Before the first average, evaluations and `averaged/` use the
            trained weights.
        posthoc: write snapshots of averages of other lengths, kept beside these and saved in
            checkpoints too, to choose the length after the training (see `emajit.posthoc`).
        pull: `(share, steps)`, averages back into training: after each `steps`-th average the
            trainable parameters become `(1 - share) parameter + share average`, of the (first)
            average that is evaluated; the optimizer keeps its state. (1.0, steps) is Switch EMA
            (arXiv 2402.09240), a smaller share is like lookahead (arXiv 1907.08610).

    When a checkpoint without averages is resumed, they start from its weights, with a warning.

    Raises ValueError and TypeError for an unusable option; and ValueError, at the start of
    training, for parameters in other shards (FSDP 1, tensor parallel, `offload_param` of ZeRO 3),
    for `pull` with DeepSpeed, whose optimizer would undo it, for a resumed checkpoint that is not
    found or whose averages do not fit, for a second `EMACallback`, and for `enable_jit_checkpoint`,
    which saves without a call of callbacks; and as `LitEma` for the model.
    """

    def __init__(
        self,
        decay: Decay | Schedule | Mapping[str, Decay | Schedule] = _DEFAULT,
        *,
        evaluate: str | None = None,
        trainer: Trainer | None = None,
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
    ) -> None:
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
        self._every = every
        self._evaluated, self._trainer = _average.evaluated(self._options, evaluate), trainer
        if len(self._evaluated) > 1 and trainer is None:
            raise ValueError(
                "trainer: expected the Trainer beside evaluate='all', found None; "
                "trainer.add_callback(EMACallback(..., trainer=trainer))"
            )
        self._averages: Averages | None = None
        self._saved: Path | None = None
        self._is_training = False
        self._is_inside = False
        self._is_sharded = False
        self._on_state = ExitStack()  # the hook of a model in shards
        # The scope of an evaluation of the Trainer, and the model's hooks that end it early.
        self._evaluation, self._guards = ExitStack(), ExitStack()
        self._entered: nn.Module | None = None  # the model in an evaluation of the Trainer
        self._runs = ExitStack()  # undoes the changes to the Trainer for `evaluate="all"`
        self._was_interrupted = self._was_mixed = False
        self._scale: float | None = None  # of the gradients, before a step that may be skipped

    @contextmanager
    def averaged(self, model: nn.Module, name: str | None = None) -> Iterator[None]:
        """A context in which `model` has the averaged weights, as `emajit.ema_scope`.

        Around `trainer.evaluate()`, `trainer.predict()` or `trainer.save_model(...)`. `name` is one
        of several averages; default, the (first) one that is evaluated. Before the first average,
        as with `every`, the model has its trained weights. Raises RuntimeError before the first
        training, and ValueError for an unknown name.
        """
        self.restore()
        with self._present().scope(model, self._evaluated[0] if name is None else name):
            self._is_inside = True
            try:
                yield
            finally:
                self._is_inside = False

    def restore(self) -> None:
        """Give the model its trained weights back after an evaluation has raised."""
        self._entered = None
        self._evaluation.close()
        self._guards.close()

    def _present(self) -> Averages:
        if self._averages is None:
            raise RuntimeError("expected averages, which train() starts, found none")
        return self._averages

    def _followed(self, model: nn.Module) -> Averages:
        """The averages, with the parameters that were unfrozen or added since."""
        averages = self._present()
        averages.follow(model)
        return averages

    def _enter(self, model: nn.Module, name: str | None = None) -> None:
        self._was_interrupted = self._was_mixed = False
        self._followed(model)
        self._evaluation.enter_context(self.averaged(model, name))
        self._entered = model
        # The Trainer calls no hook between an evaluation (the last of several, or one that raises)
        # and saving or loading.
        self._guards.enter_context(_sharded.guarded(model, self._interrupt))

    def _run_each(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an evaluation with the other averages, then with the first; returns all metrics."""
        model, runs, told = self._entered, [], [(False, False)]
        if model is not None:
            for name in self._evaluated[1:]:
                self._enter(model, name)
                prefix = f"{kwargs.get('metric_key_prefix', 'eval')}_{name}"
                with _average.isolated_rng():
                    runs.append(run(*args, **kwargs | {"metric_key_prefix": prefix}))
                told.append((self._was_interrupted, self._was_mixed))
            self._enter(model)
        found = run(*args, **kwargs)
        for other in runs:
            found.metrics.update(other.metrics)
        self._was_interrupted |= any(interrupted for interrupted, _ in told)
        self._was_mixed |= any(mixed for _, mixed in told)
        return found

    def _interrupt(self) -> None:
        self._was_interrupted |= self._is_inside
        self._evaluation.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the averages from the model's weights, or load them from the checkpoint."""
        self.restore()
        self._runs.close()
        if vars(state).setdefault("EMACallback", self) is not self:
            raise ValueError(
                "expected one EMACallback, found another; a checkpoint has room for one"
            )
        if self._trainer is not None and self._trainer.state is not state:
            raise ValueError("trainer: expected the Trainer that trains, found another")
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint: expected False, found True; these checkpoints are saved "
                "without a call of callbacks"
            )
        model = kwargs["model"]
        self._is_sharded = _sharded.prepare(model, kwargs["optimizer"], self._options["pull"])
        if state.global_step:
            told = args.resume_from_checkpoint
            folders = [*([Path(str(told))] if told else []), _folders.at(args, state)]
            self._averages = _folders.resumed(model, self._options, folders)
        else:
            self._averages = Averages(model, self._options)
        if state.is_world_process_zero:
            self._averages.begin()
        # The Trainer calls `on_save` only after it has removed an older checkpoint.
        vars(state)["save_to_json"] = partial(self._save_before, args, state, kwargs)
        self._saved = None
        self._on_state.close()
        if self._is_sharded:
            before = partial(self._save_by_all, args, state, control, kwargs)
            self._on_state.enter_context(_sharded.before_state(model, before))
        self._is_training = True
        if self._trainer is not None and len(self._evaluated) > 1:
            run = partial(self._run_each, self._trainer.evaluation_loop)
            self._runs.enter_context(_average.replaced(self._trainer, "evaluation_loop", run))
        if args.eval_on_start:
            self._enter(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Track new parameters; remember the gradient scale, which a skipped step reduces."""
        self._scale = _steps.scale(kwargs["optimizer"])
        self._followed(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average, if the optimizer has stepped."""
        self.restore()
        skipped = _steps.was_skipped(kwargs["optimizer"], self._scale)
        if state.global_step % self._every == 0 and not skipped:
            averages = self._followed(kwargs["model"])
            averages.update(kwargs["model"])
            averages.snapshot(is_writer=state.is_world_process_zero)
            averages.pull(kwargs["model"], self._evaluated[0])
        self._before_evaluation(args, state, control, **kwargs)

    def _before_evaluation(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()
        if control.should_evaluate:
            self._enter(kwargs["model"])

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Notice a batch that was evaluated after a call of `state_dict`."""
        self._was_mixed |= self._was_interrupted

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model its trained weights back, unless another data set may follow."""
        was_whole = self._was_interrupted and not self._was_mixed  # interrupted only at its end
        if self._is_training and not self._is_inside and not was_whole:
            why = (
                "from a call of state_dict() or load_state_dict() within it on"
                if self._was_interrupted
                else "since EMACallback was not told of it before; it belongs behind the callback "
                "that asked for the evaluation"
            )
            _warn.warn(
                f"the evaluation at step {state.global_step} was of the trained weights, {why}"
            )
        if "eval_runtime" in kwargs["metrics"]:  # eval_<name>_runtime where there are several
            self.restore()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the averages into the checkpoint of a Trainer that saves in its own way."""
        if (args.should_save or self._is_sharded) and self._saved != _folders.at(args, state):
            self._save(args, _folders.at(args, state), state, kwargs)
        self.restore()

    def _save_before(
        self, args: TrainingArguments, state: TrainerState, objects: dict[str, Any], json_path: str
    ) -> None:
        """Save the averages into a checkpoint, then the state of the Trainer."""
        folder = Path(json_path).parent
        is_of_step = folder.name == _folders.at(args, state).name  # else by `Trainer.save_state`
        if is_of_step and not self._is_sharded:
            self._save(args, folder, state, objects)
        type(state).save_to_json(state, json_path)

    def _save_by_all(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        objects: dict[str, Any],
    ) -> None:
        """Save the averages as all processes take the state of a model in shards."""
        folder = _folders.at(args, state)
        if self._entered is not None:
            self._interrupt()
        if control.should_save and self._saved != folder:
            self._save(args, folder, state, objects)

    def _save(
        self, args: TrainingArguments, folder: Path, state: TrainerState, objects: dict[str, Any]
    ) -> None:
        unguarded, self._entered = self._is_inside, None
        self._evaluation.close()
        if state.is_hyper_param_search:
            return
        if unguarded:
            raise RuntimeError(
                f"{folder}: expected trained weights, found the averages saved in their place by "
                "code that does not call state_dict()"
            )
        averages, names = self._followed(objects["model"]), _average.named_of(self._options)
        _folders.save(folder, averages, names, objects, writes=args.should_save)
        self._saved = folder

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the averages of the best checkpoint if the Trainer has loaded its weights."""
        self.restore()
        self._present().snapshot(is_writer=state.is_world_process_zero, at_end=True)
        self._runs.close()
        self._on_state.close()
        self._is_training = False
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not state.is_hyper_param_search:
            if args.distributed_state is not None:
                args.distributed_state.wait_for_everyone()  # one process may still be writing
            # A parameter may have been unfrozen since.
            self._averages = _folders.load(
                kwargs["model"], self._options, [Path(best)], all_of_them=False
            )

    def _restore(self, *_: Any, **__: Any) -> None:
        self.restore()

    on_epoch_begin = _restore
    on_epoch_end = _before_evaluation

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Track the parameters that were unfrozen or added since the last step."""
        self.restore()
        self._followed(kwargs["model"])
