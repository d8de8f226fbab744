"""One update of the average, everybody's way, interleaved within one run."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bench import contestants, measure, shapes
from bench.contestants import DECAY, EVERYBODY, LIMIT, PEERS, Contestant
from bench.measure import Calls, Interleave
from bench.results import Publish, Result, Target

ROUNDS = {"MLP": 300, "200 x 32": 200, "1000 x 32": 100, "ResNet-50": 100, "ViT-B": 60, "U-Net": 30}
# Of the memory's limit, of which only large trees come near.
LIMITS = {"ResNet-50": 1.12, "ViT-B": 1.05, "U-Net": 1.05}


@pytest.mark.parametrize("name", shapes.MODELS)
def test_models(name: str, device: str, interleave: Interleave, publish: Publish) -> None:
    shape = shapes.MODELS[name]()
    model = shapes.Holder(shape, device)
    calls = checked(EVERYBODY, model)
    memory = {who: measure.peak_memory(call, device) for who, call in calls.items()}
    times = interleave(calls, ROUNDS[name])
    elements = sum(p.numel() for p in model.parameters())
    title = f"{name}: {len(shape)} tensors, {elements / 1e6:.3g}M elements"
    result = Result("update", title, LIMIT, times, memory)
    result.targets = [
        Target(f"{ours} to {peer.name}", measure.ratio(times, ours, peer.name), wanted)
        for peer in PEERS
        for ours, wanted in wanted_of(name, peer)
    ]
    if name in LIMITS:
        update = measure.ratio(times, "emajit.update_", LIMIT)
        litema = measure.ratio(times, "emajit.LitEma", "emajit.update_")
        result.targets.append(Target("emajit.update_ to the limit", update, LIMITS[name]))
        result.targets.append(Target("emajit.LitEma to emajit.update_", litema, 1.1))
    publish(result)


def wanted_of(name: str, peer: type[Contestant]) -> list[tuple[str, float]]:
    if name in LIMITS:
        published = peer is contestants.Published
        return [("emajit.update_", 1 / 2.4 if published else 1 / 1.15)]
    return [("emajit.update_", 1.0), ("emajit.LitEma", 1.0)]


SOME = (
    contestants.FlatLerp,
    contestants.ForeachLerp,
    contestants.UpdateInPlace,
    contestants.DropIn,
    contestants.Averaged,
    contestants.Published,
)


@pytest.mark.parametrize("elements", [2**k for k in range(12, 28, 3)])
def test_size(elements: int, device: str, interleave: Interleave, publish: Publish) -> None:
    """Cost against the number of elements, in 32 tensors."""
    calls = checked(SOME, shapes.Holder(shapes.even(elements, 32), device))
    times = interleave(calls, 60 if elements < 2**24 else 20)
    publish(Result("size", str(elements), LIMIT, times))


@pytest.mark.parametrize("tensors", [4**k for k in range(7)])
def test_tensors(tensors: int, device: str, interleave: Interleave, publish: Publish) -> None:
    """Cost against the number of tensors that hold 2^20 elements together."""
    calls = checked(SOME, shapes.Holder(shapes.even(2**20, tensors), device))
    publish(Result("tensors", str(tensors), LIMIT, interleave(calls, 60)))


def checked(who: tuple[type[Contestant], ...], model: torch.nn.Module) -> Calls:
    """A call for each contestant, after all have been seen to compute the same average."""
    everybody = [contestant(model) for contestant in who]
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    for contestant in everybody:
        contestant.observe()
        contestant.step()
        rows = zip(contestant.averages(), before, model.parameters(), strict=True)
        for average, old, new in rows:
            assert_close(average.detach(), old + (1 - DECAY) * (new.detach() - old))
    return {contestant.name: contestant.step for contestant in everybody}
