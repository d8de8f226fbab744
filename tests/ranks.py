"""What processes check together: `torchrun --nproc-per-node 4 ranks.py RESULTS SHARED`.

Each check is a function of the folder that all share. It is run by 2, 3 or 4 of the processes, one
number after the other; what it raises is written to RESULTS. With `slow` as a third argument only
the slow ones are run.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import emajit
from emajit import _shards, _torch, checkpoint, schedules
from emajit.fused import FusedOptimizer
from emajit.integrations import _sharded
from tests import zero

Check = Callable[[Path], None]
WORLDS = (2, 3, 4)
CHECKS: dict[str, Check] = {}
FSDP: set[str] = set()
HAS_FSDP = hasattr(torch.cpu.Stream, "record_event")  # on a CPU; not before torch 2.7
QUICK: list[tuple[str, int]] = []  # with how many processes
SLOW: list[tuple[str, int]] = []


def check(*worlds: int, slow: tuple[int, ...] = (), fsdp: bool = False) -> Callable[[Check], Check]:
    """Mark a check, for how many processes it is, and whether a `fully_shard` runs in it."""

    def add(function: Check) -> Check:
        CHECKS[function.__name__] = function
        if fsdp:
            FSDP.add(function.__name__)
        QUICK.extend((function.__name__, world) for world in worlds)
        SLOW.extend((function.__name__, world) for world in slow)
        return function

    return add


# Even, uneven and fewer rows than processes; no rows; no dimension.
SHAPES = {"even": (12, 5), "uneven": (7, 3), "few": (1, 4), "none": (0, 4), "scalar": ()}
# Each costs Inductor seconds: one for uneven shards that are long enough for vectors.
COMPILED = {"uneven": (13, 7), "few": (1, 4), "none": (0, 4), "scalar": ()}


def whole_params(shapes: dict[str, Any] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sharded(params: dict[str, Tensor], *, columns: bool = False) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(p, mesh, [Shard(int(columns)) if p.ndim else Replicate()])
        for name, p in params.items()
    }


def gathered(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tree.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in gathered(found).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)


def shard_of(whole: Tensor, like: DTensor) -> Tensor:
    """The part of a whole tensor that this process's shard of a DTensor stands for."""
    shape, offsets = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    blocks = zip(offsets, shape, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in blocks)]


def assert_same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(found, value)
        assert all(torch.equal(value, other) for other in found), name


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def fsdp(model: nn.Sequential, **options: Any) -> Any:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model.train()
    optimizer.zero_grad()
    model(torch.randn(6, 3, generator=generator)).square().mean().backward()
    optimizer.step()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"nonfinite": "skip"},
    {"backend": "eager"},
    {"rounding": "stochastic"},
]


