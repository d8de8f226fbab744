"""Post-hoc snapshots of the callback for Lightning, and averages back into training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emajit import LitEma, checkpoint, merging, posthoc, schedules
from emajit.posthoc import PostHoc

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from emajit.integrations.lightning import EMACallback
from tests.test_lightning import (
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

LENGTHS = [0.05, 0.1]


def steps(folder: Path) -> list[int]:
    found = posthoc.snapshots(folder)
    both = [snapshot.step for snapshot in found]
    assert both[::2] == both[1::2]
    return both[::2]


@pytest.mark.parametrize(("every", "expected"), [(4, [4, 8, 12]), (5, [5, 10, 12])])
def test_are_those_of_the_averages(tmp_path: Path, every: int, expected: list[int]) -> None:
    folder = tmp_path / "snapshots"
    callback, model = EMACallback(0.9, posthoc=PostHoc(folder, every)), model_of()
    trainer_of(tmp_path, callback).fit(model, data(), data(2))
    assert steps(folder) == expected
    decays: Any = {f"{one}": schedules.power_function(one) for one in LENGTHS}
    several = EMACallback({"s": decays["0.05"], "l": decays["0.1"]})
    alone, other = EMACallback(0.9), model_of()
    trainer_of(tmp_path, several).fit(other, data())
    trainer_of(tmp_path, alone).fit(model_of(), data(), data(2))
    assert_equal(weights(model), weights(other))
    assert_equal(averages(callback, model), averages(alone, other))
    for name, length in (("s", 0.05), ("l", 0.1)):
        found = posthoc.reconstruct(posthoc.snapshots(folder), length)
        with several.averaged(other, name):
            torch.testing.assert_close(found, weights(other), rtol=1e-5, atol=1e-6)
        loaded = model_of(1).load_state_dict(found, strict=False)
        assert not loaded.unexpected_keys
        assert {*loaded.missing_keys} <= {key for key, _ in model.named_buffers()}


@pytest.mark.parametrize("save", ["raw", "averaged"])
def test_the_average_in_a_checkpoint_is_not_one_for_snapshots(tmp_path: Path, save: Any) -> None:
    callback, model = EMACallback(0.9, save=save, posthoc=PostHoc(tmp_path / "s", 4)), model_of()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, data())
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    found = checkpoint.read(file)
    assert found.path == "emajit.shadow"
    expected = averages(callback, model)
    assert_equal({name: found.weights[name] for name in expected}, expected)
    every = {one.path for one in checkpoint.read_all(file)}
    assert every == {found.path, *(f"emajit.shadows.posthoc-{one}" for one in LENGTHS)}
    merging.merge([file], tmp_path / "merged.safetensors", of="averages")
    assert_equal(load_file(tmp_path / "merged.safetensors"), found.weights)

    several = EMACallback({"a": 0.9, "b": 0.99}, posthoc=PostHoc(tmp_path / "t", 4))
    trainer = trainer_of(tmp_path, several)
    trainer.fit(model_of(), data())
    trainer.save_checkpoint(file)
    with pytest.raises(ValueError, match="expected one average, found 4"):
        checkpoint.read(file)


def test_a_resume_at_an_earlier_step_writes_the_later_snapshots_again(tmp_path: Path) -> None:
    """The folder is that of a run that was never stopped; nothing is there twice."""

    def train(folder: Path, *others: Callback, file: Path | None = None, seed: int = 0) -> None:
        callback = EMACallback(0.9, save="averaged", posthoc=PostHoc(folder, 3, dtype=torch.half))
        trainer = trainer_of(tmp_path, callback, *others)
        trainer.fit(model_of(seed), data(), data(2), ckpt_path=file)

    train(tmp_path / "whole")
    folder = tmp_path / "stopped"
    train(folder, ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1))
    late = [snapshot.path for snapshot in posthoc.snapshots(folder) if snapshot.step > 6]
    assert len(late) == 4
    late[0].write_bytes(late[1].read_bytes())  # as if of other weights
    late[3].unlink()  # as if killed in between
    begun: list[list[int]] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            begun.append(steps(folder))

    train(folder, Look(), file=next(tmp_path.glob("epoch=0*.ckpt")), seed=1)
    assert begun[0] == [3, 6]
    assert steps(folder) == [3, 6, 9, 12]
    for path in (tmp_path / "whole").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len([*folder.iterdir()]) == 8


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    callback = EMACallback({"a": 0.9, "b": 0.99}, posthoc=PostHoc(folder, 3, [0.1, 0.2], keep=2))
    trainer_of(tmp_path, callback).fit(model_of(), data())
    assert steps(folder) == [9, 12]


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    folder = tmp_path / "snapshots"
    trainer_of(tmp_path, EMACallback(posthoc=PostHoc(folder, 3))).fit(model_of(), data())
    assert not folder.exists()


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """And nothing is removed from it, unless that is asked for."""
    folder, model = tmp_path / "snapshots", model_of()
    callback = EMACallback(posthoc=PostHoc(folder, 6))
    trainer_of(tmp_path, callback, max_epochs=1).fit(model, data())
    with pytest.raises(ValueError, match=r"no snapshots before the first update, found 0000000006"):
        trainer_of(tmp_path, EMACallback(posthoc=PostHoc(folder, 6))).fit(model_of(), data())
    over = EMACallback(posthoc=PostHoc(folder, 4, overwrite=True))
    trainer_of(tmp_path, over, max_epochs=1).fit(model_of(), data())
    assert steps(folder) == [4, 6]
    posthoc.save(folder, {"w": torch.ones(1)}, 20, sigma_rel=0.2)
    held = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"expected a length of \[0.05, 0.1\], found 0.2"):
        trainer_of(tmp_path, callback, max_epochs=2).fit(model, data())
    with pytest.raises(ValueError, match=r"expected a length of \[0.05, 0.1\], found 0.2"):
        trainer_of(tmp_path, over).fit(model_of(1), data())
    assert sorted(folder.iterdir()) == held


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_averages_go_back_into_training(tmp_path: Path, share: float) -> None:
    """As written by hand: after each third average; the optimizer goes on with its state."""

    class ByHand(Callback):
        def on_train_start(self, _: Trainer, module: LightningModule) -> None:
            self.ema = LitEma(module, decay=schedules.constant(0.9))

        @torch.no_grad()
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            self.ema(module)
            if trainer.global_step % 3 == 0:
                for name, average in self.ema.named_averages().items():
                    module.get_parameter(name).lerp_(average, share)

    callback, model = EMACallback(0.9, pull=(share, 3)), model_of()
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer_of(tmp_path, callback, saver).fit(model, data(), data(2))
    expected, plain = model_of(), model_of()
    trainer_of(tmp_path, ByHand()).fit(expected, data())
    trainer_of(tmp_path, EMACallback(0.9)).fit(plain, data())
    assert_equal(weights(model), weights(expected))
    assert differ(weights(model), weights(plain))
    if share == 1.0:
        assert_equal(weights(model), averages(callback, model))
    resumed, again = EMACallback(0.9, pull=(share, 3)), model_of(1)
    file = next(tmp_path.glob("epoch=0*.ckpt"))
    trainer_of(tmp_path, resumed).fit(again, data(), ckpt_path=file)
    assert_equal(weights(again), weights(model))
    assert_equal(averages(resumed, again), averages(callback, model))


def test_frozen_parameters_and_what_is_left_out_are_not_pulled(tmp_path: Path) -> None:
    class Freezes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 1:
                module.net[0].requires_grad_(False)
                self.held = weights(module.net[0])

    options: dict[str, Any] = {"exclude": "*.bias", "buffers": "average"}
    freezes, model = Freezes(), model_of()
    callback = EMACallback({"a": 0.5, "b": 0.9}, evaluate="b", pull=(1.0, 1), **options)
    trainer_of(tmp_path, freezes, callback).fit(model, data())
    assert_equal(weights(model.net[0]), freezes.held)  # type: ignore[index]
    with callback.averaged(model, "b"):
        held: dict[str, Tensor] = weights(model)
    assert torch.equal(held["net.2.weight"], model.net[2].weight)  # type: ignore[index]
    assert differ(dict(model.named_buffers()), dict(model_of().named_buffers()))


def test_wrong_options() -> None:
    cases: list[tuple[Any, str]] = [
        ({"pull": (0.0, 1)}, "pull: expected a share in (0, 1], found 0.0"),
        ({"pull": (float("nan"), 1)}, "pull: expected a share in (0, 1], found nan"),
        ({"pull": (1.0, 0)}, "pull: expected a number of steps, >= 1, found 0"),
        ({"pull": 0.5}, "pull: expected (share, steps), found 0.5"),
        ({"posthoc": "folder"}, "posthoc: expected a PostHoc, found str"),
    ]
    for options, message in cases:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            EMACallback(**options)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((1, 5), "folder: expected a path, found int"),
        (("folder", 0), "every: expected a number of steps, >= 1, found 0"),
        (("folder", 1, [0.1], 0), "keep: expected a number of steps, >= 1, found 0"),
        (("folder", 1, 0.1), "sigma_rel: expected different lengths, found 0.1"),
        (("folder", 1, []), "sigma_rel: expected different lengths, found []"),
        (("folder", 1, [0.1, 0.1]), "sigma_rel: expected different lengths, found [0.1, 0.1]"),
        (("folder", 1, [0.1, 0.5]), "sigma_rel: "),
        (("folder", 1, [0.1], None, torch.int32), "dtype: expected a floating-point dtype"),
    ]
    for given, message in wrong:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            PostHoc(*given)
