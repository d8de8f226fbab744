"""Several averages in the callback for Lightning, with a real Trainer."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from emajit import checkpoint, functional, schedules

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from emajit.integrations._average import Averages
from emajit.integrations.lightning import EMACallback
from tests.test_lightning import (
    Recorder,
    Regression,
    assert_equal,
    averages,
    data,
    differ,
    model_of,
    pytestmark,
    trainer_of,
    weights,
)

__all__ = ["pytestmark"]

DECAYS: dict[str, Any] = {"short": schedules.warmup(0.3), "long": schedules.constant(0.9)}


def named(callback: EMACallback, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in DECAYS:
        with callback.averaged(model, name):
            found[name] = weights(model)
    return found


class Dropping(Regression):
    """A training that depends on the random numbers, and an evaluation that does too."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = nn.functional.dropout(self.net(batch[0])).square().mean()
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.remember(f"validation-{len(self.runs)}")
        self.losses.append(self.net(batch[0]).square().mean() + torch.rand(()))

    def on_validation_epoch_end(self) -> None:
        self.runs.append("validation")
        self.log("loss", torch.stack(self.losses).mean())
        self.losses.clear()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"a": self.net(batch[0]).mean(), "b": torch.rand(())})


def dropping(seed: int = 0) -> Dropping:
    torch.manual_seed(seed)
    return Dropping()


def test_each_is_what_it_is_alone(tmp_path: Path) -> None:
    several, model = EMACallback(DECAYS), dropping()
    trainer_of(tmp_path, several).fit(model, data(), data(2))
    for name, decay in DECAYS.items():
        single, other = EMACallback(decay), dropping()
        trainer_of(tmp_path, single).fit(other, data(), data(2))
        assert_equal(named(several, model)[name], averages(single, other))
        assert_equal(weights(model), weights(other))
    assert_equal(averages(several, model), named(several, model)["short"])


def test_one_pass_updates_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    many = functional.update_many_

    def counted(shadows: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(shadows))
        return many(shadows, *args, **kwargs)

    monkeypatch.setattr(functional, "update_many_", counted)
    monkeypatch.setattr(functional, "update_", None)
    trainer_of(tmp_path, EMACallback(DECAYS, buffers="average")).fit(model_of(), data())
    assert calls == [2] * 12


@pytest.mark.parametrize("evaluate", [None, "long"])
def test_evaluates_one(tmp_path: Path, evaluate: str | None) -> None:
    callback, model = EMACallback(DECAYS, evaluate=evaluate), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data(), data(2))
    expected = named(callback, model)[evaluate or "short"]
    trainer.test(model, data(2), verbose=False)
    for stage in ("validation", "test"):
        assert_equal(model.seen[stage], expected)
    assert {*trainer.callback_metrics} == set()  # `test` logs none
    assert_equal(averages(callback, model), expected)


