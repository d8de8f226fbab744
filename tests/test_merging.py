"""Averages over checkpoints, against sums that NumPy computes."""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
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
from emajit.checkpoint import Averaged, files, sharded, streaming
from emajit.checkpoint.layouts import WRITERS
from emajit.checkpoint.saved import MERGED
from tests.counting import own_memory, tells_memory
from tests.test_checkpoint import Bomb
from tests.test_cli import emajit as run


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = {n: torch.rand(v.shape, generator=generator) for n, v in net.state_dict().items()}
    return made | {"1.num_batches_tracked": torch.tensor(seed)}


# In one process without a group; torch 2.6 has no such option, and warns.
HAS_NO_DIST = "no_dist" in inspect.signature(state_dict_saver.save).parameters
ALONE: Any = {"no_dist": True} if HAS_NO_DIST else {}

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

    def test_parameters(self, tmp_path: Path) -> None:
        """A file may hold those of a model itself, which require grad."""
        for i in range(2):
            held = {n: nn.Parameter(v) for n, v in STATES[i].items() if v.is_floating_point()}
            torch.save(held, tmp_path / f"{i}.pt")
        merging.merge([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.safetensors")
        expected = summed([0.5, 0.5], STATES[:2])
        del expected["1.num_batches_tracked"]
        assert_same(load_file(tmp_path / "out.safetensors"), expected)

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

    def two_averages(self, folder: Path) -> tuple[list[Path], dict[str, list[dict[str, Tensor]]]]:
        """Checkpoints with a model, a LitEma of it and another average, as accelerate has them."""
        paths, held = [], {"trained": [], "litema": [], "other": []}  # type: ignore[var-annotated]
        for seed in range(2):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            ema = LitEma(model)
            held["litema"].append({n: v.clone() for n, v in model.state_dict().items()})
            for value in model.parameters():
                nn.init.normal_(value)
            held["trained"].append(dict(model.state_dict()))
            held["other"].append({n: torch.rand(v.shape) for n, v in model.state_dict().items()})
            paths.append(folder / f"checkpoint-{seed}")
            for name, state in (("unet", held["trained"][-1]), ("unet_ema", held["other"][-1])):
                (paths[-1] / name).mkdir(parents=True)
                save_file(state, paths[-1] / name / "diffusion_pytorch_model.safetensors")
                (paths[-1] / name / "config.json").write_text(json.dumps({"of": name, "n": seed}))
            torch.save(ema.state_dict(), paths[-1] / "custom_checkpoint_0.pkl")
        return paths, held

    @pytest.mark.parametrize(
        ("of", "key", "which"),
        [
            ("trained", None, "trained"),
            ("trained", "custom_checkpoint_0", "trained"),
            ("trained", "unet_ema.diffusion_pytorch_model", "trained"),
            ("trained", "unet_ema", "trained"),
            ("trained", "unet.diffusion_pytorch_model", "trained"),
            (None, "unet.diffusion_pytorch_model", "trained"),
            ("averages", "custom_checkpoint_0", "litema"),
            (None, "custom_checkpoint_0", "litema"),
            ("averages", "unet_ema", "other"),
            (None, "unet_ema.diffusion_pytorch_model", "other"),
        ],
    )
    def test_of_several_averages(self, of: Any, key: str, which: str, tmp_path: Path) -> None:
        paths, held = self.two_averages(tmp_path)
        merging.merge(paths, tmp_path / "out.safetensors", of=of, key=key)
        assert_same(load_file(tmp_path / "out.safetensors"), summed([0.5, 0.5], held[which]))

    @pytest.mark.parametrize(
        ("of", "key", "form"),
        [
            ("trained", None, "unet"),
            ("averages", "unet_ema", "unet_ema"),
            ("averages", "custom_checkpoint_0", "unet"),
            (None, "unet.diffusion_pytorch_model", "unet"),
        ],
    )
    def test_a_folder_like_that_of_the_weights(
        self, of: Any, key: str, form: str, tmp_path: Path
    ) -> None:
        """`from_pretrained` of diffusers wants this file and this config."""
        paths, _ = self.two_averages(tmp_path)
        merging.merge(paths, tmp_path / "out", of=of, key=key, to="folder")
        files = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert json.loads((tmp_path / "out/config.json").read_text()) == {"of": form, "n": 0}

    def test_several_averages_are_shown(self, tmp_path: Path) -> None:
        paths, _ = self.two_averages(tmp_path)
        for key, line in (
            (None, "expected one average, found two: LitEma and state at unet_ema"),
            ("nowhere", "expected a place in the file, found none at 'nowhere'"),
            ("unet", "'unet': expected tensors there, found none"),
        ):
            with pytest.raises(ValueError, match=f"{paths[0]}: {line}.*\n") as told:
                merging.merge(paths, tmp_path / "out.safetensors", of="averages", key=key)
            assert "  custom_checkpoint_0: 4 tensors" in str(told.value)
            assert "on the command line --key PATH" in str(told.value)

    def test_trained_weights_of_two_models(self, tmp_path: Path) -> None:
        names = ("g", "g_ema", "d", "d_ema")
        torch.save(dict(zip(names, STATES, strict=True)), tmp_path / "0.pt")
        with pytest.raises(ValueError, match="expected one average, found two"):
            merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt", of="trained")
        merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt", of="trained", key="d_ema")
        assert_same(torch.load(tmp_path / "out.pt"), STATES[2])

    def test_an_error_names_its_file(self, tmp_path: Path) -> None:
        torch.save(LitEma(nn.Linear(2, 2)).state_dict(), tmp_path / "0.pt")
        with pytest.raises(ValueError, match=r"0.pt: LitEma: expected names, which its keys do"):
            merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt", of="averages")

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
            ValueError,
            match=r"step-7.*'1\.num_batches_tracked': expected the integers of .*step-10",
        ):
            merging.merge(sources, tmp_path / "out", integers="equal")
        assert not (tmp_path / "out").exists()
        merging.merge(sources, tmp_path / "out")
        assert load_file(tmp_path / "out")["1.num_batches_tracked"] == 3

    @pytest.mark.parametrize("integers", ["last", "equal"])
    @pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
    def test_integers_that_are_views_of_their_negatives(
        self, integers: Any, out: str, tmp_path: Path
    ) -> None:
        held = {"w": torch.ones(2), "n": torch._neg_view(torch.arange(4))}
        torch.save(held, tmp_path / "0.pt")
        merging.merge([tmp_path / "0.pt"] * 2, tmp_path / out, integers=integers)
        found = checkpoint.sources.content(tmp_path / out)["n"]
        assert found.tolist() == [0, -1, -2, -3]


class Pickled:
    """An object of a training script."""


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

    @pytest.mark.filterwarnings("ignore:.*(CSR|quantize|nested)")
    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (Tensor.to_sparse, "sparse_coo"),
            (Tensor.to_sparse_csr, "sparse_csr"),
            (lambda value: value.to("meta"), "meta"),
            (lambda value: torch.nested.nested_tensor([value, value]), "nested"),
            (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantised"),
        ],
    )
    def test_tensors_that_are_no_plain_numbers(self, make: Any, kind: str, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2), "a.w": torch.ones(2, 2)}, tmp_path / "0.pt")
        torch.save({"w": torch.ones(2), "a.w": make(torch.ones(2, 2))}, tmp_path / "1.pt")
        for sources in ((1,), (0, 1)):
            paths = [tmp_path / f"{i}.pt" for i in sources]
            for out in ("out.pt", "out.safetensors"):
                message = rf"1\.pt: 'a\.w': expected a dense tensor, found .*{kind}"
                if kind != "meta":  # torch 2.14 and 2.15 do not unpickle all of them
                    message += r"|1\.pt: (expected a whole file|'a\.w': expected a tensor, found a)"
                with pytest.raises(ValueError, match=message):
                    merging.merge(paths, tmp_path / out)

    @pytest.mark.parametrize("of", [None, "trained", "averages"])
    def test_a_pickled_object_among_the_weights(self, of: Any, tmp_path: Path) -> None:
        """It may be a tensor that this torch does not unpickle: it must not go missing."""
        held = {"w": torch.ones(2), "a.w": Pickled(), "m._extra_state": Pickled()}
        run = {"hyper": Pickled(), **({"model": held, "ema": held} if of else {"model": held})}
        torch.save(run, tmp_path / "0.pt")
        with pytest.raises(ValueError, match=r"0\.pt: 'a\.w': expected a tensor, found a pickled"):
            merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt", of=of)
        del held["a.w"]
        torch.save(run, tmp_path / "0.pt")
        merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt", of=of)

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
        for one in (sources[0], str(sources[0])):
            with pytest.raises(
                TypeError, match=r"checkpoints: expected a list .*, found one: .*st"
            ):
                merging.merge(one, tmp_path / "out")  # type: ignore[arg-type]
        torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "two.pt")
        with pytest.raises(ValueError, match="the weights of one model, found a, b; choose with"):
            merging.merge([tmp_path / "two.pt"], tmp_path / "out")


