"""Arguments of another type are refused in words, the same at every entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emajit
from emajit import LitEma, checkpoint, merging, offload, posthoc, schedules
from emajit.fused import FusedOptimizer


def tree() -> dict[str, Tensor]:
    return {"w": torch.ones(2)}


def fused(decay: Any) -> None:
    params = [nn.Parameter(torch.ones(2))]
    params[0].grad = torch.ones(2)
    optimizer = torch.optim.SGD(params, lr=0.1)
    FusedOptimizer(optimizer, emajit.init(params), params, decay=decay).step(step=0)


DECAYS: dict[str, Callable[[Any], Any]] = {
    "LitEma": lambda decay: LitEma(nn.Linear(1, 1), decay),
    "update": lambda decay: emajit.update(tree(), tree(), 0, decay=decay),
    "update_": lambda decay: emajit.update_(tree(), tree(), 0, decay=decay),
    "update_many": lambda decay: emajit.update_many([tree()], tree(), 0, decays=[decay]),
    "update_many_": lambda decay: emajit.update_many_([tree()], tree(), 0, decays=[decay]),
    "of a schedule": lambda decay: emajit.update_(tree(), tree(), 0, decay=lambda _: decay),
    "offload": lambda decay: offload.update_(tree(), tree(), 0, decay=decay),
    "fused": fused,
    "multi_avg_fn": schedules.multi_avg_fn,
    "constant": schedules.constant,
    "warmup": lambda decay: schedules.warmup(decay=decay),
    "pull_": lambda c: emajit.pull_(tree(), tree(), c),
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "update": lambda step: emajit.update(tree(), tree(), step, decay=0.5),
    "update_many_": lambda step: emajit.update_many_([tree()], tree(), step, decays=[0.5]),
    "bema": lambda step: emajit.bema(tree(), tree(), tree(), step),
    "save": lambda step: checkpoint.save("no/never", tree(), step),
    "delay": lambda step: schedules.delay(schedules.uniform(), step),
}


@pytest.mark.parametrize("entry", DECAYS)
@pytest.mark.parametrize("decay", [True, False])
def test_a_bool_is_no_decay(entry: str, decay: bool) -> None:
    with pytest.raises(TypeError, match=r"expected .*number"):
        DECAYS[entry](decay)


@pytest.mark.parametrize("entry", STEPS)
def test_a_bool_is_no_step(entry: str) -> None:
    with pytest.raises(TypeError, match=r"step: expected an int or|expected numbers"):
        STEPS[entry](True)


@pytest.mark.parametrize("name", ["every", "init_num_updates"])
def test_a_bool_is_no_count(name: str) -> None:
    options: Any = {name: True}
    with pytest.raises(ValueError, match=f"{name}: expected a number of"):
        LitEma(nn.Linear(1, 1), **options)


def test_a_bool_is_no_count_of_snapshots() -> None:
    with pytest.raises(ValueError, match="every: expected a number of steps"):
        posthoc.PostHoc("never", every=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda dtype: emajit.init(tree(), dtype=dtype),
        lambda dtype: LitEma(nn.Linear(1, 1), dtype=dtype),
        lambda dtype: checkpoint.save("no/never", tree(), 1, dtype=dtype),
        lambda dtype: posthoc.PostHoc("never", every=1, dtype=dtype),
        lambda dtype: merging.merge(["a", "b"], "never", [0.5, 0.5], dtype=dtype),
    ],
)
def test_the_name_of_a_dtype(call: Callable[[Any], Any]) -> None:
    told = r"dtype: expected a floating-point dtype such as torch\.float32, found 'float32'"
    with pytest.raises(ValueError, match=told):
        call("float32")


@pytest.mark.parametrize("entry", ["LitEma", "update_many_", "offload", "fused", "multi_avg_fn"])
def test_a_module_is_no_decay(entry: str) -> None:
    with pytest.raises(TypeError, match="expected a number or a schedule, found a module, Linear"):
        DECAYS[entry](nn.Linear(1, 1))


def test_an_average_of_nothing_is_printed() -> None:
    assert repr(LitEma(nn.ReLU())) == "LitEma(decay=0.9999 after a warm-up, updates=0, averages=0)"


class TestFiles:
    @pytest.mark.parametrize("name", ["c.pt", "c.pth", "c.ckpt", "c.bin"])
    def test_no_safetensors_under_a_name_of_torch(self, tmp_path: Path, name: str) -> None:
        told = (
            rf"{name}: expected a name for safetensors, such as c\.safetensors, found \.{name[2:]}"
        )
        with pytest.raises(ValueError, match=told):
            checkpoint.save(tmp_path / name, tree(), 1)
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("is_zip", [True, False])
    def test_a_file_of_torch(self, tmp_path: Path, is_zip: bool) -> None:
        path = tmp_path / "ema.pt"
        torch.save(tree(), path, _use_new_zipfile_serialization=is_zip)
        told = r"ema\.pt: .* found a file of torch\.save, which emajit\.checkpoint\.read reads"
        with pytest.raises(ValueError, match=told):
            checkpoint.load(path, like=tree())

    def test_a_broken_file_that_begins_as_a_pickle(self, tmp_path: Path) -> None:
        """The first byte of a safetensors file is a part of a length, here 640."""
        path = tmp_path / "ema.safetensors"
        path.write_bytes((640).to_bytes(8, "little") + b"{")
        with pytest.raises(ValueError, match="expected a whole safetensors file, found Error"):
            checkpoint.load(path, like=tree())

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="found a folder, which load_sharded or"):
            checkpoint.load(tmp_path, like=tree())

    def test_no_weights_at_a_key(self, tmp_path: Path) -> None:
        path = tmp_path / "run.pt"
        torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, path)
        with pytest.raises(ValueError, match=r"key=PATH, on the command line --key PATH"):
            checkpoint.read(path, key="nowhere")
        with pytest.raises(ValueError, match=r"raw_key=PATH, on the command line --raw-key PATH"):
            checkpoint.read(path, raw_key="nowhere")


class TestDecay:
    """`read` takes the decay of the one average from wherever a script writes it."""

    def read(self, path: Path, state: dict[str, Any]) -> checkpoint.Averaged:
        torch.save(state, path / "run.pt")
        return checkpoint.read(path / "run.pt")

    @pytest.mark.parametrize("key", ["ema_decay", "ema.decay", "decay"])
    @pytest.mark.parametrize("decay", [0.999, torch.tensor(0.999)])
    def test_in_the_file(self, tmp_path: Path, key: str, decay: Any) -> None:
        trained, averages = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
        plain = {"model": trained, "ema": averages, key: decay}
        deeper = {"model": trained, "ema": {"state_dict": averages}, key: decay}
        of_torch = {"model": trained, "model_ema": {"module.w": averages["w"]}, key: decay}
        of_torch["model_ema"]["n_averaged"] = torch.tensor(3)
        for state in (plain, deeper, of_torch):
            assert self.read(tmp_path, state).decay == 0.999

    def test_in_a_state_of_a_module_with_its_average(self, tmp_path: Path) -> None:
        trained = {"net.a.weight": torch.ones(2, 2), "net.b.weight": torch.ones(2, 2)}
        averages = {name.replace("net", "ema"): value + 1 for name, value in trained.items()}
        state = {**trained, **averages, "ema.decay": torch.tensor(0.999)}
        found = self.read(tmp_path, state)
        assert (found.decay, found.path) == (0.999, "ema")
        assert {*found.weights} == {"a.weight", "b.weight"}

    @pytest.mark.parametrize(
        "others",
        [
            {"ema_decay": 0.99, "ema.decay": 0.999},  # which?
            {"ema_decay": True},
            {"ema_decay": 99.0},
            {"weight_decay": 0.999},
            {"ema_decay": torch.tensor(0.9999, dtype=torch.bfloat16)},
        ],
    )
    def test_nothing_is_guessed(self, tmp_path: Path, others: dict[str, Any]) -> None:
        averages = {"state_dict": {"w": torch.zeros(2)}}
        state = {"model": {"w": torch.ones(2)}, "ema": averages, **others}
        assert self.read(tmp_path, state).decay is None

    def test_of_two_averages(self, tmp_path: Path) -> None:
        state = {"ema": {"w": torch.ones(2)}, "ema_fast": {"w": torch.zeros(2)}, "ema_decay": 0.9}
        torch.save(state, tmp_path / "run.pt")
        assert checkpoint.read(tmp_path / "run.pt", key="ema").decay is None
