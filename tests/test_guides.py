"""The guides are true: fenced examples run, and lists in docstrings are complete.

The examples with `>>>` are doctests.
"""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emajit import checkpoint, integrations, schedules
from emajit.checkpoint.layouts import WRITERS
from emajit.guides import compiled_steps

SECTION = re.compile(r"## (\w+)\n.*?```python\n(.*?)```", flags=re.DOTALL)


def run(code: str, given: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "guide", "exec"), given)  # noqa: S102
    return given


def test_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (code,) = re.findall(r"```python\n(.*?)```", str(compiled_steps.__doc__), flags=re.DOTALL)
    given = run(code, {})
    for name, average in given["shadow"].items():
        assert not torch.equal(average, given["model"].get_parameter(name))


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")
def test_accelerate() -> None:
    example = dict(SECTION.findall(str(integrations.__doc__)))["accelerate"]
    model = nn.Linear(4, 1)
    loader: Any = torch.utils.data.DataLoader(torch.ones(8, 4))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = run(example, {"model": model, "optimizer": optimizer, "loader": loader})
    assert given["ema"].num_updates == 2  # of 8 batches, 4 to a gradient


@pytest.mark.skipif(not find_spec("lightning"), reason="needs Lightning")
@pytest.mark.filterwarnings("ignore")
def test_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer  # noqa: PLC0415

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any) -> Any:
            return self.layer(batch).mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(2, 4))  # type: ignore[arg-type]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", partial(Trainer, max_steps=2, logger=False))
    example = dict(SECTION.findall(str(integrations.__doc__)))["Lightning"]
    run(example, {"module": Module()})
    (file,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.read(file).step == 2


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path) -> None:
    from transformers import (  # noqa: PLC0415
        BertConfig,
        BertForSequenceClassification,
        TrainingArguments,
    )

    sizes: Any = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    model = BertForSequenceClassification(config)
    data = [{"input_ids": torch.arange(4), "labels": torch.tensor(1)}] * 2
    options: Any = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), **options)
    example = dict(SECTION.findall(str(integrations.__doc__)))["transformers"]
    example = example.replace("evaluate()", "evaluate(data)")
    run(example, {"model": model, "args": args, "data": data})
    assert (tmp_path / "checkpoint-2/averaged/model.safetensors").is_file()


def test_every_layout_that_is_written_is_named() -> None:
    assert set(WRITERS) <= {*re.findall(r'"([\w-]+)"', str(checkpoint.write.__doc__))}


def test_every_schedule_is_in_the_guide() -> None:
    found = {
        name
        for name, value in vars(schedules).items()
        if isfunction(value) and value.__module__ == schedules.__name__ and name[0] != "_"
    }
    assert found == {*schedules.__all__}
    table = {*re.findall(r"`(\w+)`", str(schedules.__doc__))}
    assert found - table == {"gamma_to_sigma_rel", "sigma_rel_to_gamma"}