def twice(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """For `both_ways`."""
    return {f"{name} {way}": p.clone() for way in ("rows", "columns") for name, p in params.items()}


def both_ways(params: dict[str, Tensor]) -> dict[str, Any]:
    """Half of the tensors in shards of rows, half of columns; one graph serves both."""
    halves = (
        sharded({n: p for n, p in params.items() if n.endswith(way)}, columns=way == "columns")
        for way in ("rows", "columns")
    )
    return {name: p for half in halves for name, p in half.items()}


def averages_shards_as_the_whole(options: dict[str, Any], shapes: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "rounding" in options else None
    params = whole_params(shapes)
    params["uneven"][3, 1] = torch.nan
    params = twice(params)
    expected = emajit.init(twice(whole_params(shapes)), dtype=dtype)
    # With noise, what is compiled has the bits of what is not.
    plain = options | {"backend": "eager"} if "rounding" in options else options
    ours, partners = both_ways(emajit.init(expected)), both_ways(params)
    places = {name: (t.device_mesh, t.placements) for name, t in ours.items()}
    for step in range(3):
        decay = schedules.warmup(0.99)
        new = emajit.update(ours, partners, step, decay=decay, **options)
        assert emajit.update_(ours, partners, step, decay=decay, **options) is ours
        emajit.update_(expected, params, step, decay=decay, **plain)
        assert_same(new, expected)
        assert_same(ours, expected)
    for tree in (ours, new):
        assert places == {name: (t.device_mesh, t.placements) for name, t in tree.items()}


@check(2, 3)
def average_of_shards_is_that_of_the_whole(_: Path) -> None:
    for options in OPTIONS:
        averages_shards_as_the_whole(options, SHAPES)


@check(2, slow=(3,))
def average_of_shards_by_inductor_is_that_of_the_whole(_: Path) -> None:
    for options in ({}, {"rounding": "stochastic"}):
        averages_shards_as_the_whole({**options, "backend": "inductor"}, COMPILED)


@check(2, 3)
def shards_of_complex_numbers_are_rounded_as_the_whole(_: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(7, 5, dtype=torch.complex64, generator=generator)}
    shadow = {"w": torch.zeros(7, 5, dtype=torch.complex32)}
    for columns in (False, True):
        options: dict[str, Any] = {"decay": 0.3, "rounding": "stochastic"}
        ours = sharded(shadow, columns=columns)
        new = emajit.update(ours, sharded(params, columns=columns), 5, **options)
        expected = emajit.update(shadow, params, 5, **options)
        # full_tensor() has no collective for complex32
        parts = new["w"].to_local(), sharded(expected, columns=columns)["w"].to_local()
        assert torch.equal(*(torch.view_as_real(part.to(torch.complex64)) for part in parts))


@check(2, 3)
def pulls_and_bema_of_shards_are_those_of_the_whole(_: Path) -> None:
    params = whole_params()
    shadow, initial = ({name: p + i for name, p in params.items()} for i in (1.0, -2.0))
    trees: list[dict[str, Any]] = [params, shadow, initial]
    theirs, s, p0 = map(sharded, trees)
    leaves = {name: nn.Parameter(p.clone()) for name, p in theirs.items()}
    with CommDebugMode() as seen:  # type: ignore[no-untyped-call]
        corrected = emajit.bema(s, leaves, p0, 1014)
        emajit.pull_(leaves, s, 0.25)
    assert not seen.get_total_counts()
    assert_same(corrected, emajit.bema(shadow, params, initial, 1014))
    assert_same(
        {name: p.detach() for name, p in leaves.items()}, emajit.pull_(params, shadow, 0.25)
    )


@check(2, 3)
def several_decays_ties_and_nested_trees(_: Path) -> None:
    whole = whole_params()
    shards = sharded(whole)
    tree: Any = {
        "layers": [shards["even"], (shards["uneven"],)],
        "head": shards["even"],
        "none": None,
    }
    plain: Any = {
        "layers": [whole["even"], (whole["uneven"],)],
        "head": whole["even"],
        "none": None,
    }
    ours: Any = [emajit.init(tree), emajit.init(tree)]
    theirs: Any = [emajit.init(plain), emajit.init(plain)]
    assert ours[0]["head"] is ours[0]["layers"][0]
    moved, moved_plain = (
        torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t + 1, t) for t in (tree, plain)
    )
    moved["head"], moved_plain["head"] = moved["layers"][0], moved_plain["layers"][0]
    decays: Any = [0.9, schedules.power_function(0.1)]
    new = emajit.update_many(ours, moved, 3, decays=decays)
    emajit.update_many_(ours, moved, 3, decays=decays)
    emajit.update_many_(theirs, moved_plain, 3, decays=decays)
    for mine, other, expected in zip(ours, new, theirs, strict=True):
        assert other["head"] is other["layers"][0]
        for found in (mine, other):
            assert torch.equal(found["head"].full_tensor(), expected["head"])
            assert torch.equal(found["layers"][1][0].full_tensor(), expected["layers"][1][0])


@check(2, 3)
def any_sequence_of_updates_is_that_of_the_whole_bit_for_bit(_: Path) -> None:
    """With 16-bit averages, rounded at random; the processes choose the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for seed in range(12):
        choose = random.Random(seed)  # noqa: S311
        torch.manual_seed(seed)
        shapes = [choose.choice([(4,), (5, 3), (1,), (2, 3, 4)]) for _ in range(4)]
        dtypes = [choose.choice([torch.bfloat16, torch.float16, torch.float32]) for _ in shapes]
        places = [[choose.choice([Replicate(), Shard(0), Shard(len(s) - 1)])] for s in shapes]

        def in_shards(tree: dict[str, Tensor], places: Any = places) -> dict[str, Any]:
            rows = zip(tree.items(), places, strict=True)
            return {name: distribute_tensor(leaf.clone(), mesh, at) for (name, leaf), at in rows}

        rows = list(zip(shapes, dtypes, strict=True))
        wholes = [{str(i): torch.randn(s).to(d) for i, (s, d) in enumerate(rows)} for _ in "ab"]
        parts = [in_shards(whole) for whole in wholes]
        for step in range(4):
            params = {str(i): torch.randn(s).to(d) for i, (s, d) in enumerate(rows)}
            options: Any = {
                "rounding": choose.choice(["stochastic", "stochastic", "nearest"]),
                "nonfinite": choose.choice(["propagate", "skip"]),
            }
            decays: list[Any] = [
                choose.choice([0.9, 0.999999, 0.25, schedules.uniform()]) for _ in "ab"
            ]
            for trees, given in ((wholes, params), (parts, in_shards(params))):
                emajit.update_many_(trees, given, step, decays=decays, **options)
                emajit.update_(trees[0], given, step, decay=decays[1], **options)
            for whole, part in zip(wholes, parts, strict=True):
                assert_same(gathered(part), whole)


@check(2)
def no_process_waits_for_another(_: Path) -> None:
    model = fsdp(model_of())
    params = dict(model.named_parameters())
    with CommDebugMode() as communication:  # type: ignore[no-untyped-call]
        shadow = emajit.init(params)
        emajit.update_(shadow, params, 0, decay=0.9)
        emajit.update_(shadow, params, 1, decay=0.9, rounding="stochastic")
        ema = emajit.LitEma(model)
        ema(model)
        ema.store(model.parameters())
        ema.copy_to(model)
        ema.restore(model.parameters())
        with ema.ema_scope(model), pytest.raises(RuntimeError, match="inside"):
            ema(model)
        with emajit.ema_scope(model, shadow):
            pass
    assert communication.get_total_counts() == 0


@check(2)
def inside_of_a_compiled_step(_: Path) -> None:
    params, shadow = sharded(whole_params()), sharded(whole_params())
    params = {name: p + 1 for name, p in params.items() if name != "none"}
    shadow = {name: shadow[name] for name in params}
    for rounding in ("nearest", "stochastic"):
        options: Any = {"decay": schedules.warmup(0.99), "rounding": rounding}

        def step(shadow: Any, params: Any, t: Tensor, options: Any = options) -> Any:
            return emajit.update(shadow, params, t, **options)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        start = emajit.init(shadow, dtype=torch.bfloat16)
        for t in (torch.tensor(3), torch.tensor(4)):
            found = compiled(start, params, t)
            expected = emajit.update(gathered(start), gathered(params), t, **options)
            assert_same(found, expected)


@check(2, 3, fsdp=True)
def fsdp_averages_what_one_process_averages(_: Path) -> None:
    model = fsdp(model_of())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema, shadow = emajit.LitEma(model, 0.9), emajit.init(dict(model.named_parameters()))
    whole = gathered({name: p.detach() for name, p in model.named_parameters()})
    expected, expected_ema = emajit.init(whole), emajit.init(whole)
    for step in range(4):
        trained(model, optimizer, step)
        ema(model)
        params = dict(model.named_parameters())
        emajit.update_(shadow, params, step, decay=0.5)
        whole = gathered({name: p.detach() for name, p in params.items()})
        emajit.update_(expected, whole, step, decay=0.5)
        emajit.update_(expected_ema, whole, step, decay=schedules.warmup(0.9))
    assert_same(shadow, expected)
    held = {name: ema.get_buffer(key) for name, key in ema.m_name2s_name.items()}
    assert_same(held, expected_ema)


@check(2, 3, fsdp=True)
def a_scope_computes_with_the_averages_and_leaves_nothing(_: Path) -> None:
    for options in ({}, {"reshard_after_forward": False}):
        model, reference = fsdp(model_of(), **options), model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shadow: Any = emajit.init(dict(model.named_parameters()))
        for value in shadow.values():
            value.to_local().mul_(3)
        averages, x = gathered(shadow), torch.randn(4, 3)
        with torch.no_grad():
            raw = model(x)  # leaves the root's parameters whole
            for _again in range(2):
                with emajit.ema_scope(model, shadow):
                    inside = model(x)
                torch.testing.assert_close(inside, functional_call(reference, averages, (x,)))
                assert torch.equal(model(x), raw)
            with pytest.raises(KeyError), emajit.ema_scope(model, shadow):
                model(x)
                raise KeyError
            assert torch.equal(model(x), raw)
        assert_same(shadow, averages)
        theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
        trained(model, optimizer, 0)
        trained(reference, theirs, 0)
        for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), other)


@check(2, fsdp=True)
def lit_ema_stores_copies_and_restores(_: Path) -> None:
    model: Any = fully_shard(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(4, 3)
    with torch.no_grad():
        model(x)  # leaves the root's parameters whole
    ema = emajit.LitEma(model, 0.5, use_num_upates=False)
    trained(model, optimizer, 0)
    ema(model)
    before = gathered(emajit.init(dict(model.named_parameters())))
    with torch.no_grad():
        raw = model(x)
        ema.store(model.parameters())
        ema.copy_to(model)
        averaged = model(x)
        whole = [*model.parameters()]
        with pytest.raises(ValueError, match=r"restore: expected .* as shards, found whole ones"):
            ema.restore(whole)
        model(x)
        ema.restore(model.parameters())
        model.reshard()
        assert_same(gathered(dict(model.named_parameters())), before)
        assert not torch.equal(raw, averaged)
        assert torch.equal(model(x), raw)
        with ema.ema_scope(model):
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), raw)


@check(2, fsdp=True)
def lit_ema_tracks_what_is_unfrozen_grown_and_sharded_later(_: Path) -> None:
    model: Any = model_of()
    model[0].requires_grad_(False)
    late = emajit.LitEma(model, 0.5, use_num_upates=False)
    model = fsdp(model)
    ema = emajit.LitEma(model, 0.5, use_num_upates=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trained(model, optimizer, 0)
    ema(model)
    averages = gathered(ema.named_averages())
    model[0].requires_grad_(True)
    model[4] = fully_shard(nn.Linear(5, 3))
    with torch.no_grad():
        model(torch.randn(4, 3))  # leaves parameters whole
    ema.track(model)
    params = gathered(dict(model.named_parameters()))
    found = gathered(ema.named_averages())
    assert found.keys() == params.keys()
    for name, average in found.items():
        kept = name.startswith("2.")  # a shard of another shape starts from its weights
        assert torch.equal(average, averages[name] if kept else params[name]), name
    trained(model, torch.optim.SGD(model.parameters(), lr=0.5), 1)
    ema(model)
    params = gathered(dict(model.named_parameters()))
    for name, average in gathered(ema.named_averages()).items():
        torch.testing.assert_close(average, (found[name] + params[name].detach()) / 2)
    with pytest.raises(ValueError, match="expected a whole tensor"):
        late.track(model)


@check(2)
def the_older_fsdp_is_refused(_: Path) -> None:
    model = FullyShardedDataParallel(model_of(), device_id=torch.device("cpu"))
    for use in (lambda: emajit.LitEma(model), lambda: emajit.ema_scope(model, {}).__enter__()):
        with pytest.raises(
            ValueError, match="expected fully_shard, found FullyShardedDataParallel"
        ):
            use()


@check(2, fsdp=True)
def a_fused_optimizer_runs_one_after_the_other(_: Path) -> None:
    models = [fsdp(model_of()) for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    emas = [emajit.LitEma(m, 0.9) for m in models]
    fused = FusedOptimizer(optimizers[0], emas[0], models[0])
    for seed in range(4):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        for model in models:
            model.zero_grad()
            model(x).square().mean().backward()
        fused.step()
        optimizers[1].step()
        emas[1](models[1])
    ours, theirs = (gathered(dict(ema.named_buffers())) for ema in emas)
    assert_same(ours, theirs)


@check(2, fsdp=True)
def misfits_are_named(_: Path) -> None:
    params = sharded(whole_params())
    shadow = emajit.init(params)
    for other, message in (
        (whole_params(), r"params\['even'\]: expected shape \(12, 5\) as Shard.*found a whole"),
        (sharded(whole_params(), columns=True), r"params\['even'\]: expected .*Shard\(dim=1\)"),
        (sharded({**whole_params(), "few": torch.ones(2, 4)}), r"params\['few'\]: expected shape"),
    ):
        before = gathered(emajit.init(shadow))
        with pytest.raises(ValueError, match=message):
            emajit.update_(shadow, other, 0, decay=0.5)
        assert_same(shadow, before)
    with pytest.raises(ValueError, match="make the shadow of the sharded parameters"):
        emajit.update_(whole_params(), params, 0, decay=0.5)
    with pytest.raises(ValueError, match="save_sharded writes those"):
        checkpoint.save("nowhere.safetensors", shadow, 0)
    model = fsdp(model_of())
    averages = emajit.init(dict(model.named_parameters()))
    with torch.no_grad():
        model(torch.ones(1, 3))
    loose = model_of()
    message = r"shadow\['0.weight'\]: expected a whole tensor"
    with pytest.raises(ValueError, match=message), emajit.ema_scope(loose, averages):
        pass
    ema = emajit.LitEma(model)
    before = {key: value.clone() for key, value in ema.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0weight: expected shape \(7, 3\) as Shard"):
        ema.load_state_dict(emajit.LitEma(loose).state_dict())
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    sent = [file.getvalue() if dist.get_rank() == 0 else b""]
    dist.broadcast_object_list(sent)
    from_first = torch.load(io.BytesIO(sent[0]), weights_only=False)
    if dist.get_rank():
        with pytest.raises(RuntimeError, match=r"0weight: .* at \(?\[?1.*, found .* at \(?\[?0"):
            ema.load_state_dict(from_first)
    else:
        ema.load_state_dict(from_first)
    assert_same(ema.state_dict(), gathered(before))


@check(2, 3)
def a_folder_of_shards_is_read_on_any_number_of_processes(shared: Path) -> None:
    shadow = emajit.init(sharded(whole_params()), dtype=torch.float64)
    mine = shared / f"saved-by-{dist.get_world_size()}"
    checkpoint.save_sharded(mine, shadow, torch.tensor(41))
    with pytest.raises(FileExistsError, match="saved-by"):
        checkpoint.save_sharded(mine, shadow, 42)
    with pytest.raises(FileNotFoundError):
        checkpoint.save_sharded(shared / "nowhere" / "folder", shadow, 42)
    for folder in (mine, shared / "saved-by-2"):
        for columns in (False, True):
            like = emajit.init(sharded(whole_params(), columns=columns), dtype=torch.float64)
            loaded, step = checkpoint.load_sharded(folder, like)
            assert step == 41
            assert_same(loaded, emajit.init(whole_params(), dtype=torch.float64))
            assert loaded["even"].placements == like["even"].placements
        whole, _ = checkpoint.load_sharded(folder, emajit.init(whole_params(), dtype=torch.float64))
        assert_same(whole, emajit.init(whole_params(), dtype=torch.float64))
    before = gathered(shadow)
    with pytest.raises(ValueError, match="expected shape"):
        checkpoint.load_sharded(mine, sharded({**whole_params(), "few": torch.ones(2, 4)}))
    assert_same(shadow, before)


@check(2, 3)
def a_file_is_read_into_shards(shared: Path) -> None:
    file = shared / "whole.safetensors"
    if dist.get_rank() == 0:
        checkpoint.save(file, whole_params(), 41)
    dist.barrier()
    for columns in (False, True):
        like = emajit.init(sharded(whole_params(), columns=columns))
        loaded, step = checkpoint.load(file, like)
        assert step == 41
        assert_same(loaded, whole_params())
        assert loaded["even"].placements == like["even"].placements
    with pytest.raises(ValueError, match="'few': expected shape"):
        checkpoint.load(file, sharded({**whole_params(), "few": torch.ones(2, 4)}))
    dist.barrier()


@check(2, 3, fsdp=True)
def lit_ema_goes_on_from_torchs_own_checkpoint(shared: Path) -> None:
    folder = shared / "litema"
    model = fsdp(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = emajit.LitEma(model, 0.9)
    for step in range(2):
        trained(model, optimizer, step)
        ema(model)
    if dist.get_world_size() == 2:
        save({"ema": ema.state_dict()}, checkpoint_id=folder)
        return
    resumed = emajit.LitEma(fsdp(model_of(1)), 0.5)
    state = resumed.state_dict()
    load({"ema": state}, checkpoint_id=folder)
    resumed.load_state_dict(state)
    assert int(resumed.num_updates) == 2
    for name, value in gathered(resumed.state_dict()).items():
        torch.testing.assert_close(value, gathered(ema.state_dict())[name])


@check(4, fsdp=True)
def two_dimensions_of_processes(_: Path) -> None:
    # Compared shard by shard: torch 2.8 gathers uneven shards of `mixed` in a wrong order.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    hybrid: Any = fully_shard(model_of(), mesh=mesh)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}

    def even_inside() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))

    mixed: Any = parallelize_module(even_inside(), mesh["inner"], plan)
    fully_shard(mixed, mesh=mesh["outer"])
    for model, make in ((hybrid, model_of), (mixed, even_inside)):
        params = dict(model.named_parameters())
        whole = {name: p.detach() for name, p in make().named_parameters()}
        for name, p in params.items():
            if _torch.gathers_right(p):
                torch.testing.assert_close(_shards.whole(p.detach()), whole[name])
            else:
                assert torch.__version__ < "2.9"
                with pytest.raises(RuntimeError, match="in a wrong order"):
                    _shards.whole(p.detach())
        for rounding in ("nearest", "stochastic"):
            options: Any = {"decay": 0.7, "rounding": rounding}
            shadow: Any = emajit.init(params, dtype=torch.bfloat16)
            for value in shadow.values():
                value.to_local().zero_()
            expected = {
                name: torch.zeros_like(v, dtype=torch.bfloat16) for name, v in whole.items()
            }
            for step in range(3):
                emajit.update_(shadow, params, step, **options)
                emajit.update_(expected, whole, step, **options)
            for name, value in shadow.items():
                own = shard_of(expected[name], value)
                torch.testing.assert_close(value.to_local(), own, rtol=0, atol=0)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        ema = emajit.LitEma(model)
        with torch.no_grad(), ema.ema_scope(model):
            torch.testing.assert_close(model(x), functional_call(make(), whole, (x,)))


@check(2, 3)
def averages_of_zero_3_are_those_of_the_whole(shared: Path) -> None:
    """Of fewer numbers than processes too; saved in whole tensors, and loaded."""
    model, whole = zero.divided(model_of()), model_of()
    choices: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16, "rounding": "stochastic"}]
    for each in choices:
        averages = zero.averages_of(model, 0.9, **each)
        ema = emajit.LitEma(whole, schedules.constant(0.9), **each)
        for step in range(3):
            torch.manual_seed(step)
            for p in whole.parameters():
                p.data += 0.1 * torch.randn(p.shape)
            zero.write(model, whole)
            averages.follow(model)
            averages.update(model)
            ema(whole)
        found = zero.whole_of(averages)
        assert_same(found, ema.named_averages())
        with averages.scope(model):
            assert_same(
                zero.gathered(model), {name: v.float() for name, v in ema.named_averages().items()}
            )
        assert_same(zero.gathered(model), dict(whole.named_parameters()))
        path = shared / f"zero-{dist.get_world_size()}-{len(each)}.safetensors"
        like = averages[None].named_averages()
        forms: Any = {"is_whole": True, "writes": dist.get_rank() == 0}
        _sharded.save(path, like, averages.shapes, 3, "0", **forms)
        dist.barrier()
        assert_same(checkpoint.read(path).weights, found)
        loaded, step = _sharded.load(path, like, averages.shapes)
        assert step == 3
        assert_same(gathered(loaded), gathered(like))


@check(2)
def ddp_does_not_broadcast_the_averages(_: Path) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            self.model_ema = emajit.LitEma(self.model, 0.9)

        def forward(self, x: Tensor) -> Tensor:
            predicted: Tensor = self.model(x)
            return predicted

    torch.manual_seed(dist.get_rank())  # DDP makes them alike
    host = Host()
    ddp = DistributedDataParallel(host)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.1)
    sent = []
    for step in range(4):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        sent.append({name for name in ddp.named_module_buffers if "ema" in name})
        optimizer.step()
        host.model_ema(host.model)
    assert "model.1.running_mean" in ddp.named_module_buffers
    assert sent[0]
    assert sent[1:] == [set()] * 3
    assert_same_on_all_ranks(host.model_ema.state_dict())
    assert {"model_ema.decay", "model_ema.0weight"} <= host.state_dict().keys()
    assert (
        copy.deepcopy(host).to(torch.float64).model_ema.get_buffer("0weight").dtype == torch.float64
    )


if find_spec("lightning"):

    @check(2, fsdp=True)
    def lightnings_model_parallel_strategy(shared: Path) -> None:
        from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: PLC0415

        from emajit.integrations.lightning import EMACallback  # noqa: PLC0415
        from emajit.posthoc import PostHoc  # noqa: PLC0415
        from tests import test_lightning as tests  # noqa: PLC0415

        class Sharded(tests.Regression):
            def configure_model(self) -> None:
                if isinstance(self.net, FSDPModule):  # at the second call
                    return
                self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
                strategy: Any = self.trainer.strategy
                fully_shard(self.net, mesh=strategy.device_mesh["data_parallel"])

        def fit(seed: int, callback: EMACallback, steps: int, **options: Any) -> Any:
            torch.manual_seed(seed)
            model = Sharded()
            strategy: Any = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            trainer = tests.trainer_of(
                shared,
                callback,
                devices=2,
                strategy=strategy,
                max_steps=steps,
                max_epochs=-1,
                use_distributed_sampler=False,  # which shuffles otherwise after it is resumed
            )
            trainer.fit(model, tests.data(), tests.data(2), **options)
            return trainer, model

        def averages(callback: EMACallback, model: nn.Module) -> dict[str, Tensor]:
            with callback.averaged(model):
                return gathered({name: p.detach() for name, p in model.named_parameters()})

        warnings.simplefilter("ignore")
        for save in ("raw", "averaged"):
            several = save == "averaged"
            options: Any = {"decay": tests.DECAY, "save": save}
            if several:
                options |= {"decay": {"short": tests.DECAY, "long": 0.9}, "evaluate": "all"}
                options |= {"posthoc": PostHoc(shared / "whole", 3), "pull": (0.5, 4)}
            whole = EMACallback(**options)
            _, whole_model = fit(0, whole, 9)
            if several:
                options["posthoc"] = PostHoc(shared / "resumed", 3)
            begun = EMACallback(**options)
            trainer, model = fit(0, begun, 6)
            folder = shared / f"lightning-{save}"
            trainer.save_checkpoint(folder)
            expected = averages(begun, model)
            found = checkpoint.read(folder, key="emajit.shadows.short" if several else None)
            assert_same({name: found.weights[name] for name in expected}, expected)
            resumed = EMACallback(**options)
            _, model = fit(1, resumed, 9, ckpt_path=folder)
            assert_same(averages(resumed, model), averages(whole, whole_model))
            assert_same(model.state_dict(), gathered(whole_model.state_dict()))
            if several:
                files = [*(shared / "whole").iterdir()]
                assert len(files) == 6
                for path in files:
                    assert path.read_bytes() == (shared / "resumed" / path.name).read_bytes()


if find_spec("transformers"):

    @check(2)
    def transformers_in_data_parallel(shared: Path) -> None:
        from emajit.integrations.transformers import EMACallback  # noqa: PLC0415
        from emajit.posthoc import PostHoc  # noqa: PLC0415
        from tests import test_transformers as tests  # noqa: PLC0415

        options = {**tests.settings("steps"), "max_steps": 4, "ddp_backend": "gloo"}
        posthoc = PostHoc(shared / "of-transformers", 1)
        ema, recorder = EMACallback(tests.DECAY, posthoc=posthoc), tests.Recorder()
        folder = shared / "transformers"
        trainer = tests.trainer_of(folder, ema, recorder, **options)
        start = tests.trained(trainer.model)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        expected = tests.averages(ema)
        tests.assert_near(expected, tests.reference(start, recorder.steps))
        assert_same_on_all_ranks(expected)
        assert_same(recorder.evaluated[-1], expected)
        dist.barrier()
        assert_same(checkpoint.read(folder / "checkpoint-4/averages.safetensors").weights, expected)
        held = {path: path.read_bytes() for path in Path(posthoc.folder).iterdir()}
        assert len(held) == 8
        dist.barrier()
        resumed = EMACallback(tests.DECAY, posthoc=posthoc)
        begun = str(folder / "checkpoint-2")
        tests.trainer_of(folder, resumed, **options).train(resume_from_checkpoint=begun)
        assert_same(tests.averages(resumed), expected)
        dist.barrier()
        assert held == {path: path.read_bytes() for path in Path(posthoc.folder).iterdir()}

    @check(2, 3, fsdp=True)
    def transformers_sharded_by_fsdp2(shared: Path) -> None:
        """Two processes train and go on from their checkpoint, then three."""
        from emajit.integrations.transformers import EMACallback  # noqa: PLC0415
        from tests import test_transformers as tests  # noqa: PLC0415

        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            folder = shared / f"transformers-{kind}"
            half, by_three = folder / "checkpoint-2", folder / "by three"
            ema, recorder = EMACallback(tests.DECAY), tests.Recorder()
            if dist.get_world_size() == 2:
                without = tests.Recorder()
                sharded_training(folder / "without", kind, without)
                trainer = sharded_training(folder, kind, ema, recorder)
                assert len(without.steps) == len(recorder.steps) == 4
                for a, b in zip(without.steps, recorder.steps, strict=True):
                    assert_same(gathered(a), gathered(b))
                steps = [gathered(step) for step in recorder.steps]
                start = tests.trained(tests.tiny())
                check_checkpoint(half, kind, tests.reference(start, steps[:2]), steps[1])
                found = gathered(tests.averages(ema))
                check_checkpoint(folder / "checkpoint-4", kind, doubled(found), steps[-1])
                assert_same(recorder.evaluated[-1], found)
                resumed = EMACallback(tests.DECAY)
                again = sharded_training(folder, kind, resumed, resume=half)
                for model in (trainer.model, again.model):
                    assert_same(gathered(tests.trained(model)), steps[-1])
                assert_same(gathered(tests.averages(resumed)), found)
            else:
                sharded_training(by_three, kind, ema, recorder, resume=half)
                start = checkpoint.read(in_checkpoint(half, kind)).weights
                steps = [gathered(step) for step in recorder.steps]
                assert len(steps) == 2
                expected = tests.reference(start, steps, lambda step: tests.DECAY(step + 2))
                tests.assert_near(gathered(tests.averages(ema)), expected)
                check_checkpoint(by_three / "checkpoint-4", kind, expected, steps[-1])

    @check(2)
    def what_transformers_callback_refuses(_: Path) -> None:
        """accelerate's plugin for FSDP 1 wants a GPU."""

        def refused(model: nn.Module) -> None:
            _sharded.prepare(model, None, None)

        with pytest.raises(ValueError, match=r"found FSDP 1; set version=2 in fsdp_config"):
            refused(FullyShardedDataParallel(model_of(), device_id=torch.device("cpu")))
        tensor_parallel = nn.Linear(4, 4)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(tensor_parallel, mesh, ColwiseParallel())
        with pytest.raises(
            ValueError, match=r"weight: .* one of fully_shard, found shape \(4, 4\)"
        ):
            refused(tensor_parallel)

        def changed(**values: Any) -> nn.Module:
            model: nn.Module = zero.divided(nn.Linear(4, 4))
            for name, value in values.items():
                setattr(model.weight, name, value)
            return model

        far, uneven = torch.empty(8, device="meta"), torch.empty(7)
        on_disk: Any = torch.empty(8)
        on_disk.final_location = "nvme"
        without: list[tuple[dict[str, Any], str]] = [
            ({"_z3_optimizer": None}, "without checkpoint_event_prologue, checkpoint_event_epil"),
            ({"ds_tensor": uneven}, "without parts of one size; use ZeRO 2"),
            ({"ds_tensor": far}, "on the device, found some elsewhere; leave out offload_param"),
            ({"ds_tensor": on_disk}, "on the device, found some elsewhere"),
        ]
        for values, told in without:
            with pytest.raises(ValueError, match=f"^weight: expected .*{told}"):
                refused(changed(**values))
        with_deepspeed = SimpleNamespace(accelerator_state=SimpleNamespace(deepspeed_plugin=1))
        with pytest.raises(
            ValueError, match=r"pull: expected None with DeepSpeed, found \(0.5, 1\)"
        ):
            _sharded.prepare(nn.Linear(1, 1), with_deepspeed, (0.5, 1))
        assert not _sharded.prepare(nn.Linear(1, 1), with_deepspeed, None)

    @check(slow=(2,), fsdp=True)
    def the_best_averages_of_fsdp2_at_the_end(shared: Path) -> None:
        from emajit.integrations.transformers import EMACallback  # noqa: PLC0415
        from tests import test_transformers as tests  # noqa: PLC0415

        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            ema, folder = EMACallback(tests.DECAY), shared / f"best-{kind}"
            for _ in range(2):  # the second training writes the checkpoints of the first one anew
                trainer = sharded_training(folder, kind, ema, load_best_model_at_end=True)
            best = Path(trainer.state.best_model_checkpoint)
            # With SHARDED_STATE_DICT the Trainer looks for the best checkpoint before it is made,
            # so that the last one is not seen to be the best by every process.
            assert best.name == "checkpoint-2"
            found = gathered(tests.averages(ema))
            assert_same(checkpoint.read(in_checkpoint(best, kind)).weights, found)
            with ema.averaged(trainer.model):
                assert_same(gathered(tests.trained(trainer.model)), found)

    @check(slow=(2,), fsdp=True)
    def fsdp2_with_other_options_of_the_trainer(shared: Path) -> None:
        """Wrapped and compiled layers have other names, and a root that stays whole other tensors.

        Saved, loaded by `from_pretrained` and resumed.
        """
        from transformers import GPT2LMHeadModel  # noqa: PLC0415

        from emajit.integrations.transformers import EMACallback  # noqa: PLC0415
        from tests import test_transformers as tests  # noqa: PLC0415

        compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        choices: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"activation_checkpointing": True}, {}),
            ({"reshard_after_forward": False}, {"bf16": True}),
            ({}, compiled),
        ]
        for i, (config, options) in enumerate(choices):
            for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
                folder, ema, again = shared / f"{kind}-{i}", EMACallback(), EMACallback()
                trainer = sharded_training(folder, kind, ema, config=config, **options)
                found = gathered(tests.averages(ema))
                if kind.startswith("FULL"):
                    averaged = folder / "checkpoint-4" / "averaged"
                    loaded = tests.trained(GPT2LMHeadModel.from_pretrained(averaged))
                    assert_same(loaded, found)
                half = folder / "checkpoint-2"
                resumed = sharded_training(
                    folder, kind, again, config=config, resume=half, **options
                )
                assert_same(gathered(tests.averages(again)), found)
                models = trainer.model, resumed.model
                a, b = (gathered(tests.trained(model)) for model in models)
                assert_same(a, b)

    def sharded_training(
        folder: Path,
        kind: str,
        *callbacks: Any,
        resume: Path | None = None,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        from tests import test_transformers as tests  # noqa: PLC0415

        options = {**tests.settings("steps"), "max_steps": 4, "ddp_backend": "gloo"} | options
        config = {"version": 2, "state_dict_type": kind} | (config or {})
        told = None if resume is None else str(resume)
        with fsdp_of_accelerate_on_a_cpu():
            trainer = tests.trainer_of(
                folder,
                *callbacks,
                fsdp=True,
                fsdp_config=config,
                resume_from_checkpoint=told,
                **options,
            )
            trainer.train(resume_from_checkpoint=told)
        assert isinstance(trainer.model, FSDPModule)
        dist.barrier()
        return trainer

    def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.double() for name, value in tensors.items()}

    def in_checkpoint(folder: Path, kind: str) -> Path:
        return folder / ("averages.safetensors" if kind.startswith("FULL") else "averages")

    def check_checkpoint(
        folder: Path, kind: str, averages: dict[str, Tensor], raw: dict[str, Tensor]
    ) -> None:
        """Averages to resume from, and for `from_pretrained` where the model's state is whole."""
        from transformers import GPT2LMHeadModel  # noqa: PLC0415

        from tests import test_transformers as tests  # noqa: PLC0415

        file, state = in_checkpoint(folder, kind), folder / "trainer_state.json"
        assert file.stat().st_mtime_ns < state.stat().st_mtime_ns  # which completes a checkpoint
        found = checkpoint.read(file).weights
        tests.assert_near(found, averages)
        assert (folder / "averaged").exists() == kind.startswith("FULL")
        if kind.startswith("FULL"):
            assert_same(tests.trained(GPT2LMHeadModel.from_pretrained(folder / "averaged")), found)
            assert_same(tests.trained(GPT2LMHeadModel.from_pretrained(folder)), raw)


