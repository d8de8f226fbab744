"""Random sequences of updates and of fused steps against float64, and of shards against wholes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.testing import assert_close

import emajit
from emajit import LitEma, schedules
from emajit.fused import FusedOptimizer
from tests import shards

DECAYS: tuple[Any, ...] = (
    *(0.0, 0.25, 0.9, 0.9999, 1.0, torch.tensor(0.99, dtype=torch.float64)),
    *(schedules.warmup(0.999), schedules.power_function(0.1), lambda step: 1 - 1 / (step + 5)),
)
# Half an ulp of the larger of two numbers, relative to it, and that of the arithmetic before.
ROUNDED = {
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
    torch.float32: 2**-22,
    torch.float64: 2**-51,
    torch.int64: 0.0,
}


def beta_of(decay: Any, step: int) -> float:
    return float(decay(step) if callable(decay) else decay)


def assert_updated(found: Tensor, old: Tensor, param: Tensor, beta: float, *, skip: bool) -> None:
    if not param.is_floating_point():
        assert torch.equal(found, param)
        return
    s, p = old.double(), param.double()
    expected = s + (1 - beta) * (p - s)
    if skip:
        expected = torch.where(torch.isfinite(p), expected, s)
    size = torch.maximum(s.abs(), p.abs()).nan_to_num(0.0, posinf=0.0)
    error = (found.double() - expected).abs()
    fits = (error <= 1.01 * ROUNDED[found.dtype] * size + 1e-7) | ~torch.isfinite(expected)
    assert fits.all(), (found, expected)
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))


def updated(trees: Any, params: Any, step: Any, decays: Any, options: Any) -> Any:
    if len(trees) == 1:
        return [emajit.update(trees[0], params, step, decay=decays[0], **options)]
    return emajit.update_many(trees, params, step, decays=decays, **options)


def updated_(trees: Any, params: Any, step: Any, decays: Any, options: Any) -> Any:
    if len(trees) == 1:
        return [emajit.update_(trees[0], params, step, decay=decays[0], **options)]
    return emajit.update_many_(trees, params, step, decays=decays, **options)


def change(params: dict[str, Tensor], new: dict[str, Tensor], choose: random.Random) -> None:
    """Write or replace each parameter; some hold a number that is not finite."""
    for name, fresh in new.items():
        if fresh.is_floating_point() and fresh.numel() and choose.random() < 0.2:
            fresh.view(-1)[0] = choose.choice([torch.nan, torch.inf])
        if choose.random() < 0.3:
            params[name] = fresh
        else:
            params[name].copy_(fresh)
    if "tied" in params:
        params["tied"] = params["p0"]


@pytest.mark.filterwarnings("ignore:an average in")
@pytest.mark.parametrize("seed", range(16))
def test_any_sequence_of_updates_is_the_equation(seed: int) -> None:
    """Several averages or one, pure or in place, of leaves that are written, replaced and tied."""
    choose = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    number, several = choose.randint(1, 5), choose.choice([1, 1, 2, 3])
    shapes = [choose.choice([(), (3,), (2, 3), (0,)]) for _ in range(number)]
    kinds = [choose.choice([*ROUNDED]) for _ in shapes]
    held = [
        k if k in (torch.int64, torch.float64) else choose.choice([k, torch.float32]) for k in kinds
    ]

    def new(dtypes: list[torch.dtype]) -> dict[str, Tensor]:
        rows = enumerate(zip(shapes, dtypes, strict=True))
        return {f"p{i}": torch.randn(shape).to(dtype) for i, (shape, dtype) in rows}

    params, trees = new(kinds), [new(held) for _ in range(several)]
    if choose.random() < 0.4:
        for tree in (params, *trees):
            tree["tied"] = tree["p0"]
    for step in range(6):
        change(params, new(kinds), choose)
        decays = [choose.choice(DECAYS) for _ in trees]
        nonfinite: Any = choose.choice(["propagate", "skip"])
        backend = "aot_eager" if seed == 1 and step > 4 else "eager"
        options: Any = {"nonfinite": nonfinite, "backend": backend}
        at: Any = choose.choice([step, torch.tensor(step)])
        olds = [{name: leaf.clone() for name, leaf in tree.items()} for tree in trees]
        call = updated if choose.random() < 0.3 else updated_
        trees = call(trees, params, at, decays, options)
        for tree, old, decay in zip(trees, olds, decays, strict=True):
            for name, leaf in tree.items():
                beta, skip = beta_of(decay, step), nonfinite == "skip"
                assert_updated(leaf, old[name], params[name], beta, skip=skip)
            assert "tied" not in tree or tree["tied"] is tree["p0"]


@pytest.mark.skipif(not shards.EACH_SPLITS, reason="torch 2.6 sends shards, which none receives")
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_updates_of_shards_has_the_bits_of_the_whole(seed: int) -> None:
    """On a random rank of a random mesh, with noise or without, the leaves placed anew at times."""
    choose = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    world = choose.choice([2, 3, 4, 6])
    several = choose.choice([1, 1, 2])
    shapes = [choose.choice([(5,), (4, 6), (2, 3, 4), (7, 3), (1,)]) for _ in range(3)]
    kinds = [choose.choice([torch.bfloat16, torch.float16, torch.float32]) for _ in shapes]
    trees = [
        [torch.randn(shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
        for _ in range(several)
    ]
    with shards.as_rank(choose.randrange(world), world):
        mesh = shards.grid(world, seed) if choose.random() < 0.5 else shards.line(world, f"{seed}")

        def placements(shape: Any) -> list[Any]:
            every = [Replicate(), *map(Shard, range(len(shape)))]
            return [choose.choice(every) for _ in range(mesh.ndim)]

        def split(tree: list[Tensor]) -> list[Any]:
            return [shards.split(t, mesh, *p) for t, p in zip(tree, places, strict=True)]

        for step in range(5):
            if step in (0, 3):
                places = [*map(placements, shapes)]
                parts = [*map(split, trees)]
            params = [
                torch.randn(shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)
            ]
            decays = [choose.choice(DECAYS) for _ in trees]
            options: dict[str, Any] = {
                "rounding": choose.choice(["stochastic", "stochastic", "nearest"]),
                "nonfinite": choose.choice(["propagate", "skip"]),
            }
            call = updated if choose.random() < 0.3 else updated_
            trees = call(trees, params, step, decays, options)
            parts = call(parts, split(params), step, decays, options)
            for tree, part in zip(trees, parts, strict=True):
                for whole, leaf in zip(split(tree), part, strict=True):
                    assert leaf.placements == whole.placements
                    assert torch.equal(leaf.to_local(), whole.to_local()), (leaf, whole)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_sequence_of_fused_steps_is_that_of_two_calls(seed: int) -> None:
    """With skipped steps, gradients that are unscaled by hand or None, and loaded states."""
    choose = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other = copy.deepcopy(model)
    make: Any = choose.choice([torch.optim.SGD, torch.optim.AdamW])
    decay: Any = choose.choice(
        [0.9, schedules.power_function(0.1), lambda step: 1 - 1 / (step + 3)]
    )
    ema = LitEma(model, decay, dtype=torch.float64, buffers="average")
    beta = decay if callable(decay) else schedules.warmup(decay)
    optimizer, plain = make(model.parameters(), lr=0.01), make(other.parameters(), lr=0.01)
    fused = FusedOptimizer(optimizer, ema, model, backend=choose.choice(["aot_eager", "eager"]))
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in "ab")
    updates, saved = 0, (copy.deepcopy(ema.state_dict()), 0)
    for _ in range(6):
        x, lacks, overflows = torch.randn(5, 3), choose.random() < 0.2, choose.random() < 0.3
        by_hand = choose.choice([None, None, fused, optimizer])
        for net, stepped, scaler in ((model, fused, ours), (other, plain, theirs)):
            stepped.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            layers: Any = net
            if lacks:
                layers[0].weight.grad = None
            if overflows:
                layers[2].weight.grad[0, 0] = torch.inf
        old = {name: average.clone() for name, average in ema.named_averages().items()}
        if by_hand is not None:
            ours.unscale_(by_hand)
        ours.step(fused)
        theirs.step(plain)
        ours.update()
        theirs.update()
        assert ours.get_scale() == theirs.get_scale()
        assert_close([*model.parameters()], [*other.parameters()], rtol=1e-3, atol=1e-5)
        with torch.no_grad():  # a compiled Adam rounds otherwise: compare one step, not a drift
            for mine, theirs_now in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs_now)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, average in ema.named_averages().items():
            s, p = old[name].double(), tensors[name].detach().double()
            is_whole = not tensors[name].is_floating_point()
            expected = p if is_whole else s + (1 - float(beta(updates))) * (p - s)
            assert_close(average.double(), s if overflows else expected, rtol=1e-6, atol=1e-6)
        updates += not overflows
        assert ema.num_updates == updates
        if choose.random() < 0.3:
            saved = copy.deepcopy(ema.state_dict()), updates
        elif choose.random() < 0.3:
            ema.load_state_dict(saved[0])
            updates = saved[1]
            fused.load_state_dict(copy.deepcopy(fused.state_dict()))
