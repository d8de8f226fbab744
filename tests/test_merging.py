"""Averages over checkpoints, against sums that NumPy computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim.swa_utils import AveragedModel

import emajit
from emajit import LitEma, checkpoint, merging, posthoc, schedules
from emajit.checkpoint import files
from tests.counting import own_memory, tells_memory
from tests.test_cli import emajit as run


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = {n: torch.rand(v.shape, generator=generator) for n, v in net.state_dict().items()}
    return made | {"1.num_batches_tracked": torch.tensor(seed)}


STATES = [state(seed) for seed in range(4)]


def summed(shares: list[float], states: list[dict[str, Tensor]] = STATES) -> dict[str, Tensor]:
    result = {}
    for name, last in states[-1].items():
        total = sum(
            c * each[name].numpy().astype(np.float64)
            for c, each in zip(shares, states, strict=True)
        )
        is_float = last.is_floating_point()
        result[name] = torch.from_numpy(np.asarray(total)).to(last.dtype) if is_float else last
    return result


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"step-{i + 7}.safetensors" for i in range(4)]
    for path, held in zip(paths, STATES, strict=True):
        save_file(held, path)
    return paths


class TestCoefficients:
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
    def test_of_a_decay_of_the_rate(self, decays: list[float]) -> None:
        """theta_0 + sum w_i (theta_i - theta_{i-1}) is the weighted sum of the checkpoints."""
        decays = sorted(decays, reverse=True)
        thetas = np.random.default_rng(0).standard_normal(len(decays) + 1)
        steps = sum(w * (b - a) for w, a, b in zip(decays, thetas, thetas[1:], strict=False))
        shares = merging.wsm(decays)
        assert math.isclose(np.dot(shares, thetas), thetas[0] + steps, abs_tol=1e-12)
        assert math.isclose(sum(shares), 1)

    @pytest.mark.parametrize("decays", [[], [0.5, 0.6], [1.5], [0.5, -0.1], [math.nan]])
    def test_decays_that_are_none(self, decays: list[float]) -> None:
        with pytest.raises(ValueError, match="decays: expected"):
            merging.wsm(decays)

    @pytest.mark.parametrize(
        "rule", ["uniform", "ema:0.9", "wsm:linear", "wsm:cosine", "wsm:1-sqrt"]
    )
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_they_sum_to_one_and_none_is_negative(self, rule: str, count: int) -> None:
        shares = merging.coefficients(rule, count)
        assert len(shares) == count
        assert math.isclose(sum(shares), 1)
        assert min(shares) >= 0

    def test_an_exponential_average_is_that_of_update(self) -> None:
        shadow = {"w": torch.tensor(3.0, dtype=torch.float64)}
        values = [3.0, 1.0, 4.0, 1.5]
        for step, value in enumerate(values[1:]):
            emajit.update_(shadow, {"w": torch.tensor(value, dtype=torch.float64)}, step, decay=0.7)
        shares = merging.coefficients("ema:0.7", 4)
        assert math.isclose(np.dot(shares, values), float(shadow["w"]))

    @pytest.mark.parametrize(
        "rule", ["mean", "ema:", "ema:2", "wsm:square", "1,2", "a,b,c", [1.0], [1.0, math.nan, 0.0]]
    )
    def test_rules_that_are_none(self, rule: Any) -> None:
        with pytest.raises(ValueError, match=r"coefficients: expected"):
            merging.coefficients(rule, 3)


class TestSums:
    @pytest.mark.parametrize("rule", ["uniform", "ema:0.9", "wsm:cosine", "0.5,0.5,-1,1"])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_in_float64_rounded_once(
        self, rule: str, suffix: str, sources: list[Path], tmp_path: Path
    ) -> None:
        out = tmp_path / f"out{suffix}"
        shares = merging.merge(sources, out, rule)
        found = load_file(out) if suffix == ".safetensors" else torch.load(out)
        assert_same(found, summed(shares))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
    def test_low_precision(self, dtype: torch.dtype, tmp_path: Path) -> None:
        states = [{"w": held["0.weight"].to(dtype)} for held in STATES]
        paths = [tmp_path / f"{i}.pt" for i in range(4)]
        for path, held in zip(paths, states, strict=True):
            torch.save(held, path)
        merging.merge(paths, tmp_path / "out.pt")
        wide = [{"w": held["w"].float()} for held in states]
        expected = summed([0.25] * 4, wide)["w"]
        total = sum(0.25 * held["w"].double() for held in wide)
        assert torch.equal(torch.load(tmp_path / "out.pt")["w"], total.to(dtype))  # type: ignore[union-attr]
        merging.merge(paths, tmp_path / "wide.pt", dtype=torch.float32)
        assert torch.equal(torch.load(tmp_path / "wide.pt")["w"], expected)

    def test_many_pieces_and_complex_numbers(self, tmp_path: Path) -> None:
        states = [{"w": torch.randn(100_003), "c": torch.randn(5, dtype=torch.complex64)}] * 2
        for i, held in enumerate(states):
            torch.save(held, tmp_path / f"{i}.pt")
        merging.merge([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
        assert_same(torch.load(tmp_path / "out.pt"), states[0])

    def test_containers_may_differ(self, sources: list[Path], tmp_path: Path) -> None:
        torch.save({"state_dict": STATES[1], "global_step": 9}, tmp_path / "1.ckpt")
        torch.save({"model": {f"module.{n}": v for n, v in STATES[2].items()}}, tmp_path / "2.pt")
        state_dict_saver.save({"model": STATES[3]}, storage_writer=FileSystemWriter(tmp_path / "3"))
        mixed: list[Path] = [sources[0], tmp_path / "1.ckpt", tmp_path / "2.pt", tmp_path / "3"]
        merging.merge(mixed, tmp_path / "out.safetensors")
        assert_same(load_file(tmp_path / "out.safetensors"), summed([0.25] * 4))

    pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

    def test_the_result_has_the_form_of_the_first_source(self, tmp_path: Path) -> None:
        for i in range(2):
            torch.save({"net": {"state_dict": STATES[i]}}, tmp_path / f"{i}.pt")
        merging.merge([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
        found = torch.load(tmp_path / "out.pt")["net"]["state_dict"]
        assert_same(found, summed([0.5, 0.5], STATES[:2]))

    def test_averages_or_trained_weights(self, tmp_path: Path) -> None:
        for i in range(2):
            torch.save({"model": STATES[i], "ema": STATES[i + 2]}, tmp_path / f"{i}.pt")
        paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
        for of, states in (("trained", STATES[:2]), ("averages", STATES[2:])):
            merging.merge(paths, tmp_path / "out.safetensors", of=of)  # type: ignore[arg-type]
            assert_same(load_file(tmp_path / "out.safetensors"), summed([0.5, 0.5], states))
        with pytest.raises(ValueError, match="choose with of='averages' or of='trained'"):
            merging.merge(paths, tmp_path / "x.safetensors")
        merging.merge(paths, tmp_path / "out.safetensors", key="model")
        assert_same(load_file(tmp_path / "out.safetensors"), summed([0.5, 0.5], STATES[:2]))

    def test_averages_of_a_litema(self, tmp_path: Path) -> None:
        expected = []
        for seed in range(2):
            torch.manual_seed(seed)
            host: Any = nn.ModuleDict({"model": nn.Linear(2, 2)})
            host["model_ema"] = LitEma(host["model"])
            torch.save({"state_dict": host.state_dict()}, tmp_path / f"{seed}.ckpt")
            expected.append({f"model.{n}": v for n, v in host["model"].state_dict().items()})
        paths = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
        merging.merge(paths, tmp_path / "out.safetensors", of="averages")
        assert_same(load_file(tmp_path / "out.safetensors"), summed([0.5, 0.5], expected))

    def test_torchs_own_average(self, tmp_path: Path) -> None:
        model = nn.Linear(3, 2)
        averaged = AveragedModel(model)
        for i in range(3):
            nn.init.normal_(model.weight)
            averaged.update_parameters(model)
            torch.save(model.state_dict(), tmp_path / f"{i}.pt")
        merging.merge([tmp_path / f"{i}.pt" for i in range(3)], tmp_path / "out.pt")
        found = torch.load(tmp_path / "out.pt")
        torch.testing.assert_close(found, averaged.module.state_dict(), rtol=1e-6, atol=1e-7)

    def test_tied_tensors_stay_tied(self, tmp_path: Path) -> None:
        for i in range(2):
            table = torch.full((3, 2), float(i))
            held = {"embed": table, "head": table, "other": table.clone()}
            torch.save(held, tmp_path / f"{i}.pt")
        paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
        merging.merge(paths, tmp_path / "out.pt")
        found = torch.load(tmp_path / "out.pt")
        assert found["embed"].data_ptr() == found["head"].data_ptr() != found["other"].data_ptr()
        merging.merge(paths, tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors")["head"].tolist() == [[0.5, 0.5]] * 3

    def test_integers(self, sources: list[Path], tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"'1\.num_batches_tracked': expected the same integers"
        ):
            merging.merge(sources, tmp_path / "out", integers="equal")
        assert not (tmp_path / "out").exists()
        merging.merge(sources, tmp_path / "out")
        assert load_file(tmp_path / "out")["1.num_batches_tracked"] == 3


class TestRefused:
    def test_other_names_shapes_and_kinds(self, sources: list[Path], tmp_path: Path) -> None:
        other = {**STATES[1], "0.bias": torch.ones(9), "2.bias": torch.ones(2, dtype=torch.int32)}
        other["new"] = other.pop("0.weight")
        save_file(other, sources[1])
        told = r"no 0.weight, new beside, 0.bias, floating of shape \(9,\) for floating of shape"
        with pytest.raises(ValueError, match=told):
            merging.merge(sources, tmp_path / "out")

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_numbers_that_are_not_finite(
        self, value: float, sources: list[Path], tmp_path: Path
    ) -> None:
        broken = {n: v.clone() for n, v in STATES[2].items()}
        broken["2.bias"][1] = value
        save_file(broken, sources[2])
        (tmp_path / "out").write_bytes(b"as before")
        with pytest.raises(ValueError, match=r"step-9.safetensors: '2.bias': expected finite"):
            merging.merge(sources, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"as before"

    def test_a_sum_that_is_not_one(self, sources: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a sum of 1, found 2; .* --allow-any-sum"):
            merging.merge(sources, tmp_path / "out", [2, 0, 0, 0])
        merging.merge(sources, tmp_path / "out", [2, 0, 0, 0], allow_any_sum=True)
        assert_same(load_file(tmp_path / "out"), summed([2, 0, 0, 0]))

    def test_a_source_that_changes(self, sources: list[Path], tmp_path: Path) -> None:
        def touch(_: int) -> None:
            os.utime(sources[1], (1, 1))

        with pytest.raises(ValueError, match=r"step-8\.safetensors: expected an unchanged"):
            merging.merge(sources, tmp_path / "out", tell=touch)
        assert not (tmp_path / "out").exists()

    def test_places(self, sources: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="out: expected another place than a source"):
            merging.merge(sources, sources[0])
        with pytest.raises(ValueError, match="expected checkpoints, found none"):
            merging.merge([], tmp_path / "out")
        with pytest.raises(FileNotFoundError):
            merging.merge([tmp_path / "nowhere"], tmp_path / "out")
        torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "two.pt")
        with pytest.raises(ValueError, match="the weights of one model, found a, b; choose with"):
            merging.merge([tmp_path / "two.pt"], tmp_path / "out")


def test_the_header_tells_where_a_result_comes_from(sources: list[Path], tmp_path: Path) -> None:
    merging.merge(sources, tmp_path / "out", "wsm:linear")
    with safe_open(tmp_path / "out", framework="pt") as file:
        told = json.loads(file.metadata()[merging.KEY])
    assert [each["name"] for each in told["sources"]] == [path.name for path in sources]
    assert [each["bytes"] for each in told["sources"]] == [p.stat().st_size for p in sources]
    assert len({each["crc32"] for each in told["sources"]}) == 4
    assert "00000000" not in {each["crc32"] for each in told["sources"]}
    merging.merge(sources, tmp_path / "again", "wsm:linear")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()


class TestNewest:
    def test_by_the_step_that_files_tell(self, tmp_path: Path) -> None:
        for step, name in ((10, "a.pt"), (30, "b.pt"), (20, "c.pt")):
            torch.save({"model": STATES[0], "step": step}, tmp_path / name)
        assert [p.name for p in merging.newest(tmp_path, 2)] == ["c.pt", "b.pt"]

    def test_by_the_numbers_in_their_names(self, tmp_path: Path) -> None:
        for name in ("step-9.safetensors", "step-10.safetensors", "step-100.safetensors"):
            save_file(STATES[0], tmp_path / name)
        (tmp_path / "log.txt").touch()
        (tmp_path / ".step-11.safetensors.part").touch()
        names = [path.name for path in merging.newest(tmp_path, 2)]
        assert names == ["step-10.safetensors", "step-100.safetensors"]
        with pytest.raises(ValueError, match="expected 4 checkpoints, found 3"):
            merging.newest(tmp_path, 4)

    @pytest.mark.parametrize(
        ("how", "suffix"), [("copy", "ckpt"), ("link", "ckpt"), ("link", "safetensors")]
    )
    def test_the_last_one_counts_once(self, tmp_path: Path, how: str, suffix: str) -> None:
        """As `ModelCheckpoint(save_last=True)` leaves them, which saves it anew."""
        for i, name in enumerate(("epoch=9", "epoch=10", "last")):
            path, held = tmp_path / f"{name}.{suffix}", STATES[min(i, 1)]
            if (how, i) == ("link", 2):
                path.symlink_to(f"epoch=10.{suffix}")
            elif suffix == "ckpt":
                torch.save({"state_dict": held, "global_step": min(i, 1), "of": name}, path)
            else:
                save_file(held, path)
        names = [path.stem for path in merging.newest(tmp_path, 2)]
        assert names == ["epoch=9", "epoch=10"]
        with pytest.raises(ValueError, match="expected 3 checkpoints, found 2"):
            merging.newest(tmp_path, 3)

    def test_two_of_one_step_are_refused(self, tmp_path: Path) -> None:
        for i, name in enumerate(("one.pt", "other.pt")):
            torch.save({"model": STATES[i], "step": 10}, tmp_path / name)
        message = "other.pt: expected one checkpoint of each step, found one.pt of the same step"
        with pytest.raises(ValueError, match=message):
            merging.newest(tmp_path, 2)


class TestFolders:
    def test_of_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers", reason="of the transformers extra")
        config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)
        models = []
        for i in range(2):
            torch.manual_seed(i)
            models.append(transformers.GPT2LMHeadModel(config))
            models[i].save_pretrained(tmp_path / f"checkpoint-{i + 1}", max_shard_size="2KB")
        assert (tmp_path / "checkpoint-1/model.safetensors.index.json").exists()
        paths = merging.newest(tmp_path, 2)
        merging.merge(paths, tmp_path / "merged")
        found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
        expected = [model.state_dict() for model in models]
        assert_same(found.state_dict(), summed([0.5, 0.5], expected))
        assert found.lm_head.weight is found.transformer.wte.weight
        with pytest.raises(FileExistsError):
            merging.merge(paths, tmp_path / "merged")

    def adapters(self, folder: Path, **config: Any) -> list[Path]:
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
        for i in range(2):
            path = folder / f"adapter-{i}"
            path.mkdir()
            generator = torch.Generator().manual_seed(i)
            shapes = {"lora_A": (2, 3), "lora_B": (4, 2)}
            if config.get("fan_in_fan_out"):
                shapes = {"lora_A": (2, 4), "lora_B": (3, 2)}
            held = {
                f"base_model.model.net.{part}.weight": torch.randn(shape, generator=generator)
                for part, shape in shapes.items()
            }
            save_file(held, path / "adapter_model.safetensors")
            (path / "adapter_config.json").write_text(json.dumps(told))
        return [folder / "adapter-0", folder / "adapter-1"]

    @pytest.mark.parametrize(
        ("config", "scale"),
        [({}, 3), ({"use_rslora": True}, 6 / math.sqrt(2)), ({"alpha_pattern": {"net": 2}}, 1)],
    )
    def test_adapters_into_their_base(
        self, config: dict[str, Any], scale: float, tmp_path: Path
    ) -> None:
        base = {"net.weight": torch.randn(4, 3), "net.bias": torch.randn(4)}
        save_file(base, tmp_path / "base.safetensors")
        paths = self.adapters(tmp_path, **config)
        merging.merge(paths, tmp_path / "out", [0.25, 0.75], base=tmp_path / "base.safetensors")
        total = base["net.weight"].double()
        for share, path in zip([0.25, 0.75], paths, strict=True):
            held = load_file(path / "adapter_model.safetensors").values()
            a, b = (value.double() for value in held)
            total = total + share * scale * b @ a
        expected = {**base, "net.weight": total.float()}
        assert_same(load_file(tmp_path / "out"), expected)

    def test_adapters_into_a_base_that_is_transposed(self, tmp_path: Path) -> None:
        base = {"net.weight": torch.zeros(4, 3)}
        save_file(base, tmp_path / "base.safetensors")
        paths = self.adapters(tmp_path, fan_in_fan_out=True)
        merging.merge(paths[:1], tmp_path / "out", base=tmp_path / "base.safetensors")
        a, b = load_file(paths[0] / "adapter_model.safetensors").values()
        torch.testing.assert_close(load_file(tmp_path / "out")["net.weight"], 3 * (b @ a).T)

    def test_adapters_apart(self, tmp_path: Path) -> None:
        paths = self.adapters(tmp_path)
        merging.merge(paths, tmp_path / "merged")
        held = [load_file(path / "adapter_model.safetensors") for path in paths]
        assert_same(
            load_file(tmp_path / "merged/adapter_model.safetensors"), summed([0.5] * 2, held)
        )
        assert (tmp_path / "merged/adapter_config.json").exists()

    def test_the_command_tells_what_to_average_apart_means(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [str(path) for path in self.adapters(tmp_path)]
        assert run(monkeypatch, "merge", *paths, "-o", str(tmp_path / "merged")) == 0
        assert "--base MODEL merges the products" in capsys.readouterr().out.replace("\n", " ")

    def test_adapters_that_fit_no_base(self, tmp_path: Path) -> None:
        save_file({"other.weight": torch.ones(4, 3)}, tmp_path / "base.safetensors")
        paths = self.adapters(tmp_path)
        with pytest.raises(ValueError, match="the weights that the adapters change, found none at"):
            merging.merge(paths, tmp_path / "out", base=tmp_path / "base.safetensors")
        (paths[0] / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
        with pytest.raises(ValueError, match="expected LoRA without DoRA, found IA3"):
            merging.merge(paths, tmp_path / "out", base=tmp_path / "base.safetensors")


@tells_memory
def test_memory_is_that_of_a_leaf_or_two(tmp_path: Path) -> None:
    """Three sources of 64 MB, of leaves of 4 MB."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_file({f"w{j}": torch.full((2**20,), float(i)) for j in range(16)}, path)
    before, peaks = own_memory(), [0]
    merging.merge(paths, tmp_path / "out", tell=lambda _: peaks.append(own_memory() - before))
    assert len(peaks) == 17
    assert max(peaks) < 2 * 8 * 2**20
    assert load_file(tmp_path / "out")["w15"][7] == 1.0


