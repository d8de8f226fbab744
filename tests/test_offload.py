"""Averages in host memory, as far as a machine without a CUDA device can show."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import optimizer as optimizers
from torch.testing import assert_close

import emajit
from bench import measure
from emajit import _compile, _host, _offload, checkpoint, functional, schedules
from emajit.fused import FusedOptimizer

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Stream:
    """In place of one of a device, which does late what it was given: when somebody has waited."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.pending: list[Callable[[], object]] = []

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")
        for write in self.pending:
            write()
        self.pending.clear()


class Device:
    """A device whose memory is the host's: what is launched is told, and done at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.recorded: list[Tensor] = []
        self.training, self.side = Stream(self.log, "training"), Stream(self.log, "side")
        self.capturing = False
        fakes: dict[str, Any] = {
            "Stream": lambda _: self.side,
            "current_stream": lambda _: self.training,
            "stream": self.launching,
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

        def record(tensor: Tensor, stream: Any) -> None:
            assert stream is self.side
            self.recorded.append(tensor)

        monkeypatch.setattr(Tensor, "record_stream", record)
        monkeypatch.setattr(_host, "_streams", {})
        monkeypatch.setattr(_host, "_hooks", ["no hook of optimizers"])

    @contextmanager
    def launching(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"launch in {stream.name}")
        yield

    def late(self) -> _host.Offloaded:
        """Zeros, which the device is about to make ones."""
        leaf = _host.offloaded(torch.zeros(2, 3), CUDA)
        stream: Any = _host.side_stream(CUDA)
        stream.pending.append(lambda: leaf.plain.fill_(1.0))
        return leaf


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield Device(monkeypatch)
    _host._is_used = False


def saved_and_loaded(leaf: Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"w": leaf}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["w"]


def in_safetensors(leaf: Tensor, folder: Path) -> Tensor:
    save_file({"w": leaf}, folder / "file")
    return load_file(folder / "file")["w"]


def in_a_checkpoint(leaf: Tensor, folder: Path) -> Tensor:
    checkpoint.save(folder / "file", {"w": leaf}, 1)
    return checkpoint.load(folder / "file", {"w": torch.zeros(2, 3)})[0]["w"]


@pytest.mark.parametrize(
    "read",
    [
        lambda leaf, _: leaf + 0,
        lambda leaf, _: torch._foreach_add([leaf], 0.0)[0],
        lambda leaf, _: torch.stack([leaf, leaf])[1],
        lambda leaf, _: torch.zeros(2, 3).copy_(leaf),
        lambda leaf, _: torch.from_numpy(leaf.numpy()),
        lambda leaf, _: torch.tensor(leaf.tolist()),
        lambda leaf, _: torch.utils.dlpack.from_dlpack(leaf),
        lambda leaf, _: leaf.to(torch.float32),
        lambda leaf, _: leaf.clone(),
        lambda leaf, _: copy.deepcopy(leaf),
        lambda leaf, _: pickle.loads(pickle.dumps(leaf)),
        lambda leaf, _: saved_and_loaded(leaf),
        lambda leaf, _: torch.full((2, 3), float(eval(repr(leaf), {"tensor": torch.tensor})[0, 0])),  # noqa: S307
        in_safetensors,
        in_a_checkpoint,
    ],
)
def test_whatever_reads_it_waits(device: Device, read: Any, tmp_path: Path) -> None:
    found = read(device.late(), tmp_path)
    assert "host waits for side" in device.log
    assert torch.equal(found, torch.ones(2, 3))


@pytest.mark.parametrize(
    "view",
    [
        lambda leaf: leaf[:1],
        lambda leaf: leaf.detach(),
        lambda leaf: leaf.cpu(),
        lambda leaf: leaf.t(),
        lambda leaf: leaf.chunk(2)[0],
        lambda leaf: leaf.unbind()[1],
        lambda leaf: next(iter(leaf)),
        lambda leaf: leaf.split(1)[1],
        copy.copy,
        lambda leaf: nn.ParameterDict({"w": nn.Parameter(leaf)}).state_dict()["w"],
    ],
)
def test_a_view_waits_too(device: Device, view: Any) -> None:
    leaf = device.late()
    viewed = view(leaf)
    device.side.pending.append(lambda: leaf.plain.fill_(2.0))
    assert type(viewed) is _host.Offloaded
    assert viewed.home == CUDA
    assert (viewed == 2).all()


def test_the_shape_is_a_size(device: Device) -> None:
    leaf: Any = device.late()
    assert type(leaf.shape) is type(leaf.size()) is torch.Size
    assert leaf.shape.numel() == 6


def test_a_copy_is_one_of_its_own(device: Device) -> None:
    leaf: Any = device.late()
    shadow = {"w": leaf, "tied": leaf}
    copied = copy.deepcopy(shadow)
    assert type(copied["w"]) is _host.Offloaded
    assert copied["w"] is copied["tied"]
    device.side.pending.append(lambda: leaf.plain.fill_(2.0))
    assert (leaf == 2).all()
    assert (copied["w"] == 1).all()
    assert type(leaf.clone()) is Tensor


def test_a_scope_and_a_module_wait(device: Device) -> None:
    model = nn.Linear(3, 2, bias=False)
    shadow: Any = {"weight": device.late()}
    shadow["weight"].home = CPU
    _host.side_stream(CPU)
    x = torch.ones(3)
    with emajit.ema_scope(model, shadow), torch.no_grad():
        assert torch.equal(model(x), torch.full((2,), 3.0))
    late: dict[str, Tensor] = {"weight": device.late()}
    assert torch.equal(torch.func.functional_call(model, late, (x,)), torch.full((2,), 3.0))


def test_a_loaded_shadow_is_where_like_is(device: Device, tmp_path: Path) -> None:
    like: Any = {"w": device.late()}
    checkpoint.save(tmp_path / "file", like, 3)
    checkpoint.save_sharded(tmp_path / "folder", like, 3)
    for loaded, step in (
        checkpoint.load(tmp_path / "file", like),
        checkpoint.load_sharded(tmp_path / "folder", like),
    ):
        assert step == 3
        assert type(loaded["w"]) is _host.Offloaded
        assert loaded["w"].home == CUDA
        assert torch.equal(loaded["w"], torch.ones(2, 3))


class TestPieces:
    """The same bits, however small the pieces are."""

    @pytest.fixture(params=[4, 16, 250, 2**22])
    def piece(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(_offload, "_PIECE", request.param)
        return int(request.param)

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
    @pytest.mark.parametrize(
        ("dtype", "of"),
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
            (torch.complex64, torch.complex64),
        ],
    )
    def test_are_the_whole(
        self, device: Device, piece: int, rounding: Any, nonfinite: Any, dtype: Any, of: Any
    ) -> None:
        assert piece
        params = {
            "scalar": torch.randn((), dtype=of),
            "empty": torch.randn(0, 3, dtype=of),
            "long": torch.randn(7, 31, dtype=of),
            "turned": torch.randn(9, 5, dtype=of).t(),
            "bad": torch.tensor([1.0, float("nan")] * 20, dtype=of),
        }
        start = {name: torch.randn_like(p, dtype=dtype) for name, p in params.items()}
        options: Any = {"rounding": rounding, "nonfinite": nonfinite}
        decays = [0.9, schedules.warmup(0.99)]
        expected = [copy.deepcopy(start), copy.deepcopy(start)]
        emajit.update_(expected, params, 5, decay=decays, backend="eager", **options)
        found = [copy.deepcopy(start), copy.deepcopy(start)]
        _, work = functional.prepare(found, params, 5, decays, **options, writable=True)
        _offload._average_away_(work, CPU)
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert device.log[0] == "side waits for training"

    def test_are_no_larger(self, piece: int) -> None:
        params = [torch.randn(n, 3) for n in (1, 2, 1, 100, 5)]
        shadow = [torch.randn_like(p) for p in params]
        _, work = functional.prepare(shadow, params, 0, 0.5, "nearest", "propagate", writable=True)
        counts = [sum(s.numel() for s in part.shadows) for part in _offload._pieces(work)]
        assert max(counts) <= piece
        assert sum(counts) == sum(s.numel() for s in shadow)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.11
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize(
    ("dtype", "of"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.complex128, torch.complex64),
        (torch.complex32, torch.complex64),
    ],
)
def test_a_piece_takes_at_most_80_bytes_a_number(
    nonfinite: Any, dtype: torch.dtype, of: torch.dtype
) -> None:
    shadow, params = [torch.zeros(2**16, dtype=dtype)], [torch.ones(2**16, dtype=of)]
    _, work = functional.prepare(shadow, params, 3, 0.9, "stochastic", nonfinite, writable=True)
    with torch.no_grad():
        peak = measure.peak_memory(lambda: _compile.average_(work, "eager"), "cpu")
    assert shadow[0].nbytes + peak <= 80 * 2**16
    assert _offload._PIECE * 80 < 2**28


class TestOrder:
    """Who waits for whom."""

    def away(self, work: Any) -> None:
        _offload._average_away_(work, CPU)

    def prepared(self, params: Any, **options: Any) -> Any:
        given: Any = {"step": 0, "decay": 0.5, "rounding": "nearest"} | options
        shadow = {name: torch.zeros_like(p.detach()) for name, p in params.items()}
        return functional.prepare(shadow, params, nonfinite="propagate", writable=True, **given)[1]

    def test_the_training_waits_for_what_no_optimizer_writes_only(self, device: Device) -> None:
        buffer, p = torch.ones(2), nn.Parameter(torch.ones(3))
        work = self.prepared({"p": p, "buffer": buffer})
        self.away(work)
        begin = ["side waits for training", "launch in side"]
        assert device.log == [*begin, "training waits for side", "launch in side"]
        assert [s.tolist() for s in work.shadows] == [[0.5] * 3, [0.5] * 2]
        device.log.clear()
        self.away(self.prepared({"p": p}))
        assert "training waits for side" not in device.log
        assert any(t is p for t in device.recorded)

    def test_what_is_raised_in_between_leaves_nothing_unwaited(
        self, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raising(*_: object) -> None:
            raise torch.OutOfMemoryError

        p = nn.Parameter(torch.ones(3))
        monkeypatch.setattr(_offload, "_average_piece_", raising)
        with pytest.raises(torch.OutOfMemoryError):
            self.away(self.prepared({"p": p}))
        assert any(t is p for t in device.recorded)
        device.log.clear()
        _host.hold_training()
        assert device.log == ["training waits for side"]
        assert _host.offloaded(torch.ones(1), CPU).item() == 1
        assert device.log[1:] == ["host waits for side"]

    def test_the_step_is_read_before(self, device: Device, monkeypatch: Any) -> None:
        step, p = torch.tensor(3), nn.Parameter(torch.randn(1000).bfloat16())
        work = self.prepared({"p": p}, step=step, rounding="stochastic")
        expected = {"p": torch.zeros_like(p.detach())}
        emajit.update_(expected, {"p": p}, 3, decay=0.5, rounding="stochastic", backend="eager")
        monkeypatch.setattr(device.side, "wait_stream", lambda _: step.add_(1))
        self.away(work)
        assert torch.equal(work.shadows[0], expected["p"])

    def test_in_a_captured_graph_it_is_refused(self, device: Device) -> None:
        device.capturing = True
        with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph"):
            self.away(self.prepared({"p": nn.Parameter(torch.ones(3))}))
        _host.side_stream(CPU)
        _host.hold_training()
        assert not device.log

    @pytest.mark.parametrize("fused", [False, True])
    def test_optimizers_wait_before_they_write(
        self, device: Device, monkeypatch: pytest.MonkeyPatch, fused: bool
    ) -> None:
        monkeypatch.setattr(_host, "_hooks", [])
        before = [*optimizers._global_optimizer_pre_hooks]
        _host.side_stream(CPU)
        p = nn.Parameter(torch.ones(1))
        optimizer: Any = torch.optim.SGD([p], lr=0.5)
        if fused:
            shadow = emajit.init({"p": p})
            ours = FusedOptimizer(optimizer, shadow, {"p": p}, decay=0.5, backend="aot_eager")
        try:
            for step in range(3):
                p.grad = torch.ones(1)
                device.log.clear()
                ours.step(step) if fused else optimizer.step()
                assert "training waits for side" in device.log
            assert not fused or [*filter(None, ours._graphs.values())]  # the hook did not part them
        finally:
            hooks = optimizers._global_optimizer_pre_hooks
            for key in set(hooks) - set(before):
                del hooks[key]
        assert p.item() == -0.5

    def test_what_emajit_writes_waits(self, device: Device) -> None:
        _host.side_stream(CPU)
        model = nn.Linear(2, 2)
        ema = emajit.LitEma(model)
        ema.copy_to(model)
        assert device.log == ["training waits for side"]


def test_update_takes_what_is_away_without_waiting(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    away: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(_offload, "_average_away_", lambda *call: away.append(call))
    meta = torch.device("meta")  # stands for another device
    held, here = torch.zeros(3), torch.zeros(2)
    shadow: Any = {"away": _host.offloaded(held, meta), "here": here, "tied": None}
    shadow["tied"] = shadow["away"]
    there = torch.ones(3, device=meta)
    params = {"away": there, "here": torch.ones(2), "tied": there}
    assert emajit.update_(shadow, params, 0, decay=0.5) is shadow
    assert not device.log
    ((work, home),) = away
    assert home == meta
    assert [s.data_ptr() for s in work.shadows] == [held.data_ptr()]
    assert torch.equal(here, torch.full((2,), 0.5))

    with pytest.raises(ValueError, match=r"params\['away'\]: expected device meta .* found cpu"):
        emajit.update_(shadow, params | {"away": held, "tied": held}, 0, decay=0.5)
    with pytest.raises(ValueError, match="found one in host memory, which only update_ averages"):
        emajit.update(shadow, params, 0, decay=0.5)
    weight = nn.Parameter(there)
    weight.grad = torch.ones_like(there)
    optimizer = torch.optim.SGD([weight])
    fused = FusedOptimizer(optimizer, {"away": shadow["away"]}, {"away": weight}, decay=0.5)
    with pytest.raises(ValueError, match="found one in host memory, which only update_ averages"):
        fused.step(0)


def test_without_a_device_it_is_the_plain_path() -> None:
    params: Any = {"w": torch.randn(4, 3).t(), "n": torch.tensor(3), "none": None}
    shadow = emajit.init(params, dtype=torch.float64, device="cpu", pin_memory=True)
    assert_close(shadow, emajit.init(params, dtype=torch.float64), rtol=0, atol=0)
    assert type(shadow["w"]) is Tensor
    assert shadow["w"].stride() == params["w"].stride()
    tied = emajit.init([params["w"], params["w"]], device=torch.device("cpu"))
    assert tied[0] is tied[1]
    emajit.update_(shadow, params, 0, decay=0.5)


def test_wrong_options() -> None:
    params = {"w": torch.zeros(2)}
    for device in ("cuda", "gpu"):
        with pytest.raises(ValueError, match=rf"device: expected cpu, or none .* found {device}"):
            emajit.init(params, device=device)
    assert emajit.init(params, device="cpu:0")["w"].is_cpu
    with pytest.raises(ValueError, match="pin_memory: expected device='cpu' with it, found none"):
        emajit.init(params, pin_memory=True)
    with pytest.raises(ValueError, match=r"device: expected that of params\['w'\] .* for meta"):
        emajit.init({"w": torch.zeros(2, device="meta")}, device="cpu")
