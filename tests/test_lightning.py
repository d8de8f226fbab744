"""The callback with a real Trainer."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader, TensorDataset

from emajit import checkpoint, schedules
from tests import kills

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import FSDPStrategy

from emajit.integrations._average import fingerprint
from emajit.integrations.lightning import EMACallback

# Lightning's hints, such as that there are few workers, and what torch tells Lightning
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
    "ignore:The dirpath has changed from",
)

DECAY = schedules.warmup(0.9)


class Regression(LightningModule):
    """A network with BatchNorm; it remembers the weights that it was evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.seen: dict[str, dict[str, Tensor]] = {}

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def remember(self, stage: str) -> None:
        self.seen[stage] = {name: p.detach().clone() for name, p in self.named_parameters()}

    def validation_step(self, batch: Any, _: int) -> None:
        self.remember("validation")
        self.log("loss", self.net(batch[0]).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.remember("test")
        self.net(batch[0])

    def predict_step(self, batch: Any, _: int) -> Tensor:
        self.remember("predict")
        predicted: Tensor = self.net(batch[0])
        return predicted

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Recorder(Callback):
    """The trained weights after each optimizer step, and an average of them in float64."""

    def __init__(self, decay: schedules.Schedule = DECAY, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.average: dict[str, Tensor] = {}
        self.steps = self.updates = 0

    def on_train_start(self, _: Trainer, pl_module: LightningModule) -> None:
        self.average = {n: p.detach().double().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        if self.steps % self.every == 0:
            beta = float(self.decay(self.updates))
            self.updates += 1
            for name, p in pl_module.named_parameters():
                self.average[name] = beta * self.average[name] + (1 - beta) * p.detach().double()


def data(batches: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(4 * batches, 3, generator=generator)), batch_size=4)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
    }
    return Trainer(callbacks=[*callbacks], **defaults | options)


def model_of(seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def averages(callback: EMACallback, model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    with callback.averaged(model, name):
        return weights(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_averages_optimizer_steps(tmp_path: Path, accumulate: int, every: int) -> None:
    callback, recorder = EMACallback(DECAY, every=every), Recorder(every=every)
    model = model_of()
    trainer = trainer_of(tmp_path, callback, recorder, accumulate_grad_batches=accumulate)
    trainer.fit(model, data())
    assert recorder.steps == 12 // accumulate
    found = averages(callback, model)
    for name, expected in recorder.average.items():
        assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_training_is_what_it_is_without(tmp_path: Path) -> None:
    models = [model_of(), model_of()]
    trainer_of(tmp_path).fit(models[0], data(), data(2))
    trainer_of(tmp_path, EMACallback(DECAY)).fit(models[1], data(), data(2))
    assert_equal(models[1].state_dict(), models[0].state_dict())


def test_evaluates_with_the_averages(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAY), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data(), data(2))
    trained = weights(model)
    expected = averages(callback, model)
    assert differ(trained, expected)
    trainer.test(model, data(2), verbose=False)
    trainer.predict(model, data(2))
    for stage in ("validation", "test", "predict"):
        assert_equal(model.seen[stage], expected)
    assert_equal(weights(model), trained)


def test_sanity_check_before_training(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAY), model_of()
    before = weights(model)
    trainer_of(tmp_path, callback, max_steps=0, num_sanity_val_steps=2).fit(model, data(), data())
    assert_equal(model.seen["validation"], before)


@pytest.mark.parametrize("save", ["raw", "averaged"])
class TestCheckpoint:
    def test_has_both(self, tmp_path: Path, save: Any) -> None:
        callback, model = EMACallback(DECAY, save=save), model_of()
        trainer = trainer_of(tmp_path, callback)
        trainer.fit(model, data(), data(2))
        file = tmp_path / "last.ckpt"
        trainer.save_checkpoint(file)
        trained, averaged = weights(model), averages(callback, model)
        plain = weights(Regression.load_from_checkpoint(file))
        assert_equal(plain, trained if save == "raw" else averaged)
        held = torch.load(file, weights_only=True)
        assert_equal(held["emajit"]["shadow"], averaged)
        other = held["state_dict"] if save == "raw" else held["emajit"]["raw"]
        assert_equal({name: other[name] for name in trained}, trained)
        found = checkpoint.read(file)
        assert (found.layout, found.step) == ("emajit in Lightning", 12)
        assert_equal({name: found.weights[name] for name in averaged}, averaged)
        assert_equal({name: found.raw[name] for name in trained}, trained)
        assert set(found.raw_only) == {name for name, _ in model.named_buffers()}

    @pytest.mark.parametrize("at", [3, 6])
    def test_resumes_bit_for_bit(self, tmp_path: Path, save: Any, at: int) -> None:
        """At the end of an epoch, since Lightning begins a data loader anew."""
        options: dict[str, Any] = {"max_epochs": -1, "accumulate_grad_batches": 2}
        whole, whole_model = EMACallback(DECAY, save=save, every=2), model_of()
        trainer_of(tmp_path, whole, max_steps=9, **options).fit(whole_model, data(), data(2))
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=at, save_top_k=-1)
        begun = EMACallback(DECAY, save=save, every=2)
        trainer_of(tmp_path, begun, saver, max_steps=at, **options).fit(model_of(), data(), data(2))
        file = saver.best_model_path
        resumed, model = EMACallback(DECAY, save=save, every=2), model_of(1)
        trainer = trainer_of(tmp_path, resumed, copy.deepcopy(saver), max_steps=9, **options)
        trainer.fit(model, data(), data(2), ckpt_path=file, weights_only=True)
        assert_equal(model.state_dict(), whole_model.state_dict())
        assert_equal(averages(resumed, model), averages(whole, whole_model))

    def test_of_the_best_validation(self, tmp_path: Path, save: Any) -> None:
        """Saved when its averages were validated: the weights that had that loss."""
        callback, model = EMACallback(DECAY, save=save), model_of()
        saver = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1)
        trainer_of(tmp_path, callback, saver).fit(model, data(), data(2))
        last = max(tmp_path.glob("*.ckpt"), key=lambda f: torch.load(f)["global_step"])
        assert_equal(torch.load(last)["emajit"]["shadow"], model.seen["validation"])

    def test_tested_by_a_new_process(self, tmp_path: Path, save: Any) -> None:
        callback, model = EMACallback(DECAY, save=save), model_of()
        trainer = trainer_of(tmp_path, callback)
        trainer.fit(model, data())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        expected, fresh = averages(callback, model), model_of(1)
        other = trainer_of(tmp_path, EMACallback(DECAY, save=save))
        other.test(fresh, data(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert_equal(fresh.seen["test"], expected)

    def test_saved_in_the_middle_of_a_validation(self, tmp_path: Path, save: Any) -> None:
        class Saver(Callback):
            def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

        callback, model = EMACallback(DECAY, save=save), model_of()
        trainer_of(tmp_path, callback, Saver(), max_epochs=1).fit(model, data(), data(2))
        assert_equal(model.seen["validation"], averages(callback, model))
        found = checkpoint.read(tmp_path / "middle.ckpt")
        assert_equal({name: found.raw[name] for name in weights(model)}, weights(model))
        assert_equal(
            {name: found.weights[name] for name in weights(model)}, averages(callback, model)
        )


@pytest.mark.parametrize("monitor", [None, "loss"])
def test_killed_at_any_moment_a_checkpoint_has_both(tmp_path: Path, monitor: str | None) -> None:
    """Lightning writes one file, moves it into place, and only then removes the one before."""
    folder = tmp_path / "run"
    folder.mkdir()
    saver = ModelCheckpoint(folder, monitor=monitor, mode="max", save_last=not monitor)
    with kills.moments(folder, tmp_path / "moments") as moments:
        trainer = trainer_of(folder, EMACallback(DECAY), saver, max_epochs=4)
        trainer.fit(model_of(), data(2), data(2))
    assert len(moments) >= 4
    steps = []
    for moment in moments:
        found = [checkpoint.read(file) for file in moment.glob("*.ckpt")]
        steps.append(max([each.step or 0 for each in found], default=0))
        assert all(each.raw and each.step for each in found)
    assert steps == sorted(steps)
    assert {*steps} == ({0, 2, 4} if monitor else {0, 2, 4, 6, 8})  # the highest loss is that at 4


def test_a_checkpoint_without_averages(tmp_path: Path) -> None:
    plain, model = trainer_of(tmp_path), model_of()
    plain.fit(model, data())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback, fresh = EMACallback(schedules.constant(1.0)), model_of(1)
    with pytest.warns(UserWarning, match="has no averages of EMACallback"):
        trainer_of(tmp_path, callback, max_epochs=3).fit(
            fresh, data(), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert_equal(averages(callback, fresh), weights(model))


class Migrated(Regression):
    """Its layers were called `net` when it was saved, and their units were in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.net = self.net, nn.Identity()
        self.calls = 0

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.body(batch[0]).square().mean()
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls += 1
        state = checkpoint["state_dict"]
        del checkpoint["loops"]["predict_loop"]  # which a second call would not find
        for name in list(state):
            state[name.replace("net.", "body.")] = state.pop(name)
        for name, value in state.items():
            if not name.startswith("body.2.") and value.ndim:
                state[name] = value.flip(0)
        state["body.2.weight"] = state["body.2.weight"].flip(1)
        state["body.1.running_mean"] += 1  # in place


def migrated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the hook of `Migrated` has it, for tensors that nobody else holds."""
    found = {"net.1.running_mean": torch.zeros(4)} | state
    Migrated().on_load_checkpoint({"state_dict": found, "loops": {"predict_loop": 0}})
    return found


class TestMigration:
    """A module's `on_load_checkpoint` sees averages as well as trained weights."""

    @pytest.mark.parametrize("save", ["raw", "averaged", "of Lightning"])
    def test_renames_and_changes_both(self, tmp_path: Path, save: Any) -> None:
        model = model_of()
        kind = EMAWeightAveraging(decay=0.5) if save == "of Lightning" else None
        callback: Any = kind or EMACallback(DECAY, save=save)

        class Saver(Callback):
            def on_train_epoch_end(self, trainer: Trainer, _: LightningModule) -> None:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

        trainer_of(tmp_path, callback, Saver()).fit(model, data())
        found = checkpoint.read(tmp_path / "last.ckpt")
        state = {n: v.clone() for n, v in found.raw.items()}
        averaged = migrated({n: found.weights[n].clone() for n in weights(model_of())})

        class Look(Callback):
            def on_train_start(self, _: Trainer, module: LightningModule) -> None:
                assert_equal(module.state_dict(), migrated(state))
                held = averages(resumed, module)
                assert_equal(held, {name: averaged[name] for name in held})

        fresh, resumed = Migrated(), EMACallback(DECAY, save="raw" if kind else save)
        trainer = trainer_of(tmp_path, resumed, Look(), max_epochs=3)
        trainer.fit(fresh, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=bool(kind))
        trainer.save_checkpoint(tmp_path / "again.ckpt")
        assert checkpoint.read(tmp_path / "again.ckpt").step == (found.step or 0) + 6
        assert "on_load_checkpoint" not in vars(fresh)
        assert fresh.calls == (2 if save == "raw" else 3)

    def test_tested_by_a_new_process(self, tmp_path: Path) -> None:
        file, _, model = saved(tmp_path, "averaged")
        fresh = Migrated()
        fresh.test_step = lambda *_: fresh.remember("test")  # type: ignore[method-assign]
        found = checkpoint.read(file)
        trainer_of(tmp_path, EMACallback(DECAY)).test(fresh, data(2), ckpt_path=file, verbose=False)
        averaged = migrated({n: found.weights[n].clone() for n in weights(model)})
        assert_equal(fresh.seen["test"], {n: averaged[n] for n in fresh.seen["test"]})
        assert_equal(fresh.state_dict(), migrated({n: v.clone() for n, v in found.raw.items()}))

    @pytest.mark.parametrize("save", ["raw", "averaged"])
    def test_what_torchs_hooks_change_is_told(self, tmp_path: Path, save: Any) -> None:
        """They see one copy, or none; a cast is no change."""
        file, _, _ = saved(tmp_path, save)
        model = model_of()
        trainer = trainer_of(tmp_path, EMACallback(DECAY, save=save), precision="bf16-true")
        trainer.test(model, data(2), ckpt_path=file, verbose=False)

        def doubles(_: nn.Module, state: dict[str, Tensor], *__: Any) -> None:
            state["net.0.weight"] = state["net.0.weight"] * 2

        hooked: Any = model_of()
        hooked.register_load_state_dict_pre_hook(doubles)
        trainer = trainer_of(tmp_path, EMACallback(DECAY, save=save), max_epochs=3)
        with pytest.warns(UserWarning, match=r"net\.0\.weight: the module has changed trained"):
            trainer.fit(hooked, data(), ckpt_path=file)


class TestOfLightningsOwnAveraging:
    """`WeightAveraging` has the averages in `state_dict`, and beside it the trained weights."""

    def test_resumes_with_both(self, tmp_path: Path) -> None:
        class Saver(Callback):
            def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                self.trained = weights(module)

        saver, callback, resumed = Saver(), EMAWeightAveraging(decay=0.5), EMACallback(DECAY)
        trainer_of(tmp_path, callback, saver).fit(model_of(), data())
        averaged = {n: torch.load(tmp_path / "last.ckpt")["state_dict"][n] for n in saver.trained}
        assert differ(saver.trained, averaged)

        class Look(Callback):
            def on_train_start(self, _: Trainer, module: LightningModule) -> None:
                assert_equal(weights(module), saver.trained)
                assert_equal(averages(resumed, module), averaged)

        model, trainer = model_of(1), trainer_of(tmp_path, resumed, Look(), max_epochs=3)
        trainer.fit(model, data(), ckpt_path=tmp_path / "last.ckpt")
        trainer.save_checkpoint(tmp_path / "again.ckpt")
        assert checkpoint.read(tmp_path / "again.ckpt").step == 12 + 6

    def test_before_its_first_update_there_are_no_averages(self, tmp_path: Path) -> None:
        """Only the weights that the training began with."""

        class Saver(Callback):
            def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                self.trained = weights(module)

        class Look(Callback):
            def on_train_start(self, _: Trainer, module: LightningModule) -> None:
                assert_equal(weights(module), saver.trained)
                assert_equal(averages(resumed, module), saver.trained)

        saver, resumed = Saver(), EMACallback(DECAY)
        never = EMAWeightAveraging(update_starting_at_step=1000)
        trainer_of(tmp_path, never, saver).fit(model_of(), data())
        trainer = trainer_of(tmp_path, resumed, Look(), max_epochs=3)
        trainer.fit(model_of(1), data(), ckpt_path=tmp_path / "last.ckpt")

    def test_averages_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        class Saver(Callback):
            def on_train_end(self, trainer: Trainer, _: LightningModule) -> None:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

        trainer = trainer_of(tmp_path, Saver(), EMAWeightAveraging(decay=0.5))
        trainer.fit(model_of(), data())
        file = torch.load(tmp_path / "last.ckpt")
        del file["state_dict"]["net.0.bias"]
        torch.save(file, tmp_path / "broken.ckpt")
        model = model_of()
        model.strict_loading = False
        with pytest.raises(
            ValueError, match=r"averages: expected those of the model.*net\.0\.bias"
        ):
            trainer_of(tmp_path, EMACallback(DECAY), max_epochs=3).fit(
                model, data(), ckpt_path=tmp_path / "broken.ckpt"
            )


def test_averages_of_another_model(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAY), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    file = torch.load(tmp_path / "last.ckpt")
    del file["emajit"]["shadow"]["net.0.bias"]
    torch.save(file, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"averages: expected those of the model.*net\.0\.bias"):
        trainer_of(tmp_path, EMACallback(DECAY), max_epochs=3).fit(
            model_of(), data(), ckpt_path=tmp_path / "broken.ckpt"
        )


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end"])
def test_an_exception_leaves_the_trained_weights(tmp_path: Path, hook: str) -> None:
    class Broken(Regression):
        def remember(self, stage: str) -> None:
            super().remember(stage)
            if hook == "validation_step":
                raise KeyError

        def on_validation_epoch_end(self) -> None:
            raise KeyError

    torch.manual_seed(0)
    model, callback = Broken(), EMACallback(DECAY)
    trainer = trainer_of(tmp_path, callback, num_sanity_val_steps=0)
    with pytest.raises(KeyError):
        trainer.fit(model, data(), data(2))
    assert differ(weights(model), model.seen["validation"])
    assert_equal(model.seen["validation"], averages(callback, model))


def test_fitting_goes_on(tmp_path: Path) -> None:
    """A second fit of the same callback, in a Trainer whose steps begin at 0 again."""
    callback, model = EMACallback(DECAY), model_of()
    trainer_of(tmp_path, callback).fit(model, data())
    trainer_of(tmp_path, callback).fit(model, data())
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.read(tmp_path / "last.ckpt").step == 36


def saved(folder: Path, save: Any = "raw") -> tuple[Path, EMACallback, Regression]:
    """A checkpoint of a training, its callback and its module."""
    callback, model = EMACallback(DECAY, save=save), model_of()
    trainer = trainer_of(folder, callback)
    trainer.fit(model, data())
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt", callback, model


def assert_begins_anew(folder: Path, callback: EMACallback, other: Regression) -> None:
    """`other`, which is `model_of(1)`, is tested as it is, and fit as with a new callback."""
    trainer_of(folder, callback).test(other, data(2), verbose=False)
    assert_equal(other.seen["test"], weights(other))
    trainer_of(folder, callback).fit(other, data())
    alone, expected = EMACallback(DECAY), model_of(1)
    trainer_of(folder, alone).fit(expected, data())
    assert_equal(averages(callback, other), averages(alone, expected))


class TestOfWhichWeights:
    def test_another_module_is_evaluated_as_it_is(self, tmp_path: Path) -> None:
        file, callback, _ = saved(tmp_path)
        other = Regression.load_from_checkpoint(file)
        before = weights(other)
        trainer_of(tmp_path, callback).test(other, data(2), verbose=False)
        assert_equal(other.seen["test"], before)

    def test_each_module_has_averages_of_its_own(self, tmp_path: Path) -> None:
        callback = EMACallback(DECAY)
        for seed in range(2):
            alone, expected = EMACallback(DECAY), model_of(seed)
            trainer_of(tmp_path, alone).fit(expected, data(), data(2))
            model = model_of(seed)
            trainer_of(tmp_path, callback).fit(model, data(), data(2))
            assert_equal(averages(callback, model), averages(alone, expected))

    def test_other_weights_in_the_same_module(self, tmp_path: Path) -> None:
        _, callback, model = saved(tmp_path)
        start = model_of(1)
        model.load_state_dict(start.state_dict())
        trainer = trainer_of(tmp_path, callback)
        trainer.test(model, data(2), verbose=False)
        assert_equal(model.seen["test"], weights(start))
        alone = EMACallback(DECAY)
        trainer_of(tmp_path, alone).fit(start, data())
        trainer_of(tmp_path, callback).fit(model, data())
        assert_equal(averages(callback, model), averages(alone, start))

    def test_the_same_numbers_written_again(self, tmp_path: Path) -> None:
        """As DDP does at the start of each stage."""
        _, callback, model = saved(tmp_path)
        expected = averages(callback, model)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.clone())
        trainer_of(tmp_path, callback).test(model, data(2), verbose=False)
        assert_equal(model.seen["test"], expected)

    @pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
    def test_in_the_precision_of_another_trainer(self, tmp_path: Path, precision: Any) -> None:
        _, callback, model = saved(tmp_path)
        expected = averages(callback, model)
        trainer_of(tmp_path, callback, precision=precision).test(model, data(2), verbose=False)
        dtype = next(model.parameters()).dtype
        assert dtype != torch.float32
        assert_equal(model.seen["test"], {n: v.to(dtype) for n, v in expected.items()})

    def test_the_same_numbers_in_another_order(self, tmp_path: Path) -> None:
        _, callback, model = saved(tmp_path)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.flip(0))
        trainer_of(tmp_path, callback).test(model, data(2), verbose=False)
        assert_equal(model.seen["test"], weights(model))

    def test_other_weights_saved_after_a_training(self, tmp_path: Path) -> None:
        callback, model = EMACallback(DECAY), model_of()
        trainer = trainer_of(tmp_path, callback)
        trainer.fit(model, data())
        model.load_state_dict(model_of(1).state_dict())
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        assert "emajit" not in torch.load(tmp_path / "other.ckpt")

    def test_weights_written_behind_torchs_back(self, tmp_path: Path) -> None:
        _, callback, model = saved(tmp_path)
        for p in model.parameters():
            p.data = p.data + 1
        trainer_of(tmp_path, callback).test(model, data(2), verbose=False)
        assert_equal(model.seen["test"], weights(model))

    def test_parameters_can_be_swapped(self, tmp_path: Path) -> None:
        """As `Module.to` does with DTensors; nothing may refer to one weakly."""
        _, callback, model = saved(tmp_path)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64)
            model.to(torch.float32)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        expected = averages(callback, model)
        trainer_of(tmp_path, callback).test(model, data(2), verbose=False)
        assert_equal(model.seen["test"], expected)

    @pytest.mark.parametrize("save", ["raw", "averaged"])
    def test_a_checkpoint_of_another_module_has_none(self, tmp_path: Path, save: Any) -> None:
        _, callback, _ = saved(tmp_path, save)
        other, trainer = model_of(1), trainer_of(tmp_path, callback)
        trainer.test(other, data(2), verbose=False)
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        checkpoint = torch.load(tmp_path / "other.ckpt")
        assert "emajit" not in checkpoint
        assert_equal(weights(model_of(1)), {n: checkpoint["state_dict"][n] for n in weights(other)})

    def test_a_training_that_does_not_begin(self, tmp_path: Path) -> None:
        _, callback, _ = saved(tmp_path)
        other = model_of(1)
        with pytest.raises(TypeError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(other, "configure_optimizers", lambda: 1 / "0")  # type: ignore[operator]
            trainer_of(tmp_path, callback).fit(other, data())
        assert_begins_anew(tmp_path, callback, other)

    def test_what_was_loaded_and_not_used(self, tmp_path: Path) -> None:
        """By a run that had ended before, and by one that failed."""
        file, _, _ = saved(tmp_path)
        for fails in (False, True):
            callback, resumed = EMACallback(DECAY), model_of()
            if fails:
                with pytest.raises(TypeError), pytest.MonkeyPatch.context() as patch:
                    patch.setattr(resumed, "test_dataloader", lambda: 1 / "0")  # type: ignore[operator]
                    trainer_of(tmp_path, callback).test(resumed, ckpt_path=file, verbose=False)
            else:
                trainer_of(tmp_path, callback).fit(resumed, data(), ckpt_path=file)
            assert_begins_anew(tmp_path, callback, model_of(1))

    def test_what_was_loaded_is_for_its_module(self, tmp_path: Path) -> None:
        file, before, model = saved(tmp_path)
        callback, resumed = EMACallback(DECAY), model_of()
        trainer_of(tmp_path, callback).fit(resumed, data(), ckpt_path=file)
        trainer_of(tmp_path, callback).test(resumed, data(2), verbose=False)
        assert_equal(resumed.seen["test"], averages(before, model))

    def test_a_trainer_within_a_training(self, tmp_path: Path) -> None:
        callback = EMACallback(DECAY)

        class Nested(Regression):
            def on_train_epoch_end(self) -> None:
                outer = self.trainer
                trainer_of(tmp_path, callback).validate(self, data(2), verbose=False)
                assert_equal(self.seen["validation"], averages(callback, self))
                self.trainer = outer

        model = Nested()
        trainer = trainer_of(tmp_path, callback)
        trainer.fit(model, data(), data(2))
        assert_equal(model.seen["validation"], averages(callback, model))
        trainer.save_checkpoint(tmp_path / "nested.ckpt")
        assert "emajit" in torch.load(tmp_path / "nested.ckpt")

    def test_weights_alone_are_evaluated_as_they_are(self, tmp_path: Path) -> None:
        _, callback, model = saved(tmp_path)
        trainer = trainer_of(tmp_path, callback)
        trainer.fit(model, data())
        file = tmp_path / "weights.ckpt"
        trainer.save_checkpoint(file, weights_only=True)
        trained = weights(model)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, data())
        with pytest.warns(UserWarning, match="has no averages of EMACallback"):
            trainer.test(model, data(2), ckpt_path=file, verbose=False)
        assert_equal(model.seen["test"], trained)

    @pytest.mark.parametrize("save", ["raw", "averaged"])
    def test_after_the_test_of_a_checkpoint(self, tmp_path: Path, save: Any) -> None:
        file, callback, model = saved(tmp_path, save)
        trained, expected = weights(model), averages(callback, model)
        fresh, again = model_of(1), EMACallback(DECAY, save=save)
        trainer = trainer_of(tmp_path, again)
        trainer.validate(fresh, data(2), ckpt_path=file, verbose=False)
        assert_equal(fresh.seen["validation"], expected)
        assert_equal(weights(fresh), trained)
        trainer.fit(fresh, data(), data(2))
        trainer_of(tmp_path, callback).fit(model, data())
        assert_equal(averages(again, fresh), averages(callback, model))

    def test_a_checkpoint_without_averages_is_told(self, tmp_path: Path) -> None:
        plain, model = trainer_of(tmp_path), model_of(1)
        plain.fit(model, data())
        plain.save_checkpoint(tmp_path / "plain.ckpt")
        _, callback, other = saved(tmp_path)
        with pytest.warns(UserWarning, match="has no averages of EMACallback"):
            trainer_of(tmp_path, callback).test(
                other, data(2), ckpt_path=tmp_path / "plain.ckpt", verbose=False
            )
        assert_equal(other.seen["test"], weights(model))


class Odd(Regression):
    """A tied weight, and two names that are one but for what wrappers add."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = nn.Linear(3, 3, bias=False)
        inner.module = nn.Linear(3, 3, bias=False)
        tied = nn.Linear(3, 3, bias=False)
        tied.weight = inner.weight
        inner.forward = lambda x: nn.functional.linear(inner.module(x), inner.weight)
        self.net = nn.Sequential(inner, tied)
        for name in ("_schedule", "state", "decay"):  # which the averages have themselves
            self.register_parameter(name, nn.Parameter(torch.ones(())))


@pytest.mark.parametrize("save", ["raw", "averaged"])
def test_tied_weights_and_names_that_are_alike(tmp_path: Path, save: Any) -> None:
    callback, model = EMACallback(DECAY, save=save), Odd()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "file")
    trained, expected = weights(model), averages(callback, model)
    assert len(expected) == 5
    plain = Odd.load_from_checkpoint(tmp_path / "file")
    assert_equal(weights(plain), expected if save == "averaged" else trained)
    read = Odd()
    read.load_state_dict(dict(checkpoint.read(tmp_path / "file").weights))
    assert_equal(weights(read), expected)
    resumed, fresh = EMACallback(DECAY, save=save), Odd()
    trainer_of(tmp_path, resumed).fit(fresh, data(), ckpt_path=tmp_path / "file")
    assert_equal(weights(fresh), trained)
    assert_equal(averages(resumed, fresh), expected)


def test_compiled_module_and_low_precision(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAY, dtype=torch.float32), model_of()
    model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
    trainer = trainer_of(tmp_path, callback, precision="bf16-true")
    trainer.fit(model, data(), data(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = checkpoint.read(tmp_path / "last.ckpt")
    assert {v.dtype for n, v in found.weights.items() if n not in found.raw_only} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    held = torch.load(tmp_path / "last.ckpt")
    assert "net.0.weight" in held["emajit"]["shadow"]
    assert "net._orig_mod.0.weight" in held["state_dict"]
    for name, value in model.seen["validation"].items():
        assert torch.equal(value, found.weights[name.replace("_orig_mod.", "")].bfloat16())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision_plugins(tmp_path: Path, precision: Any) -> None:
    callback, recorder, model = EMACallback(DECAY), Recorder(), model_of()
    trainer_of(tmp_path, callback, recorder, precision=precision).fit(model, data(), data(2))
    for name, value in averages(callback, model).items():
        assert_close(value.double(), recorder.average[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_buffers(tmp_path: Path, buffers: Any) -> None:
    callback, model = EMACallback(DECAY, buffers=buffers), model_of()
    trainer_of(tmp_path, callback).fit(model, data(), data(2))
    mean, count = (
        model.get_buffer(f"net.1.{n}").clone() for n in ("running_mean", "num_batches_tracked")
    )
    model.eval()
    with callback.averaged(model):
        assert torch.equal(model.get_buffer("net.1.running_mean"), mean) == (buffers != "average")
        assert torch.equal(model.get_buffer("net.1.num_batches_tracked"), count)


class Backboned(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.net = nn.Sequential(self.backbone, nn.Tanh(), nn.Linear(3, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class FromTheUnfreezing(Callback):
    """In float64, the averages of what is trained, each from the batch on that first trains it."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.updates = 0

    def on_train_batch_start(self, _: Trainer, module: LightningModule, *__: Any) -> None:
        for name, p in module.named_parameters():
            if p.requires_grad:
                self.average.setdefault(name, p.detach().double())

    def on_train_batch_end(self, _: Any, module: LightningModule, *__: Any, **___: Any) -> None:  # type: ignore[override]
        beta, self.updates = float(DECAY(self.updates)), self.updates + 1
        for name, p in module.named_parameters():
            if name in self.average:
                self.average[name] = beta * self.average[name] + (1 - beta) * p.detach().double()


class TestUnfreezing:
    """By Lightning's `BackboneFinetuning`, which freezes in `setup`, at each resume as well."""

    def finetuning(self) -> Any:
        return BackboneFinetuning(
            1, lambda _: 1.0, backbone_initial_lr=0.05, initial_denom_lr=1.0, should_align=False
        )

    @pytest.mark.parametrize("is_first", [True, False])
    def test_starts_from_the_weights_and_is_saved(self, tmp_path: Path, is_first: bool) -> None:
        torch.manual_seed(0)
        model, callback, seen = Backboned(), EMACallback(DECAY), FromTheUnfreezing()
        frozen = model.backbone.weight.detach().clone()
        pair = [callback, self.finetuning()]
        trainer = trainer_of(tmp_path, *pair[:: 1 if is_first else -1], seen, max_epochs=3)
        trainer.fit(model, data(), data(2))
        assert seen.updates == 18
        assert seen.average.keys() == weights(model).keys()
        found = averages(callback, model)
        for name, expected in seen.average.items():
            assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found["net.0.weight"], frozen)
        assert_equal(model.seen["validation"], found)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert set(torch.load(tmp_path / "last.ckpt")["emajit"]["shadow"]) == {*seen.average}

    @pytest.mark.parametrize("save", ["raw", "averaged"])
    @pytest.mark.parametrize("hooked", [False, True])
    def test_resumed_after_it(self, tmp_path: Path, save: Any, hooked: bool) -> None:
        class Hooked(Backboned):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                pass

        torch.manual_seed(0)
        model, callback = Backboned(), EMACallback(DECAY, save=save)
        trainer = trainer_of(tmp_path, callback, self.finetuning())
        trainer.fit(model, data())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        expected = averages(callback, model)

        class Look(Callback):
            def on_train_start(self, _: Trainer, module: LightningModule) -> None:
                assert not module.get_parameter("net.0.weight").requires_grad
                assert_equal(averages(resumed, module), expected)
                assert_equal(weights(module), weights(model))

        resumed, fresh = EMACallback(DECAY, save=save), Hooked() if hooked else Backboned()
        trainer = trainer_of(tmp_path, resumed, self.finetuning(), Look(), max_epochs=3)
        trainer.fit(fresh, data(), ckpt_path=tmp_path / "last.ckpt")
        # Lightning leaves the backbone frozen, and the average goes on to its weights.
        found, before, towards = (
            state["net.0.weight"] for state in (averages(resumed, fresh), expected, weights(fresh))
        )
        rest = 1.0
        for step in range(12, 18):
            rest *= float(DECAY(step))
        assert_close(found, towards + rest * (before - towards), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_within_a_batch(self, tmp_path: Path, accumulated: int) -> None:
        """A `training_step` comes after the callback's hook; validated before the next step."""

        class Unfreezing(Backboned):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if batch_idx == 2:
                    self.backbone.requires_grad_(True)
                return super().training_step(batch, batch_idx)

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=0.05)

        class Seen(Callback):
            def __init__(self) -> None:
                self.average: dict[str, Tensor] = {}
                self.updates = 0

            def on_before_optimizer_step(self, _: Any, module: Any, __: Any) -> None:
                FromTheUnfreezing.on_train_batch_start(self, _, module)  # type: ignore[arg-type]

            def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
                if trainer.global_step > self.updates:
                    FromTheUnfreezing.on_train_batch_end(self, trainer, module)  # type: ignore[arg-type]

        torch.manual_seed(0)
        model, callback, seen = Unfreezing(), EMACallback(DECAY), Seen()
        model.backbone.requires_grad_(False)
        options = {"val_check_interval": 1, "accumulate_grad_batches": accumulated}
        trainer_of(tmp_path, callback, seen, max_epochs=1, **options).fit(model, data(), data(2))
        found = averages(callback, model)
        assert found.keys() == seen.average.keys() == weights(model).keys()
        for name, expected in seen.average.items():
            assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)

    def test_another_module_takes_nothing_away(self, tmp_path: Path) -> None:
        class Wrong(Callback):
            def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
                with pytest.raises(ValueError, match="expected every averaged parameter"):
                    callback.averaged(module.net).__enter__()

        model, callback = Backboned(), EMACallback(DECAY)
        trainer_of(tmp_path, callback, Wrong(), max_epochs=1).fit(model, data())
        assert averages(callback, model).keys() == weights(model).keys()

    def test_resumed_before_it(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        whole, uninterrupted = EMACallback(DECAY), Backboned()
        start = copy.deepcopy(uninterrupted)
        trainer_of(tmp_path, whole, self.finetuning(), max_epochs=3).fit(uninterrupted, data())
        trainer = trainer_of(tmp_path, EMACallback(DECAY), self.finetuning(), max_epochs=1)
        trainer.fit(start, data())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        resumed, fresh = EMACallback(DECAY), Backboned()
        trainer = trainer_of(tmp_path, resumed, self.finetuning(), max_epochs=3)
        trainer.fit(fresh, data(), ckpt_path=tmp_path / "last.ckpt")
        assert_equal(weights(fresh), weights(uninterrupted))
        assert_equal(averages(resumed, fresh), averages(whole, uninterrupted))


class Diverging(Regression):
    """A loss that is NaN in the third batch, which Adam never forgets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss


def test_averages_that_are_not_finite_are_told_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, saver = Diverging(), ModelCheckpoint(tmp_path, save_top_k=-1)
    with pytest.warns(
        UserWarning, match=r"net.0.weight: the average holds .*nonfinite='skip'"
    ) as w:
        trainer_of(tmp_path, EMACallback(DECAY), saver, max_epochs=3).fit(model, data())
    assert len([each for each in w if "not finite" in str(each.message)]) == 1


def test_weights_that_are_not_finite_are_not_averaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback, recorder, model = EMACallback(DECAY, nonfinite="skip"), Recorder(), Diverging()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer_of(tmp_path, callback, recorder, saver, max_steps=2).fit(model, data())
    expected = recorder.average
    trainer_of(tmp_path, callback, saver).fit(model, data())
    assert all(p.isnan().all() for p in model.parameters())
    found = averages(callback, model)
    assert all(value.isfinite().all() for value in found.values())
    assert differ({n: v.float() for n, v in expected.items()}, found)  # it has gone on until then


def test_which_parameters_and_how(tmp_path: Path) -> None:
    callback = EMACallback(
        DECAY,
        include="net.*",
        exclude=["*.bias"],
        rounding="stochastic",
        dtype=torch.bfloat16,
        backend="eager",
    )
    model, trainer = model_of(), trainer_of(tmp_path, callback)
    trainer.fit(model, data(), data(2))
    trained = weights(model)
    seen = model.seen["validation"]
    assert {n for n in seen if not torch.equal(seen[n], trained[n])} == {
        n for n in seen if n.endswith("weight")
    }
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, fresh = EMACallback(**callback._options), model_of(1)
    trainer_of(tmp_path, resumed).fit(fresh, data(), ckpt_path=tmp_path / "last.ckpt")
    assert_equal(averages(resumed, fresh), averages(callback, model))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"nonfinite": "zero"}, "nonfinite: expected propagate or skip, found 'zero'"),
        ({"rounding": "up"}, "rounding: expected nearest or stochastic, found 'up'"),
        ({"backend": "none"}, "backend: "),
    ]
    for option, message in wrong:
        with pytest.raises(ValueError, match=message):
            EMACallback(**option)


def test_save_weights_only_is_told(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="saves the trained weights alone"):
        trainer_of(tmp_path, EMACallback(), saver).fit(model_of(), data())


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_an_evaluation_of_a_checkpoint_without_averages_is_told(
    tmp_path: Path, stage: str, is_whole: bool
) -> None:
    """Lightning tells no callback of a file with weights alone, also that of the best epoch."""
    plain, trained = trainer_of(tmp_path), model_of()
    plain.fit(trained, data())
    plain.save_checkpoint(tmp_path / "plain.ckpt", weights_only=not is_whole)
    trainer, model = trainer_of(tmp_path, EMACallback()), model_of(1)
    with pytest.warns(UserWarning, match="has no averages of EMACallback") as told:
        getattr(trainer, stage)(model, data(2), ckpt_path=tmp_path / "plain.ckpt")
    assert sum("no averages" in str(each.message) for each in told) == 1
    assert_equal(model.seen[stage], weights(trained))


def test_nothing_is_averaged_without_training(tmp_path: Path) -> None:
    model = model_of()
    before = weights(model)
    trainer = trainer_of(tmp_path, EMACallback())
    trainer.test(model, data(2), verbose=False)
    assert_equal(model.seen["test"], before)
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    assert "emajit" not in torch.load(tmp_path / "raw.ckpt")


def test_a_fingerprint_knows_places() -> None:
    w = torch.randn(3, 4)
    others = [w.flip(0), w.flip(1), -w, w[0], w.double(), w[:, :0]]
    assert len({fingerprint([x]) for x in (w, *others)}) == 7
    assert fingerprint([w, w[0]]) != fingerprint([w[0], w])
    assert fingerprint([w]) == fingerprint([w.mT.contiguous().mT])
    assert fingerprint([w], torch.bfloat16) == fingerprint([w.bfloat16()])
    for z in (
        torch.randn(3, 4, dtype=torch.complex128).mT,
        torch.randn(3, dtype=torch.cfloat).conj(),
    ):
        assert fingerprint([z]) == fingerprint([z.resolve_conj().contiguous()])
    both: Any = TwoTensor(w, w + 1)  # type: ignore[no-untyped-call]
    assert fingerprint([both]) == fingerprint([w, w + 1])


def test_no_averages_yet() -> None:
    with pytest.raises(RuntimeError, match=r"expected averages, which fit\(\) starts, found none"):
        averages(EMACallback(), model_of())


def test_saving_averages_for_trained_weights_is_refused(tmp_path: Path) -> None:
    _, callback, model = saved(tmp_path)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    with callback.averaged(model), pytest.raises(RuntimeError, match="outside of ema_scope"):
        trainer.save_checkpoint(tmp_path / "file")


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one EMACallback, found another"):
        trainer_of(tmp_path, EMACallback(), EMACallback()).fit(model_of(), data())


def test_processes_that_end_with_the_averages_are_told_of(tmp_path: Path) -> None:
    callback = EMACallback()
    trainer = trainer_of(tmp_path, callback, strategy="ddp_spawn", devices=2)
    trainer.strategy._configure_launcher()
    with pytest.warns(UserWarning, match="the averages end with the processes"):
        callback.setup(trainer, model_of(), "fit")


def test_the_older_fsdp_is_refused(tmp_path: Path) -> None:
    trainer: Any = trainer_of(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match="expected ModelParallelStrategy to shard, found FSDPStr"):
        EMACallback().setup(trainer, model_of(), "fit")


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="save: expected raw or averaged, found 'both'"):
        EMACallback(save="both")  # type: ignore[arg-type]
    options: list[tuple[dict[str, Any], str]] = [
        ({"every": 0}, "every: expected a number of steps, >= 1, found 0"),
        ({"every": 1.5}, "every: expected a number of steps, >= 1, found 1.5"),
        ({"decay": 1.5}, r"decay: expected a number in \[0, 1\], found 1.5"),
        ({"decay": float("nan")}, r"decay: expected a number in \[0, 1\], found nan"),
        (
            {"dtype": "float32"},
            "dtype: expected a floating-point dtype such as torch.float32, found 'float32'",
        ),
        ({"buffers": "nope"}, "buffers: expected ignore or copy or average, found 'nope'"),
    ]
    for option, message in options:
        with pytest.raises(ValueError, match=message):
            EMACallback(**option)
    for decay in ("0.9", None, [0.9, 0.99]):
        wrong: Any = decay
        with pytest.raises(TypeError, match="decay: expected a number, a 0-d tensor or a schedule"):
            EMACallback(wrong)


def test_copied_and_pickled(tmp_path: Path) -> None:
    callback, model = EMACallback(DECAY), model_of()
    trainer_of(tmp_path, callback).fit(model, data())
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert_equal(averages(other, model), averages(callback, model))
        same, another = copy.deepcopy(model), model_of(1)
        for tested in (same, another):
            trainer_of(tmp_path, other).test(tested, data(2), verbose=False)
        assert_equal(same.seen["test"], averages(callback, model))
        assert_equal(another.seen["test"], weights(model_of(1)))


def sequence(seed: int, folder: Path) -> None:
    """A training with random options, killed at random moments and resumed, is one without kills.

    Each validation is of the averages of a reference in float64.
    """
    choose = random.Random(seed)  # noqa: S311
    accumulate, every = choose.choice([1, 2, 3]), choose.choice([1, 2])
    options: dict[str, Any] = {
        "max_epochs": 4,
        "accumulate_grad_batches": accumulate,
        "check_val_every_n_epoch": choose.choice([1, 2]),
        "num_sanity_val_steps": choose.choice([0, 1]),
        "precision": choose.choice(["32-true", "bf16-mixed"]),
    }
    saves: dict[str, Any] = {
        "every_n_epochs": 1,
        "save_on_train_epoch_end": choose.choice([True, False]),
        "save_top_k": choose.choice([1, -1]),
        "save_last": choose.choice([None, True, "link"]),
    }
    kinds: dict[str, Any] = {
        "every": every,
        "save": choose.choice(["raw", "averaged"]),
        "dtype": choose.choice([None, torch.float64]),
        "nonfinite": choose.choice(["propagate", "skip"]),
    }
    epochs = [6, 5][choose.randrange(2)]
    decay: Any = {"first": DECAY, "second": 0.5} if seed % 2 else DECAY

    class Module(choose.choice([Regression, Backboned])):  # type: ignore[misc]
        def on_load_checkpoint(self, _: dict[str, Any]) -> None:
            pass

    class Checks(Recorder):
        def on_validation_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            if not trainer.sanity_checking and not trainer.ckpt_path:
                for name, value in weights(module).items():
                    assert_close(value.double(), self.average[name], rtol=2e-6, atol=2e-6)

    def train(at: Path, file: Path | None = None) -> tuple[EMACallback, Any]:
        torch.manual_seed(0)
        callback, module = EMACallback(decay, **kinds), Module()
        others = [Checks(every=every), ModelCheckpoint(at, **saves)]
        trainer = trainer_of(at, callback, *others, **options)
        trainer.fit(module, data(epochs), data(2), ckpt_path=file)
        return callback, module

    whole, expected = train(folder / "whole")
    (folder / "0").mkdir()
    with kills.moments(folder / "0", folder / "moments-0") as moments:
        train(folder / "0")
    for life in range(1, choose.choice([2, 3])):
        killed = choose.choice(moments)
        files = [file for file in killed.glob("*.ckpt") if file.exists()]  # and no dead link
        last = max(files, key=lambda file: torch.load(file)["global_step"], default=None)
        with kills.moments(killed, folder / f"moments-{life}") as moments:
            callback, module = train(killed, last)
    assert_equal(weights(module), weights(expected))
    if module.trainer.global_step:
        for name in decay if seed % 2 else [None]:
            held = averages(whole, expected, name)
            assert_equal(averages(callback, module, name), held)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_training_that_is_killed_and_resumed(tmp_path: Path, seed: int) -> None:
    sequence(seed, tmp_path)


def test_before_the_first_average_the_trained_weights_are_evaluated_and_saved(
    tmp_path: Path,
) -> None:
    """And not the weights at the start, of which the averages are."""
    ema, model = EMACallback(DECAY, every=8, save="averaged"), model_of()
    trainer = trainer_of(tmp_path, ema, max_epochs=1)
    trainer.fit(model, data(), data(1))
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, value in now.items():
        assert torch.equal(model.seen["validation"][name], value)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    early = torch.load(tmp_path / "early.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(early[name], value) for name, value in now.items())
    again, other = EMACallback(DECAY, every=8, save="averaged"), model_of(1)
    trainer = trainer_of(tmp_path, again, max_epochs=2)
    trainer.fit(other, data(), data(1), ckpt_path=tmp_path / "early.ckpt")
    assert again._averages is not None
    assert again._averages.updates == 1
    assert any(
        not torch.equal(other.seen["validation"][name], p) for name, p in other.named_parameters()
    )
