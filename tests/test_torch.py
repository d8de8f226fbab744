"""Private names of torch: without any one of them emajit imports, and the numbers are the same."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.hooks
import torch._inductor
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import vmap
from torch.testing import assert_close

import emajit
from emajit import LitEma, _compile, _plan, _torch, checkpoint, merging, schedules
from emajit.fused import FusedOptimizer
from tests import reference

# What emajit asks for when it is imported: taken away while `_torch` is imported anew.
AT_IMPORT = [
    *(
        f"torch._foreach_{name}"
        for name in ("sub", "mul", "mul_", "add", "add_", "div_", "copy_", "lerp", "lerp_")
    ),
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.maybe_current_level",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._dynamo.guards.TensorGuards",
    "torch._C._dynamo.guards.compute_overlapping_tensors",
    "torch._C._dynamo.eval_frame._debug_get_cache_entry_list",
    "torch._C._autograd._unsafe_set_version_counter",
    "torch.nn.utils.parametrize._inject_new_class",
    "torch.nn.utils.parametrize._inject_property",
    "torch.float8_e8m0fnu",
    "torch.float4_e2m1fn_x2",
]
# What it asks for when it needs it: hidden from it all the time.
LATER = [
    "torch._dynamo.exc.TorchDynamoException",
    "torch.nn.utils.parametrize._cache",
    "torch.compiler.skip_all_guards_unsafe",
    "torch._inductor.list_options",
    "torch._inductor.custom_graph_pass",
]


@pytest.fixture
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A torch without a name, as emajit sees it."""
    path: str = request.param
    owner, _, name = path.rpartition(".")
    torch.compiler.reset()
    _compile.kernel.cache_clear()
    _plan._plans.clear()
    if path in AT_IMPORT:
        with pytest.MonkeyPatch.context() as taken:
            taken.delattr(_torch._find(owner), name, raising=False)
            importlib.reload(_torch)
    elif path in LATER:
        find = _torch._find
        monkeypatch.setattr(_torch, "_find", lambda found: None if found == path else find(found))
    elif name == "guard_filter_fn":
        monkeypatch.delattr(torch._dynamo.hooks.Hooks, name, raising=False)
    elif name == "step_hooks":
        monkeypatch.setattr(_torch, name, lambda _: [None])
    else:
        assert name == "_local_tensor"
    yield path
    monkeypatch.undo()
    importlib.reload(_torch)
    _compile.kernel.cache_clear()
    _plan._plans.clear()


def trees() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float32]
    params = {f"w{i}": torch.randn(3, 4, dtype=dtype) for i, dtype in enumerate(dtypes)}
    params["turned"] = torch.randn(5, 3).t()
    params["n"] = torch.tensor([1, 2])
    shadow = {name: torch.zeros_like(p) for name, p in params.items()}
    shadow["w1"] = torch.zeros(3, 4)
    return shadow, params


def updates(backend: str) -> None:
    shadow, params = trees()
    for step in range(3):
        for p in params.values():
            p.add_(1)
        given: dict[str, Any] = {"decay": 0.9, "backend": backend, "nonfinite": "skip"}
        expected = reference.update(shadow, params, 0.9)
        assert_close(emajit.update(shadow, params, step, decay=0.9), expected)
        emajit.update_(shadow, params, step, **given)
        assert_close(shadow, expected)


def several_and_noise(backend: str) -> None:
    params = {"a": torch.randn(4, 5), "b": torch.randn(7).bfloat16()}
    shadows = [emajit.init(params, dtype=torch.float32) for _ in range(2)]
    decays: list[Any] = [0.75, schedules.warmup(0.99)]
    for step in range(9, 12):
        params = {name: p + 1 for name, p in params.items()}
        expected = [
            reference.update(s, params, float(d(step)) if callable(d) else d)
            for s, d in zip(shadows, decays, strict=True)
        ]
        emajit.update_many_(shadows, params, step, decays=decays, backend=backend)
        assert_close(shadows, expected)
    half = {"w": torch.ones(3000, dtype=torch.bfloat16)}
    one = {"w": torch.full((3000,), 1 + 2**-7)}
    emajit.update_(half, one, 0, decay=0.75, rounding="stochastic", backend=backend)
    assert 600 < (half["w"] > 1).sum() < 900