if find_spec("transformers") and find_spec("peft"):

    @check(2, fsdp=True)
    def an_adapter_that_fsdp2_shards(shared: Path) -> None:
        from emajit.integrations.transformers import EMACallback  # noqa: PLC0415
        from tests import test_adapters as adapters  # noqa: PLC0415
        from tests import test_transformers as tests  # noqa: PLC0415

        warnings.simplefilter("ignore")
        folder, ema, again = shared / "adapter", EMACallback(), EMACallback()
        half = folder / "checkpoint-2"
        for callback, resume in ((ema, None), (again, half)):
            sharded_training(
                folder, "FULL_STATE_DICT", callback, model=adapters.adapted(), resume=resume
            )
        found = gathered(tests.averages(ema))
        assert len(found) == 2
        assert_same(adapters.loaded(folder / "checkpoint-4" / "averaged" / "default"), found)
        assert_same(gathered(tests.averages(again)), found)


@contextmanager
def fsdp_of_accelerate_on_a_cpu() -> Iterator[None]:
    """Let accelerate shard: it heeds the plugin only of processes with a GPU or the like.

    `AcceleratorState.__init__` sets the type of the processes to FSDP for each kind of device but
    the CPU; all that follows from this type runs on a CPU.
    """
    from accelerate.state import AcceleratorState, PartialState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", init)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def run(world: int, names: list[str], shared: Path) -> dict[str, str]:
    """Run checks by as many processes, of which this is one; what each has raised."""
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)  # as torchrun sets them
    dist.init_process_group(
        "gloo",
        init_method=f"file://{shared}/meeting-{world}",
        rank=int(os.environ["RANK"]),
        world_size=world,
    )
    told: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        mine = ""
        try:
            CHECKS[name](shared)
        except Exception:  # noqa: BLE001, the test tells it
            mine = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        everyones: list[Any] = [None] * world
        dist.all_gather_object(everyones, mine)
        told[f"{name} {world}"] = "\n".join(filter(None, everyones))
    dist.barrier()
    gc.collect()  # what still holds the group would end its threads as the interpreter ends
    time.sleep(0.2)  # gloo's threads release what they sent; torch 2.6 joins them under the GIL
    dist.destroy_process_group()
    return told


def main() -> None:
    results, shared = map(Path, sys.argv[1:3])
    checks = SLOW if "slow" in sys.argv else QUICK
    rank = int(os.environ["RANK"])
    told: dict[str, str] = {}
    for world in WORLDS:
        names = [name for name, worlds in checks if worlds == world]
        names = [name for name in names if HAS_FSDP or name not in FSDP]
        if names and rank < world:
            told |= run(world, names, shared)
    if rank == 0:
        results.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
