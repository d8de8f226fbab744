"""What only a CUDA device can show. Needs nothing but torch and pytest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import emajit
from emajit import LitEma, offload, schedules
from emajit.fused import FusedOptimizer

Rounding = Literal["nearest", "stochastic"]

pytestmark = pytest.mark.cuda


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_schedules_do_not_synchronise(request: pytest.FixtureRequest) -> None:
    step = torch.tensor(3, device="cuda")
    every = [
        schedules.warmup(0.9),
        schedules.inverse_gamma(),
        schedules.power_function(0.1),
        schedules.half_life(1000, 10),
        schedules.debiased(0.9),
        schedules.uniform(),
        schedules.cosine(0.9, 1.0, 10),
        schedules.linear(0.9, 1.0, 10),
        schedules.delay(schedules.constant(0.9), 2),
        schedules.every(schedules.warmup(0.9), 4),
    ]
    request.getfixturevalue("no_synchronisation")
    found = [schedule(step) for schedule in every]
    torch.cuda.set_sync_debug_mode("default")
    assert_close([float(x) for x in found], [float(schedule(3)) for schedule in every])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_serves_several_leaves(dtype: torch.dtype) -> None:
    shadow = {str(i): torch.zeros(32 + i, device="cuda") for i in range(200)}
    params = {name: torch.ones_like(s, dtype=dtype) for name, s in shadow.items()}
    step = torch.tensor(0, device="cuda")

    def update() -> None:
        emajit.update_(shadow, params, step, decay=0.5, backend="inductor")

    update()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        update()
        torch.cuda.synchronize()
    events: Any = profile.events()
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    assert 0 < len(kernels) < 60
    assert all(bool((s == 0.75).all()) for s in shadow.values())


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


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_captured_update_follows_the_step(backend: str, rounding: Rounding) -> None:
    """A CUDA graph is replayed with a step that it counts itself."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    params = {"w": torch.ones(2**16, device="cuda"), "b": torch.ones(3, device="cuda")}
    captured, expected = (
        {n: torch.zeros_like(p, dtype=dtype) for n, p in params.items()} for _ in range(2)
    )
    step = torch.tensor(0, device="cuda")

    def update() -> None:
        emajit.update_(
            captured,
            params,
            step,
            decay=schedules.warmup(0.9),
            rounding=rounding,
            backend=backend,
        )
        step.add_(1)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        update()
        update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    other = [torch.full((2, 2), 7, dtype=torch.int32, device="cuda") for _ in range(100)]
    for _ in range(5):
        graph.replay()
    del other
    for t in range(7):  # capturing runs nothing
        emajit.update_(
            expected,
            params,
            torch.tensor(t, device="cuda"),
            decay=schedules.warmup(0.9),
            rounding=rounding,
            backend=backend,
        )
    assert step.item() == 7
    assert_close(captured, expected, rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_no_capture_of_a_litema_that_counts_on_the_host() -> None:
    model = nn.Linear(2, 2).cuda()
    ema = LitEma(model)
    ema(model)
    graph = torch.cuda.CUDAGraph()
    captured = pytest.raises(
        RuntimeError, match="num_updates is on the CPU during CUDA graph capture"
    )
    with captured, torch.cuda.graph(graph):
        ema(model)
    assert ema.num_updates.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_is_that_of_the_host(dtype: torch.dtype) -> None:
    shadow = {"w": torch.ones(1000, dtype=dtype)}
    params = {"w": torch.linspace(1, 1.1, 1000)}
    expected = emajit.update(shadow, params, 3, decay=0.5, rounding="stochastic", backend="eager")
    shadow, params = ({n: t.cuda() for n, t in tree.items()} for tree in (shadow, params))
    for backend in ("eager", "inductor"):
        found = emajit.update(shadow, params, 3, decay=0.5, rounding="stochastic", backend=backend)
        # Half-way between neighbours of float32, a fused multiply-add may round another way.
        assert (found["w"].cpu() != expected["w"]).sum() <= 2


def test_a_step_on_the_host_has_the_noise_of_one_on_the_device(
    request: pytest.FixtureRequest,
) -> None:
    shadow = {"w": torch.ones(1000, dtype=torch.bfloat16, device="cuda")}
    params = {"w": torch.linspace(1, 1.1, 1000, device="cuda")}
    steps: list[Any] = [2**40 + 3, torch.tensor(2**40 + 3), torch.tensor(2**40 + 3, device="cuda")]

    def updates() -> list[Any]:
        options: Any = {"decay": 0.5, "rounding": "stochastic", "backend": "eager"}
        return [emajit.update(shadow, params, step, **options) for step in steps]

    updates()
    request.getfixturevalue("no_synchronisation")
    found = updates()
    torch.cuda.set_sync_debug_mode("default")
    assert_close(found[1:], [found[0]] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("capturable", [True, False])
def test_optimizer_and_average_in_one_graph(capturable: bool) -> None:
    models = [nn.Linear(8, 8).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), capturable=capturable) for m in models]
    averages = [LitEma(model, 0.9).cuda() for model in models]
    fused = FusedOptimizer(optimizers[1], averages[1], models[1])
    for _ in range(5):
        x = torch.randn(4, 8, device="cuda")
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        optimizers[0].step()
        averages[0](models[0])
        fused.step()
    assert_close(averages[1].state_dict(), averages[0].state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("controls", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.NAdam])
