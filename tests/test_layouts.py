"""Checkpoints as training scripts write them: which weights are the averages."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pkgutil
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from emajit import LitEma, checkpoint, posthoc
from emajit.checkpoint import layouts


def net() -> nn.Module:
    layers = {"a": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "b": nn.Linear(4, 2)}
    return nn.Sequential(collections.OrderedDict(layers))


torch.manual_seed(0)
NET = net()
RAW = {name: value.clone() for name, value in NET.state_dict().items()}
AVERAGE = {k: v + 1 if v.is_floating_point() else v.clone() for k, v in RAW.items()}
NAMES = [name for name, _ in NET.named_parameters()]
SHADOW = [AVERAGE[name] for name in NAMES]
OTHER = {"w": torch.ones(2, 2), "v": torch.ones(3)}
NUMBER = torch.tensor(7)


def below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def own(tree: Any) -> Any:
    """A copy in which no tensor is there twice."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: own(value) for key, value in tree.items()}
    return [own(each) for each in tree] if isinstance(tree, list) else tree


EMA_PYTORCH = {**below("ema_model.", AVERAGE), "initted": torch.tensor(True), "step": NUMBER}
AVERAGED_MODEL = {**below("module.", AVERAGE), "n_averaged": NUMBER}
POSITIONS = {"decay": 0.999, "num_updates": 7, "shadow_params": SHADOW}
OPTIMIZER = {
    "state": {i: {"exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(SHADOW)},
    "param_groups": [{"lr": 0.1}],
}
LITEMA = {"decay": torch.tensor(0.5), "num_updates": NUMBER.int()}
LITEMA |= {name.replace(".", ""): AVERAGE[name] for name in NAMES}

# By the project that writes it: the content of a file, then the step and the decay that it tells.
READ: dict[str, tuple[dict[str, Any], int | None, float | None]] = {
    "DiT": ({"model": below("module.", RAW), "ema": AVERAGE, "opt": OPTIMIZER}, None, None),
    "DiT, compiled": ({"model": RAW, "ema": below("_orig_mod.", AVERAGE)}, None, None),
    "score_sde": ({"step": 9, "model": below("module.", RAW), "ema": POSITIONS}, 7, 0.999),
    "score_sde, with a buffer": (
        {"model": {"module.sigmas": torch.ones(9), **below("module.", RAW)}, "ema": POSITIONS},
        7,
        0.999,
    ),
    "MDLM": (
        {"state_dict": below("backbone.", RAW), "ema": POSITIONS, "global_step": 9},
        7,
        0.999,
    ),
    "denoising-diffusion": ({"step": 9, "model": RAW, "opt": {}, "ema": EMA_PYTORCH}, 7, None),
    "F5-TTS": (
        {"model_state_dict": RAW, "ema_model_state_dict": EMA_PYTORCH, "step": 9},
        7,
        None,
    ),
    "stable-audio-tools": (
        {"state_dict": {**below("diffusion.", RAW), **below("diffusion_ema.", EMA_PYTORCH)}},
        7,
        None,
    ),
    "k-diffusion": ({"model": RAW, "model_ema": AVERAGE, "ema_sched": {}, "step": 7}, 7, None),
    "torchvision": ({"model": RAW, "model_ema": AVERAGED_MODEL, "epoch": 1}, 7, None),
    "torchvision, distributed": (
        {"model": RAW, "model_ema": {"n_averaged": NUMBER, **below("module.module.", AVERAGE)}},
        7,
        None,
    ),
    "OpenFold": (
        {"state_dict": below("model.", RAW), "ema": {"params": AVERAGE, "decay": 0.9}},
        None,
        0.9,
    ),
    "DINO": ({"student": below("module.", RAW), "teacher": AVERAGE}, None, None),
    "MoCo": (
        {
            "state_dict": {
                **below("module.encoder_q.", RAW),
                **below("module.encoder_k.", AVERAGE),
                "module.queue": torch.ones(2),
            }
        },
        None,
        None,
    ),
    "BYOL": (
        {"online.predictor": torch.ones(2)} | below("online.", RAW) | below("target.", AVERAGE),
        None,
        None,
    ),
    "RT-DETR": ({"model": RAW, "ema": {"module": AVERAGE, "updates": 7}}, 7, None),
    "BasicSR": ({"params": RAW, "params_ema": AVERAGE}, None, None),
    "StyleGAN2": ({"g": RAW, "d": OTHER, "g_ema": AVERAGE, "g_optim": OPTIMIZER}, None, None),
    "pytorch-ddpm": ({"net_model": RAW, "ema_model": AVERAGE, "step": 7}, 7, None),
    "Diffusion Policy": ({"state_dicts": {"model": RAW, "ema_model": AVERAGE}}, None, None),
    "fairseq": ({"model": RAW, "extra_state": {"ema": AVERAGE}}, None, None),
    "icefall": ({"model": RAW, "model_avg": AVERAGE, "batch_idx_train": 7}, 7, None),
    "hand-written": ({"model": RAW, "ema": {"shadow": AVERAGE, "decay": 0.9}}, None, 0.9),
    "hand-written, with a backup": (
        {"model": RAW, "ema": {"shadow": AVERAGE, "backup": RAW, "decay": 0.9}},
        None,
        0.9,
    ),
    "hand-written, flat": ({"model": RAW, "ema_shadow": AVERAGE}, None, None),
    "a script's AveragedModel": ({"state_dict": RAW, "ema_state_dict": AVERAGED_MODEL}, 7, None),
    "a script's AveragedModel, without its count": (
        {"state_dict": RAW, "ema_state_dict": below("module.", AVERAGE)},
        None,
        None,
    ),
    "a LitEma in a script": ({"model": RAW, "ema": LITEMA}, 7, 0.5),
    "a level deeper": ({"checkpoint": {"model": RAW, "ema": {"net": AVERAGE}}}, None, None),
    "a policy and its target": ({"policy_net": RAW, "target_net": AVERAGE}, None, None),
    "a student's average": ({"student": {"model": RAW, "ema": AVERAGE}}, None, None),
    "an average of a student": ({"student": RAW, "ema_student": AVERAGE}, None, None),
    "a trained one below the averages": (
        {"ema": {"online_model": RAW, "ema_model": AVERAGE}},
        None,
        None,
    ),
    "a numbered average": ({"model": RAW, "ema1": AVERAGE}, None, None),
    "a shadow beside tensors of step and decay": (
        {"model": RAW, "ema": {"decay": torch.tensor(0.9), "num_updates": NUMBER, "s": AVERAGE}},
        7,
        0.9,
    ),
    "a shadow in a list": ({"model": RAW, "ema": {"shadow": SHADOW, "step": 7}}, 7, None),
    "a wrapped module in a module": (
        {"state_dict": below("model.", RAW) | below("ema.module.", AVERAGE)},
        None,
        None,
    ),
    "an averaged module beside frozen ones": (
        {
            "state_dict": below("net.", RAW)
            | below("net_ema.module.", AVERAGE)
            | {f"vae.{i}.weight": torch.ones(2) for i in range(99)}
        },
        None,
        None,
    ),
    "an average beside those of losses": (
        {"model": RAW, "ema": AVERAGE, "avg_losses": [NUMBER / 2], "ema_log": {"loss": NUMBER / 2}},
        None,
        None,
    ),
    "an average of the first of two networks": (
        {"nets": {"g": RAW, "d": AVERAGE | {"a.weight": torch.ones(4, 3)}}, "ema": {"g": AVERAGE}},
        None,
        None,
    ),
    "a shadow of parameters": (
        {"model": RAW, "ema": dict(zip(NAMES, SHADOW, strict=True))},
        None,
        None,
    ),
}
PROJECTS = {name.partition(",")[0] for name in READ if not name.startswith(("a ", "an "))}


@pytest.mark.parametrize("project", READ)
def test_the_averages_have_the_names_of_the_trained_weights(project: str, tmp_path: Path) -> None:
    tree, step, decay = READ[project]
    torch.save(tree, tmp_path / "checkpoint.pt")
    for source in (tree, tmp_path / "checkpoint.pt"):
        found = checkpoint.read(source)
        net().load_state_dict({name: found.weights[name] for name in RAW})
        for name in NAMES:
            assert torch.equal(found.weights[name], AVERAGE[name])
            assert torch.equal(found.raw[name], RAW[name])
        assert (found.step, found.decay) == (step, decay)
        assert not set(found.raw_only) & set(NAMES)


def test_the_readme_lists_what_is_read() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    told = readme.partition("| files of scripts |")[2].partition("\n")[0]
    assert all(project in told for project in PROJECTS)
    told = readme.partition("| states of libraries |")[2].partition("\n")[0]
    spelled = told.lower().replace("averagedmodel", "averaged_model").replace("-", "_")
    libraries = {each.name for each in pkgutil.iter_modules(layouts.__path__)}
    libraries -= {"state_dict", "native", "native_lightning"}  # our own
    assert all(library in spelled for library in libraries)
    told = readme.partition("| folders |")[2].partition("\n")[0]
    for text, test in FOLDERS.items():
        assert text in told
        assert callable(test)
    assert len(FOLDERS) == len(re.findall(r", (?!which)", told)) + 1


def test_the_wider_of_two_precisions() -> None:
    half = {name: value.half() for name, value in AVERAGE.items()}
    wide = dict(zip(NAMES, SHADOW, strict=True))
    found = checkpoint.read({"model": RAW, "extra_state": {"ema": half, "ema_fp32_params": wide}})
    assert all(torch.equal(found.weights[name], AVERAGE[name]) for name in NAMES)
    assert found.raw_only == tuple(name for name in RAW if name not in NAMES)


class TestMmengine:
    """Its files have the trained weights in `ema_state_dict`; those of others, the averages."""

    @pytest.mark.parametrize(
        "mark", [{"meta": {"mmengine_version": "0.10"}}, {"message_hub": {}}, {}]
    )
    def test_it_is_known_by_marks_of_its_own(self, mark: dict[str, Any]) -> None:
        held = below("module.", RAW) | ({} if mark else {"steps": NUMBER})
        found = checkpoint.read({"state_dict": AVERAGE, "ema_state_dict": held, **mark})
        assert found.layout == "mmengine"
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])


