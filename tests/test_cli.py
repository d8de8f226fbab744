"""The command: its exit codes, its lines, and how it fails."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from emajit import cli, demo
from emajit.checkpoint import files


def emajit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["emajit", *arguments])
    return cli.main()


def test_the_same_seed_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        arguments = ["--steps", "3", "--seed", seed, "--out", str(tmp_path / name)]
        assert emajit(monkeypatch, "demo", *arguments) == 0
    a, b, c = (load_file(tmp_path / name / "averaged.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["inside.weight"], c["inside.weight"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "0"], "--steps: expected an integer >= 1, found 0"),
        (["--steps", "many"], "'--steps'"),
        (["--decay", "1.5"], "--decay: expected a number in [0, 1], found 1.5"),
        (["--decay", "nan"], "--decay: expected a number in [0, 1], found nan"),
        (["--seed", "-1"], "--seed: expected an integer in [0, 2**63), found -1"),
        (["--device", "abacus"], "--device: expected a usable device, found 'abacus'"),
        (["--out", "FILE"], "--out: expected a folder to write into, found"),
        (["--speed", "9"], "No such option: --speed"),
    ],
)
def test_an_unusable_value_is_one_line_and_exit_code_2(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert emajit(monkeypatch, "demo", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("emajit: ")
    assert line in err
    assert err.count("\n") == 1
    assert file.read_bytes() == b""


WORDS = st.one_of(
    st.sampled_from(["demo", "--help", "--steps", "--decay", "--seed", "--device", "--out", "--"]),
    st.sampled_from(
        ["0", "1", "-1", "0.5", "1e400", "nan", "inf", "9" * 30, "cpu", "cpu:7", "meta"]
    ),
    st.sampled_from(["", "out", "out/deeper", "file", "file/out", "x" * 300, "--steps=2", "-s"]),
    st.text(max_size=6),
)


@given(words=st.lists(WORDS, max_size=7))
@example(words=["demo", "--out", "a\0b"])
@example(words=["demo", "--device", "meta"])
def test_any_command_line(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    """It runs, or ends with exit code 2 and one line; nothing is made but the folder it is told."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "file").write_text("kept")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "run", lambda *_: None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = emajit(patch, *words)
    assert code in (0, 2)
    if code == 2:
        assert err.getvalue().startswith("emajit: ")
        assert err.getvalue().count("\n") == 1
    made = {path.name for path in folder.iterdir()} - {"file"}
    assert made <= {"emajit-demo", *(word.rpartition("=")[2].partition("/")[0] for word in words)}
    assert (folder / "file").read_text() == "kept"


@pytest.mark.parametrize("when", ["train", "draw_samples", "checksum"])
def test_ctrl_c_leaves_no_half_written_file(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        if hasattr(arguments[-1], "write"):
            arguments[-1].write(b"half of a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(files if when == "checksum" else demo, when, interrupt)
    assert emajit(monkeypatch, "demo", "--steps", "2", "--out", str(tmp_path)) == 130
    whole = {"train": [], "draw_samples": ["losses.png"], "checksum": ["losses.png", "samples.png"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == whole[when]
    assert "interrupted" in capsys.readouterr().err


def test_help_is_there_and_light() -> None:
    code = (
        "import sys; sys.argv = ['emajit', 'demo', '--help']; from emajit import cli; cli.main();"
        "assert 'sklearn' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--steps", "--decay", "--seed", "--device", "--out"):
        assert option in done.stdout


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import emajit.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "emajit: the command needs typer; pip install 'emajit[demo]' brings it"
    )
