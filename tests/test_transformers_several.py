"""Several averages in the callback for transformers, with a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emajit import checkpoint, functional, schedules

pytest.importorskip("transformers", reason="the callback for transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")

from transformers import EarlyStoppingCallback, GPT2LMHeadModel, TrainerCallback

from emajit.integrations.transformers import EMACallback
from tests.test_transformers import (
    Recorder,
    State,
    Stop,
    _quiet,
    assert_near,
    assert_same,
    averages,
    differ,
    reference,
    settings,
    tokens,
    trained,
    trainer_of,
)

__all__ = ["_quiet"]

DECAYS: dict[str, Any] = {"short": schedules.warmup(0.3), "long": schedules.constant(0.9)}


def named(callback: EMACallback, model: Any) -> dict[str, State]:
    found = {}
    for name in DECAYS:
        with callback.averaged(model, name):
            found[name] = trained(model)
    return found


def test_each_is_the_formula_and_one_pass_updates_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    many = functional.update_many_

    def counted(shadows: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(shadows))
        return many(shadows, *args, **kwargs)

    monkeypatch.setattr(functional, "update_many_", counted)
    monkeypatch.setattr(functional, "update_", None)
    callback, recorder = EMACallback(DECAYS, every=2, exclude="*.bias"), Recorder()
    trainer = trainer_of(tmp_path, callback, recorder)
    start = trained(trainer.model)
    trainer.train()
    assert calls == [2] * 3
    last = recorder.steps[-1]
    for name, found in named(callback, trainer.model).items():
        expected = reference(start, recorder.steps[1::2], DECAYS[name])
        assert_near(
            found, {n: last[n].double() if n.endswith("bias") else v for n, v in expected.items()}
        )


class Logs(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
        self.metrics.append(dict(kwargs["metrics"]))


def losses(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def test_evaluates_all_with_a_metric_each(tmp_path: Path) -> None:
    """Each is what it is alone, of each of two data sets; the training is what it is without."""
    options = settings("steps") | {"save_strategy": "no"}
    options["eval_dataset"] = {"a": tokens(8, seed=2), "b": tokens(8, seed=3)}
    keys = ("eval_a", "eval_b")
    trainer, logs, recorder = trainer_of(tmp_path, **options), Logs(), Recorder()
    callback = EMACallback(DECAYS, evaluate="all", trainer=trainer)
    for each in (callback, EarlyStoppingCallback(9), logs, recorder):
        trainer.add_callback(each)
    trainer.args.metric_for_best_model = f"{keys[-1]}_long_loss"
    trainer.args.greater_is_better = False
    trainer.train()
    assert "evaluation_loop" not in vars(trainer)
    assert len(logs.metrics) == 3 * len(keys)
    for name in DECAYS:
        other = Recorder()
        alone = trainer_of(tmp_path, EMACallback(DECAYS, evaluate=name), other, **options)
        alone.train()
        for a, b in zip(other.steps + other.begun, recorder.steps + recorder.begun, strict=True):
            assert_same(a, b)
        for key in keys:
            found = losses(trainer, f"{key}_loss" if name == "short" else f"{key}_long_loss")
            assert found == losses(alone, f"{key}_loss")
            assert len(found) == 3


def test_the_best_of_another_average(tmp_path: Path) -> None:
    options = settings("steps") | {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_long_loss",
        "save_total_limit": 3,
    }
    trainer = trainer_of(tmp_path, **options)
    callback = EMACallback(DECAYS, evaluate="all", trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    long = losses(trainer, "eval_long_loss")
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{2 + 2 * long.index(min(long))}"
    assert_same(trained(trainer.model), trained(GPT2LMHeadModel.from_pretrained(best)))
    for name, found in named(callback, trainer.model).items():
        assert_same(found, trained(GPT2LMHeadModel.from_pretrained(best / f"averaged-{name}")))


def test_resumes_bit_for_bit_and_has_all(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    given: dict[str, Any] = {"rounding": "stochastic", "dtype": torch.bfloat16}
    trainer_of(tmp_path / "half", EMACallback(DECAYS, **given), Stop(), **options).train()
    whole, resumed = EMACallback(DECAYS, **given), EMACallback(DECAYS, **given)
    expected = trainer_of(tmp_path / "whole", whole, **options)
    expected.train()
    trainer = trainer_of(tmp_path / "half", resumed, **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trained(trainer.model), trained(expected.model))
    held = named(whole, expected.model)
    assert differ(*held.values())
    folder = tmp_path / "half" / "checkpoint-6"
    assert_same(trained(GPT2LMHeadModel.from_pretrained(folder)), trained(expected.model))
    assert not (folder / "averages.safetensors").exists()
    for name, average in held.items():
        assert_same(named(resumed, trainer.model)[name], average)
        saved = GPT2LMHeadModel.from_pretrained(folder / f"averaged-{name}")
        assert_same(trained(saved), average)
        found = checkpoint.read(folder / f"averages-{name}.safetensors")
        assert found.step == 6
        assert_same({n: v.float() for n, v in found.weights.items()}, average)
    for decay in (0.9, {"other": 0.9}):
        trainer = trainer_of(tmp_path / "half", EMACallback(decay), **options)
        with pytest.raises(ValueError, match="as the options say, found long, short"):
            trainer.train(resume_from_checkpoint=True)


def test_resumes_bit_for_bit_what_a_filter_leaves(tmp_path: Path) -> None:
    """What is left out is saved as it is trained, and loaded with the averages."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    given: dict[str, Any] = {"include": "transformer.h.*", "exclude": "*.bias", "every": 2}
    trainer_of(tmp_path / "half", EMACallback(0.9, **given), Stop(), **options).train()
    whole, resumed = EMACallback(0.9, **given), EMACallback(0.9, **given)
    expected = trainer_of(tmp_path / "whole", whole, **options)
    expected.train()
    trainer = trainer_of(tmp_path / "half", resumed, **options)
    trainer.train(resume_from_checkpoint=True)
    raw, held = trained(expected.model), averages(whole)
    assert held.keys() == {n for n in raw if ".h." in n and not n.endswith("bias")}
    assert_same(trained(trainer.model), raw)
    assert_same(averages(resumed), held)
    folder = tmp_path / "half" / "checkpoint-6"
    assert_same(checkpoint.read(folder / "averages.safetensors").weights, held)
    assert_same(trained(GPT2LMHeadModel.from_pretrained(folder / "averaged")), raw | held)


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluate: expected one of all, short, long, found 'no'"):
        EMACallback(DECAYS, evaluate="no")
    with pytest.raises(ValueError, match="trainer: expected the Trainer beside evaluate='all'"):
        EMACallback(DECAYS, evaluate="all")
    other = trainer_of(tmp_path)
    trainer = trainer_of(tmp_path, EMACallback(DECAYS, evaluate="all", trainer=other))
    with pytest.raises(ValueError, match="trainer: expected the Trainer that trains, found anoth"):
        trainer.train()
