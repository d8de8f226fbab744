"""The studies of the bench run, and write a table and a picture."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench.studies import anytime, scaling, wsm


@pytest.mark.filterwarnings("ignore:.*lengths? outside")
@pytest.mark.parametrize(
    ("name", "module", "smaller", "row"),
    [
        ("wsm", wsm, {"BEFORE": 400, "AFTER": 200}, "| constant rate, merged wsm:linear |"),
        ("scaling", scaling, {"SAMPLES": 3072}, "| kappa = 16 |"),
        (
            "anytime",
            anytime,
            {"HORIZONS": (100, 200), "RATES": (0.1, 0.2), "EVERY": 20},
            "| one run, averaged, length 0.20 |",
        ),
    ],
)
def test_a_study_writes_a_table_and_a_picture(
    name: str,
    module: Any,
    smaller: dict[str, Any],
    row: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = import_module("bench.studies.__main__")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    for constant, value in smaller.items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(sys, "argv", ["studies", name, "--seeds", "2"])
    assert command.main() == 0
    assert row in capsys.readouterr().out
    assert (tmp_path / f"study-{name}.md").read_text().startswith(f"# {name}")
    assert (tmp_path / f"study-{name}.png").read_bytes().startswith(b"\x89PNG")
