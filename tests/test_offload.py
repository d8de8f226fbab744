"""Averages in host memory, as far as a machine without a CUDA device can show."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections import OrderedDict
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
from emajit import checkpoint, offload, schedules, scope
from emajit.fused import FusedOptimizer

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class There(Tensor):
    """A tensor in the memory of the host that says that it is on a device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = CUDA
    is_cpu = False


def there(tensor: Tensor, *, requires_grad: bool = False) -> Tensor:
    """The same memory, on the device."""
    return tensor.as_subclass(There).requires_grad_(requires_grad)


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
        self.capturing = self.full = False
        # The numbers that were copied to the device: all of them, those there now, and at most.
        self.copied = self.held = self.peak = 0
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

        to: Any = Tensor.to
        full = torch.full

        def moved(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            is_there = isinstance(tensor, There)
            comes = args[:1] == (CUDA,) and not is_there
            goes = args[:1] == (CPU,) and is_there
            if (comes or goes) and not options.get("non_blocking"):
                self.log.append("host waits for training")
            if not comes:
                return tensor if args[:1] == (CUDA,) else to(tensor, *args, **options)
            if self.full:
                raise torch.OutOfMemoryError
            copied = there(to(tensor, CPU, *args[1:], **options, copy=True))
            self.count(copied.numel())
            weakref.finalize(copied, self.count, -copied.numel())
            return copied

        def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
            if device != CUDA:
                return full(*args, device=device, **options)
            return there(full(*args, **options))

        monkeypatch.setattr(torch, "full", made)
        monkeypatch.setattr(Tensor, "to", moved)
        monkeypatch.setattr(Tensor, "record_stream", record)
        monkeypatch.setattr(offload, "_streams", {})
        monkeypatch.setattr(offload, "_hooks", [])
        monkeypatch.setattr(scope, "before_writing", [])
        monkeypatch.setattr(optimizers, "_global_optimizer_pre_hooks", OrderedDict())

    def count(self, numbers: int) -> None:
        self.copied += max(numbers, 0)
        self.held += numbers
        self.peak = max(self.peak, self.held)

    @contextmanager
    def launching(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"launch in {stream.name}")
        yield

    def update(self) -> Any:
        """A shadow of zeros after a first update, of which nothing is told."""
        params = {"w": there(torch.zeros(2, 3), requires_grad=True)}
        shadow = offload.update_(offload.init(params), params, 0, decay=0.5)
        self.log.clear()
        return shadow

    def late(self) -> Any:
        """Zeros, which the device is about to make ones."""
        leaf = self.update()["w"]
        self.side.pending.append(lambda: leaf.raw.fill_(1.0))
        return leaf


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


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
    device.side.pending.append(lambda: leaf.raw.fill_(2.0))
    assert type(viewed) is offload.Offloaded
    assert viewed.home == CUDA
    assert (viewed == 2).all()


def test_the_shape_is_a_size(device: Device) -> None:
    leaf = device.late()
    assert type(leaf.shape) is type(leaf.size()) is torch.Size
    assert leaf.shape.numel() == 6


def test_a_copy_is_one_of_its_own(device: Device) -> None:
    leaf = device.late()
    shadow = {"w": leaf, "tied": leaf}
    copied = copy.deepcopy(shadow)
    assert type(copied["w"]) is offload.Offloaded
    assert copied["w"] is copied["tied"]
    device.side.pending.append(lambda: leaf.raw.fill_(2.0))
    assert (leaf == 2).all()
    assert (copied["w"] == 1).all()
    assert type(leaf.clone()) is Tensor


def test_a_scope_and_a_module_wait(device: Device) -> None:
    model = nn.Linear(3, 2, bias=False)
    x = torch.ones(3)
    fetched = offload.fetch({"weight": device.late(), "none": None, "buffer": x})
    assert "host waits for side" in device.log
    assert fetched["none"] is None
    assert fetched["buffer"] is x
    assert isinstance(fetched["weight"], There)
    averages = {"weight": fetched["weight"].as_subclass(Tensor)}
    with emajit.ema_scope(model, averages), torch.no_grad():
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
        assert type(loaded["w"]) is offload.Offloaded
        assert loaded["w"].home == CUDA
        assert torch.equal(loaded["w"], torch.ones(2, 3))


class TestPieces:
    """The same bits, however small the pieces are."""

    @pytest.fixture(params=[4, 16, 250, 2**22])
    def piece(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(offload, "_PIECE", request.param)
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
        away = {name: there(p) for name, p in params.items()}
        start = {name: torch.randn_like(p, dtype=dtype) for name, p in params.items()}
        options: Any = {"rounding": rounding, "nonfinite": nonfinite}
        decays: list[Any] = [0.9, schedules.warmup(0.99)]
        expected = [copy.deepcopy(start), copy.deepcopy(start)]
        emajit.update_many_(expected, params, 5, decays=decays, backend="eager", **options)
        found = [offload.init(away, dtype=dtype.to_real()) for _ in decays]
        for shadow in found:
            for name, leaf in shadow.items():
                assert leaf.dtype == dtype
                assert leaf.stride() == params[name].stride()
                leaf.copy_(start[name])
        assert offload.update_many_(found, away, 5, decays=decays, **options) is found
        assert device.log[0] == "side waits for training"
        assert_close([copy.copy(s) for s in found], expected, rtol=0, atol=0, equal_nan=True)

    def test_are_no_larger(self, device: Device, piece: int) -> None:
        params = [there(torch.randn(n, 3)) for n in (1, 2, 1, 100, 5)]
        shadow = offload.init(params)
        offload.update_(shadow, params, 0, decay=0.5)
        assert device.peak <= piece
        assert device.copied == sum(s.numel() for s in shadow)


@pytest.mark.usefixtures("device")
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
    params = [there(torch.ones(2**16, dtype=of))]
    shadow = offload.init(params, dtype=dtype.to_real())
    assert shadow[0].dtype == dtype

    def update() -> None:
        options: Any = {"rounding": "stochastic", "nonfinite": nonfinite}
        offload.update_(shadow, params, 3, decay=0.9, **options)

    assert shadow[0].nbytes < measure.peak_memory(update, "cpu") <= 80 * 2**16
    assert offload._PIECE * 80 < 2**28


class TestOrder:
    """Who waits for whom."""

    def test_the_training_waits_for_what_no_optimizer_writes_only(self, device: Device) -> None:
        p, buffer = there(torch.ones(3), requires_grad=True), there(torch.ones(2))
        params = {"p": p, "buffer": buffer}
        shadow = offload.init({name: there(torch.zeros_like(t)) for name, t in params.items()})
        offload.update_(shadow, params, 0, decay=0.5)
        begin = ["side waits for training", "launch in side"]
        assert device.log == [*begin, "training waits for side", "launch in side"]
        assert [s.tolist() for s in shadow.values()] == [[0.5] * 3, [0.5] * 2]
        device.log.clear()
        offload.update_({"p": shadow["p"]}, {"p": p}, 0, decay=0.5)
        assert "training waits for side" not in device.log
        assert any(t is p for t in device.recorded)

    def test_what_is_raised_in_between_leaves_nothing_unwaited(self, device: Device) -> None:
        params = {"p": there(torch.ones(3), requires_grad=True)}
        shadow = offload.init(params)
        device.full = True
        with pytest.raises(torch.OutOfMemoryError):
            offload.update_(shadow, params, 0, decay=0.5)
        assert any(t is params["p"] for t in device.recorded)
        device.log.clear()
        scope.prepare_to_write()
        assert device.log == ["training waits for side"]
        assert shadow["p"][0].item() == 1
        assert {*device.log[1:]} == {"host waits for side"}

    def test_the_step_is_read_before(self, device: Device, monkeypatch: Any) -> None:
        step, params = torch.tensor(3), {"p": torch.randn(1000).bfloat16()}
        options: Any = {"decay": 0.5, "rounding": "stochastic"}
        zeros = {"p": torch.zeros_like(params["p"])}
        expected = emajit.update(zeros, params, 3, backend="eager", **options)
        shadow = offload.init({"p": there(zeros["p"])})
        monkeypatch.setattr(device.side, "wait_stream", lambda _: step.add_(1))
        away = {"p": there(params["p"], requires_grad=True)}
        offload.update_(shadow, away, step, **options)
        assert step.item() == 4
        assert torch.equal(shadow["p"], expected["p"])

    def test_in_a_captured_graph_it_is_refused(self, device: Device) -> None:
        shadow = device.update()
        device.capturing = True
        with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph"):
            offload.update_(shadow, {"w": there(torch.ones(2, 3))}, 0, decay=0.5)
        scope.prepare_to_write()
        assert not device.log

    @pytest.mark.parametrize("fused", [False, True])
    def test_optimizers_wait_before_they_write(
        self, device: Device, monkeypatch: pytest.MonkeyPatch, fused: bool
    ) -> None:
        device.update()
        monkeypatch.delattr(Tensor, "to")  # ours, which Dynamo cannot trace
        p = nn.Parameter(torch.ones(1))
        optimizer: Any = torch.optim.SGD([p], lr=0.5)
        if fused:
            shadow = emajit.init({"p": p})
            ours = FusedOptimizer(optimizer, shadow, {"p": p}, decay=0.5, backend="aot_eager")
        for step in range(3):
            p.grad = torch.ones(1)
            device.log.clear()
            ours.step(step) if fused else optimizer.step()
            assert "training waits for side" in device.log
        assert not fused or [*filter(None, ours._graphs.values())]  # the hook did not part them
        assert p.item() == -0.5

    def test_what_emajit_writes_waits(self, device: Device) -> None:
        device.update()
        model = nn.Linear(2, 2)
        ema = emajit.LitEma(model)
        ema.copy_to(model)
        assert device.log == ["training waits for side"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("step", [0, torch.tensor(0), there(torch.tensor(0))])
def test_update_takes_what_is_away_without_waiting(
    device: Device, rounding: Any, step: int | Tensor
) -> None:
    zeros = there(torch.zeros(3))
    shadow: Any = offload.init({"away": zeros, "tied": zeros, "none": None})
    shadow["resident"] = there(torch.zeros(2))
    assert type(shadow["away"]) is offload.Offloaded
    assert shadow["tied"] is shadow["away"]
    w = there(torch.ones(3))
    params = {"away": w, "tied": w, "none": None, "resident": there(torch.ones(2))}
    decay = schedules.warmup(0.5)
    assert offload.update_(shadow, params, step, decay=decay, rounding=rounding) is shadow
    assert device.log
    assert not any(entry.startswith("host waits") for entry in device.log)
    assert_close(shadow["away"].raw, torch.full((3,), 9 / 11))  # what is tied, once
    assert torch.equal(shadow["resident"], shadow["away"].raw[:2])


@pytest.mark.usefixtures("device")
def test_parameters_on_the_host_may_be_among_them() -> None:
    params = {"away": there(torch.zeros(3)), "here": torch.zeros(2)}
    params |= {"empty away": there(torch.zeros(0)), "empty here": torch.zeros(0)}
    shadow = offload.init(params)
    away = [name for name, s in shadow.items() if type(s) is offload.Offloaded]
    assert away == ["away", "empty away"]
    ones = {name: p.add(1) if p.is_cpu else there(p.add(1)) for name, p in params.items()}
    offload.update_(shadow, ones, 0, decay=0.5)
    assert {name: s.tolist() for name, s in shadow.items() if s.numel()} == {
        "away": [0.5] * 3,
        "here": [0.5] * 2,
    }


@pytest.mark.usefixtures("device")
def test_a_parameter_on_another_device_is_refused() -> None:
    away = there(torch.zeros(3))
    params = {"here": torch.zeros(2), "away": away, "tied": away}
    shadow, other = offload.init(params), offload.init(params)
    moved = {name: torch.ones_like(p) for name, p in params.items()}
    moved["tied"] = moved["away"]
    with pytest.raises(ValueError, match=r"^params\['away'\]: expected device cuda:0 .* found cpu"):
        offload.update_(shadow, moved, 0, decay=0.5)
    with pytest.raises(ValueError, match=r"^params\['away'\]: expected device cuda:0 .* found cpu"):
        offload.update_many_([shadow, other], moved, 0, decays=[0.5, 0.5])
    moved |= {"here": there(torch.ones(2)), "away": there(torch.ones(3))}
    moved["tied"] = moved["away"]
    with pytest.raises(ValueError, match=r"^params\['here'\]: expected device cpu .* found cuda:0"):
        offload.update_(shadow, moved, 0, decay=0.5)

    message = r"params\['away'\]: expected device cpu as in shadow, found cuda:0"
    moved["here"] = torch.ones(2)
    for update in (emajit.update, emajit.update_):
        with pytest.raises(ValueError, match=message):
            update(shadow, moved, 0, decay=0.5)
    for several in (emajit.update_many, emajit.update_many_):
        with pytest.raises(ValueError, match=message):
            several([shadow, other], moved, 0, decays=[0.5, 0.5])
    weight = there(torch.zeros(3), requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight])
    fused = FusedOptimizer(optimizer, {"away": shadow["away"]}, {"away": weight}, decay=0.5)
    with pytest.raises(ValueError, match=message):
        fused.step(0)
    written = [*shadow.values(), *other.values(), weight.detach()]
    assert not any(bool(t.any()) for t in written)


def test_without_a_device_it_is_the_plain_path() -> None:
    model = nn.Linear(2, 2)
    own = dict(model.named_parameters())
    params: Any = {"w": torch.randn(4, 3).t(), "n": torch.tensor(3), "none": None, **own}
    shadow = offload.init(params, dtype=torch.float64, pin_memory=True)
    expected = emajit.init(params, dtype=torch.float64)
    assert_close(shadow, expected, rtol=0, atol=0)
    assert type(shadow["w"]) is Tensor
    assert shadow["w"].stride() == params["w"].stride()
    assert not shadow["weight"].requires_grad
    tied = offload.init([params["w"], params["w"]])
    assert tied[0] is tied[1]
    params["w"] = torch.randn(4, 3).t()
    offload.update_(shadow, params, 0, decay=0.5)
    emajit.update_(expected, params, 0, decay=0.5)
    assert_close(shadow, expected, rtol=0, atol=0)
    assert offload.fetch(shadow) == shadow
    averages = {name: s for name, s in shadow.items() if name in own}
    with emajit.ema_scope(model, averages), pytest.raises(RuntimeError, match="outside of"):
        offload.update_(averages, own, 0, decay=0.5)


def test_wrong_options() -> None:
    params: Any = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"params\['m'\]: expected it on cpu or cuda, found meta"):
        offload.init(params | {"m": torch.zeros(2, device="meta")})
    with pytest.raises(TypeError, match=r"params\['w'\]: expected a tensor or None, found float"):
        offload.init({"w": 0.0})
    with pytest.raises(
        ValueError, match=r"dtype: expected a floating-point dtype such as .*, found torch\.int32"
    ):
        offload.init(params, dtype=torch.int32)
    shadow = offload.init(params)
    with pytest.raises(ValueError, match="shadows: expected 2, as decays, found 1"):
        offload.update_many_([shadow], params, 0, decays=[0.5, 0.5])