class TestRefused:
    """More than one reading, or none: the error is a table of the candidates."""

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ({"model": RAW, "ema": None}, r"found none among model, ema\n  model: 9 tensors, 43"),
            ({"model": RAW, "ema": {}}, r"found none among model, ema\n  model: 9 tensors, 43"),
            ({"model": RAW, "ema": OTHER}, "ema: expected trained weights of the same names"),
            ({"g": RAW, "d": OTHER, "g_ema": AVERAGE, "d_ema": OTHER}, "one average, found two"),
            (
                {"model": RAW, "other": RAW, "ema": {k: v.clone() for k, v in AVERAGE.items()}},
                "ema: expected trained weights in one place, found them at 'model' and 'other'",
            ),
            (
                {"model": RAW, "best": {"net": RAW}, "ema": {"net": AVERAGE}},
                "in one place, found them at 'model' and 'best.net'",
            ),
            ({"one": RAW, "two": RAW, "ema": POSITIONS}, "in one place, found them at 'one' and"),
            ({"student": RAW, "teacher": AVERAGE | {"b.bias": torch.ones(9)}}, r"shape \(2,\), "),
            ({"net": RAW, "ema": {"stds": [0.05, 0.1], "emas": [AVERAGE, RAW]}}, "sigma_rel 0.05"),
            ({"model": RAW, "ema": [*SHADOW, torch.ones(7)]}, "expected names, since its averages"),
            ({"model": RAW, "opt": {"ema": SHADOW}}, "found none among model, opt"),
            ({"model": RAW, "adam": {"param_groups": [], "avg": SHADOW}}, "found none among model"),
            ({"model": RAW, "adam": {"exp_avg": AVERAGE}}, "found none among model"),
            ({"model": RAW, "avg_sq": AVERAGE}, "found none among model"),
            ({"model": RAW, "grad_ema": AVERAGE}, "found none among model"),
            ({"model": RAW, "ema": POSITIONS | {"shadow_params": []}}, "found none among model"),
            ({"model": RAW, "ema": POSITIONS | {"shadow_params": None}}, "found none among model"),
            ({"nets": [RAW, AVERAGE], "emas": [RAW, AVERAGE]}, "expected one average, found two"),
            (
                {"model": {"1.w": torch.ones(3)}, "ema": {"0.w": torch.ones(3)}},
                "expected trained weights of the same names beside it, found others; read it with",
            ),
        ],
    )
    def test_what_may_be_read_in_two_ways(self, tree: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checkpoint.read(own(tree))

    def test_whatever_is_broken_is_a_value_error(self) -> None:
        odd = [None, 5, "x", [], {}, [1], {5: NUMBER}, {"a": 1}, torch.ones(2), -1, float("nan")]
        chosen = random.Random(0)  # noqa: S311, no secret
        for tree, *_ in READ.values():
            for key, value in tree.items():
                inner = value if isinstance(value, dict) else {}
                broken = [{**tree, key: chosen.choice(odd)}]
                broken += [
                    {**tree, key: {**inner, k: chosen.choice(odd)}} for k in [*inner][:4] if inner
                ]
                for each in broken:
                    with contextlib.suppress(ValueError):
                        checkpoint.read_all(each)

    def test_positions_that_fit_in_two_ways(self) -> None:
        layers = {"a": torch.ones(3, 3), "buffer": torch.ones(3), "bias": torch.ones(3)}
        with pytest.raises(ValueError, match=r"the one at 1 may be that of 'buffer' or of 'bias'"):
            checkpoint.read(
                {
                    "model": layers,
                    "ema": {**POSITIONS, "shadow_params": [torch.ones(3, 3), torch.ones(3)]},
                }
            )
        frozen = {"a": torch.ones(3, 3), "frozen": torch.ones(4), "bias": torch.ones(3)}
        shadow = [torch.full((3, 3), 2.0), torch.full((3,), 2.0)]
        found = checkpoint.read({"model": frozen, "ema": {**POSITIONS, "shadow_params": shadow}})
        assert found.raw_only == ("frozen",)
        assert torch.equal(found.weights["bias"], shadow[1])

    def test_tied_positions(self) -> None:
        table = torch.ones(4, 3)
        state = {"embed.weight": table, "body.weight": torch.ones(3, 3), "head.weight": table}
        shadow = [table + 1, torch.full((3, 3), 2.0)]
        found = checkpoint.read({"model": state, "ema": {**POSITIONS, "shadow_params": shadow}})
        assert torch.equal(found.weights["head.weight"], shadow[0])

    @pytest.mark.parametrize(
        "state",
        [
            {"source_table.w": torch.ones(3), "target_table.w": torch.ones(3)},
            {"avg_pool.w": torch.ones(3), "pool.b": torch.ones(3)},
            {"vq.ema_w": torch.ones(3), "vq.w": torch.ones(3)},
            {f"attention.{name}.w": torch.ones(3) for name in ("query", "key", "value")},
            {f"attn.{name}.w": torch.ones(3) for name in ("q_proj", "k_proj", "to_q", "to_k")},
            {f"{name}.w": torch.ones(3) for name in ("proj", "target_proj", "a", "b", "c")},
            {f"{name}.w": torch.ones(3) for name in ("attention", "ema")},
            {f"{name}.{i}.w": torch.ones(3) for name in ("a.gate", "a.ema_gate", "b") for i in (1,)}
            | {f"{name}.2.w": torch.ones(3) for name in ("a", "b", "c", "d")},
            {"net.w": torch.ones(3), "net_ema.w": torch.ones(4)},
        ],
    )
    def test_names_of_a_model_that_sound_like_averages(self, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="found none among"):
            checkpoint.read({"state_dict": state})


class TestNames:
    """Those of the averaged module, as it has them itself."""

    RAW: ClassVar[dict[str, Any]] = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}
    POSITIONS: ClassVar[dict[str, Any]] = {
        **POSITIONS,
        "shadow_params": [torch.ones(2, 3), torch.ones(2)],
    }
    FLAT: ClassVar[dict[str, Any]] = {
        "decay": torch.tensor(0.5),
        "num_updates": NUMBER.int(),
        "0weight": torch.ones(2, 3),
        "0bias": torch.ones(2),
    }

    @pytest.mark.parametrize(
        "tree",
        [
            {"model": RAW, "ema": POSITIONS},
            {"state_dict": RAW, "ema": POSITIONS, "global_step": 9},
            {"state_dict": below("net.", RAW), "ema": POSITIONS, "global_step": 9},
            {"model": RAW, "ema": FLAT},
            {"model": below("net.", RAW), "ema": FLAT},
        ],
    )
    def test_the_first_item_of_a_list_keeps_its_number(self, tree: dict[str, Any]) -> None:
        found = checkpoint.read(tree)
        assert found.weights.keys() == found.raw.keys() == self.RAW.keys()
        assert torch.equal(found.weights["0.weight"], torch.ones(2, 3))
        assert found.step == 7

    def test_only_lightning_has_an_attribute_around_the_model(self) -> None:
        flat = {**self.FLAT, "net0weight": torch.ones(2, 3), "net0bias": torch.ones(2)}
        del flat["0weight"], flat["0bias"]
        for averages in (self.POSITIONS, flat):
            found = checkpoint.read({"model": below("net.", self.RAW), "ema": averages})
            assert found.weights.keys() == {"net.0.weight", "net.0.bias"}

    def test_a_file_that_keeps_no_order(self, tmp_path: Path) -> None:
        model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
        shadow = [p.detach() + i for i, p in enumerate(model.parameters())]
        save_file(model.state_dict(), tmp_path / "model.safetensors")  # 0, 1, 10, 11, 2
        torch.save({**POSITIONS, "shadow_params": shadow}, tmp_path / "custom_checkpoint_0.pkl")
        with pytest.raises(ValueError, match="in their order, found them in a file that keeps"):
            checkpoint.read(tmp_path)
        found = checkpoint.read(tmp_path, names=model)
        assert torch.equal(found.weights["2.weight"], shadow[2])
        assert found.raw.keys() == model.state_dict().keys()

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_positions_in_a_folder_of_shards(self, tmp_path: Path) -> None:
        tree = {"model": RAW, "ema": POSITIONS}
        state_dict_saver.save(tree, storage_writer=FileSystemWriter(tmp_path / "dcp"))
        with pytest.raises(ValueError, match="in their order, found them in a file that keeps"):
            checkpoint.read(tmp_path / "dcp")
        found = checkpoint.read(tmp_path / "dcp", names=NAMES)
        assert all(torch.equal(found.weights[name], AVERAGE[name]) for name in NAMES)