def transforms_and_traces() -> None:
    s, p = torch.zeros(3, 2), torch.randn(3, 2)
    found = vmap(lambda a, b: emajit.update([a], [b], 0, decay=0.75)[0])(s, p)
    assert_close(found, p / 4)
    step = torch.compile(emajit.update, fullgraph=True, backend="aot_eager")
    assert_close(step([s], [p], torch.tensor(0), decay=0.75)[0], p / 4)


def scopes_and_files(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = LitEma(model, decay=0.75, use_num_upates=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema(model)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = reference.update(start, raw, 0.75)
    assert_close(ema.named_averages(), expected)
    with ema.ema_scope(model):
        assert_close(dict(model.named_parameters()), expected, check_stride=False)
    ema.store(model.parameters())
    ema.copy_to(model)
    ema.restore(model.parameters())
    assert_close({n: p.detach() for n, p in model.named_parameters()}, raw)
    torch.save(ema.state_dict(), folder / "ema.pt")
    other = LitEma(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    other.load_state_dict(torch.load(folder / "ema.pt", weights_only=True))
    assert_close(other.named_averages(), expected)
    checkpoint.save(folder / "shadow.safetensors", ema.named_averages(), 3)
    save_file(start, folder / "0.safetensors")
    save_file(raw, folder / "1.safetensors")
    merging.merge([folder / f"{i}.safetensors" for i in range(2)], folder / "m.pt", [0.75, 0.25])
    assert_close(torch.load(folder / "m.pt", weights_only=True), expected)
    loaded, step = checkpoint.load(folder / "shadow.safetensors", start)
    assert step == 3
    assert_close(loaded, expected)


def fused() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4))
    shadow, optimizer = {"w": w.detach().clone()}, torch.optim.SGD([w], lr=0.5)
    ours = FusedOptimizer(optimizer, shadow, {"w": w}, decay=0.75, backend="aot_eager")
    expected = w.detach().double()
    average = expected.clone()
    for step in range(3):
        w.grad = torch.full((4,), float(step + 1))
        ours.step(step)
        expected = expected - 0.5 * (step + 1)
        average = average + 0.25 * (expected - average)
    assert_close(w.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert_close(shadow["w"].double(), average, rtol=1e-6, atol=1e-6)


OTHERS = ["torch._dynamo.hooks.Hooks.guard_filter_fn", "step_hooks"]


@pytest.mark.parametrize("without", [*AT_IMPORT, *LATER, *OTHERS], indirect=True)
def test_numbers_without_a_name(without: str, tmp_path: Path) -> None:
    assert without
    updates("eager")
    updates("aot_eager")
    several_and_noise("eager")
    transforms_and_traces()
    scopes_and_files(tmp_path)
    fused()


@pytest.mark.inductor
@pytest.mark.parametrize("without", LATER[2:], indirect=True)
def test_inductor_without_a_name(without: str) -> None:
    assert without
    updates("inductor")


def test_a_dtensor_without_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard by the public way; its place in the whole by our own arithmetic."""
    from torch.distributed import destroy_process_group, init_process_group  # noqa: PLC0415
    from torch.distributed import tensor as dtensors  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    shapes = [(7, 5), (6, 6), (1, 3), (4, 1, 9)]
    for rank in range(6):
        init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
        try:
            mesh = init_device_mesh("cpu", (2, 3))
            for shape in shapes:
                for first in (dtensors.Shard(0), dtensors.Shard(1), dtensors.Replicate()):
                    for second in (dtensors.Shard(0), dtensors.Shard(1), dtensors.Replicate()):
                        placements = (first, second)
                        size, start = dtensors._utils.compute_local_shape_and_global_offset(
                            torch.Size(shape), mesh, placements
                        )
                        if 0 in size:  # an empty shard is nowhere
                            continue
                        expected = [*_torch.shard_offsets(torch.Size(shape), mesh, placements)]
                        assert expected == [*start]
                        with monkeypatch.context() as taken:
                            taken.delattr(dtensors._utils, "compute_local_shape_and_global_offset")
                            found = [*_torch.shard_offsets(torch.Size(shape), mesh, placements)]
                        assert found == expected, (rank, shape, placements)
            one = dtensors.DTensor.from_local(torch.ones(2), mesh, (dtensors.Replicate(),) * 2)
            assert torch.equal(_torch.shard(one), one.to_local())
        finally:
            destroy_process_group()