def test_the_header_tells_where_a_result_comes_from(sources: list[Path], tmp_path: Path) -> None:
    merging.merge(sources, tmp_path / "out", "wsm:linear")
    with safe_open(tmp_path / "out", framework="pt") as file:
        told = json.loads(file.metadata()[MERGED])
    assert [each["name"] for each in told["sources"]] == [path.name for path in sources]
    assert [each["bytes"] for each in told["sources"]] == [p.stat().st_size for p in sources]
    assert len({each["crc32"] for each in told["sources"]}) == 4
    assert "00000000" not in {each["crc32"] for each in told["sources"]}
    merging.merge(sources, tmp_path / "again", "wsm:linear")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_checksum_is_the_crc_32_of_the_weights(tmp_path: Path) -> None:
    """By either library, over many pieces, in the order of the result."""
    held = {"b": torch.randn(3_000_000), "a": torch.randn(7), "n": torch.tensor(3)}
    save_file(held, tmp_path / "a.safetensors")
    merging.merge([tmp_path / "a.safetensors"], tmp_path / "out.safetensors")
    told = merging.told(tmp_path / "out.safetensors")
    assert told is not None
    content = b"".join(held[name].numpy().tobytes() for name in ("n", "a", "b"))
    assert told["sources"][0]["crc32"] == f"{zlib.crc32(content):08x}"
    for data, seed in ((content, 0), (b"", 7), (content[:9], 2**32 - 1)):
        assert files.crc32(data, seed) == zlib.crc32(data, seed)


def test_results_are_merged_in_turn(sources: list[Path], tmp_path: Path) -> None:
    for name, pair in (("a.safetensors", sources[:2]), ("b.pt", sources[1:3])):
        merging.merge(pair, tmp_path / name)
    merging.merge([tmp_path / "a.safetensors", tmp_path / "b.pt"], out := tmp_path / "out.pt")
    found = torch.load(out)
    expected = summed([0.25, 0.5, 0.25], STATES[:3])
    assert found.keys() >= expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].to(found[name].dtype))