class TestKey:
    def test_it_names_the_averages(self) -> None:
        tree = {"nets": {"first": AVERAGE, "second": below("module.", RAW)}}
        found = checkpoint.read(tree, key="nets.first", raw_key="nets.second")
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert torch.equal(found.raw["a.weight"], RAW["a.weight"])
        assert (found.path, found.raw_path) == ("nets.first", "nets.second")
        assert checkpoint.read(tree, key="nets.first").raw.keys() == RAW.keys()

    def test_it_chooses_one_of_several(self) -> None:
        tree = {"net": RAW, "ema": {"stds": [0.05, 0.1], "emas": [RAW, AVERAGE]}}
        found = checkpoint.read(tree, key="ema.emas.1")
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert found.sigma_rel == 0.1

    def test_a_module_in_a_state(self) -> None:
        tree = {"state_dict": below("first.", AVERAGE) | below("second.", RAW)}
        found = checkpoint.read(tree, key="state_dict.first")
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert torch.equal(found.raw["a.weight"], RAW["a.weight"])

    def test_averages_by_position_of_the_chosen_weights(self) -> None:
        tree = {"one": RAW, "two": {k: v.clone() for k, v in RAW.items()}, "ema": POSITIONS}
        assert checkpoint.read(tree, raw_key="two").raw["a.weight"] is tree["two"]["a.weight"]

    @pytest.mark.parametrize("key", ["nowhere", "model.a.weight.more", "ema.5", "opt"])
    def test_one_that_is_not_there(self, key: str) -> None:
        tree = {"model": RAW, "ema": [RAW], "opt": {"lr": 1}}
        with pytest.raises(
            ValueError, match=r"expected a place in the file|expected tensors there"
        ):
            checkpoint.read(tree, key=key)


