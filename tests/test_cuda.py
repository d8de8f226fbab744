"""What only a CUDA device can show. Needs nothing but torch and pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import emajit
from emajit import LitEma, schedules

pytestmark = pytest.mark.cuda


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_does_not_synchronise(
    backend: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    shadow = {"a": torch.zeros(2**20, device="cuda"), "b": torch.zeros(3, device="cuda")}
    params = {name: torch.ones_like(s, dtype=dtype) for name, s in shadow.items()}
    step, decay = torch.tensor(0, device="cuda"), schedules.warmup(0.9)
    emajit.update_(shadow, params, step, decay=decay, backend=backend)
    emajit.update(shadow, params, 5, decay=decay, backend=backend)
    request.getfixturevalue("no_synchronisation")
    for _ in range(3):
        emajit.update_(shadow, params, step, decay=decay, backend=backend)
        emajit.update(shadow, params, 5, decay=decay, backend=backend)
    torch.cuda.set_sync_debug_mode("default")
    assert_close(shadow["b"], torch.full_like(shadow["b"], 1 - (2 / 11) ** 4))


def test_litema_does_not_synchronise(request: pytest.FixtureRequest) -> None:
    model = nn.Linear(2, 2).cuda()
    ema = LitEma(model).cuda()
    ema(model)
    request.getfixturevalue("no_synchronisation")
    ema(model)
    torch.cuda.set_sync_debug_mode("default")
    assert ema.num_updates.item() == 2


def test_litema_on_another_device_than_the_model() -> None:
    model = nn.Linear(2, 2)
    ema = LitEma(model, decay=0.0, use_num_upates=False)
    nn.init.ones_(model.cuda().weight)
    ema(model)
    average = ema.get_buffer("weight")
    assert average.device.type == "cpu"
    assert_close(average, torch.ones(2, 2))
    with ema.ema_scope(model):
        assert model.weight.is_cuda
