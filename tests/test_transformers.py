"""The callback for transformers: a real Trainer, and a real model of a few thousand weights."""

from __future__ import annotations

import copy
import json
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from emajit import checkpoint, schedules
from tests import kills

pytest.importorskip("transformers", reason="the callback for transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")

from transformers import (
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from emajit.integrations.transformers import EMACallback

DECAY = schedules.warmup(0.9)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        # of torch's DataLoader, which wants to pin the memory of batches for a GPU, and of dynamo
        warnings.filterwarnings("ignore", message="'pin_memory' argument")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
        yield
    transformers_logging.set_verbosity(level)


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: Any = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def tokens(number: int = 24, seed: int = 1) -> list[dict[str, Tensor]]:
    rows = torch.randint(32, (number, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def differ(a: State, b: State) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


class Recorder(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The weights after each optimizer step, of each evaluation, and of each later step's start."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.evaluated: list[State] = []
        self.begun: list[State] = []

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.begun.append(trained(kwargs["model"]))

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.steps.append(trained(kwargs["model"]))

    def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
        self.evaluated.append(trained(kwargs["model"]))


def trainer_of(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    model = options.pop("model") if "model" in options else tiny()
    keys = ("eval_dataset", "processing_class", "compute_metrics")
    others = {key: options.pop(key) for key in keys if key in options}
    kind = options.pop("kind", Trainer)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    others.setdefault("eval_dataset", tokens(8, seed=2))
    arguments = TrainingArguments(**given | options)
    return kind(
        model=model, args=arguments, train_dataset=tokens(), callbacks=[*callbacks], **others
    )


def averages(ema: EMACallback, which: str | None = None) -> State:
    assert ema._averages is not None
    return {name: value.clone() for name, value in ema._averages[which].named_averages().items()}


def reference(start: State, steps: list[State], decay: schedules.Schedule = DECAY) -> State:
    average = {name: value.double() for name, value in start.items()}
    for step, params in enumerate(steps):
        beta = float(decay(step))
        average = {
            name: beta * s + (1 - beta) * params[name].double() for name, s in average.items()
        }
    return average


def assert_near(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_averages_each_optimizer_step(tmp_path: Path, accumulated: int) -> None:
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder, gradient_accumulation_steps=accumulated)
    start = trained(trainer.model)
    trainer.train()
    assert len(recorder.steps) == 6
    assert differ(start, recorder.steps[-1])
    assert_near(averages(ema), reference(start, recorder.steps))


def test_every_other_step_in_another_dtype(tmp_path: Path) -> None:
    ema, recorder = EMACallback(DECAY, every=2, dtype=torch.float64), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder)
    start = trained(trainer.model)
    trainer.train()
    expected = reference(start, recorder.steps[1::2])
    for name, value in averages(ema).items():
        assert_close(value, expected[name], rtol=1e-12, atol=0)


def test_a_step_that_was_skipped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.optimizer import AcceleratedOptimizer  # noqa: PLC0415, after importorskip

    ema, recorder = EMACallback(DECAY), Recorder()
    steps = recorder.steps
    monkeypatch.setattr(
        AcceleratedOptimizer, "step_was_skipped", property(lambda _: len(steps) in {2, 5})
    )
    trainer = trainer_of(tmp_path, ema, recorder)
    start = trained(trainer.model)
    trainer.train()
    counted = [step for number, step in enumerate(steps, 1) if number not in {2, 5}]
    assert_near(averages(ema), reference(start, counted))


class Overflowing(Trainer):  # type: ignore[misc, unused-ignore]
    """The gradients of the steps 2 and 5 are infinite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.state.global_step + 1 in {2, 5} else loss


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(tmp_path: Path, optim: str) -> None:
    """accelerate does not tell of those that a fused optimizer leaves out by itself."""
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder, kind=Overflowing, optim=optim, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = trained(trainer.model)
    trainer.train()
    assert_same(recorder.steps[1], recorder.steps[0])
    assert ema._averages is not None
    assert ema._averages.updates == 4
    counted = [step for number, step in enumerate(recorder.steps, 1) if number not in {2, 5}]
    assert_near(averages(ema), reference(start, counted))


def settings(strategy: str) -> dict[str, Any]:
    return {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 2, "save_steps": 2}


def test_before_the_first_average_the_trained_weights_are_evaluated_and_saved(
    tmp_path: Path,
) -> None:
    """And not the weights at the start, of which the averages are."""
    ema, recorder = EMACallback(DECAY, every=4), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder, **settings("steps"))
    trainer.train()
    assert_same(recorder.evaluated[0], recorder.steps[1])
    assert differ(recorder.evaluated[1], recorder.steps[3])
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2" / "averaged")
    assert_same(trained(saved), recorder.steps[1])


@pytest.mark.parametrize(
    "options",
    [
        settings("steps"),
        settings("epoch") | {"num_train_epochs": 2, "max_steps": -1},
        settings("steps")
        | {"eval_dataset": {"one": tokens(8, seed=2), "two": tokens(8, seed=3)}, "eval_steps": 3},
        settings("steps") | {"eval_on_start": True},
    ],
    ids=["steps", "epochs", "several data sets", "at the start too"],
)
def test_evaluates_the_averages_and_trains_as_without(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    without, ema, recorder = Recorder(), EMACallback(DECAY), Recorder()
    alone = trainer_of(tmp_path / "without", without, **options)
    alone.train()
    trainer = trainer_of(tmp_path / "with", ema, recorder, **options)
    start = trained(trainer.model)
    trainer.train()

    assert len(without.steps) == len(recorder.steps)
    for a, b in zip(without.steps + without.begun, recorder.steps + recorder.begun, strict=True):
        assert_same(a, b)
    assert_same(trained(alone.model), trained(trainer.model))
    losses = [
        [log["loss"] for log in t.state.log_history if "loss" in log] for t in (alone, trainer)
    ]
    assert losses[0] == losses[1]

    logs = trainer.state.log_history
    steps = [log["step"] for log in logs if any(key.endswith("_runtime") for key in log)]
    evaluations = [step for step in steps if step <= len(recorder.steps)][: len(recorder.evaluated)]
    assert len(evaluations) == len(recorder.evaluated) > 1
    for step, found in zip(evaluations, recorder.evaluated, strict=True):
        assert_near(found, reference(start, recorder.steps[:step]))
    for folder in (tmp_path / "with").iterdir():
        step = int(folder.name.rpartition("-")[2])
        saved = GPT2LMHeadModel.from_pretrained(folder)
        assert_same(trained(saved), recorder.steps[step - 1])
        saved = GPT2LMHeadModel.from_pretrained(folder / "averaged")
        assert_near(trained(saved), reference(start, recorder.steps[:step]))


def test_a_checkpoint_has_both(tmp_path: Path) -> None:
    words = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    ema = EMACallback(DECAY, dtype=torch.float64)
    trainer = trainer_of(
        tmp_path,
        ema,
        save_strategy="steps",
        save_steps=6,
        processing_class=BertTokenizer(str(tmp_path / "vocab.txt")),
    )
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert_same(trained(GPT2LMHeadModel.from_pretrained(folder)), trained(trainer.model))
    averaged = GPT2LMHeadModel.from_pretrained(folder / "averaged")
    assert_same(trained(averaged), {name: v.float() for name, v in averages(ema).items()})
    assert averaged.config.n_embd == 16
    BertTokenizer.from_pretrained(folder / "averaged")
    shadow, step = checkpoint.load(folder / "averages.safetensors", like=averages(ema))
    assert step == 6
    assert_same(shadow, averages(ema))
    assert_same(checkpoint.read(folder / "averages.safetensors").weights, averages(ema))


def test_of_the_caller_within_averaged(tmp_path: Path) -> None:
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder)
    with pytest.raises(RuntimeError, match=r"expected averages, which train\(\) starts"):
        ema.averaged(trainer.model).__enter__()
    trainer.evaluate()
    trainer.train()
    raw = trained(trainer.model)
    recorder.evaluated.clear()
    trainer.evaluate()
    assert_same(recorder.evaluated.pop(), raw)
    with ema.averaged(trainer.model):
        trainer.evaluate()
        trainer.predict(tokens(8))
        trainer.save_model(str(tmp_path / "saved"))
    for evaluated in recorder.evaluated:
        assert_same(evaluated, averages(ema))
    assert len(recorder.evaluated) == 2
    assert_same(trained(trainer.model), raw)
    assert_same(trained(GPT2LMHeadModel.from_pretrained(tmp_path / "saved")), averages(ema))


class Stop(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 4


def half(folder: Path, **options: Any) -> dict[str, Any]:
    """Train 4 of 6 steps and save the last; the options to go on with."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    } | options
    trainer_of(folder, EMACallback(DECAY), Stop(), **options).train()
    return options


@pytest.mark.parametrize("told", ["by True", "by path", "of another run"])
def test_resumes_bit_for_bit(tmp_path: Path, told: str) -> None:
    options = half(tmp_path / "half")
    whole = EMACallback(DECAY)
    uninterrupted = trainer_of(tmp_path / "whole", whole, **options)
    uninterrupted.train()

    folder, path = tmp_path / "half", str(tmp_path / "half" / "checkpoint-4")
    if told == "of another run":
        folder = tmp_path / "whole"  # which has a checkpoint of the same step and another time
        options |= {"resume_from_checkpoint": path}
    ema, recorder = EMACallback(DECAY), Recorder()
    resumed = trainer_of(folder, ema, recorder, **options)
    resumed.train(resume_from_checkpoint=True if told == "by True" else path)
    assert len(recorder.steps) == 2
    assert_same(trained(resumed.model), trained(uninterrupted.model))
    assert_same(averages(ema), averages(whole))


def complete(folder: Path) -> list[Path]:
    """The checkpoints that a training can go on from, the last one first."""
    found = []
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(file.read_text())["global_step"], file.parent))
        except json.JSONDecodeError:  # half written
            continue
    return [path for _, path in sorted(found, reverse=True)]


def seeded_bare() -> Any:
    torch.manual_seed(0)
    return Bare()


@pytest.mark.parametrize("model", [tiny, seeded_bare])
def test_killed_at_any_moment_the_averages_fit_the_last_checkpoint(
    tmp_path: Path, model: Any
) -> None:
    """The Trainer removes the older checkpoint before `on_save`, where another callback raises."""

    class Kill(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    folder = tmp_path / "run"
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 8}
    with kills.moments(folder, tmp_path / "moments") as moments:
        trainer = trainer_of(folder, Kill(), EMACallback(DECAY), model=model(), **options)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert len(moments) > 25
    seen: list[int] = []
    for moment in moments:
        last = complete(moment)
        if not last:  # there was no checkpoint yet
            assert not seen
            continue
        step = int(last[0].name.rpartition("-")[2])
        assert checkpoint.read(last[0] / "averages.safetensors").step == step
        seen.append(step)
    assert seen == sorted(seen)
    assert {*seen} == {2, 4, 6}

    whole = EMACallback(DECAY)
    trainer_of(tmp_path / "whole", whole, model=model(), **options).train()
    for path in (complete(moments[-1])[0], complete(moments[seen.index(4) - len(seen)])[0]):
        ema = EMACallback(DECAY)
        resumed = trainer_of(path.parent, ema, model=model(), **options)
        resumed.train(resume_from_checkpoint=str(path))
        assert_same(averages(ema), averages(whole))


class SavesOnItsOwn(Trainer):  # type: ignore[misc, unused-ignore]
    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        state: Any = self.state
        self.save_model(str(Path(str(self.args.output_dir), f"checkpoint-{state.global_step}")))


def test_a_trainer_that_writes_no_state(tmp_path: Path) -> None:
    ema, options = EMACallback(DECAY), {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(tmp_path, ema, kind=SavesOnItsOwn, **options)
    trainer.train()
    assert checkpoint.read(tmp_path / "checkpoint-3" / "averages.safetensors").step == 3
    found = checkpoint.read(tmp_path / "checkpoint-6" / "averages.safetensors")
    assert_same(dict(found.weights), averages(ema))
    trainer.save_state()
    assert not (tmp_path / "averages.safetensors").exists()


def test_averages_that_are_saved_for_trained_weights_are_refused(tmp_path: Path) -> None:
    """No hook is called between the last of several evaluations and saving, nor `state_dict`."""

    class Careless(Trainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            assert output_dir is not None
            assert self.model is not None
            Path(output_dir).mkdir(parents=True)
            torch.save(trained(self.model), Path(output_dir, "weights.pt"))

    sets = {"one": tokens(8, seed=2), "two": tokens(8, seed=3)}
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    ema = EMACallback(DECAY)
    trainer = trainer_of(tmp_path, ema, kind=Careless, eval_dataset=sets, eval_steps=2, **options)
    with pytest.raises(RuntimeError, match="expected trained weights, found the averages"):
        trainer.train()
    assert not [*tmp_path.rglob("averages.safetensors")]
    assert differ(trained(trainer.model), averages(ema))


def test_a_resumed_checkpoint_without_averages(tmp_path: Path) -> None:
    options = half(tmp_path)
    path = tmp_path / "checkpoint-4" / "averages.safetensors"
    whole = path.read_bytes()

    path.unlink()
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder, **options | {"save_strategy": "no"})
    with pytest.warns(UserWarning, match="checkpoint-4 has no averages of EMACallback; they start"):
        trainer.train(resume_from_checkpoint=True)
    start = trained(GPT2LMHeadModel.from_pretrained(path.parent))
    assert_near(averages(ema), reference(start, recorder.steps))

    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{path}: expected a whole safetensors file"):
        trainer_of(tmp_path, EMACallback(DECAY), **options).train(resume_from_checkpoint=True)

    path.write_bytes(whole)
    ema = EMACallback(DECAY, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{path}: .* in torch.float64 as in like, found .*32"):
        trainer_of(tmp_path, ema, **options).train(resume_from_checkpoint=True)


def test_a_resumed_checkpoint_that_is_not_found(tmp_path: Path) -> None:
    options = half(tmp_path / "one")
    path = str(tmp_path / "one" / "checkpoint-4")
    message = r"expected averages.safetensors .* found it in none of \['.*other/checkpoint-4'\]"
    trainer = trainer_of(tmp_path / "other", EMACallback(DECAY), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=path)

    half(tmp_path / "other", **options | {"seed": 7, "logging_strategy": "no"})
    trainer = trainer_of(tmp_path / "other", EMACallback(DECAY), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=path)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one EMACallback, found another"):
        trainer_of(tmp_path, EMACallback(), EMACallback()).train()


def test_checkpoints_that_no_callback_hears_of_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, EMACallback(), enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="enable_jit_checkpoint: expected False"):
        trainer.train()


def test_each_training_starts_anew(tmp_path: Path) -> None:
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder)
    trainer.train()
    start = trained(trainer.model)
    recorder.steps.clear()
    trainer.train()
    assert_near(averages(ema), reference(start, recorder.steps))


def test_the_best_averages_at_the_end(tmp_path: Path) -> None:
    ema, recorder = EMACallback(DECAY), Recorder()
    losses = iter([3.0, 1.0, 2.0])
    trainer = trainer_of(
        tmp_path,
        ema,
        recorder,
        **settings("steps"),
        load_best_model_at_end=True,
        metric_for_best_model="given",
        greater_is_better=False,
        compute_metrics=lambda _: {"given": next(losses)},
    )
    start = trained(trainer.model)
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert_same(trained(trainer.model), recorder.steps[3])
    assert_near(averages(ema), reference(start, recorder.steps[:4]))
    averaged = trained(GPT2LMHeadModel.from_pretrained(best / "averaged"))
    assert_same(averaged, averages(ema))
    recorder.evaluated.clear()
    losses = iter([1.0])
    with ema.averaged(trainer.model):
        trainer.evaluate()
    assert_same(recorder.evaluated[0], averaged)


def failing(_: Any) -> dict[str, float]:
    raise OSError("the disk is full")


@pytest.mark.parametrize("through", ["saving", "loading", "averaged", "restore", "training"])
def test_an_evaluation_that_raises(tmp_path: Path, through: str) -> None:
    ema, recorder = EMACallback(DECAY), Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, ema, recorder, compute_metrics=failing, **options)
    start = trained(trainer.model)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    raw = recorder.steps[2]
    assert_near(averages(ema), reference(start, recorder.steps))
    if through == "saving":
        trainer.save_model(str(tmp_path / "saved"))
        assert_same(trained(GPT2LMHeadModel.from_pretrained(tmp_path / "saved")), raw)
    elif through == "loading":
        trainer.model.load_state_dict(start, strict=False)
        raw = start
    elif through == "averaged":
        with ema.averaged(trainer.model):
            assert_same(trained(trainer.model), averages(ema))
    elif through == "restore":
        ema.restore()
    else:  # on from the last checkpoint, by the same Trainer and callback
        trainer.compute_metrics = None
        trainer.train(resume_from_checkpoint=True)
        whole = EMACallback(DECAY)
        uninterrupted = trainer_of(tmp_path / "whole", whole, **options)
        uninterrupted.train()
        raw = trained(uninterrupted.model)
        assert_same(averages(ema), averages(whole))
    assert_same(trained(trainer.model), raw)
    ema.restore()
    assert_same(trained(trainer.model), raw)
    assert not trainer.model._state_dict_pre_hooks
    assert not trainer.model._load_state_dict_pre_hooks


class AsksLater(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step == 3


def test_an_evaluation_that_is_asked_for_later(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, EMACallback(DECAY), AsksLater(), recorder)
    with pytest.warns(UserWarning, match="the evaluation at step 3 was of the trained weights"):
        trainer.train()
    assert_same(recorder.evaluated[0], recorder.steps[2])

    ema, recorder = EMACallback(DECAY), Recorder()
    trainer_of(tmp_path, AsksLater(), ema, recorder, max_steps=3).train()
    assert_same(recorder.evaluated[0], averages(ema))


class TakesState(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
        self.taken = trained(kwargs["model"]) and kwargs["model"].state_dict()


def test_a_state_that_is_taken_in_an_evaluation(tmp_path: Path) -> None:
    """It is that of the trained weights, and what is evaluated after it is told."""
    recorder, takes = Recorder(), TakesState()
    options = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 3}
    options |= {"eval_dataset": tokens(24, seed=2)}
    trainer = trainer_of(tmp_path, EMACallback(DECAY), recorder, takes, **options)
    with pytest.warns(UserWarning, match=r"step 3 was of the trained .* call of state_dict\(\)"):
        trainer.train()
    assert_same({name: takes.taken[name] for name in recorder.steps[-1]}, recorder.steps[-1])


class SavesAfter(TrainerCallback):  # type: ignore[misc, unused-ignore]
    trainer: Any
    path: str

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.trainer.save_model(self.path)


def test_a_model_that_is_saved_after_an_evaluation(tmp_path: Path) -> None:
    """By a callback in front: no part of the evaluation was of the trained weights."""
    saves, recorder = SavesAfter(), Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = trainer_of(tmp_path, saves, EMACallback(DECAY), recorder, **options)
    saves.trainer, saves.path = trainer, str(tmp_path / "saved")
    trainer.train()
    assert_same(trained(GPT2LMHeadModel.from_pretrained(saves.path)), recorder.steps[-1])


class ForbidsLater(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = False


class SavesParameters(Trainer):  # type: ignore[misc, unused-ignore]
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model: Any = self.model
        super()._save(output_dir, state_dict=state_dict or trained(model))


def test_an_evaluation_that_is_forbidden_later(tmp_path: Path) -> None:
    recorder = Recorder()
    options = settings("steps") | {"max_steps": 2}
    trainer = trainer_of(tmp_path, EMACallback(DECAY), ForbidsLater(), recorder, **options)
    trainer.train()
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2")
    assert_same(trained(saved), recorder.steps[1])
    assert_same(trained(trainer.model), recorder.steps[1])

    trainer = trainer_of(
        tmp_path, EMACallback(DECAY), ForbidsLater(), kind=SavesParameters, **options
    )
    with pytest.raises(RuntimeError, match=r"checkpoint-2: expected trained weights, found the"):
        trainer.train()


class Unfreezes(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The embeddings at the step `at`, and adds an adapter; in float64, what should be averaged."""

    def __init__(self, at: int) -> None:
        self.at, self.updates = at, 0
        self.average: State = {}

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        kwargs["model"].get_input_embeddings().requires_grad_(False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step == self.at:
            model.get_input_embeddings().requires_grad_(True)
            model.transformer.h[0].adapter = adapter = nn.Linear(2, 2)
            adapter.weight.grad = torch.ones(2, 2)
            kwargs["optimizer"].param_groups[0]["params"] += [*adapter.parameters()]
            self.new = [n for n, p in model.named_parameters() if n not in self.average]
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.average.setdefault(name, p.detach().double())

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        beta, self.updates = float(DECAY(self.updates)), self.updates + 1
        for name, p in kwargs["model"].named_parameters():
            if name in self.average:
                self.average[name] = beta * self.average[name] + (1 - beta) * p.detach().double()


def test_what_is_trainable_only_after_a_resume_is_named(tmp_path: Path) -> None:
    """The averages are those of the weights in the checkpoint, but not of all trainable ones."""

    class Freezing(TrainerCallback):
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            kwargs["model"].get_input_embeddings().requires_grad_(False)

    trainer_of(tmp_path, Freezing(), EMACallback(DECAY), **settings("steps")).train()
    resumed = trainer_of(tmp_path, EMACallback(DECAY), **settings("steps"))
    with pytest.raises(ValueError, match=r"found \['transformer\.wte\.weight'\] missing"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("where", ["training_step", "on_epoch_end"])
def test_what_is_unfrozen_within_a_step_or_before_an_evaluation(tmp_path: Path, where: str) -> None:
    """A `training_step` comes after `on_step_begin`; no step comes before the evaluation."""
    ema = EMACallback(DECAY)
    before: dict[str, Tensor] = {}

    def unfreeze(model: Any) -> None:
        embedding = model.get_input_embeddings().requires_grad_(True).weight
        before.setdefault("weight", embedding.detach().clone())

    class Unfreezing(TrainerCallback):
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:  # when the optimizer has it
            kwargs["model"].get_input_embeddings().requires_grad_(False)

        def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
            if where == "on_epoch_end":
                unfreeze(kwargs["model"])

    trainer = trainer_of(tmp_path, Unfreezing(), ema, **settings("epoch"), num_train_epochs=1)
    if where == "training_step":
        step = trainer.training_step

        def training_step(model: Any, *rest: Any) -> Any:
            unfreeze(model)
            return step(model, *rest)

        trainer.training_step = training_step
    trainer.train()
    (found,) = [a for name, a in averages(ema).items() if name.endswith("wte.weight")]
    trained_now = trainer.model.get_input_embeddings().weight
    assert torch.equal(found, before["weight"]) == (where == "on_epoch_end")
    assert torch.equal(found, trained_now) == (where == "on_epoch_end")


@pytest.mark.parametrize("is_best", [False, True])
def test_what_is_unfrozen_and_added_in_training(tmp_path: Path, is_best: bool) -> None:
    """Each average begins with the step that first trains it; saved, and resumed where frozen."""
    losses = iter([1.0, 2.0, 3.0])
    options: dict[str, Any] = settings("steps") | {
        "load_best_model_at_end": is_best,
        "metric_for_best_model": "given",
        "greater_is_better": False,
        "compute_metrics": lambda _: {"given": next(losses)},
    }
    ema, unfreezes, recorder = EMACallback(DECAY), Unfreezes(3), Recorder()
    trainer = trainer_of(tmp_path, unfreezes, ema, recorder, **options)
    if is_best:  # of the step 2, when the embeddings were frozen, and there was no adapter
        trainer._load_best_model = lambda: trainer.model.load_state_dict(
            {**trainer.model.state_dict(), **recorder.steps[1]}
        )
    trainer.train()
    found = averages(ema)
    if is_best:
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        raw = trained(trainer.model)
        assert_same({n: found[n] for n in unfreezes.new}, {n: raw[n] for n in unfreezes.new})
        kept = checkpoint.read(tmp_path / "checkpoint-2" / "averages.safetensors").weights
        assert_same({n: found[n] for n in kept}, dict(kept))
        return
    assert_near(found, unfreezes.average)
    assert "transformer.h.0.adapter.weight" in found
    assert differ(found, trained(trainer.model))

    model = copy.deepcopy(trainer.model)
    model.get_input_embeddings().requires_grad_(False)
    again, seen = EMACallback(DECAY), []

    class Look(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.append(averages(again))

    resumed = trainer_of(tmp_path, again, Look(), model=model, max_steps=7)
    resumed._load_optimizer_and_scheduler = lambda *_: None  # it had other groups of parameters
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(seen[0], found)


class Diverges(Trainer):  # type: ignore[misc, unused-ignore]
    """A loss that is NaN at the third step, which Adam never forgets."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss: Any = super().compute_loss(*arguments, **options)
        return loss * float("nan") if self.state.global_step == 2 else loss


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_averages_that_are_not_finite(tmp_path: Path, nonfinite: Any) -> None:
    ema, recorder = EMACallback(DECAY, nonfinite=nonfinite, exclude="*.bias"), Recorder()
    options = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, ema, recorder, kind=Diverges, **options)
    start = trained(trainer.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [each for each in caught if "the average holds values that are" in str(each.message)]
    assert len(told) == (nonfinite == "propagate")
    found = averages(ema)
    assert not any(name.endswith("bias") for name in found)
    if nonfinite == "skip":  # the decay counts the updates that were left out
        expected = reference(start, recorder.steps[:2])
        assert_near(found, {name: expected[name] for name in found})


class Bare(nn.Module):
    """No `PreTrainedModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.table(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_model_of_plain_torch(tmp_path: Path) -> None:
    ema, options = EMACallback(DECAY), {"model": Bare(), "save_strategy": "steps", "save_steps": 6}
    trainer_of(tmp_path, ema, **options).train()
    folder = tmp_path / "checkpoint-6"
    assert not (folder / "averaged").exists()
    assert_same(checkpoint.read(folder / "averages.safetensors").weights, averages(ema))
    assert averages(ema).keys() == {"table.weight"}


class Normed(nn.Module):
    """With statistics, on which its loss depends."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.norm(input_ids.float()) - labels).square().mean()}


class States(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Parameters and buffers before the training, and after each step."""

    def __init__(self) -> None:
        self.seen: list[State] = []

    def remember(self, *_: Any, **kwargs: Any) -> None:
        self.seen.append({name: v.clone() for name, v in kwargs["model"].state_dict().items()})

    on_train_begin = on_optimizer_step = remember


@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_buffers(tmp_path: Path, buffers: Any) -> None:
    ema, states, options = EMACallback(DECAY, buffers=buffers), States(), settings("steps")
    options |= {"model": Normed(), "max_steps": 4, "prediction_loss_only": True}
    trainer = trainer_of(tmp_path, ema, states, **options)
    trainer.train()

    first, *later = states.seen
    expected = reference(first, later)
    kept = ["norm.num_batches_tracked"]
    if buffers != "average":
        kept += ["norm.running_mean", "norm.running_var"]
    averaged = Normed().eval()
    averaged.load_state_dict(expected | {name: later[-1][name] for name in kept})
    with torch.no_grad():
        loss = averaged(**torch.utils.data.default_collate(tokens(8, seed=2)))["loss"]
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert found[-1] == pytest.approx(float(loss))
    assert_same(trainer.model.state_dict(), later[-1])


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 cannot trace transformers 5"
)
@pytest.mark.parametrize("compiled_by", ["Trainer", "caller"])
def test_a_compiled_model(tmp_path: Path, compiled_by: str) -> None:
    options: dict[str, Any] = settings("steps") | {"max_steps": 4}
    if compiled_by == "Trainer":
        options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    else:
        # which hides from the Trainer what its forward takes
        model: Any = torch.compile(tiny(), backend="eager")
        options |= {"model": model, "remove_unused_columns": False}
    ema, recorder = EMACallback(DECAY), Recorder()
    trainer = trainer_of(tmp_path, ema, recorder, **options)
    start = trained(trainer.model)
    trainer.train()
    bare = {name.removeprefix("_orig_mod."): v for name, v in start.items()}
    steps = [
        {name.removeprefix("_orig_mod."): v for name, v in step.items()} for step in recorder.steps
    ]
    assert_near(averages(ema), reference(bare, steps))
    folder = tmp_path / "checkpoint-4"
    if compiled_by == "Trainer":  # else it saves the prefix, with which nothing loads
        assert_same(trained(GPT2LMHeadModel.from_pretrained(folder)), steps[3])
    assert_same(trained(GPT2LMHeadModel.from_pretrained(folder / "averaged")), averages(ema))


def test_what_cannot_be_averaged(tmp_path: Path) -> None:
    for every in (0, 1.5, "2"):
        wrong: Any = every
        with pytest.raises(ValueError, match="every: expected a number of steps, >= 1, found"):
            EMACallback(every=wrong)
    trainer = trainer_of(tmp_path, EMACallback(DECAY))
    trainer.model.transformer.wte.weight.ds_id = 0  # as DeepSpeed marks what it has sharded
    with pytest.raises(ValueError, match=r"wte.weight: expected a parameter of ZeRO 3 as in Deep"):
        trainer.train()


def test_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try: import emajit.integrations.transformers\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert told == (
        "emajit.integrations.transformers needs transformers; "
        "pip install transformers accelerate safetensors\n"
    )


def sequence(seed: int, folder: Path) -> None:
    """A training with random options, killed at random moments and resumed, is one without kills.

    At each evaluation its averages are those of a reference in float64.
    """
    choose = random.Random(seed)  # noqa: S311
    options: dict[str, Any] = {
        "model": None,
        "max_steps": 8,
        "eval_strategy": choose.choice(["no", "steps", "epoch"]),
        "eval_steps": choose.choice([1, 2, 3]),
        "save_strategy": "steps",
        "save_steps": choose.choice([1, 2, 3]),
        "save_total_limit": choose.choice([None, 1, 2]),
        "gradient_accumulation_steps": choose.choice([1, 2]),
    }
    if choose.random() < 0.3:
        options["eval_dataset"] = {"one": tokens(8, seed=2), "two": tokens(8, seed=3)}
    every, fixed = choose.choice([1, 1, 2]), schedules.constant(0.9)
    decay = choose.choice([DECAY, fixed, schedules.uniform()])
    kinds: dict[str, Any] = {
        "every": every,
        "dtype": choose.choice([None, torch.float64]),
        "nonfinite": choose.choice(["propagate", "skip"]),
    }
    build = choose.choice([tiny, seeded_bare])
    given: Any = {"first": decay, "second": 0.5} if seed % 2 else decay

    def train(at: Path, **kwargs: Any) -> tuple[EMACallback, Recorder, Any]:
        ema, recorder = EMACallback(given, **kinds), Recorder()
        trainer = trainer_of(at, ema, recorder, **options | {"model": build()})
        trainer.train(**kwargs)
        return ema, recorder, trainer

    whole, recorder, expected = train(folder / "whole")
    start = trained(build())
    steps = recorder.steps[every - 1 :: every]
    evaluated = [log["step"] for log in expected.state.log_history if "eval_runtime" in log]
    evaluated += [
        log["step"] for log in expected.state.log_history if "eval_one_runtime" in log
    ] * 2
    assert len(evaluated) == len(recorder.evaluated)
    for step, found in zip(sorted(evaluated), recorder.evaluated, strict=True):
        taken = steps[: step // every]  # before the first average the trained weights count
        assert_near(found, reference(start if taken else recorder.steps[step - 1], taken, decay))
    assert_near(averages(whole), reference(start, steps, decay))

    with kills.moments(folder / "0", folder / "moments-0") as moments:
        train(folder / "0")
    for life in range(1, choose.choice([2, 3])):
        # One at the last step would take another: the Trainer looks whether it is done after it.
        moments = [at for at in moments if not (at / f"checkpoint-{options['max_steps']}").exists()]
        killed = choose.choice(moments)
        last = complete(killed)
        with kills.moments(killed, folder / f"moments-{life}") as moments:
            ema, _, trainer = train(killed, resume_from_checkpoint=str(last[0]) if last else None)
    assert_same(trained(trainer.model), trained(expected.model))
    for name in given if seed % 2 else [None]:
        assert_same(averages(ema, name), averages(whole, name))


@pytest.mark.parametrize("seed", range(3))
def test_a_random_training_that_is_killed_and_resumed(tmp_path: Path, seed: int) -> None:
    sequence(seed, tmp_path)
