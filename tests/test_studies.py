"""The studies of the bench run, and write a table and a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import studies


def test_merged_checkpoints_beat_the_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "BEFORE", 400)
    monkeypatch.setattr(studies, "AFTER", 200)
    monkeypatch.setattr(sys, "argv", ["studies", "wsm", "--seeds", "2"])
    assert studies.main() == 0
    assert "| constant rate, merged wsm:linear |" in capsys.readouterr().out
    assert (tmp_path / "study-wsm.md").read_text().startswith("# wsm")
    assert (tmp_path / "study-wsm.png").read_bytes().startswith(b"\x89PNG")
