"""The demo: a full run, what it shows, and what it writes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed as dist

from emajit.cli import demo, diffusion
from emajit.cli.diffusion import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")


def run(settings: demo.Settings) -> tuple[demo.History, str]:
    """What happened, and what was shown."""
    file = io.StringIO()
    history = demo.run(settings, Console(file=file, width=100))
    return history, file.getvalue()


def rows(shown: str) -> dict[str, list[str]]:
    """The cells of the table by the weights of their line."""
    lines = (line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│"))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


class JudgedFaster(diffusion.Trial):
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
        assert "Held-out loss after 2,000 steps" in shown
        told = rows(shown)
        assert told["raw"][:2] == [f"{history.raw[-1]:.4f}", ""]
        assert told["averaged"][:2] == [f"{history.averaged[-1]:.4f}", f"{-history.gain:+.1%}"]
        assert re.fullmatch(r"\d+\.\d\d ms a step", told["raw"][2])
        share = r"\+ \d+\.\d\d ms \(\d+\.\d%\)"
        assert re.fullmatch(share, told["averaged"][2])
        assert re.fullmatch(f"as above, {share}", told["in bfloat16, stochastic"][2])

    def test_the_table_shows_what_each_feature_is_worth(
        self, finished: tuple[Path, demo.History, str]
    ) -> None:
        _, history, shown = finished
        told = rows(shown)
        assert len(told) == 6
        losses = {weights: float(cells[0]) for weights, cells in told.items()}
        average = history.averaged[-1]
        assert losses["in bfloat16, to nearest"] > 1.1 * average
        assert losses["in bfloat16, stochastic"] == pytest.approx(average, rel=0.01)
        chosen = next(weights for weights in told if weights.startswith("length 0."))
        assert losses[chosen] < 1.005 * average
        assert losses["mean of 8 checkpoints"] < 0.95 * history.raw[-1]

    def test_weights_have_the_models_names(self, finished: tuple[Path, demo.History, str]) -> None:
        weights = load_file(finished[0] / "averaged.safetensors")
        model = Denoiser()
        assert model.load_state_dict(weights) == ([], [])
        generator = torch.Generator().manual_seed(7)
        images, t = diffusion.digits(generator)[1], torch.rand(359, generator=generator)
        with torch.no_grad():
            loss = diffusion.loss_of(model, images, t, torch.randn(359, 64, generator=generator))
        assert loss < 0.25

    def test_pictures_and_nothing_else(self, finished: tuple[Path, demo.History, str]) -> None:
        names = {path.name: path.read_bytes()[:4] for path in finished[0].iterdir()}
        assert names.keys() == {
            "averaged.safetensors",
            "losses.png",
            "samples.png",
            "lengths.png",
        }
        assert all(names[name] == b"\x89PNG" for name in names if name.endswith(".png"))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_of_a_few_steps(steps: int, tmp_path: Path) -> None:
    _, shown = run(demo.Settings(steps, 0.9, 1, "cpu", tmp_path))
    told = rows(shown)
    assert {"raw", "averaged", f"mean of {steps} checkpoints"} <= told.keys()
    assert float(told["averaged"][0]) > 0


def test_the_sweep_is_of_averages_of_each_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = demo.Settings(60, 0.9, 1, "cpu", tmp_path)
    trial = diffusion.Trial(1, Denoiser(width=16, blocks=1))
    averages = demo.Averages(dict(trial.model.named_parameters()), settings, tmp_path)
    demo.train(settings, trial, averages, lambda _: None)
    losses, saved = demo.sweep(trial, tmp_path / "snapshots")
    assert sorted(saved) == pytest.approx(demo.TRACKED)
    for average, length in zip(averages.tracked, sorted(saved), strict=True):
        assert saved[length] == pytest.approx(trial.loss(average), rel=1e-3)  # saved in float16
    for length, loss in saved.items():
        nearest = min(losses, key=lambda x: abs(x - length))
        assert losses[nearest] == pytest.approx(loss, rel=0.01)
    assert len(averages.checkpoints) == demo.MERGED
    mean = {
        name: sum(torch.load(path)[name] for path in averages.checkpoints) / demo.MERGED
        for name in averages.params
    }
    torch.testing.assert_close(averages.merged(), mean)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_in_data_parallel_it_ends_with_the_same_table(tmp_path: Path) -> None:
    _, shown = run(demo.Settings(6, 0.9, 1, "cpu", tmp_path / "alone"))
    options = ["--steps", "6", "--decay", "0.9", "--seed", "1", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    ran = subprocess.run(
        [*launch, "-m", "emajit", "demo", *options, "--out", str(tmp_path / "together")],
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    alone, together = (
        {weights: cells[:2] for weights, cells in rows(told).items()}
        for told in (shown, ran.stdout)
    )
    assert len(alone) >= 5
    assert together == alone
    assert ran.stdout.count("Written into") == 1
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