class TestForms:
    """The form of the first source, or another."""

    pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

    def given(self, form: str, folder: Path) -> list[Path]:
        paths = [folder / f"source-{i}.{i}" for i in range(2)]
        for path, held in zip(paths, STATES, strict=False):
            if form == "torch":
                torch.save({"model": held, "step": 5}, path)
            elif form == "safetensors":
                save_file(held, path)
            elif form == "folder":
                path.mkdir()
                save_file(held, path / "model.safetensors")
                (path / "config.json").write_text("{}")
            else:
                writer = FileSystemWriter(path)
                state_dict_saver.save({"model": held}, storage_writer=writer, **ALONE)
        return paths

    def found(self, form: str, out: Path) -> dict[str, Tensor]:
        if form == "torch":
            held: Any = torch.load(out, mmap=True)
            return held.get("model", held)  # type: ignore[no-any-return]
        if form == "safetensors":
            return load_file(out)
        if form == "folder":
            return load_file(out / "model.safetensors")
        tree = checkpoint.sources.content(out)
        return dict(tree.get("model", tree))

    FORMS = "torch", "safetensors", "folder", "distributed"

    @pytest.mark.parametrize("to", [None, *FORMS])
    @pytest.mark.parametrize("form", FORMS)
    def test_each_from_each(self, form: str, to: Any, tmp_path: Path) -> None:
        paths, out = self.given(form, tmp_path), tmp_path / "merged-v1.5"
        if to == "folder" and form in ("torch", "safetensors"):
            with pytest.raises(ValueError, match=r"source-0\.0: expected a folder to write one"):
                merging.merge(paths, out, to=to)
            return
        told: list[int] = []
        total: list[int] = []
        merging.merge(paths, out, to=to, tell=told.append, expect=total.append)
        assert sum(told) == total[0]
        assert_same(self.found(to or form, out), summed([0.5, 0.5], STATES[:2]))
        if (to or form) != "distributed":
            record = merging.told(out)
            assert record is not None
            assert [each["name"] for each in record["sources"]] == [p.name for p in paths]
            assert record["step"] == (5 if form == "torch" else None)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {out.name, *(path.name for path in paths)}

    def test_a_file_of_torch_save_is_whole(self, tmp_path: Path) -> None:
        """Its checksums are right, ties and empty tensors stay, any program can read it."""
        table = torch.randn(700, 300)
        tied = {"none": torch.empty(0, 3), "a": table, "b": table, "c": torch.randn(5, 2).T}
        torch.save({"x": {"y": tied}}, tmp_path / "0.pt")
        merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt")
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:
            assert archive.testzip() is None
        for mapped in (True, False):
            found = torch.load(tmp_path / "out.pt", mmap=mapped)["x"]["y"]
            assert_same(found, tied)
            assert found["a"].data_ptr() == found["b"].data_ptr()

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = self.given("folder", tmp_path)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(streaming, "_write", full)
        before = {*tmp_path.iterdir()}
        for form in self.FORMS:
            with pytest.raises(OSError, match="No space left"):
                merging.merge(paths, tmp_path / "out", to=form)  # type: ignore[arg-type]
        assert {*tmp_path.iterdir()} == before

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_disk_that_fails_while_the_rest_is_summed(
        self, suffix: str, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The system tells such an error once; a later sync may succeed."""
        before = {*tmp_path.iterdir()}

        def fails_early(_: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise OSError(5, "Input/output error")

        size = sum(value.nbytes for value in STATES[0].values())
        monkeypatch.setattr(streaming, "_SYNCED", size)  # once, behind the last piece
        monkeypatch.setattr(os, "fsync", fails_early)
        with pytest.raises(OSError, match="Input/output error"):
            merging.merge(sources, tmp_path / f"out{suffix}")
        assert {*tmp_path.iterdir()} == before

    def test_a_folder_of_folders_stays_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in self.given("distributed", tmp_path):
            (tmp_path / f"run-{path.name}").mkdir()
            path.rename(tmp_path / f"run-{path.name}" / "model")
        paths = sorted(tmp_path.iterdir())
        read: list[list[str]] = []
        monkeypatch.setattr(
            sharded.Folder, "read_into", note_before(sharded.Folder.read_into, read)
        )
        merging.merge(paths, tmp_path / "out.safetensors")
        assert_same(load_file(tmp_path / "out.safetensors"), summed([0.5, 0.5], STATES[:2]))
        assert {len(names) for names in read} == {1}


def note_before(function: Any, calls: list[list[str]]) -> Any:
    def call(folder: Any, tensors: dict[str, Any], **options: Any) -> None:
        calls.append([*tensors])
        function(folder, tensors, **options)

    return call


class TestLayouts:
    @pytest.mark.parametrize("of", ["averages", "trained"])
    @pytest.mark.parametrize(
        "layout", [w.name for w in WRITERS.values() if w.name != "state_dict" and w.place is None]
    )
    def test_of_each_library(self, layout: str, of: Any, tmp_path: Path) -> None:
        paths, expected, names = [tmp_path / "0.pt", tmp_path / "1.pt"], [], []
        for i, path in enumerate(paths):
            torch.manual_seed(i)
            weights, raw = (dict(nn.Linear(3, 4).state_dict()) for _ in range(2))
            names = [*raw]
            averaged = Averaged(weights, "", step=9, decay=0.9, raw=raw)
            checkpoint.write(path, averaged, layout=layout, names=names)
            known = checkpoint.read(path, names=names)
            expected.append(dict(known.weights if of == "averages" else known.raw))
            assert of == "trained" or torch.equal(known.weights["weight"], weights["weight"])
        out = tmp_path / "out.safetensors"
        if not expected[0]:
            with pytest.raises(ValueError, match="expected trained weights beside the averages"):
                merging.merge(paths, out, of=of, names=names)
            return
        merging.merge(paths, out, of=of, names=iter(names))
        assert_same(load_file(out), summed([0.5, 0.5], expected))


class TestHostile:
    """Broken inputs, and inputs that would run code: one error with the path, and no result."""

    def broken(self, path: Path, whole: bytes) -> dict[str, bytes | None]:
        header = len(whole).to_bytes(8, "little")
        return {
            "nothing": b"",
            "text": b"a file of another kind",
            "half a file": whole[: len(whole) // 2],
            "a header beyond the end": header + b"{",
            "no pickle": b"\x80\x02" + b"\x00" * 99,
            "half an archive": b"PK\x03\x04" + whole[4:200],
            "a folder of nothing": None,
        }

    KINDS = (
        "nothing",
        "text",
        "half a file",
        "a header beyond the end",
        "no pickle",
        "half an archive",
        "a folder of nothing",
    )

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_broken(self, kind: str, suffix: str, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
        for path in paths:
            save_file(STATES[0], path) if suffix != ".pt" else torch.save(STATES[0], path)
        content = self.broken(paths[1], paths[1].read_bytes())[kind]
        paths[1].unlink()
        if content is None:
            paths[1].mkdir()
        else:
            paths[1].write_bytes(content)
        with pytest.raises((ValueError, OSError), match=rf"1\{suffix}"):
            merging.merge(paths, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}

    def test_code_does_not_run(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2), "bomb": Bomb(str(tmp_path / "run"))}, tmp_path / "0.pt")
        with pytest.raises(ValueError, match=r"0\.pt: .* nothing else is unpickled"):
            merging.merge([tmp_path / "0.pt"], tmp_path / "out.pt")
        assert not (tmp_path / "run").exists()

    def test_a_source_within_itself_and_a_pipe(self, tmp_path: Path) -> None:
        held: dict[str, Any] = {"w": torch.ones(2)}
        held["self"] = held
        torch.save(held, tmp_path / "0.pt")
        os.mkfifo(tmp_path / "1.pt")
        for name in ("0.pt", "1.pt"):
            with pytest.raises((ValueError, OSError)):
                merging.merge([tmp_path / name], tmp_path / "out")

    @pytest.mark.parametrize("text", ["[]", "{", '{"sources": [1]}', '{"sources": 3}'])
    def test_a_record_of_sources_that_is_none(self, text: str, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={MERGED: text})
        with pytest.raises(ValueError, match=r"a\.safetensors: expected the merged sources"):
            merging.told(tmp_path / "a.safetensors")

    def test_a_result_within_a_source(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        save_file(STATES[0], tmp_path / "model/model.safetensors")
        with pytest.raises(ValueError, match="out: expected another place than a source"):
            merging.merge([tmp_path / "model"], tmp_path / "model/merged.safetensors")

    def test_the_element_that_is_not_finite_in_a_source_that_is_loaded(
        self, tmp_path: Path
    ) -> None:
        turned = torch.ones(3, 2).T.clone(memory_format=torch.preserve_format)
        for i, value in enumerate((1.0, math.nan)):
            held = turned.clone(memory_format=torch.preserve_format)
            held[1, 1] = value
            torch.save({"w": held}, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match=r"1\.pt: 'w': expected finite numbers"):
            merging.merge([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")

    def test_a_sum_that_overflows(self, tmp_path: Path) -> None:
        torch.save({"w": torch.full((2,), 6e4, dtype=torch.float16)}, tmp_path / "0.pt")
        arguments: Any = [tmp_path / "0.pt"], tmp_path / "out.pt", [2.0]
        with pytest.raises(ValueError, match="'w': expected numbers up to 65504, found a larger"):
            merging.merge(*arguments, allow_any_sum=True)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_sum_that_overflows_eight_bits(
        self, dtype: torch.dtype, sign: int, tmp_path: Path
    ) -> None:
        """Where torch saturates, too (1200 to 448); a third of the largest, three times, is it."""
        held = {"w": torch.full((2,), sign * torch.finfo(dtype).max).to(dtype)}
        for i in range(3):
            torch.save(held, tmp_path / f"{i}.pt")
        sources = [tmp_path / f"{i}.pt" for i in range(3)]
        merging.merge(sources, tmp_path / "out.pt")
        assert torch.equal(torch.load(tmp_path / "out.pt")["w"].float(), held["w"].float())
        with pytest.raises(ValueError, match=r"'w': expected numbers up to \d+, found a larger"):
            merging.merge(sources, tmp_path / "out.pt", [1.0] * 3, allow_any_sum=True)


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

    def test_other_files_and_folders_are_none(self, tmp_path: Path) -> None:
        """As transformers' Trainer leaves them."""
        for step in (9, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            save_file(STATES[0], tmp_path / f"checkpoint-{step}/model.safetensors")
            torch.save({"state": {}}, tmp_path / f"checkpoint-{step}/optimizer.pt")
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/events").touch()
        torch.save({}, tmp_path / "training_args.bin")
        assert [path.name for path in merging.newest(tmp_path, 2)] == [
            "checkpoint-9",
            "checkpoint-10",
        ]
        with pytest.raises(ValueError, match="expected 3 checkpoints, found 2"):
            merging.newest(tmp_path, 3)

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

    @pytest.mark.parametrize("names", ["epoch={}-step={}.pt", "{1}-of-{0}.pt"])
    @pytest.mark.parametrize("key", ["step", "steps"])
    def test_a_step_that_restarts_with_each_epoch(
        self, key: str, names: str, tmp_path: Path
    ) -> None:
        """Two files of one step tell that it restarts, whatever their names are."""
        moments = [(0, 50), (0, 100), (1, 50), (1, 100), (10, 50)]
        paths = [tmp_path / names.format(*moment) for moment in moments]
        for i, (path, (epoch, step)) in enumerate(zip(paths, moments, strict=True)):
            torch.save({"model": state(i), "epoch": epoch, key: step}, path)
        torch.save(torch.load(paths[-1]), tmp_path / "last.pt")
        assert merging.newest(tmp_path, 4) == paths[1:]
        with pytest.raises(ValueError, match="expected 6 checkpoints, found 5"):
            merging.newest(tmp_path, 6)

    def test_a_step_that_may_restart(self, tmp_path: Path) -> None:
        """Without two of one step the names decide, if they are those of one order."""
        held = {"model": STATES[0], "epoch": 0, "step": 100}
        later = {"model": STATES[1], "epoch": 1, "step": 70}
        for folder, (first, second) in {
            "by_epoch": ("epoch=0-step=100.pt", "epoch=1-step=70.pt"),
            "by_step": ("300-100.pt", "200-70.pt"),
            "by_none": ("a.pt", "best.pt"),
        }.items():
            (tmp_path / folder).mkdir()
            torch.save(held, tmp_path / folder / first)
            torch.save(later, tmp_path / folder / second)
        found = [path.name for path in merging.newest(tmp_path / "by_epoch", 2)]
        assert found == ["epoch=0-step=100.pt", "epoch=1-step=70.pt"]
        assert [path.name for path in merging.newest(tmp_path / "by_step", 2)] == [
            "200-70.pt",
            "300-100.pt",
        ]
        with pytest.raises(
            ValueError,
            match=r"by_none: expected one order .*, found best\.pt, a\.pt by their steps and "
            r"a\.pt, best\.pt by their epochs; give the checkpoints in their order",
        ):
            merging.newest(tmp_path / "by_none", 2)

    def test_a_step_that_contradicts_the_names(self, tmp_path: Path) -> None:
        for i, (name, step) in enumerate((("epoch=0-step=100", 100), ("epoch=1-step=70", 70))):
            torch.save({"model": STATES[i], "step": step}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=r"epoch=0-step=100\.pt by their steps and epoch=0-.*"):
            merging.newest(tmp_path, 2)

    @pytest.mark.parametrize("key", ["global_step", "batch_idx_train", "iteration"])
    def test_a_step_of_the_whole_run_needs_no_epoch(self, key: str, tmp_path: Path) -> None:
        """A step within the epoch is beside it; names with losses tell no order."""
        for i, (step, inner) in enumerate([(100, 9), (200, 5), (300, 7)]):
            tree = {"model": STATES[i], key: step, "step": inner}
            torch.save(tree, tmp_path / f"loss-0.{9 - i}.pt")
        found = [path.name for path in merging.newest(tmp_path, 3)]
        assert found == ["loss-0.9.pt", "loss-0.8.pt", "loss-0.7.pt"]

    @pytest.mark.parametrize("key", ["global_step", "batch_idx_train", "iteration", "step"])
    def test_any_step_may_restart_as_any_epoch_may(self, key: str, tmp_path: Path) -> None:
        """As within each epoch or after a resume, or in a second stage; names may tell which."""
        for folder, numbers in {"epoch_": (1, 2, 3), "loss-0.": (5, 9, 7)}.items():
            (tmp_path / folder).mkdir()
            for i, (number, step) in enumerate(zip(numbers, (90, 50, 70), strict=True)):
                tree = {"model": STATES[i], "epoch": i + 1, key: step}
                torch.save(tree, tmp_path / folder / f"{folder}{number}.pt")
        names = [path.stem for path in merging.newest(tmp_path / "epoch_", 3)]
        assert names == ["epoch_1", "epoch_2", "epoch_3"]
        told = (
            r"found loss-0\.9\.pt, loss-0\.7\.pt, loss-0\.5\.pt by their steps and "
            r"loss-0\.5\.pt, loss-0\.9\.pt, loss-0\.7\.pt by their epochs; give the checkpoints"
        )
        with pytest.raises(ValueError, match=told):
            merging.newest(tmp_path / "loss-0.", 3)
        (tmp_path / "stages").mkdir()
        for i, (epoch, step) in enumerate([(0, 100), (1, 200), (0, 300)]):
            tree = {"model": STATES[i], "epoch": epoch, key: step}
            torch.save(tree, tmp_path / f"stages/{step}.pt")
        names = [path.stem for path in merging.newest(tmp_path / "stages", 3)]
        assert names == ["100", "200", "300"]

    def test_an_epoch_without_a_step(self, tmp_path: Path) -> None:
        """It tells the order, which names with losses contradict, and others need not."""
        names = {
            "by_both": ("epoch-9", "epoch-10", "epoch-11"),
            "by_epoch": ("first-7", "best-9", "last"),
            "by_none": ("loss=0.9", "loss=0.5", "loss=0.7"),
        }
        for folder, each in names.items():
            (tmp_path / folder).mkdir()
            for i, name in enumerate(each):
                tree = {"model": STATES[i], "epoch": 9 + i}
                torch.save(tree, tmp_path / folder / f"{name}.pt")
            if folder != "by_none":
                torch.save(tree, tmp_path / folder / "copy.pt")
                found = merging.newest(tmp_path / folder, 2)
                assert [torch.load(path)["epoch"] for path in found] == [10, 11]
                with pytest.raises(ValueError, match="expected 4 checkpoints, found 3"):
                    merging.newest(tmp_path / folder, 4)
        told = (
            r"found loss=0\.9\.pt, loss=0\.5\.pt, loss=0\.7\.pt by their epochs and "
            r"loss=0\.5\.pt, loss=0\.7\.pt, loss=0\.9\.pt by their names"
        )
        with pytest.raises(ValueError, match=told):
            merging.newest(tmp_path / "by_none", 2)

    def test_two_of_one_epoch_without_a_step(self, tmp_path: Path) -> None:
        """Names that are alike tell them apart."""
        for i, (epoch, name) in enumerate(((1, "at-900"), (1, "at-1000"), (2, "at-2000"))):
            torch.save({"model": STATES[i], "epoch": epoch}, tmp_path / f"{name}.pt")
        names = [path.stem for path in merging.newest(tmp_path, 3)]
        assert names == ["at-900", "at-1000", "at-2000"]
        (tmp_path / "at-900.pt").rename(tmp_path / "best-900.pt")
        with pytest.raises(ValueError, match=r"best-900.pt: expected one checkpoint of each epoch"):
            merging.newest(tmp_path, 3)

    def test_a_copy_of_a_later_epoch(self, tmp_path: Path) -> None:
        """As `last.ckpt` of an epoch that has begun, where another has the same step in it."""
        for name, seed, epoch in (("a-1", 0, 1), ("a-2", 1, 2), ("last", 0, 2)):
            torch.save({"model": STATES[seed], "step": 5, "epoch": epoch}, tmp_path / f"{name}.pt")
        assert [path.stem for path in merging.newest(tmp_path, 2)] == ["a-1", "a-2"]

    def test_a_step_beside_another_part(self, tmp_path: Path) -> None:
        """The first tensors of a file need not be those with a step above them."""
        for i, (name, step) in enumerate((("b", 10), ("a", 20))):
            tree = {
                "args": {"mean": torch.ones(3)},
                "run": {"model": STATES[i], "global_step": step},
            }
            torch.save(tree, tmp_path / f"{name}.pt")
        assert [path.name for path in merging.newest(tmp_path, 2)] == ["b.pt", "a.pt"]

    def test_an_exported_model_is_none(self, tmp_path: Path) -> None:
        """As a script of diffusers leaves a pipeline beside its checkpoints."""
        for step in (9, 10):
            torch.save({"model": STATES[0], "step": step}, tmp_path / f"checkpoint-{step}.pt")
        (tmp_path / "unet").mkdir()
        save_file(STATES[0], tmp_path / "unet/diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=r"a step of each .* found none of unet"):
            merging.newest(tmp_path, 2)
        save_file(STATES[0], tmp_path / "final.safetensors")
        (tmp_path / "checkpoint-9.pt").rename(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"found one only of checkpoint-10\.pt"):
            merging.newest(tmp_path, 2)
        (tmp_path / "saved").rename(tmp_path / "checkpoint-9.pt")
        (tmp_path / "final.safetensors").unlink()
        told = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(told))
        assert [p.stem for p in merging.newest(tmp_path, 2)] == ["checkpoint-9", "checkpoint-10"]

    def test_of_a_folder_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected 1 checkpoints, found 0"):
            merging.newest(tmp_path, 1)

    def test_of_some_without_a_number(self, tmp_path: Path) -> None:
        for name in ("step-9", "step-10", "final"):
            save_file(STATES[0], tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"a number in the name .* none of final.safetensors"):
            merging.newest(tmp_path, 2)
        for path in tmp_path.glob("step-*"):
            path.unlink()
        assert [path.stem for path in merging.newest(tmp_path, 1)] == ["final"]


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

    def test_all_of_an_adapter_goes_into_its_base(self, tmp_path: Path) -> None:
        """Embeddings, convolutions, transposed weights, whole modules, and what PEFT adds to them.

        The same was seen with PEFT 0.21.2 itself: GPT-2 and Llama, seven configs, largest
        difference to the mean of its own merges in float64 7.5e-9.
        """
        base = {
            "emb.weight": torch.randn(7, 4),
            "conv.weight": torch.randn(5, 3, 2, 2),
            "turned.weight": torch.randn(4, 6),
            "head.weight": torch.randn(2, 4),
            "head.bias": torch.randn(2),
        }
        save_file(base, tmp_path / "base.safetensors")
        paths, totals = self.adapters(tmp_path), []
        for i, path in enumerate(paths):
            torch.manual_seed(i)
            held = {
                "emb.lora_embedding_A": torch.randn(2, 7),
                "emb.lora_embedding_B": torch.randn(4, 2),
                "emb.base_layer.weight": base["emb.weight"],
                "conv.lora_A.weight": torch.randn(2, 3, 2, 2),
                "conv.lora_B.weight": torch.randn(5, 2, 1, 1),
                "turned.lora_A.weight": torch.randn(2, 4),
                "turned.lora_B.weight": torch.randn(6, 2),
                "head.weight": torch.randn(2, 4),
                "head.base_layer.bias": torch.randn(2),
            }
            prefixed = {f"base_model.model.{name}": value for name, value in held.items()}
            save_file(prefixed, path / "adapter_model.safetensors")
            a, b, _, c, d, e, f, weight, bias = (value.double() for value in held.values())
            full = {
                "emb.weight": base["emb.weight"] + 3 * (b @ a).T,
                "conv.weight": base["conv.weight"] + 3 * torch.einsum("orkl,rihw->oihw", d, c),
                "turned.weight": base["turned.weight"] + 3 * (f @ e).T,
            }
            totals.append({**full, "head.weight": weight, "head.bias": bias})
        merging.merge(paths, tmp_path / "out", [0.25, 0.75], base=tmp_path / "base.safetensors")
        found = load_file(tmp_path / "out")
        for name in base:
            mean = 0.25 * totals[0][name] + 0.75 * totals[1][name]
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-6)
        told = merging.told(tmp_path / "out")
        assert told is not None
        assert told["base"]["name"] == "base.safetensors"

    @pytest.mark.parametrize(
        ("name", "shape", "words"),
        [
            ("net.lora_B.weight", (9, 2), r"'net.weight' of shape \(4, 3\) .* found \(9, 3\)"),
            ("net.lora_B.bias", (4,), "expected pairs of lora_A and lora_B, found .*lora_B.bias"),
            ("net.lora_magnitude_vector", (4,), "expected pairs of lora_A and lora_B, found"),
            ("else.weight", (4,), "expected the weights that the adapters change, found none at"),
        ],
    )
    def test_adapters_that_are_others(
        self, name: str, shape: tuple[int, ...], words: str, tmp_path: Path
    ) -> None:
        save_file({"net.weight": torch.randn(4, 3)}, tmp_path / "base.safetensors")
        path = self.adapters(tmp_path)[0] / "adapter_model.safetensors"
        save_file(load_file(path) | {f"base_model.model.{name}": torch.ones(shape)}, path)
        with pytest.raises(ValueError, match=words):
            merging.merge([path.parent], tmp_path / "out", base=tmp_path / "base.safetensors")
        (path.parent / "adapter_config.json").write_text("[]")
        with pytest.raises(ValueError, match="expected the config of a PEFT adapter"):
            merging.merge([path.parent], tmp_path / "out", base=tmp_path / "base.safetensors")

    def test_a_square_weight_of_which_its_config_is_not_to_be_believed(
        self, tmp_path: Path
    ) -> None:
        base = {"net.weight": torch.randn(3, 4), "square.weight": torch.randn(2, 2)}
        save_file(base, tmp_path / "base.safetensors")
        path = self.adapters(tmp_path)[0] / "adapter_model.safetensors"
        square = {f"base_model.model.square.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        save_file(load_file(path) | square, path)
        with pytest.raises(ValueError, match=r"whether 'square.weight' is transposed cannot be"):
            merging.merge([path.parent], tmp_path / "out", base=tmp_path / "base.safetensors")

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
        with pytest.raises(ValueError, match="expected LoRA, found IA3"):
            merging.merge(paths, tmp_path / "out", base=tmp_path / "base.safetensors")

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
            ({"init_lora_weights": "pissa_niter_4"}, "found init_lora_weights 'pissa_niter_4'"),
            ({"init_lora_weights": "OLoRA"}, "found init_lora_weights 'OLoRA'"),
            ({"init_lora_weights": "corda"}, "found init_lora_weights 'corda'"),
            ({"init_lora_weights": "loftq"}, "found init_lora_weights 'loftq'"),
            ({"init_lora_weights": "lora_ga"}, "found init_lora_weights 'lora_ga'"),
            ({"init_lora_weights": ["pissa"]}, r"found init_lora_weights \['pissa'\]"),
            ({"use_dora": True}, "expected plain LoRA, found use_dora True"),
            ({"alora_invocation_tokens": [1]}, r"plain LoRA, found alora_invocation_tokens \[1\]"),
            ({"use_qalora": True}, "found use_qalora True"),
            ({"layer_replication": [[0, 2]]}, "found layer_replication"),
            ({"of_tomorrow": {"x": 1}}, r"found of_tomorrow \{'x': 1\}"),
        ],
    )
    def test_adapters_whose_change_is_another(
        self, config: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        save_file({"net.weight": torch.ones(4, 3)}, tmp_path / "base.safetensors")
        paths = self.adapters(tmp_path, **config)
        with pytest.raises(ValueError, match=f"adapter_config.json: .*{words}"):
            merging.merge(paths, tmp_path / "out", base=tmp_path / "base.safetensors")

    @pytest.mark.filterwarnings("ignore:.*Using default EVA config:UserWarning")
    def test_adapters_with_all_that_peft_writes(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft", reason="its own config")
        base = {"net.weight": torch.randn(4, 3)}
        save_file(base, tmp_path / "base.safetensors")
        paths = self.adapters(tmp_path)
        merging.merge(paths, tmp_path / "plain", base=tmp_path / "base.safetensors")
        for init in (True, False, "gaussian", "Gaussian", "eva", "orthogonal"):
            for path in paths:
                told = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["net"]}
                peft.LoraConfig(init_lora_weights=init, **told).save_pretrained(path)
            merging.merge(paths, tmp_path / "whole", base=tmp_path / "base.safetensors")
            assert_same(load_file(tmp_path / "whole"), load_file(tmp_path / "plain"))

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_base_in_float64_stays_as_it_is(self, suffix: str, tmp_path: Path) -> None:
        """Its memory is read twice where the result is written with a checksum or a tie."""
        tied = torch.randn(4, 3, dtype=torch.float64)
        torch.save({"net.weight": tied, "other.weight": tied}, tmp_path / "base.pt")
        paths = self.adapters(tmp_path)
        out = tmp_path / f"out{suffix}"
        merging.merge(paths, out, base=tmp_path / "base.pt")
        found = load_file(out) if suffix == ".safetensors" else torch.load(out)
        assert torch.equal(found["other.weight"], tied)
        assert not torch.equal(found["net.weight"], tied)


@tells_memory
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_memory_is_that_of_a_leaf_or_two(suffix: str, tmp_path: Path) -> None:
    """Six sources with two leaves of 16 MB: that of a few pieces, if they can be mapped."""
    if not suffix and torch.__version__ < "2.11":
        pytest.skip("torch 2.10 leaves what its reader has read to the garbage collector")
    paths = [tmp_path / f"{i}{suffix}" for i in range(6)]
    for i, path in enumerate(paths):
        held = {f"w{j}": torch.full((2**11, 2**11), float(i)) for j in range(2)}
        if suffix == ".safetensors":
            save_file(held, path)
        elif suffix == ".pt":
            torch.save(held, path)
        else:  # not mapped
            state_dict_saver.save(held, storage_writer=FileSystemWriter(path), **ALONE)
    before, peaks = own_memory(), [0]
    out = tmp_path / f"out{suffix}"
    merging.merge(paths, out, tell=lambda _: peaks.append(own_memory() - before))
    assert len(peaks) > 8
    assert max(peaks) < (2 * 32 if not suffix else 32) * 2**20


def test_killed_at_any_moment_the_result_is_old_or_new(sources: list[Path], tmp_path: Path) -> None:
    """A process merges over and over, by two rules, and is killed by SIGKILL."""
    code = (
        "import sys; from emajit import merging; out, *sources = sys.argv[1:]\n"
        "for i in range(10**9):\n"
        "    merging.merge(sources, out, [i % 2, 0, 0, 1 - i % 2])\n"
        "    i or print('begun', flush=True)"
    )
    results = [STATES[0] | {"1.num_batches_tracked": torch.tensor(3)}, STATES[3]]
    runs = []
    for suffix in (".safetensors", ".pt"):
        out = tmp_path / f"out{suffix}"
        command = [sys.executable, "-c", code, str(out), *map(str, sources)]
        runs.append((out, subprocess.Popen(command, stdout=subprocess.PIPE)))
    chance = np.random.default_rng(0)
    for out, process in runs:
        assert process.stdout is not None
        with process:
            assert process.stdout.readline() == b"begun\n"
            for _ in range(12):  # stopped, it leaves on the disk what it would leave if killed
                time.sleep(chance.uniform(0, 0.01))
                process.send_signal(signal.SIGSTOP)
                found = load_file(out) if out.suffix == ".safetensors" else torch.load(out)
                same = [all(torch.equal(found[n], r[n]) for n in r) for r in results]
                assert any(same)
                process.send_signal(signal.SIGCONT)
            process.kill()
        found = load_file(out) if out.suffix == ".safetensors" else torch.load(out)
        assert any(all(torch.equal(found[n], r[n]) for n in r) for r in results)
        merging.merge(sources, out)


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
        for averages in (posthoc.snapshots(tmp_path), sorted(tmp_path.iterdir())):
            with pytest.raises(ValueError, match=r"a mean since the start, found sigma_rel 0\.1"):
                posthoc.window(averages, 5, 9)

    def test_needs_no_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a folder whose steps and names tell two orders, with a copy."""
        for step, name in ((4, "loss-0.2"), (9, "loss-0.1"), (9, "last")):
            tree = {"model": {"w": torch.zeros(2)}, "model_avg": {"w": torch.ones(2) * step}}
            torch.save({**tree, "epoch": 9 - step, "step": step}, tmp_path / f"{name}.pt")
        out = tmp_path / "out.safetensors"
        arguments = ["merge", "--window", "4:9", str(tmp_path), "-o", str(out)]
        assert run(monkeypatch, *arguments) == 0
        torch.testing.assert_close(load_file(out)["w"], torch.full((2,), 13.0))

    @pytest.mark.parametrize("of_torch", [False, True])
    def test_what_is_no_mean_is_that_of_stop(
        self, of_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Statistics that shrink: the mean before `stop` of two that are none is below zero."""
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
        averaged, held = AveragedModel(model), []
        for step in range(1, 10):
            for value in model.state_dict().values():
                value.copy_(torch.randn(value.shape, dtype=torch.float64).abs() / step**4)
            averaged.update_parameters(model)
            held.append({name: value.clone() for name, value in model.state_dict().items()})
            shadow = {n: torch.stack([x[n] for x in held]).mean(0) for n in ("0.weight", "1.bias")}
            state = {"state_dict": held[-1], "emajit": {"shadow": shadow, "step": step}}
            torch.save(averaged.state_dict() if of_torch else state, tmp_path / f"{step}.pt")
        paths = [tmp_path / "4.pt", tmp_path / "9.pt"]
        arguments = ["merge", "--window", "4:9", *map(str, paths), "--of", "averages"]
        assert run(monkeypatch, *arguments, "-o", str(tmp_path / "out.safetensors")) == 0
        if not of_torch:  # a difference of models, not of means
            out = tmp_path / "trained.safetensors"
            merging.merge(paths, out, [-1.0, 2.0], of="trained")
            for name, value in load_file(out).items():
                if value.is_floating_point():
                    torch.testing.assert_close(value, 2 * held[-1][name] - held[3][name])
        for mean in (posthoc.window(paths, 4, 9), load_file(tmp_path / "out.safetensors")):
            for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
                assert torch.equal(mean[name], held[-1][name])
            for name in ("0.weight", "1.bias"):
                direct = torch.stack([each[name] for each in held[4:]]).mean(0)
                torch.testing.assert_close(mean[name], direct, rtol=1e-9, atol=1e-9)

    def test_of_an_average_with_a_decay(self, tmp_path: Path) -> None:
        decays: Any = [0.99, 0.9999, schedules.uniform()]
        for i, decay in enumerate(decays):
            model = nn.Linear(2, 3)
            ema = LitEma(model, decay)
            for step in range(1, 10):
                with torch.no_grad():
                    model.weight.add_(step)
                ema(model)
                state = {f"model_ema.{name}": value for name, value in ema.state_dict().items()}
                state |= {f"model.{name}": value for name, value in model.state_dict().items()}
                torch.save({"state_dict": state}, tmp_path / f"{i}-{step}.pt")
        for i, word in ((0, "0.99"), (1, "0.9999")):
            words = (
                rf"{i}-4.pt: expected a mean since the start, whose .* is 0.75, found .* {word}$"
            )
            with pytest.raises(ValueError, match=words):
                posthoc.window([tmp_path / f"{i}-4.pt", tmp_path / f"{i}-9.pt"], 4, 9)
        posthoc.window([tmp_path / "2-4.pt", tmp_path / "2-9.pt"], 4, 9)

    @pytest.mark.parametrize(
        "other", [torch.ones(3, 1), torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3) * 1j]
    )
    def test_of_two_that_differ(self, other: Tensor, tmp_path: Path) -> None:
        paths = [tmp_path / "5.safetensors", tmp_path / "9.safetensors"]
        checkpoint.save(paths[0], {"w": other}, 5)
        checkpoint.save(paths[1], {"w": torch.ones(3, 3)}, 9)
        with pytest.raises(ValueError, match=r"same names, shapes and kinds at 5 and 9, .* at w$"):
            posthoc.window(paths, 5, 9)

    def test_of_two_of_one_step(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for i, (path, step) in enumerate(zip(paths, (5, 5, 9), strict=True)):
            checkpoint.save(path, {"w": torch.full((2,), float(i))}, step)
        with pytest.raises(
            ValueError, match=r"1\.safetensors: expected one average at 5, found .*0"
        ):
            posthoc.window(paths, 5, 9)
        posthoc.window([paths[0], paths[0], paths[2]], 5, 9)

    def test_of_a_tensor_that_one_file_averages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = {"w": torch.ones(2), "running_mean": torch.ones(3)}
        for step, names in ((5, ["w"]), (9, ["w", "running_mean"])):
            ours = {"shadow": {name: weights[name] for name in names}, "step": step}
            torch.save({"state_dict": weights, "emajit": ours}, tmp_path / f"{step}.ckpt")
        paths = [str(tmp_path / "5.ckpt"), str(tmp_path / "9.ckpt")]
        with pytest.raises(ValueError, match=r"at 5 and 9, found others at running_mean$"):
            posthoc.window(paths, 5, 9)
        out = str(tmp_path / "out.pt")
        assert run(monkeypatch, "merge", "--window", "5:9", *paths, "-o", out) != 0
        assert "found others at running_mean" in capsys.readouterr().err.replace("\n", " ")

    @pytest.mark.parametrize("kind", ["snapshots", "icefall"])
    def test_of_the_command(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = [torch.randn(3, 2, dtype=torch.float64) for _ in range(9)]
        folder = tmp_path / "run"
        folder.mkdir()
        for step in (2, 4, 9):
            mean = {"w": torch.stack(held[:step]).mean(0)}
            if kind == "snapshots":
                posthoc.save(folder, mean, step, sigma_rel=12**-0.5)
            else:
                tree = {"model": {"w": held[step - 1]}, "model_avg": mean, "batch_idx_train": step}
                torch.save(tree, folder / f"checkpoint-{step}.pt")
        for start in (0, 4):
            out = tmp_path / f"{start}.safetensors"
            arguments = ["merge", "--window", f"{start}:9", str(folder), "-o", str(out)]
            assert run(monkeypatch, *arguments) == 0
            direct = torch.stack(held[start:]).mean(0)
            torch.testing.assert_close(load_file(out)["w"], direct, rtol=1e-13, atol=1e-13)


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
            (["a.safetensors", "-o", "out", "--window", "3"], "--window: expected START:STOP"),
            (["a.safetensors", "-o", "out", "--window", "1:3", "--last", "2"], "neither --last"),
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

    @pytest.mark.parametrize("last", [["--last", "2"], []])
    def test_nothing_is_shown_before_all_is_checked(
        self,
        last: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        paths = [tmp_path / "run" / f"{step}.pt" for step in (1, 2)]
        paths[0].parent.mkdir()
        for path, held in zip(paths, STATES, strict=False):
            torch.save({"model": held, "ema": held, "step": int(path.stem)}, path)
        given = [*last, str(paths[0].parent)] if last else [*map(str, paths)]
        for out, options, line in (
            ("out.pt", [], "--of"),
            ("out", ["--of", "trained", "--to", "folder"], "expected a folder to write one like"),
        ):
            arguments = ["merge", *given, "-o", str(tmp_path / out), *options]
            assert run(monkeypatch, *arguments) == 2
            shown = capsys.readouterr()
            assert line in shown.err
            assert not shown.out

    def test_the_order_by_epochs_is_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "run").mkdir()
        for i, (epoch, step) in enumerate([(1, 50), (0, 50), (1, 100)]):
            held = {"model": STATES[i], "epoch": epoch, "step": step}
            torch.save(held, tmp_path / f"run/{i}.pt")
        arguments = ["merge", "--last", "3", str(tmp_path / "run"), "-o", str(tmp_path / "out.pt")]
        assert run(monkeypatch, *arguments) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "by their steps: 50 of epoch 0, 50 of epoch 1, 100 of epoch 1" in shown
        assert shown.index("1.pt") < shown.index("0.pt") < shown.index("2.pt")

    def test_sources_of_one_name_are_told_apart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        paths = [f"{i}/unet" for i in range(2)]
        for i, path in enumerate(paths):
            Path(path).mkdir(parents=True)
            save_file(STATES[i], f"{path}/model.safetensors")
        assert run(monkeypatch, "merge", *paths, "-o", "out.safetensors") == 0
        assert run(monkeypatch, "inspect", "out.safetensors") == 0
        shown = capsys.readouterr().out
        assert [shown.count(path) for path in paths] == [2, 2]
        told = merging.told("out.safetensors")
        assert told is not None
        assert [each["name"] for each in told["sources"]] == paths

    def test_inspect_shows_what_was_merged(
        self,
        sources: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for suffix in (".safetensors", ".pt"):
            merging.merge(sources, tmp_path / f"out{suffix}")
            assert run(monkeypatch, "inspect", str(tmp_path / f"out{suffix}")) == 0
            shown = capsys.readouterr().out
            assert "step-7.safetensors" in shown
            assert "0.25" in shown


def test_a_dtype_that_safetensors_lacks() -> None:
    forms = {"w": files.Form((1,), torch.complex128)}
    with pytest.raises(ValueError, match="expected a dtype that safetensors has"):
        files.in_order(forms)
    assert checkpoint.candidates({"w": {"v": torch.ones(1)}})[0].path == "w"