def test_each_candidate_is_told_once() -> None:
    tree = {"model": RAW, "ema": POSITIONS, "opt": OPTIMIZER, "best": {"ema": EMA_PYTORCH}}
    rows = checkpoint.candidates(tree)
    assert [row.path for row in rows] == ["ema", "best.ema.ema_model", "model"]
    assert [len(row.tensors) for row in rows] == [len(SHADOW), len(AVERAGE), len(RAW)]


class TestSeveral:
    def test_all_at_once_and_as_snapshots(self, tmp_path: Path) -> None:
        later = {k: v + 1 if v.is_floating_point() else v for k, v in AVERAGE.items()}
        tree = {"net": RAW, "ema": {"stds": [0.05, 0.1], "emas": [AVERAGE, later]}}
        found = checkpoint.read_all(tree)
        assert [each.sigma_rel for each in found] == [0.05, 0.1]
        assert torch.equal(found[1].weights["a.weight"], later["a.weight"])
        shadows = [{name: each.weights[name] for name in NAMES} for each in found]
        posthoc.save(tmp_path, shadows, 8, sigma_rel=[0.05, 0.1])
        assert len(posthoc.snapshots(tmp_path)) == 2

    def test_one_is_a_list_of_one(self) -> None:
        assert len(checkpoint.read_all({"model": RAW, "ema": AVERAGE})) == 1


