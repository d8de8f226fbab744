"""Everybody's checkpoints, as they themselves write them where they are installed."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import math
import pickle
import pkgutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from bench import contestants
from emajit import LitEma, checkpoint, posthoc
from emajit.checkpoint import layouts
from emajit.checkpoint.layouts import WRITERS
from emajit.checkpoint.reading import inspected
from tests import reference
from tests.counting import own_memory, tells_memory


def peer(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is of the bench extra")


class Host(nn.Module):
    """As latent-diffusion has it: the averaged model and others, averages beside them."""

    def __init__(self, make: Any = LitEma, whole: bool = False) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": net()})
        self.first_stage = nn.Linear(2, 2)
        self.model_ema = make(self if whole else self.model)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(model: nn.Module) -> None:
    """Weights that are no average of anything."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))


def assert_average(
    found: checkpoint.Averaged, expected: dict[str, Tensor], raw: dict[str, Tensor] | None = None
) -> None:
    """That it has these averages, and beside them these trained weights, if any are given."""
    for part, values in ((found.weights, expected), (found.raw, raw)):
        if values is not None:
            assert part.keys() == values.keys()
            for name, value in values.items():
                assert torch.equal(part[name], value), name


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(params=["torch.save", "legacy", "safetensors", "mapping"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A way to hand over a state: as a file of some kind, or as it is."""

    def write(state: dict[str, Any]) -> Any:
        path = tmp_path / "file"
        flat = all(isinstance(value, Tensor) for value in state.values())
        if request.param == "safetensors" and flat:
            save_file({k: v.contiguous() for k, v in state.items()}, path)
        elif request.param == "mapping":
            return state
        else:
            zipped = request.param != "legacy"
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


class TestLitEma:
    @pytest.mark.parametrize("make", [LitEma, reference.LitEma])
    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    def test_in_a_full_checkpoint(self, written: Any, make: Any, whole: bool, nested: bool) -> None:
        host = Host(make, whole)
        if whole:  # as the first stage of latent-diffusion: averages of all but themselves
            host.model_ema = make(
                nn.ModuleDict({"model": host.model, "first_stage": host.first_stage})
            )
        averages = parameters(host.model)
        trained(host.model)
        state = host.state_dict()
        found = checkpoint.read(written({"state_dict": state, "epoch": 3} if nested else state))
        expected = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
        expected |= {f"model.{name}": value for name, value in averages.items()}
        assert_average(found, expected)
        assert (found.layout, found.step, found.decay) == ("LitEma at model_ema", 0, 0.9999)
        raw = {name for name in expected if "running" in name or "num_batches" in name}
        raw |= set() if whole else {"first_stage.weight", "first_stage.bias"}
        assert set(found.raw_only) == raw

    def test_on_its_own(self, written: Any) -> None:
        model = net()
        ema = LitEma(model, decay=0.5, use_num_upates=False)
        averages = parameters(model)
        source = written(ema.state_dict())
        for names in (model, list(averages), iter(averages)):
            found = checkpoint.read(source, names=names)
            assert_average(found, averages)
        assert (found.layout, found.step, found.decay) == ("LitEma", None, 0.5)
        model = nn.Sequential(model, nn.BatchNorm1d(3))
        for buffers in ("ignore", "copy", "average"):
            ema = LitEma(model, buffers=buffers)
            found = checkpoint.read(ema.state_dict(), names=model)
            assert_average(found, ema.named_averages())
        with pytest.raises(ValueError, match="LitEma: expected names, which its keys do not tell"):
            checkpoint.read(source)
        with pytest.raises(ValueError, match=r"LitEma: '0\w+': expected one parameter of that"):
            checkpoint.read(source, names=["other.weight"])

    def test_of_a_compiled_module(self) -> None:
        host: Any = Host()
        host.model["diffusion_model"] = torch.compile(host.model["diffusion_model"])
        host.model_ema = reference.LitEma(host.model)
        averages = parameters(host.model)
        trained(host.model)
        state = host.state_dict()
        assert any("_orig_mod0weight" in key for key in state)
        found = checkpoint.read(state)
        plain = {key.replace("_orig_mod.", ""): v for key, v in state.items() if "ema" not in key}
        plain |= {key: v for key, v in state.items() if "model_ema" in key}
        for result in (found, checkpoint.read(plain)):
            average = result.weights["model.diffusion_model.0.weight"]
            assert torch.equal(average, averages["diffusion_model._orig_mod.0.weight"])

    def test_names_that_collide(self) -> None:
        def make(ema: Any) -> nn.Module:
            host = nn.Module()
            host.model = nn.Module()
            host.model.a = nn.Module()
            host.model.a.register_parameter("bc", nn.Parameter(torch.ones(1)))
            host.model.ab = nn.Module()
            host.model.ab.register_parameter("c", nn.Parameter(torch.zeros(1)))
            host.model_ema = ema(host.model)
            return host

        with pytest.raises(ValueError, match=r"'abc': expected one .* found \['model.a.bc'"):
            checkpoint.read(make(reference.LitEma).state_dict())
        found = checkpoint.read(make(LitEma).state_dict())  # which keeps them apart
        assert {k: v.item() for k, v in found.weights.items()} == {"model.a.bc": 1, "model.ab.c": 0}

    def test_tied_weights_have_one_average(self, tmp_path: Path) -> None:
        """Under all their names in a model, under one in a LitEma."""

        def make(ema: Any) -> nn.Module:
            host: Any = nn.Module()
            host.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            host.model[1].weight = host.model[0].weight
            host.model_ema = ema(host.model)
            return host  # type: ignore[no-any-return]

        for ema in (LitEma, reference.LitEma):
            host: Any = make(ema)
            averages = parameters(host.model)
            trained(host.model)
            torch.save(host.state_dict(), tmp_path / "source")
            found = checkpoint.read(tmp_path / "source")
            assert not found.raw_only
            assert torch.equal(found.weights["model.1.weight"], averages["0.weight"])
            checkpoint.write(tmp_path / "out", found, layout="litema")
            other = make(ema)
            assert other.load_state_dict(load_file(tmp_path / "out")) == ([], [])
            for name, value in host.state_dict().items():
                assert torch.equal(other.state_dict()[name], value), name
            again = checkpoint.read(tmp_path / "out")
            assert not again.raw_only
            assert torch.equal(again.weights["model.1.weight"], averages["0.weight"])
            names = [f"model.{name}" for name in averages]
            checkpoint.write(tmp_path / "out", found, layout="torch-ema", names=names)
            again = checkpoint.read(tmp_path / "out", names=names)
            assert_average(again, {f"model.{name}": value for name, value in averages.items()})

    def test_ties_that_a_header_tells(self, tmp_path: Path) -> None:
        host: Any = nn.Module()
        host.model = nn.Linear(2, 2)
        host.model_ema = LitEma(host.model)
        host.other = nn.Parameter(host.model.weight.detach().clone())
        for told, is_tied in (
            ({"other": "model.weight"}, True),
            ({"model.bias": "model.weight"}, False),
            ({"nowhere": "model.weight"}, None),
            ([], None),
        ):
            header = {"emajit.tied": json.dumps(told)}
            save_file(host.state_dict(), tmp_path / "file", metadata=header)
            if is_tied is None:
                with pytest.raises(ValueError, match="file: expected names that are tied, found"):
                    checkpoint.read(tmp_path / "file")
            else:
                found = checkpoint.read(tmp_path / "file")
                assert found.raw_only == (() if is_tied else ("other",))

    def test_half_precision_files_are_distrusted(self) -> None:
        state = {key: value.half() for key, value in Host().state_dict().items()}
        found = checkpoint.read(state)
        assert found.step is found.decay is None

    def test_ambiguity(self) -> None:
        state = Host().state_dict()
        twice = state | {f"other.{key}": value for key, value in state.items()}
        with pytest.raises(ValueError, match="found two: LitEma at model_ema and LitEma at other"):
            checkpoint.read(twice)
        beside = state | {f"copy.{k}": v for k, v in state.items() if not k.startswith("model_ema")}
        with pytest.raises(ValueError, match="expected its parameter in one place, found 2"):
            checkpoint.read(beside)
        del state["model.diffusion_model.0.bias"]
        with pytest.raises(ValueError, match="'diffusion_model0bias': expected one parameter"):
            checkpoint.read(state)
        colliding = {
            "model_ema.abc": torch.ones(1),
            "model_ema.decay": torch.ones(()),
            "model_ema.num_updates": torch.ones(()),
        }
        for names in (["a.bc", "ab.c"], ["a.bc", "ab.c", "teacher.a.bc"]):
            raw = {f"model.{name}": torch.zeros(1) for name in names}
            with pytest.raises(ValueError, match="'abc': expected one parameter of that name"):
                checkpoint.read({**colliding, **raw})
        state["model.diffusion_model.0.bias"] = torch.ones(99)
        with pytest.raises(ValueError, match=r"0.bias': expected an average of shape \(99,\)"):
            checkpoint.read(state)

    def test_without_averages(self) -> None:
        state = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
        with pytest.raises(
            ValueError, match=r"expected averages beside model_ema\.decay, found none"
        ):
            checkpoint.read(state)

    @pytest.mark.parametrize("decay", [0.9999, 2 ** (-1 / 12345), 2 ** (-1 / 1234567)])
    def test_the_decay_is_that_of_the_file(self, decay: float) -> None:
        host = Host()
        host.model_ema.decay.fill_(decay)
        found = checkpoint.read(host.state_dict()).decay
        assert found == (0.9999 if decay == 0.9999 else host.model_ema.decay.item())
        wide = {key: value.double() for key, value in host.state_dict().items()}
        assert checkpoint.read(wide).decay == found


class TestPeers:
    def test_averaged_model(self, written: Any) -> None:
        model = net()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        for _ in range(3):
            trained(model)
            averaged.update_parameters(model)
        found = checkpoint.read(written(averaged.state_dict()))
        assert_average(found, averaged.module.state_dict())
        assert (found.layout, found.step) == ("AveragedModel", 3)

    @pytest.mark.parametrize(
        ("kind", "online"), [("EMA", False), ("EMA", True), ("KarrasEMA", False)]
    )
    def test_ema_pytorch(self, written: Any, kind: str, online: bool) -> None:
        ema_pytorch = peer("ema_pytorch")
        model = net()
        options: dict[str, Any] = {"update_every": 1}
        if kind == "EMA":
            options |= {"beta": 0.9, "include_online_model": online, "update_after_step": 0}
        else:
            options |= {"sigma_rel": 0.1}
        ema = getattr(ema_pytorch, kind)(model, **options)
        for _ in range(3):
            trained(model)
            ema.update()
        found = checkpoint.read(written(ema.state_dict()))
        assert_average(found, ema.ema_model.state_dict(), model.state_dict() if online else {})
        assert (found.layout, found.step) == ("ema-pytorch", int(ema.step))

    def test_ema_pytorch_posthoc(self, tmp_path: Path) -> None:
        ema_pytorch = peer("ema_pytorch")
        model = net()
        ema = ema_pytorch.PostHocEMA(
            model, sigma_rels=(0.05, 0.28), checkpoint_folder=str(tmp_path), update_every=1
        )
        ema.update()
        ema.checkpoint()
        with pytest.raises(ValueError, match="expected one average, found two: ema-pytorch"):
            checkpoint.read(ema.state_dict())
        both = checkpoint.read_all(ema.state_dict())
        for i, found in enumerate(both):
            assert f"length {i} in the order of its sigma_rels" in found.why
            assert_average(found, ema.ema_models[i].ema_model.state_dict())
            assert found.sigma_rel is None  # which its state does not hold
        found = checkpoint.read(tmp_path / "1.1.pt")
        assert found.step == 1  # from its name: in the file it is in float16
        expected = {k: v.half() for k, v in ema.ema_models[1].ema_model.state_dict().items()}
        assert_average(found, expected)

    def test_ema_pytorch_posthoc_of_many_lengths(self, tmp_path: Path) -> None:
        """The order of its lengths, which safetensors does not keep."""
        state: dict[str, Tensor] = {}
        for i in range(11):
            controls = {"initted": torch.tensor(True), "step": torch.tensor(3)}
            held = {**controls, "ema_model.w": torch.full((2,), float(i))}
            state |= {f"ema_models.{i}.{name}": value for name, value in held.items()}
        save_file(state, tmp_path / "file")
        found = checkpoint.read_all(tmp_path / "file")
        assert [int(each.weights["w"][0]) for each in found] == [*range(11)]

    def test_ema_pytorch_posthoc_with_its_lengths(self, tmp_path: Path) -> None:
        ema_pytorch = peer("ema_pytorch")
        lengths = (0.05, 0.15, 0.28)
        options: dict[str, Any] = {"checkpoint_folder": str(tmp_path), "update_every": 1}
        ema = ema_pytorch.PostHocEMA(net(), sigma_rels=lengths, **options)
        for _ in range(10):
            ema.update()
            ema.checkpoint()
        assert not [name for name in ema.state_dict() if "gamma" in name or "sigma" in name]
        state = checkpoint.read_all(ema.state_dict(), sigma_rel=lengths)
        assert [each.sigma_rel for each in state] == [*lengths]
        assert ["sigma_rel 0.15" in each.why for each in state] == [False, True, False]
        told = checkpoint.read_all(tmp_path, sigma_rel=lengths)
        order = [(each.step, each.sigma_rel) for each in told]
        assert order == [(step, length) for step in range(1, 11) for length in lengths]
        one = checkpoint.read(tmp_path / "1.10.pt", sigma_rel=lengths)
        assert (one.step, one.sigma_rel, one.path) == (10, 0.15, "1.10.ema_model")
        assert checkpoint.read(tmp_path / "1.10.pt", key=one.path).path == one.path
        with pytest.raises(
            ValueError, match="length 2 in the order of its sigma_rels, sigma_rel 0"
        ):
            checkpoint.read(ema.state_dict(), sigma_rel=lengths)
        key = "ema_models.2.ema_model"
        assert checkpoint.read(ema.state_dict(), key=key, sigma_rel=lengths).sigma_rel == 0.28
        for wrong, source in (
            ((0.05, 0.28), ema.state_dict()),
            ((*lengths, 0.1), ema.state_dict()),
            ((0.05, 0.28), tmp_path),
            ((0.05,), tmp_path / "1.10.pt"),
        ):
            with pytest.raises(ValueError, match=r"sigma_rel: expected \d lengths, found \d"):
                checkpoint.read_all(source, sigma_rel=wrong)
        with pytest.raises(ValueError, match="sigma_rel"):
            checkpoint.read_all(tmp_path, sigma_rel=(0.05, 0.15, 2.8))
        edm2 = {"stds": [0.05], "emas": [net().state_dict()], "net": net().state_dict()}
        with pytest.raises(
            ValueError, match="sigma_rel: expected averages of PostHocEMA, found ED"
        ):
            checkpoint.read(edm2, sigma_rel=(0.05,))

    def test_ema_pytorch_posthoc_as_snapshots(self, tmp_path: Path) -> None:
        """Another length from its files, close to that averaged in training."""
        ema_pytorch = peer("ema_pytorch")
        model, lengths = nn.Linear(4, 4), (0.05, 0.28)
        folder, ours = tmp_path / "theirs", tmp_path / "ours"
        options: dict[str, Any] = {"checkpoint_dtype": torch.float32, "update_every": 1}
        options |= {"checkpoint_every_num_steps": 25, "checkpoint_folder": str(folder)}
        ema = ema_pytorch.PostHocEMA(model, sigma_rels=lengths, **options)
        wanted = ema_pytorch.KarrasEMA(model, sigma_rel=0.15, update_every=1)
        for i in range(200):
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.full_like(p, math.sin(i / 40)))
            ema.update()
            wanted.update()
        for each in checkpoint.read_all(folder, sigma_rel=lengths):
            assert each.step is not None
            assert each.sigma_rel is not None
            posthoc.save(ours, each.weights, each.step, sigma_rel=each.sigma_rel)
        got = posthoc.reconstruct(posthoc.snapshots(ours), 0.15)
        expected = parameters(wanted.ema_model)
        assert_close(got, expected, rtol=0, atol=0.01)
        for each in ema.ema_models:  # far from those that were kept
            assert abs(float(each.ema_model.weight.mean() - expected["weight"].mean())) > 0.1

    def test_diffusers(self, written: Any) -> None:
        training_utils = peer("diffusers.training_utils")
        model = net()
        ema = training_utils.EMAModel(model.parameters(), decay=0.9)
        for _ in range(3):
            trained(model)
            ema.step(model.parameters())
        source = written(ema.state_dict())
        found = checkpoint.read(source, names=model)
        assert_average(found, dict(zip(parameters(model), ema.shadow_params, strict=True)))
        assert (found.layout, found.step, found.decay) == ("diffusers EMAModel", 3, 0.9)
        options = {"use_ema_warmup": False, "power": 2 / 3, "inv_gamma": 1.0}
        assert found.options.items() >= options.items()
        with pytest.raises(ValueError, match="EMAModel: expected names, since its averages have n"):
            checkpoint.read(source)
        with pytest.raises(ValueError, match="EMAModel: expected 6 names, found 1"):
            checkpoint.read(source, names=["w"])
        with pytest.raises(ValueError, match=r"6 names, found 7; .*averaged alone"):
            checkpoint.read(source, names=[*parameters(model), "frozen"])

    def test_torch_ema(self, written: Any) -> None:
        torch_ema = peer("torch_ema")
        model = net()
        ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9)
        trained(model)
        ema.update()
        found = checkpoint.read(written(ema.state_dict()), names=model)
        assert_average(found, dict(zip(parameters(model), ema.shadow_params, strict=True)))
        assert (found.layout, found.step, found.decay) == ("torch_ema", 1, 0.9)

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_timm(self, written: Any, wrapped: bool) -> None:
        raw, averages = net().state_dict(), net().state_dict()
        prefix = "module." if wrapped else ""
        saved = {f"{prefix}{name}": value for name, value in averages.items()}
        found = checkpoint.read(written({"epoch": 1, "state_dict": raw, "state_dict_ema": saved}))
        assert_average(found, averages, raw)
        assert found.layout == "timm"

    def test_lightning(self, written: Any) -> None:
        raw, averages = net().state_dict(), net().state_dict()
        state: dict[str, Any] = {"state_dict": averages, "current_model_state": raw}
        found = checkpoint.read(
            written({**state, "averaging_state": {"n_averaged": torch.tensor(5)}})
        )
        assert_average(found, averages, raw)
        assert (found.layout, found.step) == ("Lightning weight averaging", 5)

    def test_lightning_itself(self, tmp_path: Path) -> None:
        pytest.importorskip("lightning", reason="lightning is not installed")
        from lightning.pytorch import callbacks  # noqa: PLC0415

        from tests import test_lightning as tests  # noqa: PLC0415

        callback, model = callbacks.EMAWeightAveraging(decay=0.9), tests.model_of()
        saver = callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=12)
        trainer = tests.trainer_of(tmp_path, callback, saver)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's hints
            trainer.fit(model, tests.data())
        found = checkpoint.read(saver.best_model_path)
        assert_average(found, model.state_dict())  # where it leaves the averages
        assert (found.layout, found.step) == ("Lightning weight averaging", 12)
        assert found.raw.keys() == found.weights.keys()
        assert not torch.equal(found.raw["net.0.weight"], found.weights["net.0.weight"])

    def test_nemo(self, written: Any) -> None:
        averages = parameters(net())
        optimizer = {"opt": {}, "ema": tuple(averages.values()), "current_step": 7, "decay": 0.99}
        raw = net().state_dict()
        state = {"state_dict": raw, "optimizer_states": [optimizer]}
        found = checkpoint.read(written(state), names=list(averages))
        assert_average(found, {**raw, **averages}, raw)
        assert (found.layout, found.step, found.decay) == ("NeMo", 7, 0.99)

    def test_d2go(self, written: Any) -> None:
        model = net()
        averages, raw = parameters(net()), model.state_dict()
        found = checkpoint.read(written({"model": raw, "ema_state": averages}))
        assert_average(found, {**raw, **averages}, raw)
        assert set(found.raw_only) == raw.keys() - averages.keys()

    def test_mmengine_swaps_on_saving(self, written: Any) -> None:
        raw, averages = net().state_dict(), net().state_dict()
        held = {"steps": torch.tensor(4)} | {f"module.{name}": v for name, v in raw.items()}
        found = checkpoint.read(written({"state_dict": averages, "ema_state_dict": held}))
        assert_average(found, averages, raw)
        assert (found.layout, found.step) == ("mmengine", 4)

    @pytest.mark.parametrize("active", [False, True])
    def test_composer_swaps_while_active(self, written: Any, active: bool) -> None:
        model, other = net(), net()
        averages = other.state_dict()
        raw = model.state_dict()
        aside = model if active else other
        ema = {
            "named_parameters_dict": dict(aside.named_parameters()),
            "named_buffers_dict": dict(aside.named_buffers()),
        }
        state = {
            "model": averages if active else raw,
            "algorithms": [("EMA", {"ema_model": ema, "ema_weights_active": active})],
        }
        found = checkpoint.read(written({"state": state}))
        assert_average(found, averages, raw)

    def test_torchtitan(self, written: Any) -> None:
        averages = net().state_dict()
        state = {f"state.{name}.ema_params": value for name, value in averages.items()}
        assert_average(checkpoint.read(written(state)), averages)

    def test_emajit(self, tmp_path: Path, written: Any) -> None:
        shadow = {"a": torch.ones(2), "b": {"c": torch.zeros(1)}}
        checkpoint.save(tmp_path / "own", shadow, 5)
        flat = {"a": torch.ones(2), "b.c": torch.zeros(1)}
        for source in (tmp_path / "own", written({"shadow": shadow, "step": 5})):
            found = checkpoint.read(source)
            assert_average(found, flat)
            assert (found.layout, found.step) == ("emajit", 5)


KEYS = st.sampled_from(
    [
        *("state_dict", "model_ema.decay", "model_ema.num_updates", "decay", "num_updates"),
        *("n_averaged", "module.w", "state_dict_ema", "initted", "step", "ema_model.w"),
        *("shadow_params", "optimization_step", "current_model_state", "optimizer_states"),
        *("ema", "current_step", "ema_state", "ema_state_dict", "state", "algorithms", "EMA"),
        *("state.w.ema_params", "shadow", "w", "model.w", "model_ema.w", "ema_models.0.step"),
    ]
)


class Hyperparameters:
    """As a training script pickles them; what unpickling calls leaves a trace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return tempfile.mkdtemp, ("", "", str(self.folder))


class TestPickledBeside:
    """What a file holds beside the averages is neither run, nor imported, nor in the way."""

    def test_nothing_of_it_runs(self, tmp_path: Path) -> None:
        averages, folder = net().state_dict(), tmp_path / "folder"
        folder.mkdir()
        beside = [
            Hyperparameters(folder),
            np.float64(0.5),
            {Host: 1},
            nn.functional.relu,
            Path("a"),
        ]
        torch.save({"state_dict_ema": averages, "beside": beside}, tmp_path / "file")
        assert_average(checkpoint.read(tmp_path / "file"), averages)
        assert not [*folder.iterdir()]
        torch.load(tmp_path / "file", weights_only=False)
        assert [*folder.iterdir()]

    def test_of_a_library_that_is_not_there(self, tmp_path: Path) -> None:
        """A module of this name would be imported, which fails."""
        content = io.BytesIO()
        torch.save({"state_dict_ema": net().state_dict(), "b": argparse.Namespace(a=1)}, content)
        renamed = content.getvalue().replace(b"argparse\nNamespace", b"omegacon\nDictConfi")
        (tmp_path / "file").write_bytes(renamed)
        assert checkpoint.read(tmp_path / "file").layout == "timm"

    def test_a_value_among_them_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        averages: dict[str, Any] = {**net().state_dict(), "missing": np.float32(1)}
        torch.save({"state_dict_ema": averages}, path)
        with pytest.raises(
            ValueError, match="'missing': expected a tensor, found a pickled scalar"
        ):
            checkpoint.read(path)
        averages["layer._extra_state"] = averages.pop("missing")  # as TransformerEngine has it
        torch.save({"state_dict_ema": averages}, path)
        assert checkpoint.read(path).layout == "timm"
        ema = {"shadow_params": [torch.ones(1)], "optimization_step": np.int64(3), "decay": 0.9}
        torch.save(ema, path)
        with pytest.raises(ValueError, match="EMAModel: step: expected a number, found scalar"):
            checkpoint.read(path, names=["w"])
        state = {"named_parameters_dict": net().state_dict()}
        ema = {"ema_weights_active": np.False_, "ema_model": state}
        torch.save({"state": {"model": net().state_dict(), "algorithms": {"EMA": ema}}}, path)
        with pytest.raises(ValueError, match="expected a value, found a pickled scalar"):
            checkpoint.read(path)

    def test_a_mapping_in_itself(self, tmp_path: Path) -> None:
        held: dict[str, Any] = {"state_dict_ema": net().state_dict()}
        held["itself"] = held
        torch.save(held, tmp_path / "file")
        with pytest.raises(
            ValueError, match=r"expected averages in a layout .* found one in itself"
        ):
            checkpoint.read(tmp_path / "file")

    def test_what_is_no_plain_container_after_all(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        torch.save({"state_dict_ema": collections.defaultdict(int, w=1)}, path)
        with pytest.raises(ValueError, match=f"^{path}: .* nothing else is .*(SETITEM|item assig)"):
            checkpoint.read(path)


def test_every_module_of_a_layout_is_listed() -> None:
    assert len(layouts.LAYOUTS) == len([*pkgutil.iter_modules(layouts.__path__)])


class TestRefused:
    def test_no_average(self, written: Any) -> None:
        with pytest.raises(ValueError, match=r"expected averages in a layout .* none among 0"):
            checkpoint.read(written(net().state_dict()))

    def test_two_averages(self) -> None:
        state = net().state_dict()
        both = {"state_dict_ema": state, "current_model_state": state, "state_dict": state}
        with pytest.raises(ValueError, match="expected one average, found two: timm and Lightning"):
            checkpoint.read(both)

    def test_no_module_is_unpickled(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        of = "beside what is not unpickled: torch.nn.modules"
        torch.save({"first": net(), "model": None}, path)
        with pytest.raises(ValueError, match=rf"^{path}: .* none among first, model, {of}"):
            checkpoint.read(path)
        torch.save(nn.Linear(1, 1), path)
        with pytest.raises(ValueError, match=f"^{path}: expected a mapping .* found Linear, {of}"):
            checkpoint.read(path)
        path.write_bytes(pickle.dumps(copy.copy))
        with pytest.raises(ValueError, match=f"^{path}: expected a whole file of torch.save"):
            checkpoint.read(path)

    @pytest.mark.parametrize("file", ["model.pt", "ema.pt"])
    def test_trained_weights_beside_a_pickled_average(self, tmp_path: Path, file: str) -> None:
        """They are not offered, nor taken, in its place."""
        path = tmp_path / file
        told = r"ema holds a pickled Sequential: save its state_dict\(\), where torch\.nn\.modules"
        torch.save({"model": net().state_dict(), "ema": net()}, path)
        for read in (checkpoint.read, checkpoint.read_all, inspected):
            with pytest.raises(ValueError, match=f"^{path}: {told}") as caught:
                read(path)
            assert "key" not in str(caught.value)
        torch.save({"model": net().state_dict(), "state": {"ema": net()}}, path)
        with pytest.raises(ValueError, match=rf"^{path}: state\.{told}"):
            checkpoint.read(path)
        assert checkpoint.read(path, key="model").path == "model"

    def test_pickled_settings_of_averages_are_no_averages(self, tmp_path: Path) -> None:
        path, state = tmp_path / "ema.pt", net().state_dict()
        torch.save({"model": state, "ema_args": argparse.Namespace(decay=0.9)}, path)
        assert checkpoint.read(path).weights.keys() == state.keys()

    @pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02", b"no", b"12345678{", bytes(9)])
    def test_broken_files(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "broken"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: expected") as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value)

    def test_truncated_files(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        torch.save(AveragedModel(net()).state_dict(), path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 97):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"^{path}: expected"):
                checkpoint.read(path)

    def test_corrupt_files_of_our_own(self, tmp_path: Path) -> None:
        path = tmp_path / "own"
        checkpoint.save(path, {"w": torch.ones(4)}, 1)
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="'w' is corrupt"):
            checkpoint.read(path)

    def test_wrong_arguments(self) -> None:
        for source in (None, net()):
            wrong: Any = source
            with pytest.raises(TypeError, match="source: expected a path, or a mapping"):
                checkpoint.read(wrong)
        for names in ("weight", 3):
            wrong = names
            with pytest.raises(TypeError, match="names: expected a list of names, or the model"):
                checkpoint.read({}, names=wrong)
        shadow = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
        with pytest.raises(ValueError, match=r"emajit: .* found twice \['a.b'\]"):
            checkpoint.read({"shadow": shadow, "step": 0})
        listed = {"shadow_params": [torch.ones(2)] * 3, "num_updates": 1}
        with pytest.raises(ValueError, match=r"torch_ema: .* found twice \['a'\]"):
            checkpoint.read(listed, names=["a", "a", "b"])
        for pairs in (net().named_parameters(), [1]):
            wrong = pairs
            with pytest.raises(TypeError, match="names: expected strings, or the model itself, f"):
                checkpoint.read(listed, names=wrong)
        with pytest.raises(ValueError, match=r"'0.weight': expected an average of shape \(3, 5\)"):
            checkpoint.read(
                {"shadow_params": [torch.ones(2), torch.ones(3)], "num_updates": 1},
                names=nn.Sequential(nn.Linear(5, 3)),
            )

    @pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
    def test_averages_of_other_shapes(self, shape: tuple[int, ...]) -> None:
        raw, average = {"w": torch.ones(3, 4)}, {"w": torch.ones(shape)}
        composer = {"EMA": {"ema_model": {"named_parameters_dict": raw}, "ema_weights_active": 1}}
        for tree in (
            {"state_dict": raw, "state_dict_ema": average},
            {"initted": torch.tensor(True), "step": torch.tensor(3), "online_model.w": raw["w"]}
            | {"ema_model.w": average["w"]},
            {"current_model_state": raw, "state_dict": average},
            {"ema_state_dict": {"module.w": raw["w"]}, "state_dict": average, "message_hub": {}},
            {"state": {"algorithms": composer, "model": average}},
            {"ema_state": average, "model": raw},
        ):
            with pytest.raises(
                ValueError, match=r"'w': expected an average of shape \(3, 4\), fou"
            ):
                checkpoint.read(tree)

    @pytest.mark.parametrize("step", [math.inf, 1j, [1, 2]])
    def test_steps_that_are_none(self, step: Any) -> None:
        state = {"n_averaged": torch.tensor(step), "module.w": torch.ones(1)}
        with pytest.raises(ValueError, match=r"step: expected a whole number, found tensor\("):
            checkpoint.read(state)

    def test_a_key_that_is_no_text(self) -> None:
        state = {"w": torch.ones(1)}
        tree: dict[Any, Any] = {"state_dict": state, "state_dict_ema": state, 0: 1}
        assert checkpoint.read(tree).layout == "timm"

    def test_a_dtype_that_torch_lacks(self, tmp_path: Path) -> None:
        header = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
        (tmp_path / "f6").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
        with pytest.raises(ValueError, match="f6: 'w': expected a dtype of torch, found"):
            checkpoint.read(tmp_path / "f6")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            checkpoint.read(tmp_path / "nowhere")
        with pytest.raises(IsADirectoryError, match=r"or a folder of torch\.distributed"):
            checkpoint.read(tmp_path)

    @given(
        st.recursive(
            st.one_of(
                st.none(),
                st.integers(-3, 3),
                st.text(max_size=2),
                st.just(torch.ones(())),
                st.just(torch.ones(2)),
                st.just(torch.tensor(3)),
            ),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)
            ),
        )
    )
    def test_any_tree(self, tree: Any) -> None:
        """Averages or a ValueError, whatever stands where."""
        with contextlib.suppress(ValueError):
            found = checkpoint.read({"state": tree} if not isinstance(tree, dict) else tree)
            assert all(isinstance(value, Tensor) for value in found.weights.values())


def unet_of_latent_diffusion() -> nn.Module:
    """The names of its parameters, each of two numbers."""
    resnet = "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"
    blocks = [f"input_blocks.{i}.0" for i in range(1, 10)] + ["middle_block.0", "middle_block.2"]
    modules = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    modules += [f"{block}.{part}" for block in blocks for part in resnet]
    root = nn.Module()
    for module in modules:
        inner = root
        for part in module.split("."):
            if part not in dict(inner.named_children()):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        for name in ("weight", "bias"):
            inner.register_parameter(name, nn.Parameter(torch.randn(2)))
    return root


class EmaHook:
    """As MMCV 1's hook keeps averages: in buffers of the model, which its checkpoint then has.

    After github.com/open-mmlab/mmcv, v1.7, mmcv/runner/hooks/ema.py, written anew: a momentum for
    the new weights, buffers `ema_` and the name with `_`, registered before a checkpoint is loaded.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.params = dict(model.named_parameters())
        self.momentum = momentum
        self.keys = {name: f"ema_{name.replace('.', '_')}" for name in self.params}
        for name, key in self.keys.items():
            model.register_buffer(key, self.params[name].detach().clone())
        self.model = model

    def after_train_iter(self) -> None:
        for name, average in self.averages().items():
            average.mul_(1 - self.momentum).add_(self.params[name].detach(), alpha=self.momentum)

    def averages(self) -> dict[str, Tensor]:
        return {name: self.model.get_buffer(key) for name, key in self.keys.items()}


class Resumed(NamedTuple):
    """How a library averages on from a state: one update, its averages in order, its decay."""

    update: Callable[[], object]
    averages: Callable[[], Iterable[Tensor]]
    decay: float = 0.9


def in_latent_diffusion(model: nn.Module, state: Any, _: Path) -> Resumed:
    ema = reference.LitEma(model, decay=0.5)
    host = nn.ModuleDict({"model_ema": ema})
    held = {name: v for name, v in state["state_dict"].items() if name.startswith("model_ema.")}
    assert len(held) + len(model.state_dict()) == len(state["state_dict"])
    host.load_state_dict(held)
    rest = {name: v for name, v in state["state_dict"].items() if name not in held}
    model.load_state_dict(rest)
    decay = min(0.9, (1 + 8) / (10 + 8))  # its warm-up, at the eighth update
    names = [ema.m_name2s_name[name] for name in parameters(model)]
    return Resumed(lambda: ema(model), lambda: map(ema.get_buffer, names), decay)


def in_averaged_model(model: nn.Module, state: Any, _: Path) -> Resumed:
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    ema.load_state_dict(state)
    assert ema.n_averaged == 7
    return Resumed(lambda: ema.update_parameters(model), ema.module.parameters)


def in_ema_pytorch(model: nn.Module, state: Any, _: Path) -> Resumed:
    options = {"beta": 0.9, "update_every": 1, "update_after_step": 0}
    ema = peer("ema_pytorch").EMA(model, **options)
    ema.load_state_dict(state)
    decay = 1 - (1 + 7) ** (-2 / 3)  # its warm-up: 1 - (1 + epoch / inv_gamma) ** -power
    return Resumed(ema.update, ema.ema_model.parameters, decay)


def in_timm(model: nn.Module, _: Any, path: Path) -> Resumed:
    if find_spec("timm") is None:
        pytest.skip("timm is installed by hand, without its dependencies")
    averaging, helpers = map(contestants.timm, ("utils/model_ema.py", "models/_helpers.py"))
    ema = averaging.ModelEmaV3(model, decay=0.9)
    helpers.load_checkpoint(model, str(path), use_ema=False)
    helpers.load_checkpoint(ema.module, str(path), use_ema=True)
    return Resumed(lambda: ema.update(model), ema.module.parameters)


def in_diffusers(model: nn.Module, state: Any, _: Path) -> Resumed:
    ema = peer("diffusers.training_utils").EMAModel(model.parameters(), decay=0.5)
    ema.load_state_dict(state)
    decay = (1 + 7) / (10 + 7)  # its warm-up
    return Resumed(lambda: ema.step(model.parameters()), lambda: ema.shadow_params, decay)


def in_torch_ema(model: nn.Module, state: Any, _: Path) -> Resumed:
    ema = peer("torch_ema").ExponentialMovingAverage(model.parameters(), decay=0.5)
    ema.load_state_dict(state)
    decay = min(0.9, (1 + 8) / (10 + 8))  # its warm-up
    return Resumed(ema.update, lambda: ema.shadow_params, decay)


def in_mmcv(model: nn.Module, state: Any, _: Path) -> Resumed:
    hook = EmaHook(model, momentum=0.1)
    model.load_state_dict(state["state_dict"])
    return Resumed(hook.after_train_iter, lambda: hook.averages().values())


RESUMED: dict[str, Callable[[nn.Module, Any, Path], Resumed]] = {
    "litema": in_latent_diffusion,
    "averaged-model": in_averaged_model,
    "ema-pytorch": in_ema_pytorch,
    "timm": in_timm,
    "diffusers-ema": in_diffusers,
    "torch-ema": in_torch_ema,
    "mmcv": in_mmcv,
}


def test_each_layout_is_resumed() -> None:
    copies = {name for name, writer in WRITERS.items() if writer.place}  # test_trainers.py
    assert RESUMED.keys() == WRITERS.keys() - {"state_dict"} - copies


@pytest.mark.parametrize("layout", ["litema", "mmcv"])
def test_buffers_of_a_model_have_no_average(tmp_path: Path, layout: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2))
    raw = model.state_dict()
    found = checkpoint.read({"model": raw, "ema": {name: v + 1 for name, v in raw.items()}})
    options: dict[str, Any] = {"layout": layout, "decay": 0.9, "step": 7}
    checkpoint.write(tmp_path / "out.pt", found, names=model, **options)
    state = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert torch.equal(state["scale"], raw["scale"])
    assert not {"ema_scale", "model_ema.scale"} & state.keys()


@pytest.mark.parametrize("layout", RESUMED)
def test_from_a_script_to_each_library(tmp_path: Path, layout: str) -> None:
    """The library's own object loads the state, and averages on from step 7 at decay 0.9."""
    model, path = net(), tmp_path / "out.pt"
    raw = copy.deepcopy(model.state_dict())
    average = {name: v + 1 if v.is_floating_point() else v for name, v in raw.items()}
    found = checkpoint.read({"model": {f"module.{n}": v for n, v in raw.items()}, "ema": average})
    checkpoint.write(path, found, layout=layout, names=net(), decay=0.9, step=7)
    other = net()
    resumed = RESUMED[layout](other, torch.load(path, weights_only=True), path)
    names = [*parameters(model)]
    for name, loaded in zip(names, resumed.averages(), strict=True):
        assert torch.equal(loaded, average[name])
    trained(other)
    resumed.update()
    for name, got in zip(names, resumed.averages(), strict=True):
        new = parameters(other)[name]
        assert_close(got.detach(), resumed.decay * average[name] + (1 - resumed.decay) * new)


class TestWritten:
    """What is written is read by those whose layout it is, and goes on with the same averages."""

    def found(self) -> tuple[Host, checkpoint.Averaged]:
        host = Host(reference.LitEma)
        for _ in range(3):
            trained(host.model)
            host.model_ema(host.model)
        return host, checkpoint.read(copy.deepcopy(host.state_dict()))

    def test_state_dict(self, tmp_path: Path) -> None:
        host, found = self.found()
        checkpoint.write(tmp_path / "out", found)
        del host.model_ema
        assert host.load_state_dict(load_file(tmp_path / "out")) == ([], [])
        assert_average(found, host.state_dict())

    @pytest.mark.parametrize("make", [LitEma, reference.LitEma])
    def test_litema(self, tmp_path: Path, make: Any) -> None:
        host, found = self.found()
        checkpoint.write(tmp_path / "out", found, layout="litema")
        other = Host(make)
        assert other.load_state_dict(load_file(tmp_path / "out")) == ([], [])
        before = host.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        for one in (host, other):
            torch.manual_seed(5)
            trained(one.model)
            one.model_ema(one.model)
        for a, b in zip(host.model_ema.buffers(), other.model_ema.buffers(), strict=True):
            assert_close(a, b)
        again = checkpoint.read(tmp_path / "out")
        assert_average(again, found.weights)
        assert again[1:4] == found[1:4]
        assert set(again.raw_only) == set(found.raw_only)

    @pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
    def test_the_converter_of_diffusers_takes_the_averages(self, tmp_path: Path, kind: str) -> None:
        """Its --extract_ema wants more than 100 of them, or takes the trained weights."""
        convert = peer("diffusers.loaders.single_file_utils").convert_ldm_unet_checkpoint
        host: Any = nn.Module()
        host.model = nn.Module()
        host.model.diffusion_model = unet_of_latent_diffusion()
        host.model_ema = reference.LitEma(host.model)
        trained(host.model)
        state, source = host.state_dict(), tmp_path / "source"
        if kind == "safetensors":
            save_file(state, source)
        else:
            torch.save({"state_dict": state}, source)
        found = checkpoint.read(source)
        checkpoint.write(tmp_path / "out", found, layout="litema")
        config = {"layers_per_block": 2}
        converted = convert(load_file(tmp_path / "out"), config, extract_ema=True)
        expected = convert(dict(found.weights), config)
        assert converted.keys() == expected.keys()
        assert len(converted) > 100
        for name, value in expected.items():
            assert torch.equal(converted[name], value)
        raw = convert(dict(state), config)
        assert not torch.equal(converted["conv_in.weight"], raw["conv_in.weight"])

    @tells_memory
    @pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
    @pytest.mark.parametrize("layout", ["state_dict", "litema", "diffusers-ema"])
    def test_memory_is_that_of_a_few_tensors(self, tmp_path: Path, kind: str, layout: str) -> None:
        """Of a file of 128 MB: what is mapped from the disk is not counted."""
        source = tmp_path / "source"
        state = {f"model.{i}.w": torch.full((2**20,), float(i)) for i in range(16)}
        state |= {f"model_ema.{i}w": torch.full((2**20,), i + 0.5) for i in range(16)}
        state |= {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(1)}
        save_file(state, source) if kind == "safetensors" else torch.save(state, source)
        del state
        before, peaks = own_memory(), [0]

        def tell(_: int) -> None:
            peaks.append(own_memory() - before)

        found = checkpoint.read(source)
        names = [f"model.{i}.w" for i in range(16)]
        options: Any = {"layout": layout, "tell": tell, "names": names}
        if WRITERS[layout].safetensors:
            options["dtype"] = torch.float16
        checkpoint.write(tmp_path / "out", found, **options)
        assert len(peaks) > 16
        assert max(peaks) < 32 * 2**20  # a tensor is 4 MB; freed ones are not all reused
        if layout == "diffusers-ema":
            written = torch.load(tmp_path / "out")["shadow_params"][3]
        else:
            key = "model.3.w" if layout == "state_dict" else "model_ema.3w"
            written = load_file(tmp_path / "out")[key]
        assert written[0] == 3.5

    def test_diffusers(self, tmp_path: Path) -> None:
        training_utils = peer("diffusers.training_utils")
        model, other = net(), net()
        ema = training_utils.EMAModel(model.parameters(), decay=0.9)
        for _ in range(3):
            trained(model)
            ema.step(model.parameters())
        found = checkpoint.read(ema.state_dict(), names=model)
        checkpoint.write(tmp_path / "out", found, layout="diffusers-ema", names=model)
        second = training_utils.EMAModel(other.parameters())
        second.load_state_dict(torch.load(tmp_path / "out", weights_only=True))
        trained(model)
        for one in (ema, second):
            one.step(model.parameters())
        assert ema.optimization_step == second.optimization_step == 4
        for a, b in zip(ema.shadow_params, second.shadow_params, strict=True):
            assert torch.equal(a, b)

    def test_averaged_model(self, tmp_path: Path) -> None:
        model, other = net(), net()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        for _ in range(3):
            trained(model)
            averaged.update_parameters(model)
        found = checkpoint.read(copy.deepcopy(averaged.state_dict()))
        checkpoint.write(tmp_path / "out", found, layout="averaged-model")
        second = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        second.load_state_dict(torch.load(tmp_path / "out", weights_only=True))
        trained(model)
        for one in (averaged, second):
            one.update_parameters(model)
        for a, b in zip(averaged.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_ema_pytorch(self, tmp_path: Path) -> None:
        ema_pytorch = peer("ema_pytorch")
        options = {"beta": 0.9, "update_every": 1, "update_after_step": 0}
        model, other = net(), net()
        ema, second = (ema_pytorch.EMA(one, **options) for one in (model, other))
        for _ in range(3):
            trained(model)
            ema.update()
        found = checkpoint.read(copy.deepcopy(ema.state_dict()))
        checkpoint.write(tmp_path / "out", found, layout="ema-pytorch")
        second.load_state_dict(torch.load(tmp_path / "out", weights_only=True))
        trained(model)
        other.load_state_dict(model.state_dict())
        for one in (ema, second):
            one.update()
        for a, b in zip(ema.ema_model.parameters(), second.ema_model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_torch_ema(self, tmp_path: Path) -> None:
        torch_ema = peer("torch_ema")
        model, other = net(), net()
        ema, second = (
            torch_ema.ExponentialMovingAverage(one.parameters(), decay=0.9)
            for one in (model, other)
        )
        for _ in range(3):
            trained(model)
            ema.update()
        found = checkpoint.read(copy.deepcopy(ema.state_dict()), names=model)
        checkpoint.write(tmp_path / "out", found, layout="torch-ema", names=model)
        second.load_state_dict(torch.load(tmp_path / "out", weights_only=True))
        trained(model)
        for one in (ema, second):
            one.update(model.parameters())
        for a, b in zip(ema.shadow_params, second.shadow_params, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.skipif(
        find_spec("timm") is None, reason="timm is installed by hand, without its dependencies"
    )
    def test_timm(self, tmp_path: Path) -> None:
        """As its training script saves and resumes, with the options of the run beside."""
        averaging, helpers = map(contestants.timm, ("utils/model_ema.py", "models/_helpers.py"))
        model, other = net(), net()
        ema = averaging.ModelEmaV3(model, decay=0.9)
        for _ in range(3):
            trained(model)
            ema.update(model)
        raw, averages = model.state_dict(), ema.module.state_dict()
        options = argparse.Namespace(output=tmp_path)
        saved = {"epoch": 1, "args": options, "state_dict": raw, "state_dict_ema": averages}
        torch.save(saved, tmp_path / "source")
        found = checkpoint.read(tmp_path / "source")
        assert_average(found, averages)
        checkpoint.write(tmp_path / "out", found, layout="timm")
        helpers.load_checkpoint(other, str(tmp_path / "out"), use_ema=False)
        second = averaging.ModelEmaV3(other, decay=0.9)
        helpers.load_checkpoint(second.module, str(tmp_path / "out"), use_ema=True)
        assert_close(other.state_dict(), raw, rtol=0, atol=0)
        trained(model)
        for one in (ema, second):
            one.update(model)
        assert_close(second.module.state_dict(), ema.module.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("layout", [name for name, w in WRITERS.items() if not w.place])
    def test_dtype(self, tmp_path: Path, layout: str) -> None:
        _, found = self.found()
        sizes: list[int] = []
        names = [name for name in found.weights if name not in found.raw_only]
        options: Any = {"dtype": torch.float16, "tell": sizes.append, "names": names}
        checkpoint.write(tmp_path / "out", found, layout=layout, **options)
        if not WRITERS[layout].safetensors:
            again = checkpoint.read(tmp_path / "out", names=names)
            assert {again.weights[name].dtype for name in names} == {torch.float16}
            assert again.step == (None if layout in ("mmcv", "timm") else found.step)
            return
        state = load_file(tmp_path / "out")
        if state:
            assert state["model.diffusion_model.0.weight"].dtype == torch.float16
            assert state["model.diffusion_model.1.num_batches_tracked"].dtype == torch.int64
            assert sum(sizes) == sum(value.nbytes for value in state.values())
        if layout == "litema":
            assert state["model_ema.decay"].dtype == torch.float32
            assert checkpoint.read(tmp_path / "out").decay == 0.9999

    def test_what_cannot_be_written(self, tmp_path: Path) -> None:
        shadow = {"w": torch.ones(1), "v": torch.ones(1)}
        found = checkpoint.read({"shadow": shadow, "step": 1})
        cases: list[tuple[dict[str, Any], str]] = [
            ({"layout": "litema"}, "litema: expected the trained weights beside the av"),
            ({"layout": "onnx"}, "layout: expected state_dict or litema or"),
            (
                {"dtype": torch.int8},
                "dtype: expected a floating-point dtype such as torch.float32, found torch.int8",
            ),
        ]
        if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
            cases.append(({"dtype": torch.float8_e8m0fnu}, "dtype: expected a floating-point dt"))
        for layout in ("diffusers-ema", "torch-ema"):
            options: dict[str, Any] = {"layout": layout, "decay": 0.9}
            cases += [
                ({**options, "decay": None, "names": shadow}, f"{layout}: .* tells its decay"),
                (
                    options,
                    f"{layout}: expected names of the averages in the order of .* found none",
                ),
                (
                    {**options, "names": ["w", "v", "u"]},
                    f"{layout}: .* with u, which is no average",
                ),
                ({**options, "names": ["w"]}, f"{layout}: .* found .* without v; .*names=model"),
            ]
        for wrong, message in cases:
            with pytest.raises(ValueError, match=message):
                checkpoint.write(tmp_path / "out", found, **wrong)
        unknown = found._replace(step=None, decay=0.9)
        for layout in ("averaged-model", "ema-pytorch", "diffusers-ema"):
            with pytest.raises(
                ValueError, match=f"{layout}: .* tells its step, or a step to write"
            ):
                checkpoint.write(tmp_path / "out", unknown, layout=layout, names=shadow)
        for wrong, message in (
            ({"decay": 1.5}, "decay: expected a number in .0, 1., found 1.5"),
            ({"step": -1}, "step: expected the number of updates so far, >= 0, found -1"),
            (
                {"step": 2**63},
                "step: expected a number of updates below .*, found 9223372036854775",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoint.write(tmp_path / "out", found, **wrong)
        for layout, writer in WRITERS.items():
            if not writer.safetensors:
                with pytest.raises(
                    ValueError, match=rf"expected a name with .ckpt or .* for {layout}"
                ):
                    checkpoint.write(tmp_path / "out.safetensors", found, layout=layout)
        large = found._replace(weights={"w": torch.tensor([1e5, math.inf])})
        for name in ("out.safetensors", "out.pt"):
            with pytest.raises(
                ValueError, match="'w': expected numbers up to 65504, found a larger"
            ):
                checkpoint.write(tmp_path / name, large, dtype=torch.float16)
        state: Any = found.weights
        with pytest.raises(TypeError, match="averaged: expected what read has found, found dict"):
            checkpoint.write(tmp_path / "out", state)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_what_is_raised_while_it_is_written(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        _, found = self.found()
        for name in ("out.safetensors", "out.pt"):
            sizes: list[int] = []

            def tell(size: int, sizes: list[int] = sizes) -> None:
                sizes.append(size)
                if len(sizes) == 5:  # of an error at the first, torch.save makes no other
                    raise error

            with pytest.raises(error):
                checkpoint.write(tmp_path / name, found, tell=tell)
        assert not list(tmp_path.iterdir())

    def test_a_litema_without_a_step_has_no_warm_up(self, tmp_path: Path) -> None:
        _, found = self.found()
        path = tmp_path / "out.ckpt"
        unknown = found._replace(step=None)
        checkpoint.write(path, unknown, layout="litema", dtype=torch.float16)
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state["model_ema.num_updates"] == -1
        assert state["model.diffusion_model.0.weight"].dtype == torch.float16
        assert checkpoint.read(path).step is None

    def test_a_step_beyond_what_a_litema_counts_to(self, tmp_path: Path) -> None:
        _, found = self.found()
        with pytest.raises(ValueError, match=r"litema: .* a step below .* found 3000000000"):
            checkpoint.write(tmp_path / "out", found, layout="litema", step=3_000_000_000)
        assert not [*tmp_path.iterdir()]

    def test_with_a_step_and_a_decay_of_your_own(self, tmp_path: Path) -> None:
        found = checkpoint.Averaged({"w": torch.ones(1)}, "timm")
        options: dict[str, Any] = {"names": ["w"], "decay": 0.9, "step": 7}
        checkpoint.write(tmp_path / "out", found, layout="diffusers-ema", **options)
        again = checkpoint.read(tmp_path / "out", names=["w"])
        assert (again.step, again.decay) == (7, 0.9)

    @pytest.mark.parametrize("layout", [name for name, w in WRITERS.items() if w.by_position])
    def test_the_parameters_of_a_model(self, tmp_path: Path, layout: str) -> None:
        """Of a state with buffers, as timm has it; and of one where a parameter is frozen."""
        model = net()
        averages = {name: value + 1 for name, value in model.state_dict().items()}
        all_of_it = checkpoint.read({"state_dict_ema": averages, "state_dict": model.state_dict()})
        ema = {name: v for name, v in averages.items() if name in parameters(model)}
        del ema["0.weight"]
        frozen = checkpoint.read({"ema_state": ema, "model": model.state_dict()})
        for found in (all_of_it, frozen):
            options: dict[str, Any] = {"names": model, "decay": 0.9, "step": 1}
            checkpoint.write(tmp_path / "out", found, layout=layout, **options)
            again = checkpoint.read(tmp_path / "out", names=model)
            assert_average(again, {name: found.weights[name] for name in parameters(model)})
        with pytest.raises(ValueError, match=f"{layout}: .* with 0.weight, which is no average"):
            names = [*parameters(model)]
            checkpoint.write(
                tmp_path / "out", frozen, layout=layout, names=names, decay=0.9, step=1
            )

    @pytest.mark.parametrize("layout", ["litema", "torch-ema"])
    def test_a_cast_keeps_ties(self, tmp_path: Path, layout: str) -> None:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        second.weight = first.weight
        model = nn.Module()
        model.model = nn.Sequential(first, second)
        model.model_ema = LitEma(model.model)
        path = tmp_path / "out.ckpt"
        options: dict[str, Any] = {"layout": layout, "names": model, "dtype": torch.float16}
        checkpoint.write(path, checkpoint.read(model.state_dict()), **options)
        written = torch.load(path, weights_only=True)
        if layout == "litema":
            assert written["state_dict"].keys() == model.state_dict().keys()
        else:
            assert len(written["shadow_params"]) == 3

    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
    def test_in_the_container_that_the_name_says(self, tmp_path: Path, suffix: str) -> None:
        _, found = self.found()
        path = tmp_path / f"out{suffix}"
        checkpoint.write(path, found, dtype=torch.float64)
        state = torch.load(path, weights_only=True)
        assert state.keys() == found.weights.keys()
        checkpoint.write(path, found, layout="litema")
        assert "model_ema.decay" in torch.load(path, weights_only=True)["state_dict"]
        assert_average(checkpoint.read(path), found.weights)

    def test_empty_tensors_of_a_file(self, tmp_path: Path) -> None:
        shadow = {"w": torch.ones(4), "empty": torch.empty(0), "h": torch.ones(3).half()}
        checkpoint.save(tmp_path / "ours", shadow, 3)
        save_file(Host().state_dict() | {"empty": torch.empty(0)}, tmp_path / "litema")
        for name in ("ours", "litema"):
            found = checkpoint.read(tmp_path / name)
            checkpoint.write(tmp_path / "out.pt", found)
            assert torch.load(tmp_path / "out.pt")["empty"].shape == (0,)

    def test_the_trained_weights_and_the_rest(self) -> None:
        raw, averages = net().state_dict(), net().state_dict()
        tree = {"state_dict_ema": averages, "state_dict": raw, "x": [torch.ones(1)]}
        found = checkpoint.read(tree)
        assert found.raw.keys() == averages.keys()
        assert torch.equal(found.raw["0.weight"], raw["0.weight"])
        assert found.others == 1
