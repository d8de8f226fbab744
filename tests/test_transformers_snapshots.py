"""Post-hoc snapshots of the callback for transformers, and averages back into training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emajit import LitEma, checkpoint, cli, posthoc, schedules
from emajit.posthoc import PostHoc

pytest.importorskip("transformers", reason="the callback for transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")

from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from emajit.integrations.transformers import EMACallback
from tests.test_transformers import (
    Recorder,
    Stop,
    _quiet,
    assert_near,
    assert_same,
    averages,
    differ,
    reference,
    trained,
    trainer_of,
)

__all__ = ["_quiet"]

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


class Begun(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The snapshots at the start of the training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, list[str]()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.folder.exists():
            self.files = sorted(path.name for path in self.folder.iterdir())


def test_snapshots_of_a_resumed_training_are_those_of_a_whole(tmp_path: Path) -> None:
    """A resume at an earlier step writes the later ones again."""
    folders = {run: tmp_path / f"snapshots-{run}" for run in ("whole", "stopped")}

    def callback(run: str) -> EMACallback:
        return EMACallback(0.9, posthoc=PostHoc(folders[run], 1, [0.1, 0.2]))

    whole, recorder = callback("whole"), Recorder()
    trainer = trainer_of(tmp_path / "whole", whole, recorder, **SAVES)
    start = trained(trainer.model)
    trainer.train()
    assert_near(averages(whole), reference(start, recorder.steps, schedules.constant(0.9)))
    for length in (0.1, 0.2):
        found = posthoc.reconstruct(posthoc.snapshots(folders["whole"]), length)
        expected = reference(start, recorder.steps, schedules.power_function(length))
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)

    trainer_of(tmp_path / "stopped", callback("stopped"), Stop(), **SAVES).train()
    assert {s.step for s in posthoc.snapshots(folders["stopped"])} == {1, 2, 3, 4}
    resumed, begun = callback("stopped"), Begun(folders["stopped"])
    trainer = trainer_of(tmp_path / "stopped", resumed, begun, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert [name[:10] for name in begun.files] == ["0000000001"] * 2 + ["0000000002"] * 2
    names = sorted(path.name for path in folders["whole"].iterdir())
    assert names == sorted(path.name for path in folders["stopped"].iterdir())
    assert len(names) == 12
    for name in names:
        assert (folders["stopped"] / name).read_bytes() == (folders["whole"] / name).read_bytes()
    for run in folders:
        folder = tmp_path / run / "checkpoint-6"
        assert_same(trained(GPT2LMHeadModel.from_pretrained(folder / "averaged")), averages(whole))
        assert not [*folder.glob("averaged-*")]
        held = checkpoint.read(folder)
        assert held.path == "averages.shadow"
        assert_same({name: held.weights[name] for name in averages(whole)}, averages(whole))
        assert len(checkpoint.read_all(folder)) == 3
    again = trainer_of(tmp_path / "again", callback("whole"))
    with pytest.raises(ValueError, match="no snapshots before the first update, found 0000000001"):
        again.train()


@pytest.mark.parametrize("every", [None, 2])
def test_extract_like_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    callback = EMACallback(0.9, posthoc=PostHoc(tmp_path / "s", every) if every else None)
    trainer_of(tmp_path, callback, **SAVES).train()
    folder, out = str(tmp_path / "checkpoint-6"), tmp_path / "averaged"
    monkeypatch.setattr("sys.argv", ["emajit", "extract", folder, "-o", str(out), "--like", folder])
    assert cli.main() == 0
    model = GPT2LMHeadModel.from_pretrained(out)
    assert_same(trained(model), averages(callback))
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors"}


def test_the_last_is_saved_and_only_by_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "snapshots"
    options = PostHoc(folder, 4, keep=1)
    trainer_of(tmp_path, EMACallback(posthoc=options)).train()
    assert {snapshot.step for snapshot in posthoc.snapshots(folder)} == {6}
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda _: False)
    trainer_of(tmp_path, EMACallback(posthoc=PostHoc(tmp_path / "other", 4))).train()
    assert not (tmp_path / "other").exists()


class ByHand(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.ema = LitEma(kwargs["model"], decay=schedules.constant(0.9))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ema(kwargs["model"])
        if state.global_step % 2 == 0:
            for name, average in self.ema.named_averages().items():
                kwargs["model"].get_parameter(name).lerp_(average, self.share)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_averages_go_back_into_training(tmp_path: Path, share: float) -> None:
    """As written by hand: after each second average; the optimizer goes on with its state."""
    callback = EMACallback(0.9, pull=(share, 2))
    trainer = trainer_of(tmp_path / "whole", callback, **SAVES)
    trainer.train()
    expected = trainer_of(tmp_path / "hand", ByHand(share))
    expected.train()
    plain = trainer_of(tmp_path / "plain")
    plain.train()
    assert_same(trained(trainer.model), trained(expected.model))
    assert differ(trained(trainer.model), trained(plain.model))
    folder = tmp_path / "whole" / "checkpoint-6"
    assert_same(trained(GPT2LMHeadModel.from_pretrained(folder)), trained(trainer.model))
    if share == 1.0:
        assert_same(trained(trainer.model), averages(callback))
    resumed = EMACallback(0.9, pull=(share, 2))
    again = trainer_of(tmp_path / "whole", resumed, **SAVES)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(trained(again.model), trained(trainer.model))
    assert_same(averages(resumed), averages(callback))