class Metrics(Callback):
    """The metrics at the end of each validation, and how often it is told of one."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: Trainer, _: LightningModule) -> None:
        self.found.append(dict(trainer.callback_metrics))


def test_evaluates_all_with_a_metric_each(tmp_path: Path) -> None:
    callback, model, metrics = EMACallback(DECAYS, evaluate="all"), dropping(), Metrics()
    saver = ModelCheckpoint(tmp_path, monitor="loss_long", save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, saver, metrics, num_sanity_val_steps=1)
    trainer.fit(model, data(), data(2))
    assert len(model.runs) == 1 + 2 * 2  # the sanity check is of the first alone
    held = named(callback, model)
    assert_equal(model.seen["validation-3"], held["long"])
    assert_equal(model.seen["validation-4"], held["short"])
    sanity, *found = metrics.found
    assert {*sanity} == {"loss"}
    for alone in ("short", "long"):
        one, other = EMACallback(DECAYS, evaluate=alone), dropping()
        seen = Metrics()
        trainer_of(tmp_path, one, seen, num_sanity_val_steps=1).fit(other, data(), data(2))
        assert_equal(weights(other), weights(model))
        expected = [each["loss"] for each in seen.found[1:]]
        key = "loss" if alone == "short" else "loss_long"
        assert [each[key] for each in found] == expected
    scores = {
        float(torch.load(f)["callbacks"][saver.state_key]["current_score"])
        for f in tmp_path.glob("epoch*.ckpt")
    }
    assert scores == {float(each["loss_long"]) for each in found}
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
    assert "log" not in vars(model)
    (results,) = trainer.test(model, data(2), verbose=False)
    assert {*results} == {"a", "b", "a_long", "b_long"}
    assert results["b"] == results["b_long"]  # the same random numbers
    assert results["a"] != results["a_long"]


@pytest.mark.parametrize(
    ("save", "options"),
    [("averaged", {}), ("raw", {"rounding": "stochastic", "dtype": torch.bfloat16})],
)
def test_resumes_bit_for_bit(tmp_path: Path, save: Any, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"save": save, "evaluate": "long", "every": 2, **options}
    whole, expected = EMACallback(DECAYS, **given), model_of()
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer_of(tmp_path, whole, saver).fit(expected, data())
    file = next(tmp_path.glob("epoch=0*.ckpt"))
    held = torch.load(file, weights_only=True)
    assert {*held["emajit"]} == {"shadows", "step", "averaged_at"} | ({"raw"} - {save})
    resumed, model = EMACallback(DECAYS, **given), model_of(1)
    trainer_of(tmp_path, resumed).fit(model, data(), ckpt_path=file, weights_only=True)
    assert_equal(weights(model), weights(expected))
    for name, average in named(whole, expected).items():
        assert_equal(named(resumed, model)[name], average)
    assert differ(*named(whole, expected).values())


@pytest.mark.parametrize("save", ["raw", "averaged"])
def test_a_checkpoint_has_all(tmp_path: Path, save: Any) -> None:
    callback, model = EMACallback(DECAYS, save=save, evaluate="long"), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    plain = weights(Regression.load_from_checkpoint(file))
    held = named(callback, model)
    assert_equal(plain, weights(model) if save == "raw" else held["long"])
    found = {each.path: each for each in checkpoint.read_all(file)}
    assert {*found} == {"emajit.shadows.short", "emajit.shadows.long"}
    for name, average in held.items():
        one = checkpoint.read(file, key=f"emajit.shadows.{name}")
        for each in (found[f"emajit.shadows.{name}"], one):
            assert each.step == 12
            assert_equal({n: each.weights[n] for n in average}, average)
            assert_equal({n: each.raw[n] for n in average}, weights(model))
    other, fresh = EMACallback(DECAYS, evaluate="long"), model_of(1)
    trainer_of(tmp_path, other).test(fresh, data(2), ckpt_path=file, verbose=False)
    assert_equal(fresh.seen["test"], held["long"])


@pytest.mark.parametrize("save", ["raw", "averaged"])
def test_a_modules_hook_sees_each(tmp_path: Path, save: Any) -> None:
    class Renamed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.net = self.net, nn.Identity()

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.body(batch[0]).square().mean()
            return loss

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            for name in list(state):
                state[name.replace("net.", "body.")] = state.pop(name)

    callback, model = EMACallback(DECAYS, save=save), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, fresh = EMACallback(DECAYS, save=save), Renamed()
    # Of an epoch that is over already: nothing is trained.
    trainer_of(tmp_path, resumed).fit(fresh, data(), ckpt_path=tmp_path / "last.ckpt")
    for name, average in named(callback, model).items():
        moved = {n.replace("net.", "body."): value for n, value in average.items()}
        assert_equal(named(resumed, fresh)[name], moved)


def test_what_is_left_out_follows_the_training(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAYS, exclude="*.bias", buffers="average"), model_of()
    trainer_of(tmp_path, callback).fit(model, data(), data(2))
    trained = weights(model)
    for average in named(callback, model).values():
        same = {n for n in trained if torch.equal(average[n], trained[n])}
        assert same == {n for n in trained if n.endswith("bias")}


def test_each_is_the_formula(tmp_path: Path) -> None:
    recorders = [Recorder(decay, every=2) for decay in DECAYS.values()]
    callback, model = EMACallback(DECAYS, every=2), model_of()
    trainer_of(tmp_path, callback, *recorders).fit(model, data())
    for recorder, average in zip(recorders, named(callback, model).values(), strict=True):
        for name, expected in recorder.average.items():
            assert_close(average[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_written", [False, True])
def test_an_interrupted_update_counts_for_all_or_none(
    monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    model = model_of()
    held = Averages(model, EMACallback(DECAYS)._options)
    held.update(model)
    many = functional.update_many_

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if is_written:
            many(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "update_many_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.update(model)
    assert [int(held[name].num_updates) for name in DECAYS] == [1 + is_written] * 2
    assert held.updates == 1 + is_written


def test_other_names_are_refused(tmp_path: Path) -> None:
    model, files = model_of(), {}
    for kind, decay in (("single", 0.9), ("several", DECAYS)):
        trainer = trainer_of(tmp_path, EMACallback(decay), max_epochs=1)
        trainer.fit(model, data())
        files[kind] = tmp_path / f"{kind}.ckpt"
        trainer.save_checkpoint(files[kind])
    cases: list[tuple[Any, Any, str]] = [
        (0.9, "several", "expected one without a name, as the options say, found"),
        (DECAYS, "single", "expected long, short, as the options say, found one"),
        ({"a": 0.9}, "several", "expected a, as the options say, found long, short"),
    ]
    for decay, kind, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, EMACallback(decay)).fit(model_of(), data(), ckpt_path=files[kind])


def test_wrong_options() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ({}, {}, "names of letters, digits, _ and -, and none called all, found none"),
        ({"all": 0.9}, {}, "found 'all'"),
        ({"a.b": 0.9}, {}, "found 'a.b'"),
        ({1: 0.9}, {}, "found 1"),
        ({"a": 1.5}, {}, r"decay['a']: expected a number in [0, 1], found 1.5"),
        (DECAYS, {"evaluate": "other"}, "expected one of all, short, long, found 'other'"),
        (0.9, {"evaluate": "short"}, "evaluate: expected one of all, found 'short'"),
    ]
    for decay, options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            EMACallback(decay, **options)
    with pytest.raises(TypeError, match=re.escape("decay['a']: expected a number, a 0-d tensor")):
        EMACallback({"a": "0.9"})  # type: ignore[dict-item]


def test_an_unknown_name(tmp_path: Path) -> None:
    callback, single, model = EMACallback(DECAYS), EMACallback(0.9), model_of()
    for each in (callback, single):
        trainer_of(tmp_path, each, max_steps=1).fit(model, data())
    with pytest.raises(ValueError, match="name: expected short, long, found 'other'"):
        callback.averaged(model, "other").__enter__()
    with pytest.raises(ValueError, match="expected none, since there is only one, found 'short'"):
        single.averaged(model, "short").__enter__()


def test_copied_and_pickled(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAYS, evaluate="all"), model_of()
    trainer_of(tmp_path, callback).fit(model, data())
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        for name, average in named(other, model).items():
            assert_equal(average, named(callback, model)[name])
