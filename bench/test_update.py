"""One update of the average, everybody's way, interleaved within one run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from bench import measure, shapes
from bench.contestants import CONTESTANTS, DECAY

ROUNDS = {"mlp": 300, "tiny": 100, "resnet50": 100, "vit_b": 60}


@pytest.mark.parametrize("name", ROUNDS)
def test_update(name: str, device: str, results: dict[str, measure.Times], benchmark: Any) -> None:
    shape = getattr(shapes, name)()
    model = shapes.Holder(shape, device)
    contestants = [contestant(model) for contestant in CONTESTANTS]
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    for contestant in contestants:
        contestant.observe()
        contestant.step()
        for average, old, new in zip(
            contestant.averages(), before, model.parameters(), strict=True
        ):
            assert_close(average.detach(), old + (1 - DECAY) * (new.detach() - old))
    del before

    calls = {contestant.name: contestant.step for contestant in contestants}
    times: measure.Times = {name: [] for name in calls}
    benchmark.pedantic(
        measure.one_round, (calls, times, device), rounds=ROUNDS[name], warmup_rounds=0
    )
    elements = sum(p.numel() for p in model.parameters())
    results[f"{name}: {len(shape)} tensors, {elements / 1e6:.2f}M elements"] = times
    benchmark.extra_info["seconds"] = times