def test_killed_at_any_moment_the_result_is_old_or_new(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    code = (
        "import os, sys; from emajit import merging; out, *sources = sys.argv[1:]\n"
        "def tell(_, count=[0]):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4: os._exit(7)\n"
        "merging.merge(sources, out, tell=tell)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out), *map(str, sources)], check=False)
    assert done.returncode == 7
    assert out.read_bytes() == b"old"
    merging.merge(sources, out)
    assert_same(load_file(out), summed([0.25] * 4))


class TestWindow:
    """Two means since the start give the mean of the steps in between."""

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
    def test_of_snapshots(self, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
        params = {"w": torch.zeros(5, dtype=torch.float64), "n": torch.tensor(0)}
        shadow = emajit.init(params, dtype=torch.float64)
        steps, held = 60, []
        for step in range(steps):
            params["w"] += torch.randn(5, dtype=torch.float64)
            params["n"] += 1
            held.append(params["w"].clone())
            emajit.update_(shadow, params, step, decay=schedules.uniform())
            if step % 20 == 19:
                posthoc.save(tmp_path, shadow, step + 1, sigma_rel=12**-0.5, dtype=dtype)
        found = posthoc.snapshots(tmp_path)
        for start, stop in ((20, 60), (40, 60), (0, 40)):
            mean = posthoc.window(found, start, stop)
            direct = torch.stack(held[start:stop]).mean(0)
            torch.testing.assert_close(mean["w"], direct, rtol=bound, atol=bound)
            assert mean["n"] == stop
        with pytest.raises(ValueError, match=r"one at each of \(10, 60\), found none at \[10\]"):
            posthoc.window(found, 10, 60)
        with pytest.raises(ValueError, match="expected 0 <= start < stop"):
            posthoc.window(found, 60, 20)

    def test_of_files_of_icefall(self, tmp_path: Path) -> None:
        held = [{"w": torch.randn(3, dtype=torch.float64)} for _ in range(9)]
        for step in (4, 9):
            mean = {"w": torch.stack([each["w"] for each in held[:step]]).mean(0)}
            tree = {"model": held[step - 1], "model_avg": mean, "batch_idx_train": step}
            torch.save(tree, tmp_path / f"checkpoint-{step}.pt")
        mean = posthoc.window(tmp_path.iterdir(), 4, 9)
        torch.testing.assert_close(mean["w"], torch.stack([each["w"] for each in held[4:]]).mean(0))

    def test_of_other_profiles(self, tmp_path: Path) -> None:
        for step in (5, 9):
            posthoc.save(tmp_path, {"w": torch.ones(2)}, step, sigma_rel=0.1)
        with pytest.raises(ValueError, match=r"a mean since the start, found sigma_rel 0\.1"):
            posthoc.window(posthoc.snapshots(tmp_path), 5, 9)


class TestCommand:
    def test_the_last_of_a_folder(
        self,
        sources: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / ".out" / "merged.safetensors"  # not one of the checkpoints
        out.parent.mkdir()
        arguments = ["--last", "2", str(tmp_path), "-o", str(out)]
        assert run(monkeypatch, "merge", *arguments) == 0
        assert_same(load_file(out), summed([0.5, 0.5], STATES[2:]))
        shown = capsys.readouterr().out
        assert "step-9.safetensors" in shown.replace("\n", "")
        assert "0.5" in shown

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["nowhere", "-o", "out"], "No such file or directory"),
            (["a.safetensors", "-o", "out", "--coefficients", "2"], "expected a sum of 1, found 2"),
            (["a.safetensors", "-o", "out", "--last", "2"], "--last: expected one folder"),
            (["a.safetensors"], "Missing option '--out'"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self,
        arguments: list[str],
        line: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_file(STATES[0], "a.safetensors")
        assert run(monkeypatch, "merge", *arguments) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1
        assert not Path("out").exists()

    def test_inspect_shows_what_was_merged(
        self,
        sources: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        merging.merge(sources, tmp_path / "out.safetensors")
        assert run(monkeypatch, "inspect", str(tmp_path / "out.safetensors")) == 0
        shown = capsys.readouterr().out
        assert "step-7.safetensors" in shown
        assert "0.25" in shown


def test_write_leaves_refuses_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    forms = {"w": files.Form((1,), torch.complex128)}
    with pytest.raises(ValueError, match="expected a dtype that safetensors has"):
        files.write_leaves(tmp_path / "out", forms, lambda _: torch.ones(1), lambda *_: {})
    assert checkpoint.candidates({"w": {"v": torch.ones(1)}})[0].path == "w"
