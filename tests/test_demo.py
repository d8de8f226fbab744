"""The demo: a full run, what it shows, and what it writes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from emajit import demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.History, str]:
    """A full run with the default settings, but for the seed."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    history = demo.run(demo.Settings(2000, 0.999, 1, "cpu", out), console)
    assert isinstance(console.file, io.StringIO)
    return out, history, console.file.getvalue()


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