class TestWholeFiles:
    @pytest.mark.parametrize("name", ["ema_0.9999_100000.pt", "valid.acc.ave_10best.pth"])
    def test_the_name_of_the_file_says_that_it_is_an_average(
        self, name: str, tmp_path: Path
    ) -> None:
        torch.save(AVERAGE, tmp_path / name)
        found = checkpoint.read(tmp_path / name)
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert found.why.startswith("the name of the file says")
        assert not found.raw
        torch.save(AVERAGE, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="found none among"):
            checkpoint.read(tmp_path / "model.pt")

    @pytest.mark.parametrize("name", ["teacher.pt", "target_domain.pt", "shadow_removal.pt"])
    def test_a_teacher_is_an_average_only_beside_its_student(
        self, name: str, tmp_path: Path
    ) -> None:
        torch.save(AVERAGE, tmp_path / name)
        with pytest.raises(ValueError, match="found none among"):
            checkpoint.read(tmp_path / name)

    def test_averages_alone_at_a_key(self) -> None:
        for tree in ({"params_ema": AVERAGE}, {"teacher": below("module.", AVERAGE)}):
            assert checkpoint.read(tree).weights.keys() == AVERAGE.keys()


class TestFolders:
    def test_of_the_transformers_trainer(self, tmp_path: Path) -> None:
        save_file(RAW, tmp_path / "model.safetensors")
        checkpoint.save(tmp_path / "averages.safetensors", dict(zip(NAMES, SHADOW, strict=True)), 7)
        torch.save(OPTIMIZER, tmp_path / "optimizer.pt")
        (tmp_path / "training_args.bin").write_bytes(b"pickled")
        found = checkpoint.read(tmp_path)
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert torch.equal(found.raw["a.weight"], RAW["a.weight"])
        assert (found.layout, found.step) == ("emajit", 7)

    def test_an_average_and_its_model_in_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "averaged").mkdir()
        save_file(RAW, tmp_path / "model.safetensors")
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in AVERAGE.items()}
        save_file(half, tmp_path / "averaged" / "model.safetensors")
        checkpoint.save(tmp_path / "averages.safetensors", dict(zip(NAMES, SHADOW, strict=True)), 7)
        found = checkpoint.read(tmp_path)
        assert (found.path, found.step) == ("averages.shadow", 7)
        half["a.weight"] = half["a.weight"] + 1
        save_file(half, tmp_path / "averaged" / "model.safetensors")
        with pytest.raises(ValueError, match="expected one average, found two"):
            checkpoint.read(tmp_path)

    def test_of_accelerate(self, tmp_path: Path) -> None:
        ema = LitEma(NET)
        ema(NET)
        save_file(RAW, tmp_path / "model.safetensors")
        torch.save(ema.state_dict(), tmp_path / "custom_checkpoint_0.pkl")
        torch.save({}, tmp_path / "random_states_0.pkl")
        found = checkpoint.read(tmp_path)
        averages = ema.named_averages()
        assert all(torch.equal(found.weights[name], averages[name]) for name in NAMES)
        assert found.step == 1

    def test_of_a_diffusers_pipeline(self, tmp_path: Path) -> None:
        for name, state in (("unet", RAW), ("unet_ema", AVERAGE), ("vae", OTHER)):
            (tmp_path / name).mkdir()
            save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
            told = {"optimization_step": 7, "decay": 0.9} if name == "unet_ema" else {}
            (tmp_path / name / "config.json").write_text(json.dumps(told))
        for path in (tmp_path, tmp_path / "unet_ema"):
            found = checkpoint.read(path)
            assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
            assert (found.step, found.decay) == (7, 0.9)
        assert checkpoint.read(tmp_path).raw.keys() == RAW.keys()

    def test_of_shards_with_an_index(self, tmp_path: Path) -> None:
        (tmp_path / "ema").mkdir()
        names = [*AVERAGE]
        files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            held = {name: AVERAGE[name] for name in names if files[name] == file}
            save_file(held, tmp_path / "ema" / file)
        index = tmp_path / "ema" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
        found = checkpoint.read(tmp_path)
        assert all(torch.equal(found.weights[name], AVERAGE[name]) for name in names)
        index.write_text(json.dumps({"weight_map": {**files, "w": "../elsewhere.safetensors"}}))
        with pytest.raises(ValueError, match="expected its files beside it, found none at"):
            checkpoint.read(tmp_path)

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_of_torch_distributed_checkpoint(self, tmp_path: Path) -> None:
        tree = {"model": RAW, "optim": {"step": NUMBER}, "ema": AVERAGE}
        numbers = {"step": 12, "decay": 0.9, "run": Loss(), "log": [0.5] * 10_000}
        writer = FileSystemWriter(tmp_path / "dcp")
        state_dict_saver.save({**tree, **numbers}, storage_writer=writer)
        found = checkpoint.read(tmp_path / "dcp")
        assert torch.equal(found.weights["a.weight"], AVERAGE["a.weight"])
        assert torch.equal(found.raw["a.weight"], RAW["a.weight"])
        assert (found.step, found.decay) == (12, 0.9)


