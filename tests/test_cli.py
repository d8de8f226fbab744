"""The command: its exit codes, its lines, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from emajit import LitEma, checkpoint, cli, posthoc, schedules, update_many_
from emajit import init as emajit_init
from emajit.checkpoint import files, sources
from emajit.checkpoint.layouts import WRITERS
from emajit.cli import demo, pictures


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
    st.sampled_from(["inspect", "extract", "convert", "--layout", "litema", "--quick", "--names"]),
    st.sampled_from(["reconstruct", "run", "--sigma-rel", "0.07", "-o", "--plot", "--step", "2"]),
    st.sampled_from(["", "out", "out/deeper", "file", "file/out", "x" * 300, "--steps=2", "-s"]),
    st.text(max_size=6),
)


@given(words=st.lists(WORDS, max_size=7))
@example(words=["demo", "--out", "a\0b"])
@example(words=["demo", "--device", "meta"])
@example(words=["reconstruct", "run", "--sigma-rel", "0.07", "-o", "out"])
@example(words=["reconstruct", "run", "--sigma-rel", "0.07", "0.08", "-o", "file"])
@example(words=["reconstruct", "run", "--sigma-rel", "0.07", "-o", "x[/v2].png", "--plot"])
@example(words=["reconstruct", "run", "--sigma-rel", "1e-200", "-o", "out"])
@example(words=["reconstruct", "run", "--sigma-rel", "0.07", "-o", "a\0b"])
@example(words=["reconstruct", "file", "--sigma-rel", "0.07", "-o", "out"])
def test_any_command_line(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    """It runs, or ends with exit code 2 and one line; nothing is made but the folder it is told."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "file").write_text("kept")
    posthoc.save(folder / "run", [{"w": torch.ones(2)}] * 2, 2, sigma_rel=[0.05, 0.1])
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "run", lambda *_: None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = emajit(patch, *words)
    assert code in (0, 2)
    if code == 2 and words:
        assert err.getvalue().startswith("emajit: ")
        assert err.getvalue().count("\n") == 1
    made = {path.name for path in folder.iterdir()} - {"file", "run"}
    told = {word.rpartition("=")[2].partition("/")[0] for word in words} - {""}
    pictures_of = {f"{word}.png" for word in told}
    assert made <= {"emajit-demo", *told, *pictures_of}
    assert len(list((folder / "run").iterdir())) == 2 or "run" in words
    assert (folder / "file").read_bytes() == b"kept" or "file" in words