def test_the_first_step_of_a_graph_can_be_one_that_is_skipped(
    optimizer_type: Any, controls: str
) -> None:
    model = nn.Linear(8, 8).cuda()
    optimizer = optimizer_type(model.parameters())
    ema = LitEma(model, 0.9)  # its averages are on the device, what counts is not
    if controls == "cuda":
        ema.cuda()
    fused: Any = FusedOptimizer(optimizer, ema, model)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for gradient in (1.0, float("inf")):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        scaler.scale(torch.zeros((), device="cuda"))
        before = [t.clone() for t in (*model.parameters(), *ema.buffers())]
        scaler.step(fused)
        scaler.update()
    after = [*model.parameters(), *ema.buffers()]
    assert_close(after, before, rtol=0, atol=0, check_device=False)
    assert ema.num_updates.item() == 1
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


class TestOffload:
    """A shadow in host memory: the same averages, little memory on the device, nobody waits."""

    @pytest.mark.parametrize("pinned", [True, False])
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_has_the_averages_of_one_on_the_device(self, pinned: bool, rounding: Rounding) -> None:
        dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
        params = [nn.Parameter(torch.randn(n, 1000, device="cuda")) for n in (3000, 1, 5000)]
        buffer = torch.randn(10_000_000, device="cuda")
        tensors = [*params, buffer]
        optimizer = torch.optim.SGD(params, lr=0.1)
        offloaded = offload.init(tensors, dtype=dtype, pin_memory=pinned)
        resident = emajit.init(tensors, dtype=dtype)
        step = torch.tensor(0, device="cuda")
        for _ in range(10):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()  # writes what the last update may still read
            options: Any = {"decay": 0.9, "rounding": rounding}
            offload.update_(offloaded, tensors, step, **options)
            emajit.update_(resident, tensors, step, backend="eager", **options)
            step.add_(1)
            buffer.mul_(0.5)
        assert {s.device.type for s in offloaded} == {"cpu"}
        assert_close([s.clone() for s in offloaded], [s.cpu() for s in resident], rtol=0, atol=0)

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_takes_little_memory_and_holds_nobody(
        self, rounding: Rounding, request: pytest.FixtureRequest
    ) -> None:
        dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
        params = [nn.Parameter(torch.ones(2**27, device="cuda")) for _ in range(2)]  # 1 GiB
        shadow = [s.zero_() for s in offload.init(params, dtype=dtype, pin_memory=True)]
        steps = [torch.tensor(i, device="cuda") for i in range(2)]
        offload.update_(shadow, params, steps[0], decay=0.5, rounding=rounding)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        request.getfixturevalue("no_synchronisation")
        offload.update_(shadow, params, steps[1], decay=0.5, rounding=rounding)
        assert torch.cuda.current_stream().query()  # the training has nothing to wait for
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        limit = 2**26 if rounding == "nearest" else 80 * 2**21 + 2**20
        assert torch.cuda.max_memory_allocated() - before < limit
        assert all(bool((s == 0.75).all()) for s in shadow)

    def test_several_are_those_of_the_device(self) -> None:
        params = {"w": torch.randn(3000, 1000, device="cuda"), "b": torch.randn(3, device="cuda")}
        offloaded = [offload.init(params, pin_memory=True) for _ in range(2)]
        resident = [emajit.init(params) for _ in range(2)]
        for p in params.values():
            p.neg_()
        for step in range(3):
            offload.update_many_(offloaded, params, step, decays=[0.5, 0.9])
            emajit.update_many_(resident, params, step, decays=[0.5, 0.9], backend="eager")
        assert_close([offload.fetch(s) for s in offloaded], resident, rtol=0, atol=0)

    def test_a_scope_computes_with_what_is_fetched(self) -> None:
        model = nn.Linear(2, 2).cuda()
        params = dict(model.named_parameters())
        shadow = offload.init(params, pin_memory=True)
        expected = {name: p.detach() / 2 for name, p in params.items()}
        for s in shadow.values():
            s.zero_()
        offload.update_(shadow, params, 0, decay=0.5)
        with emajit.ema_scope(model, offload.fetch(shadow)):
            assert_close(model.state_dict(), expected)
            with pytest.raises(RuntimeError, match="outside of ema_scope"):
                offload.update_(shadow, params, 1, decay=0.5)

    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
    def test_in_a_captured_graph_it_is_refused(self) -> None:
        params = {"w": torch.ones(3, device="cuda")}
        shadow = offload.init(params, dtype=torch.bfloat16)
        step = torch.tensor(0, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="expected no capture"):
            offload.update_(shadow, params, step, decay=0.5, rounding="stochastic")
        assert bool((shadow["w"] == 1).all())
