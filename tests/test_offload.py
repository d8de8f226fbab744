"""Averages in host memory, as far as a machine without a CUDA device can show."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from bench import measure
from emajit import _compile, _host, _offload, checkpoint, functional, schedules
from emajit.fused import FusedOptimizer

CUDA = torch.device("cuda", 0)


class Lane:
    """In place of the stream of a device: what it writes is there when somebody has waited."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], object]] = []
        self.waits = self.held = 0

    @contextmanager
    def running(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        assert all(isinstance(tensor, Tensor) for tensor in inputs)
        yield

    def hold_training(self) -> None:
        self.held += 1

    def hold_host(self) -> None:
        self.waits += 1
        for write in self.pending:
            write()
        self.pending.clear()


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    made = Lane()
    monkeypatch.setattr(_host, "lane_of", lambda _: made)
    yield made
    _host._is_used = False


def late(lane: Lane) -> _host.Offloaded:
    """Zeros, which the device is about to make ones."""
    leaf = _host.offloaded(torch.zeros(2, 3), CUDA)
    lane.pending.append(lambda: leaf.plain.fill_(1.0))
    return leaf


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
def test_whatever_reads_it_waits(lane: Lane, read: Any, tmp_path: Path) -> None:
    found = read(late(lane), tmp_path)
    assert lane.waits
    assert type(found) is Tensor
    assert torch.equal(found, torch.ones(2, 3))


def test_a_scope_and_a_module_wait(lane: Lane) -> None:
    model = nn.Linear(3, 2, bias=False)
    shadow: Any = {"weight": _host.offloaded(torch.zeros(2, 3), torch.device("cpu"))}
    lane.pending.append(lambda: shadow["weight"].plain.fill_(1.0))
    x = torch.ones(3)
    with emajit.ema_scope(model, shadow), torch.no_grad():
        assert torch.equal(model(x), torch.full((2,), 3.0))
    assert torch.equal(torch.func.functional_call(model, {"weight": late(lane)}, (x,)), 3 * x[:2])


def test_a_loaded_shadow_is_where_like_is(lane: Lane, tmp_path: Path) -> None:
    like: Any = {"w": late(lane)}
    checkpoint.save(tmp_path / "file", like, 3)
    loaded, _ = checkpoint.load(tmp_path / "file", like)
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
        self, lane: Lane, piece: int, rounding: Any, nonfinite: Any, dtype: Any, of: Any
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
        _offload._average_away_(work, torch.device("cpu"))
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def test_are_no_larger(self, piece: int) -> None:
        params = [torch.randn(n, 3) for n in (1, 2, 1, 100, 5)]
        shadow = [torch.randn_like(p) for p in params]
        _, work = functional.prepare(shadow, params, 0, 0.5, "nearest", "propagate", writable=True)
        counts = [sum(s.numel() for s in part.shadows) for part in _offload._pieces(work)]
        assert max(counts) <= piece
        assert sum(counts) == sum(s.numel() for s in shadow)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
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


def test_update_takes_what_is_away_without_waiting(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
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
    assert not lane.waits
    ((work, home),) = away
    assert home == meta
    assert [s.data_ptr() for s in work.shadows] == [held.data_ptr()]
    assert torch.equal(here, torch.full((2,), 0.5))

    with pytest.raises(ValueError, match=r"params\['away'\]: expected device meta .* found cpu"):
        emajit.update_(shadow, params | {"away": held, "tied": held}, 0, decay=0.5)
    with pytest.raises(ValueError, match="found one in host memory, which only update_ averages"):
        emajit.update(shadow, params, 0, decay=0.5)
    weights = [nn.Parameter(p) for p in (there, params["here"])]
    fused = FusedOptimizer(
        torch.optim.SGD(weights), {"away": shadow["away"]}, {"away": weights[0]}, decay=0.5
    )
    weights[0].grad = torch.ones_like(there)
    with pytest.raises(ValueError, match="found one in host memory, which only update_ averages"):
        fused.step(0)


def test_optimizers_wait_before_they_write(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, p = Lane(), nn.Parameter(torch.ones(1))
    monkeypatch.setattr(_host, "_lanes", {CUDA: lane})
    held = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            held.append(lane.held)
            return super().step(closure)

    _host._hold_optimizers()
    p.grad = torch.ones(1)
    Watching([p], lr=0.5).step()
    assert held == [1]
    assert p.item() == 0.5


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
    with pytest.raises(ValueError, match=r"device: expected cpu, or none .* found cuda"):
        emajit.init(params, device="cuda")
    with pytest.raises(ValueError, match="pin_memory: expected device='cpu' with it, found none"):
        emajit.init(params, pin_memory=True)
    with pytest.raises(ValueError, match=r"device: expected that of params\['w'\] .* for meta"):
        emajit.init({"w": torch.zeros(2, device="meta")}, device="cpu")