@pytest.mark.parametrize("when", ["train", "checksum", "draw_digits", "draw_sweep"])
def test_ctrl_c_leaves_no_half_written_file(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        if hasattr(arguments[-1], "write"):
            arguments[-1].write(b"half of a picture")
        raise KeyboardInterrupt

    owner: Any = {"train": demo, "checksum": files}.get(when, pictures)
    monkeypatch.setattr(owner, when, interrupt)
    assert emajit(monkeypatch, "demo", "--steps", "16", "--out", str(tmp_path)) == 130
    whole = {"draw_digits": ["losses.png"], "draw_sweep": ["losses.png", "samples.png"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == whole.get(when, [])
    assert "interrupted" in capsys.readouterr().err


def test_without_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emajit(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "Commands" in out + err
    assert "emajit: " not in err
    assert emajit(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("emajit ")


def test_help_is_there_and_light() -> None:
    code = (
        "import sys; sys.argv = ['emajit', 'demo', '--help']; from emajit import cli; cli.main();"
        "assert 'sklearn' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--steps", "--decay", "--seed", "--device", "--out"):
        assert option in done.stdout


@pytest.mark.parametrize("lacking", ["typer", "safetensors"])
def test_without_the_extra_the_command_says_what_to_install(lacking: str) -> None:
    code = f"import sys; sys.modules['{lacking}'] = None; import emajit.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = f"emajit: the command needs {lacking}; pip install rich safetensors typer"
    assert done.stderr.strip() == told


def test_without_the_extra_the_demo_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; from emajit.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--steps", "1", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("emajit: this needs sklearn")
    assert done.stderr.endswith("; pip install matplotlib numpy scikit-learn\n")
    assert not [*tmp_path.iterdir()]


class TestReconstruct:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        params = {"a": torch.arange(3.0), "n": torch.tensor(7)}
        decays = [schedules.power_function(x) for x in (0.05, 0.1)]
        shadows = [emajit_init(params) for _ in decays]
        for step in range(40):
            params["a"] += 1
            update_many_(shadows, params, step, decays=decays)
            if step % 5 == 4:
                posthoc.save(tmp_path / "run", shadows, step + 1, sigma_rel=[0.05, 0.1])
        return tmp_path / "run"

    def test_one_length_is_a_file(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = run.parent / "ema.safetensors"
        arguments = [str(run), "--sigma-rel", "0.08", "-o", str(out), "--step", "30", "--plot"]
        assert emajit(monkeypatch, "reconstruct", *arguments) == 0
        expected = posthoc.reconstruct(posthoc.snapshots(run), 0.08, step=30)
        found, step = checkpoint.load(out, expected)
        assert step == 30
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "After 30 steps, from 12 files" in capsys.readouterr().out

    def test_several_lengths_are_a_folder(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = run.parent / "new" / "folder"
        arguments = ["--sigma-rel", "0.08", "0.2", "-o", str(out), "--dtype", "float16"]
        assert emajit(monkeypatch, "reconstruct", str(run), *arguments) == 0
        files_there = {path.name for path in out.iterdir()}
        assert files_there == {"sigma-0.08.safetensors", "sigma-0.2.safetensors"}
        assert load_file(out / "sigma-0.2.safetensors")["a"].dtype == torch.float16
        assert "sigma_rel 0.2 is outside of 0.050 to 0.100" in capsys.readouterr().out.replace(
            "\n", " "
        )

    @pytest.mark.parametrize("words", ["--sigma-rel 0.08 0.09 {}", "--sigma-rel 0.08,0.09 {}"])
    def test_the_folder_may_come_last(
        self, run: Path, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = run.parent / "new"
        arguments = words.format(run).split()
        assert emajit(monkeypatch, "reconstruct", *arguments, "-o", str(out)) == 0
        files_there = {path.name for path in out.iterdir()}
        assert files_there == {"sigma-0.08.safetensors", "sigma-0.09.safetensors"}

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["nowhere", "--sigma-rel", "0.1", "-o", "x"], "No such file or directory: 'nowhere'"),
            (
                ["empty", "--sigma-rel", "0.1", "-o", "x"],
                "empty: expected snapshots of emajit.posthoc.save",
            ),
            (["broken", "--sigma-rel", "0.1", "-o", "x"], "expected a whole safetensors file"),
            (["run", "--sigma-rel", "0.5", "-o", "x"], "sigma_rel: expected 0 < sigma_rel"),
            (["run", "--sigma-rel", "much", "-o", "x"], "expected one folder of snapshots beside"),
            (["--sigma-rel", "0.1", "-o", "x"], "SNAPSHOT_DIR"),
            (["run", "--sigma-rel", "0.1", "-o", "x.pt"], "x.pt: expected a name for safetensors"),
            (["run", "--sigma-rel", "0.1", "0.1", "-o", "x"], "expected different lengths"),
            (
                ["run", "--sigma-rel", "0.1", "-o", "run/0000000005-0.1.safetensors"],
                "--out: expected another file than a snapshot",
            ),
            (
                ["run", "--sigma-rel", "0.1", "-o", "run"],
                "expected a file to write, found a",
            ),
            (
                ["run", "--sigma-rel", "0.1", "-o", "no/x"],
                "expected a folder to write into, f",
            ),
            (["run", "--sigma-rel", "0.1", "--step", "99", "-o", "x"], "expected one from 5 to 40"),
            (["run", "--sigma-rel", "0.1", "--dtype", "int8", "-o", "x"], "'--dtype'"),
            (["run", "--sigma-rel", "0.1"], "'--out'"),
            (["run", "-o", "x"], "'--sigma-rel'"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self,
        run: Path,
        arguments: list[str],
        line: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(run.parent)
        Path("empty").mkdir()
        Path("broken").mkdir()
        Path("broken/0000000001-0.1.safetensors").write_bytes(b"half a file")
        before = sorted(run.parent.rglob("*"))
        assert emajit(monkeypatch, "reconstruct", *arguments) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.startswith("emajit: ")
        assert err.count("\n") == 1
        assert sorted(run.parent.rglob("*")) == before


class TestCheckpoints:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        model: Any = nn.ModuleDict({"model": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))})
        model["model_ema"] = LitEma(model["model"], decay=0.99)
        with torch.no_grad():
            model["model"][0].weight.mul_(2)
        model["first_stage"] = nn.Linear(1, 1)
        torch.save(
            {"state_dict": model.state_dict(), "optimizer": [torch.ones(2)]}, tmp_path / "ldm.ckpt"
        )
        return tmp_path / "ldm.ckpt"

    def test_inspect_parameters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of whatever script: averages that require grad."""
        average = nn.Parameter(torch.ones(2))
        torch.save({"model": {"w": torch.full((2,), 2.0)}, "ema": {"w": average}}, tmp_path / "f")
        assert emajit(monkeypatch, "inspect", str(tmp_path / "f")) == 0
        shown = capsys.readouterr()
        assert "50.00%" in shown.out
        assert not shown.err

    def test_inspect(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert emajit(monkeypatch, "inspect", str(file)) == 0
        shown = capsys.readouterr().out
        for text in (
            "LitEma at model_ema",
            "0.99",
            "4 tensors, 13 numbers",
            "2 tensors, 2 numbers",
        ):
            assert text in shown
        assert "model.0" in shown
        assert "%" in shown

    def test_options_of_diffusers_are_carried_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The options in the config.json of an `EMAModel.save_pretrained`, and what lacks them."""
        config = {"decay": 0.9, "optimization_step": 20, "min_decay": 0.1, "power": 0.75}
        config |= {"use_ema_warmup": True, "inv_gamma": 2.0, "update_after_step": 3}
        state = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
        for name in ("unet", "unet_ema"):
            folder = tmp_path / "checkpoint-20" / name
            folder.mkdir(parents=True)
            save_file(state, folder / "diffusion_pytorch_model.safetensors")
            told = {"_class_name": "UNet2DModel", **(config if "ema" in name else {})}
            (folder / "config.json").write_text(json.dumps(told))
        (tmp_path / "names").write_text("\n".join(state))
        lacking = {"ema": state, "model": state, "step": 20, "decay": 0.9}
        torch.save(lacking, tmp_path / "other.pt")
        monkeypatch.chdir(tmp_path)
        to_diffusers = ["--layout", "diffusers-ema", "--names", "names", "-o"]
        assert emajit(monkeypatch, "convert", "checkpoint-20", *to_diffusers, "first.pt") == 0
        assert emajit(monkeypatch, "convert", "first.pt", *to_diffusers, "again.pt") == 0
        assert "warning" not in capsys.readouterr().out
        for name in ("first.pt", "again.pt"):
            held = torch.load(name)
            assert {key: held[key] for key in config} == config
        arguments = ["extract", "checkpoint-20", "--layout", "diffusers-ema", "-o", "folder"]
        assert emajit(monkeypatch, *arguments, "--like", "checkpoint-20/unet") == 0
        told = json.loads(Path("folder/config.json").read_text())
        assert {key: told[key] for key in config} == config
        capsys.readouterr()
        assert emajit(monkeypatch, "convert", "other.pt", *to_diffusers, "x.pt") == 0
        line = "tell how its decay rises; written with decay 0.9, min_decay 0, update_after_step 0"
        assert line in capsys.readouterr().out
        arguments = ["convert", "checkpoint-20", "--layout", "torch-ema", "--names", "names"]
        assert emajit(monkeypatch, *arguments, "-o", "y.pt") == 0
        assert "torch-ema has no place for min_decay 0.1" in capsys.readouterr().out
        assert emajit(monkeypatch, "extract", "checkpoint-20", "-o", "z.safetensors") == 0
        assert "warning" not in capsys.readouterr().out

    def test_names_are_no_markup(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model: Any = nn.ModuleDict(
            {"[red]": nn.Linear(2, 3), "other[/x]": nn.BatchNorm1d(1, affine=False)}
        )
        model["ema[/x]"] = LitEma(model["[red]"], decay=0.99)
        file, out = tmp_path / "ldm.ckpt", tmp_path / "run[red].safetensors"
        torch.save({"state_dict": model.state_dict()}, file)
        assert emajit(monkeypatch, "inspect", str(file)) == 0
        shown = capsys.readouterr().out
        assert "LitEma at ema[/x]" in shown
        assert "[red]" in shown.split("Distance")[1]
        assert emajit(monkeypatch, "extract", str(file), "-o", str(out)) == 0
        shown = capsys.readouterr().out.replace("\n", "")
        assert "run[red].safetensors" in shown
        assert "other[/x].running_mean" in shown
        assert out.exists()

    def test_inspect_a_script_s_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raw = {f"blocks.{i}.{name}": torch.ones(2) for i in range(2) for name in ("w", "b")}
        average = {name: value + 0.01 for name, value in raw.items()}
        tree = {"model": {**raw, "table": torch.ones(3)}, "ema": {"shadow": average, "decay": 0.9}}
        torch.save({**tree, "best": {"x": torch.ones(1)}}, tmp_path / "file")
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file"), "--depth", "1") == 0
        shown = capsys.readouterr().out
        for text in ("ema.shadow", "its path says 'ema'", "10 updates", "1.00%", "table", "best"):
            assert text in shown
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file"), "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert [row["key"] for row in told["candidates"]] == ["ema.shadow", "model", "best"]
        assert told["average"]["raw_path"] == "model"
        assert told["average"]["trained_only"] == ["table"]
        assert told["average"]["averaged_only"] == []
        assert told["average"]["length"] == pytest.approx(10)
        assert told["average"]["distances"]["blocks.0"] == pytest.approx(0.01)

    def test_inspect_a_file_of_thousands_of_tensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The deepest modules of which there are at most 40, on lines that fit."""
        raw = {f"net.blocks.{i}.{j}.w": torch.ones(2) for i in range(50) for j in range(40)}
        raw |= {f"net.head.{i}.w": torch.ones(2) for i in range(3)}
        average = {name: value * 1.02 for name, value in raw.items()}
        torch.save({"model": raw, "ema": average}, tmp_path / "file")
        monkeypatch.setenv("COLUMNS", "80")
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file")) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) < 45
        for module in ("all", "net.blocks", "net.head"):
            assert sum(module in line and "2.00%" in line for line in lines) == 1
        assert not any("net.blocks.0" in line for line in lines)

    def test_inspect_reads_a_file_once(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths: list[Path] = []
        content = sources.content

        def counted(path: Path) -> Any:
            paths.append(path)
            return content(path)

        monkeypatch.setattr(sources, "content", counted)
        assert emajit(monkeypatch, "inspect", str(file)) == 0
        assert paths == [file]

    def test_inspect_several(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        states = [{"w": torch.full((2,), float(i))} for i in range(3)]
        tree = {"net": states[0], "ema": {"stds": [0.05, 0.1], "emas": states[1:]}}
        torch.save(tree, tmp_path / "file")
        arguments = [str(tmp_path / "file")]
        assert emajit(monkeypatch, "inspect", *arguments) == 0
        shown = capsys.readouterr().out
        assert "sigma_rel 0.05" in shown
        assert "choose one with --key PATH" in shown
        assert emajit(monkeypatch, "extract", *arguments, "-o", str(tmp_path / "out")) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[1].startswith("  ema.emas.0: 1 tensors, 2 numbers, float32")
        arguments += ["--key", "ema.emas.1", "-o", str(tmp_path / "out")]
        assert emajit(monkeypatch, "extract", *arguments) == 0
        assert load_file(tmp_path / "out")["w"].tolist() == [2.0, 2.0]

    def test_inspect_with_the_lengths_of_post_hoc_ema(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        controls = {"initted": torch.tensor(True), "step": torch.tensor(3)}
        held = {**controls, "ema_model.w": torch.ones(2)}
        state = {f"ema_models.{i}.{name}": value for i in range(2) for name, value in held.items()}
        torch.save(state, tmp_path / "file")
        torch.save(held, tmp_path / "1.40.pt")
        given = ["--json", "--sigma-rel", "0.05,0.28"]
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file"), *given) == 0
        rows = json.loads(capsys.readouterr().out)["candidates"]
        assert [row["why"].rpartition(" ")[2] for row in rows] == ["0.05", "0.28"]
        assert emajit(monkeypatch, "inspect", str(tmp_path / "1.40.pt"), *given) == 0
        told = json.loads(capsys.readouterr().out)["average"]
        assert (told["sigma_rel"], told["step"]) == (0.28, 40)
        for wrong, line in (
            ("0.05", "expected 2 lengths, found 1"),
            ("0.05,x", "expected numbers joined by commas, found 0.05,x"),
        ):
            arguments = ["inspect", str(tmp_path / "file"), "--sigma-rel", wrong]
            assert emajit(monkeypatch, *arguments) == 2
            assert line in capsys.readouterr().err

    def test_inspect_looks_at_a_sample_of_large_tensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raw = torch.rand(2**22)
        torch.save({"model": {"w": raw}, "ema": {"w": raw * 1.01}}, tmp_path / "file")
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file"), "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["average"]["distances"]["all"] == pytest.approx(0.01, rel=1e-3)

    def test_json_of_weights_that_are_not_finite(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raw = {"a.w": torch.ones(2), "b.w": torch.ones(2)}
        broken = {"a.w": torch.tensor([1.0, float("nan")]), "b.w": torch.ones(2)}
        torch.save({"model": raw, "ema": broken}, tmp_path / "file")
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file"), "--json") == 0
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert told["average"]["distances"] == {"all": None, "a": None, "b": 0.0}
        assert emajit(monkeypatch, "inspect", str(tmp_path / "file")) == 0
        assert "nan" in capsys.readouterr().out

    def test_extract_for_a_model(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_file({"w": torch.ones(1)}, file.parent / "model.safetensors")
        arguments = [
            "-o",
            str(file.parent / "out"),
            "--like",
            str(file.parent / "model.safetensors"),
        ]
        assert emajit(monkeypatch, "extract", str(file), *arguments) == 2
        assert "expected averages of the weights in" in capsys.readouterr().err

    @pytest.mark.parametrize("layout", ["state_dict", "litema", "diffusers-ema"])
    def test_extract(
        self,
        layout: str,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out, listed = file.parent / "out", file.parent / "names"
        found = checkpoint.read(file)
        names = [name for name in found.weights if name not in found.raw_only]
        listed.write_text("\n".join(names))
        arguments = [str(file), "-o", str(out), "--layout", layout, "--dtype", "float64"]
        assert emajit(monkeypatch, "extract", *arguments, "--names", str(listed)) == 0
        if layout == "state_dict":
            weights = load_file(out)
        else:
            weights = checkpoint.read(out, names=None if layout == "litema" else names).weights
        for name in names:
            assert torch.equal(weights[name], found.weights[name].double())
        shown = capsys.readouterr().out
        assert shown.startswith(f"LitEma at model_ema: {len(names)} averages, written into")
        told = "with 2 that are not averages: first_stage.weight" in shown
        assert told == (layout != "diffusers-ema")

    def test_all_layouts_are_offered(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for command in ("extract", "convert"):
            assert emajit(monkeypatch, command, "file", "-o", "out", "--layout", "onnx") == 2
            told = capsys.readouterr().err
            assert all(f"'{layout}'" in told for layout in WRITERS)

    def test_convert(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = file.parent / "out"
        arguments = [str(file), "-o", str(out)]
        assert emajit(monkeypatch, "convert", *arguments, "--layout", "averaged-model") == 0
        found = checkpoint.read(out)
        assert found.layout == "AveragedModel"
        assert found.weights.keys() == checkpoint.read(file).weights.keys()
        assert emajit(monkeypatch, "convert", *arguments) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "Missing option '--layout'" in told

    def test_a_decay_that_the_checkpoint_does_not_tell(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        timm, out = file.parent / "timm", file.parent / "out.ckpt"
        assert emajit(monkeypatch, "convert", str(file), "-o", str(timm), "--layout", "timm") == 0
        arguments = ["convert", str(timm), "-o", str(out), "--layout", "litema"]
        assert emajit(monkeypatch, *arguments) == 2
        assert "expected a checkpoint that tells its decay" in capsys.readouterr().err
        assert emajit(monkeypatch, *arguments, "--decay", "1.5") == 2
        assert "decay: expected a number in [0, 1], found 1.5" in capsys.readouterr().err
        assert emajit(monkeypatch, *arguments, "--decay", "0.99") == 0
        assert checkpoint.read(out).decay == 0.99

    def test_names_from_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save(LitEma(nn.Linear(2, 2)).state_dict(), tmp_path / "ema.pt")
        (tmp_path / "names.txt").write_text("weight\nbias\n")
        monkeypatch.chdir(tmp_path)
        assert emajit(monkeypatch, "inspect", "ema.pt") == 2
        assert emajit(monkeypatch, "inspect", "ema.pt", "--names", "names.txt") == 0
        assert emajit(monkeypatch, "extract", "ema.pt", "--names", "names.txt", "-o", "out") == 0
        assert load_file("out").keys() == {"weight", "bias"}
        torch.save({"shadow_params": [torch.ones(1)] * 2, "num_updates": 3}, tmp_path / "listed.pt")
        (tmp_path / "names.txt").write_text("\ufeffa weight\r\n\n bias \n", encoding="utf-8")
        assert emajit(monkeypatch, "extract", "listed.pt", "--names", "names.txt", "-o", "out") == 0
        assert load_file("out").keys() == {"a weight", "bias"}
        (tmp_path / "names.txt").write_bytes(b"\x80")
        assert emajit(monkeypatch, "inspect", "ema.pt", "--names", "names.txt") == 2
        assert "--names: expected a text file" in capsys.readouterr().err
        assert emajit(monkeypatch, "inspect", "ema.pt", "--names", str(tmp_path)) == 2
        assert "for name, _ in model.named_parameters()) gives it, f" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            (None, "No such file or directory"),
            (b"", "expected a file of safetensors or torch.save"),
            (b"PK\3\4 half", "expected a whole file of torch.save"),
            (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "expected a whole safetensors file"),
            (pickle.dumps(print), "nothing else is unpickled"),
        ],
    )
    def test_broken_input_is_one_line_and_nothing_written(
        self,
        content: bytes | None,
        line: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if content is not None:
            Path("file").write_bytes(content)
        for command in (["inspect", "file"], ["extract", "file", "-o", "out"]):
            assert emajit(monkeypatch, *command) == 2
            err = capsys.readouterr().err
            assert err.startswith("emajit: ")
            assert line in err
            assert err.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} <= {"file"}

    def test_output_that_cannot_be(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = file.read_bytes()
        outs = {str(file): "expected another file", str(file.parent): "found a folder"}
        outs |= {
            str(file.parent / "no" / "out"): "No such file",
            str(file / "out"): "Not a directory",
        }
        for out, line in outs.items():
            assert emajit(monkeypatch, "extract", str(file), "-o", out) == 2
            assert line in capsys.readouterr().err
        assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir()] == [file.name]


COMMANDS = ["demo", "reconstruct", "inspect", "extract", "convert", "merge"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_text_has_examples_and_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option is nowhere cut, and every example is one line of options that the command has."""
    monkeypatch.setenv("COLUMNS", "80")
    assert emajit(monkeypatch, command, "--help") == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told
    screen, _, examples = told.partition("Examples")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 2
    for line in lines:
        name, called, *words = line.partition(" |")[0].split()
        assert (name, called) == ("emajit", command)
        assert all(word in screen for word in words if word.startswith("-"))


def test_all_commands_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emajit(monkeypatch, "-h") == 0
    told = capsys.readouterr().out
    assert all(f"│ {command}" in told for command in COMMANDS)
    for option in ("--install-completion", "--show-completion", "--version"):
        assert option in told


def test_a_shell_completes_layouts() -> None:
    code = "import sys; sys.argv = ['emajit']; from emajit import cli; sys.exit(cli.main())"
    words = {"COMP_WORDS": "emajit convert a.ckpt --layout ti", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **words, "_EMAJIT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "timm\n"


def test_a_file_that_is_not_there_has_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert emajit(monkeypatch, "inspect", "nowhere.pt") == 2
    assert capsys.readouterr().err == "emajit: No such file or directory: 'nowhere.pt'\n"
    Path("one.pt").touch()
    assert emajit(monkeypatch, "merge", "one.pt", "--last", "2", "-o", "out.pt") == 2
    assert "--last: expected one folder of checkpoints, found a file: one.pt" in (
        capsys.readouterr().err
    )