@pytest.mark.parametrize("key", ["ema_decay", "ema.decay"])
@pytest.mark.parametrize("is_deep", [False, True])
def test_a_decay_of_the_average_beside_another(key: str, is_deep: bool) -> None:
    """A bare "decay" in a checkpoint may be that of the weights or of the rate."""
    ema = {"x": {"y": {"ema": AVERAGE}}} if is_deep else {"ema": AVERAGE}
    tree = {"model": RAW, **ema, "decay": 0.1, key: 0.999}
    assert checkpoint.read(tree).decay == 0.999


class Loss:
    """As a training script may hand to DeepSpeed: an object that is pickled."""


class TestDeepspeed:
    """Its folders, as version 0.19 writes them, with the averages in the client state."""

    @pytest.fixture(params=["zero", "bf16_zero"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        step = tmp_path / "global_step7"
        step.mkdir()
        (tmp_path / "latest").write_text("global_step7")
        torch.save({}, step / f"{request.param}_pp_rank_0_mp_rank_00_optim_states.pt")
        state = {
            "module": {name: v.bfloat16() if v.ndim else v for name, v in RAW.items()},
            "param_shapes": [{name: tuple(RAW[name].shape) for name in NAMES}],
            "frozen_param_fragments": {"b.bias": RAW["b.bias"].bfloat16()},
            "global_steps": 7,
        }
        torch.save({**state, "ema": AVERAGE}, step / "mp_rank_00_model_states.pt")
        return tmp_path

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A stand-in for DeepSpeed; what its converter was asked for."""
        asked: list[Any] = []

        def join(folder: str, tag: str) -> dict[str, Tensor]:
            print("Detected checkpoint of type zero stage 2")  # noqa: T201, as DeepSpeed does
            asked.append((Path(folder), tag))
            if len(asked) > 2:
                raise FileNotFoundError("no shards")
            return {name: RAW[name].requires_grad_() for name in NAMES[:-1]}  # one is frozen

        for name in ("deepspeed", "deepspeed.utils", "deepspeed.utils.zero_to_fp32"):
            module: Any = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        module.get_fp32_state_dict_from_zero_checkpoint = join
        sys.modules["deepspeed.utils"].zero_to_fp32 = module  # type: ignore[attr-defined]
        return asked

    def test_its_own_converter_joins_the_weights(
        self, folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in (folder, folder / "global_step7"):
            found = checkpoint.read(path)
            assert all(torch.equal(found.weights[name], AVERAGE[name]) for name in NAMES)
            assert all(torch.equal(found.raw[name], RAW[name]) for name in NAMES[:-1])
            assert found.raw[NAMES[-1]].dtype == torch.bfloat16
            assert not found.raw["a.weight"].requires_grad
            assert (found.path, found.raw_path, found.step) == ("ema", "module", 7)
        assert asked == [(folder, "global_step7")] * 2
        assert not capsys.readouterr().out  # of a command that prints JSON
        with pytest.raises(ValueError, match="shards that DeepSpeed can join, found FileNotFound"):
            checkpoint.read(folder)

    def test_without_it(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "deepspeed", None)
        with pytest.raises(ValueError, match=r"install deepspeed, or .* zero_to_fp32\.py"):
            checkpoint.read(folder)
        alone = checkpoint.read(folder / "global_step7" / "mp_rank_00_model_states.pt")
        assert torch.equal(alone.weights["a.weight"], AVERAGE["a.weight"])

    def test_no_object_is_unpickled_by_it(self, folder: Path, asked: list[Any]) -> None:
        (shards,) = folder.glob("*/*_optim_states.pt")
        torch.save({"loss": Loss()}, shards)
        with pytest.raises(ValueError, match=r"runs what it unpickles, found .*Loss; if you trust"):
            checkpoint.read(folder)
        assert not asked

    def test_a_step_that_is_not_told(self, folder: Path, asked: list[Any]) -> None:
        (folder / "latest").unlink()
        assert checkpoint.read(folder).step == 7
        shutil.copytree(folder / "global_step7", folder / "global_step8")
        with pytest.raises(ValueError, match="found global_step7, global_step8"):
            checkpoint.read(folder)
        (folder / "global_step8" / "mp_rank_00_model_states.pt").unlink()
        with pytest.raises(ValueError, match="expected the states of DeepSpeed, found no"):
            checkpoint.read(folder / "global_step8")
        assert len(asked) == 1


# As the README lists them, by the test that reads one.
FOLDERS: dict[str, Callable[..., None]] = {
    "Trainer of transformers": TestFolders.test_of_the_transformers_trainer,
    "accelerate": TestFolders.test_of_accelerate,
    "diffusers' pipelines": TestFolders.test_of_a_diffusers_pipeline,
    "shards with an index": TestFolders.test_of_shards_with_an_index,
    "torch.distributed.checkpoint": TestFolders.test_of_torch_distributed_checkpoint,
    "DeepSpeed's ZeRO": TestDeepspeed.test_its_own_converter_joins_the_weights,
}


class TestHostile:
    """An error within a second, or the averages."""

    @pytest.fixture(autouse=True)
    def _within_a_second(self) -> Any:
        start = time.perf_counter()
        yield
        assert time.perf_counter() - start < 5  # of a slow machine

    def test_thousands_of_levels(self) -> None:
        tree: dict[str, Any] = {"ema": AVERAGE}
        for _ in range(3000):
            tree = {"in": tree}
        with pytest.raises(ValueError, match="at most 100 containers in each other"):
            checkpoint.read(tree)

    def test_lists_that_share_themselves(self, tmp_path: Path) -> None:
        shared: list[Any] = []
        for _ in range(60):
            shared = [shared, shared]
        torch.save({"model": RAW, "ema": AVERAGE, "log": shared}, tmp_path / "file")
        assert checkpoint.read(tmp_path / "file").path == "ema"

    def test_a_container_in_itself(self) -> None:
        tree: dict[str, Any] = {"model": RAW, "ema": AVERAGE}
        tree["log"] = [[tree]]
        with pytest.raises(ValueError, match="found one in itself"):
            checkpoint.read(tree)

    def test_a_pipe_in_a_folder(self, tmp_path: Path) -> None:
        save_file(AVERAGE, tmp_path / "ema.safetensors")
        os.mkfifo(tmp_path / "model.safetensors")
        assert checkpoint.read(tmp_path).weights.keys() == AVERAGE.keys()

    def test_many_small_containers(self) -> None:
        optimizer = {"state": {i: {"m": NUMBER} for i in range(30_000)}, "param_groups": []}
        log = [{"loss": i} for i in range(100_000)]
        tree = {"model": RAW, "ema": AVERAGE, "log": log, "optimizer": optimizer}
        assert checkpoint.read(tree).path == "ema"

    @pytest.mark.parametrize(
        "state",
        [
            {f"m{i}{end}.w": NUMBER for i in range(10**4) for end in ("", "_ema")},
            {f"m{i}.{name}": NUMBER for i in range(10**4) for name in ("decay", "num_updates")},
            {f"{'m.' * 10**4}{name}.w": NUMBER[None] for name in ("net", "net_ema")},
            {"model": {f"m{i}.w": torch.ones(1) for i in range(10**4)}, "ema": {"w": SHADOW[0]}},
            {
                "model": {f"m{i}.w": torch.ones(1) for i in range(10**4)},
                "ema": {"w": torch.ones(1)},
            },
        ],
    )
    def test_states_that_take_the_square_of_their_names(self, state: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected") as raised:
            checkpoint.read(state)
        assert len(str(raised.value)) < 1000

    def test_thousands_of_tensors(self) -> None:
        raw = {f"blocks.{i}.{j}.weight": torch.ones(2) for i in range(100) for j in range(40)}
        average = below("model.", {name: value + 1 for name, value in raw.items()})
        assert len(checkpoint.read({"model": raw, "ema": average}).weights) == len(raw)
        shadow = {"decay": 0.9, "num_updates": 1, "shadow_params": [*average.values()]}
        assert len(checkpoint.read({"model": raw, "ema": shadow}).weights) == len(raw)


class TestMmcv:
    STATE = RAW | {f"ema_{name.replace('.', '_')}": AVERAGE[name] for name in NAMES}

    def test_both_ways(self, tmp_path: Path) -> None:
        found = checkpoint.read({"state_dict": self.STATE, "meta": {}})
        net().load_state_dict(found.weights)
        assert all(torch.equal(found.weights[name], AVERAGE[name]) for name in NAMES)
        checkpoint.write(tmp_path / "out.pth", found, layout="mmcv")
        written = torch.load(tmp_path / "out.pth")["state_dict"]
        assert written.keys() == self.STATE.keys()
        assert all(torch.equal(written[name], value) for name, value in self.STATE.items())

    def test_after_the_hook_has_swapped_them(self) -> None:
        tree = {"state_dict": self.STATE}
        found = checkpoint.read(tree, key="state_dict")
        assert found.layout == "MMCV"

    def test_what_cannot_be_written(self, tmp_path: Path) -> None:
        found = checkpoint.read({"params_ema": AVERAGE})
        with pytest.raises(ValueError, match="mmcv: expected the trained weights"):
            checkpoint.write(tmp_path / "out.pth", found, layout="mmcv")
        same = {"a_b": torch.ones(1), "a.b": torch.ones(1)}
        found = checkpoint.read({"model": same, "ema": {k: v + 1 for k, v in same.items()}})
        with pytest.raises(ValueError, match="mmcv: expected names that stay apart"):
            checkpoint.write(tmp_path / "out.pth", found, layout="mmcv")


class TestLike:
    """Averages written for a model: its file or folder tells the names."""

    FOUND = checkpoint.read({"model": below("module.", RAW), "ema": AVERAGE})

    def test_a_file(self, tmp_path: Path) -> None:
        save_file(RAW, tmp_path / "model.safetensors")
        checkpoint.write(tmp_path / "out", self.FOUND, like=tmp_path / "model.safetensors")
        net().load_state_dict(load_file(tmp_path / "out"))

    def test_names_and_shapes_that_differ(self, tmp_path: Path) -> None:
        other = {**RAW, "b.bias": torch.ones(9), "c.bias": torch.ones(1)}
        del other["a.bias"]
        save_file(other, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"no c.bias, a.bias beside, b.bias of shape \(2,\) for \(9,\)"
        ):
            checkpoint.write(tmp_path / "out", self.FOUND, like=tmp_path / "model.safetensors")
        assert not (tmp_path / "out").exists()

    def test_tied_names_that_a_file_leaves_out(self, tmp_path: Path) -> None:
        table = torch.ones(4, 3)
        tied = {"embed.weight": table, "head.weight": table}
        found = checkpoint.read({"model": tied, "ema": {"embed.weight": table + 1}})
        assert found.weights.keys() == tied.keys()
        save_file({"embed.weight": table}, tmp_path / "model.safetensors")
        checkpoint.write(tmp_path / "out", found, like=tmp_path / "model.safetensors")
        assert load_file(tmp_path / "out").keys() == {"embed.weight"}

    def test_a_folder_of_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers", reason="of the transformers extra")
        config = transformers.BertConfig(
            vocab_size=9,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=4,
        )
        model = transformers.BertForMaskedLM(config)
        model.save_pretrained(tmp_path / "model")
        ema = LitEma(model, decay=0.5)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        ema(model)
        source = tmp_path / "both.pt"
        torch.save({"model": model.state_dict(), "ema": ema.named_averages()}, source)
        found = checkpoint.read(source)
        checkpoint.write(tmp_path / "out", found, like=tmp_path / "model")
        loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
        averages = ema.named_averages()
        assert all(torch.equal(p, averages[name]) for name, p in loaded.named_parameters())
        with pytest.raises(FileExistsError):
            checkpoint.write(tmp_path / "out", found, like=tmp_path / "model")
        with pytest.raises(ValueError, match="expected state_dict or diffusers-ema in a folder"):
            checkpoint.write(tmp_path / "o", found, layout="timm", like=tmp_path / "model")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["both.pt", "model", "out"]

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    @pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name")
    def test_a_folder_of_diffusers(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers", reason="diffusers is of the bench extra")
        training = pytest.importorskip("diffusers.training_utils", reason="of the bench extra")
        model = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        model.save_pretrained(tmp_path / "unet")
        averages = {name: p.detach() + 1 for name, p in model.named_parameters()}
        found = checkpoint.read({"model": model.state_dict(), "ema": averages})
        options: Any = {"layout": "diffusers-ema", "decay": 0.9, "step": 7}
        checkpoint.write(tmp_path / "unet_ema", found, like=tmp_path / "unet", **options)
        ema = training.EMAModel.from_pretrained(tmp_path / "unet_ema", diffusers.UNet2DModel)
        assert (ema.decay, ema.optimization_step) == (0.9, 7)
        assert all(map(torch.equal, ema.shadow_params, averages.values()))
        again = checkpoint.read(tmp_path)
        assert (again.step, again.decay) == (7, 0.9)
        assert all(torch.equal(again.weights[name], averages[name]) for name in averages)
