"""The demo: a full run, what it shows, and what it writes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed as dist

from emajit import posthoc
from emajit.cli import demo
from emajit.cli.demo import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")


def run(settings: demo.Settings) -> tuple[demo.History, str]:
    """What happened, and what was shown."""
    file = io.StringIO()
    history = demo.run(settings, Console(file=file, width=100))
    return history, file.getvalue()


def tiny() -> demo.Denoiser:
    return Denoiser(width=16, blocks=1)


class JudgedFaster(demo.Trial):
    """By a quarter of the noise, still of all held-out images and at all times."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        parts = self.judged, self.judged_at, self.judged_noise
        self.judged, self.judged_at, self.judged_noise = (part[::4] for part in parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.History, str]:
    """A full run with the default settings, but for the seed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Trial", JudgedFaster)
        return out, *run(demo.Settings(2000, 0.999, 1, "cpu", out))


class TestRun:
    def test_averaging_is_worth_8_percent(self, finished: tuple[Path, demo.History, str]) -> None:
        history = finished[1]
        assert history.gain > 0.08
        assert history.raw[-1] < 0.8 * history.raw[0]

    def test_table(self, finished: tuple[Path, demo.History, str]) -> None:
        _, history, shown = finished
        for text in ("After 2000 steps", f"{history.raw[-1]:.4f}", f"{-history.gain:.1%}", "ms"):
            assert text in shown

    def test_weights_have_the_models_names(self, finished: tuple[Path, demo.History, str]) -> None:
        weights = load_file(finished[0] / "averaged.safetensors")
        model = demo.Denoiser()
        assert model.load_state_dict(weights) == ([], [])
        generator = torch.Generator().manual_seed(7)
        images, t = demo.digits(generator)[1], torch.rand(359, generator=generator)
        with torch.no_grad():
            loss = demo.loss_of(model, images, t, torch.randn(359, 64, generator=generator))
        assert loss < 0.25

    def test_pictures_and_nothing_else(self, finished: tuple[Path, demo.History, str]) -> None:
        names = {path.name: path.read_bytes()[:4] for path in finished[0].iterdir()}
        assert set(names) == {"averaged.safetensors", "losses.png", "samples.png"}
        assert names["losses.png"] == names["samples.png"] == b"\x89PNG"


def test_posthoc_sweeps_the_length_from_the_snapshots_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "Denoiser", tiny)
    for steps in (40, 20):  # the longer one leaves snapshots that are not of the second
        _, shown = run(demo.Settings(steps, 0.9, 1, "cpu", tmp_path, posthoc=True))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "averaged.safetensors",
        "losses.png",
        "samples.png",
        "posthoc.png",
        "snapshots",
    }
    assert (tmp_path / "posthoc.png").read_bytes().startswith(b"\x89PNG")
    steps_there = {snapshot.step for snapshot in posthoc.snapshots(tmp_path / "snapshots")}
    assert max(steps_there) == 40
    assert "After 20 steps" in shown
    assert "From the snapshots alone, the best average is of length 0." in shown


def test_the_sweep_is_of_averages_of_each_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = demo.Settings(60, 0.9, 1, "cpu", tmp_path, posthoc=True)
    trial = demo.Trial(settings, tiny())
    shadow, history = demo.train(settings, trial, lambda _: None)
    found = posthoc.snapshots(tmp_path / "snapshots")
    assert {snapshot.path for snapshot in found} == set(history.snapshots)
    lengths, losses = demo.sweep(trial, found)
    saved = demo.tracked_losses(trial, found, shadow)
    assert sorted(saved) == pytest.approx([0.05, 0.10])
    for length, loss in saved.items():
        nearest = min(range(len(lengths)), key=lambda i: abs(lengths[i] - length))
        assert losses[nearest] == pytest.approx(loss, rel=0.01)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_in_data_parallel_it_ends_with_the_same_table(tmp_path: Path) -> None:
    _, shown = run(demo.Settings(6, 0.9, 1, "cpu", tmp_path / "alone"))
    options = ["--steps", "6", "--decay", "0.9", "--seed", "1", "--posthoc", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    ran = subprocess.run(
        [*launch, "-m", "emajit", "demo", *options, "--out", str(tmp_path / "together")],
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    names = ["raw"], ["averaged"]
    alone, together = (
        [row[:6] for row in map(str.split, told.splitlines()) if row[1:2] in names]
        for told in (shown, ran.stdout)
    )
    assert len(alone) == 2
    assert together == alone
    assert ran.stdout.count("Written into") == 1
    assert len([*(tmp_path / "together" / "snapshots").iterdir()]) == 2 * 6
