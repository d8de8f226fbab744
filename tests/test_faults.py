"""An exception at every line of emajit's own code: what it touches is all old or all new."""

from __future__ import annotations

import copy
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

import emajit
from emajit import LitEma, checkpoint, scope
from tests import shards

SOURCES = str(Path(emajit.__file__).parent), str(Path(nn.__file__).parent / "modules")


class Fault(BaseException):
    """What nothing expects, as a KeyboardInterrupt at any moment."""


def faults(act: Callable[[], object]) -> Iterator[str]:
    """Run `act` again and again, with a fault at its first line, its second, ... until it is done.

    Yields after each fault the line that it came at.
    """
    for at in itertools.count(1):
        lines = itertools.count(1)
        where = ""

        def trace(frame: FrameType, event: str, _: Any, at: int = at, lines: Any = lines) -> Any:
            nonlocal where
            if not frame.f_code.co_filename.startswith(SOURCES):
                return None
            if event == "line" and next(lines) == at:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise Fault
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            # Python itself leaves a `with` open if the fault comes at its very end.
            with torch.enable_grad():
                act()
        except Fault:
            sys.settrace(before)
            yield where
        else:
            return
        finally:
            sys.settrace(before)


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 1))


TREES = {
    "float32": lambda: {name: torch.ones(3) * i for i, name in enumerate("abc")},
    "several dtypes": lambda: {
        "a": torch.ones(3),
        "b": torch.ones(3).bfloat16(),
        "c": torch.ones(2) * 1j,
        "d": torch.tensor([1, 2]),
    },
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_update_in_place(tree: str, several: bool) -> None:
    """Before the first write nothing has changed; one operator writes all float32 leaves."""
    params = {name: leaf * 2 for name, leaf in TREES[tree]().items()}
    first: Any = [emajit.init(TREES[tree]()) for _ in range(2)] if several else TREES[tree]()
    options: dict[str, Any] = {"decays": [0.5, 0.75]} if several else {"decay": 0.5}
    functions: Any = (
        (emajit.update_many, emajit.update_many_) if several else (emajit.update, emajit.update_)
    )
    update, update_ = functions
    expected = update(first, params, 0, **options)
    shadow = copy.deepcopy(first)

    def leaves(tree: Any) -> list[Tensor]:
        return [leaf for part in (tree if several else [tree]) for leaf in part.values()]

    old, new = values(leaves(first)), values(leaves(expected))
    whole, mixed = 0, set()
    for where in faults(lambda: update_(shadow, params, 0, **options)):
        found = leaves(shadow)
        if same(old, found) or same(new, found):
            whole += 1
        else:
            mixed.add(where.split(":")[0])
            assert all(
                torch.equal(f, o) or torch.equal(f, n)
                for f, o, n in zip(found, old, new, strict=True)
            )
        for leaf, value in zip(found, old, strict=True):
            leaf.copy_(value)
    assert whole > 20
    assert mixed <= (set() if tree == "float32" else {"_kernels.py", "_compile.py"})
    assert_close(shadow, expected, rtol=0, atol=0)


def test_pure_update_never_writes() -> None:
    shadow, params = TREES["several dtypes"](), TREES["several dtypes"]()
    before = values(shadow.values()) + values(params.values())
    count = 0
    for _ in faults(lambda: emajit.update(shadow, params, 0, decay=0.5)):
        count += 1
        assert same(before, [*shadow.values(), *params.values()])
    assert count > 20


def prepared(dtype: torch.dtype | None = None) -> tuple[nn.Module, LitEma]:
    net = model()
    ema = LitEma(net, decay=0.5, dtype=dtype)
    for p in net.parameters():
        p.data.add_(1)
    ema(net)
    return net, ema


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_copy_to(dtype: torch.dtype | None) -> None:
    net, ema = prepared(dtype)
    old, averages = values(net.parameters()), values(list(ema.buffers())[2:])
    outcomes = set()
    for _ in faults(lambda: ema.copy_to(net)):
        copied = same([a.float() for a in averages], list(net.parameters()))
        assert copied or same(old, list(net.parameters()))
        outcomes.add(copied)
        for p, value in zip(net.parameters(), old, strict=True):
            p.data.copy_(value)
    assert False in outcomes
    assert same([a.float() for a in averages], list(net.parameters()))
    assert same(averages, list(ema.buffers())[2:])


def test_store_and_restore() -> None:
    net, ema = prepared()
    old = values(net.parameters())
    for _ in faults(lambda: ema.store(net.parameters())):
        assert ema.collected_params == [] or same(old, ema.collected_params)
        ema.collected_params = []
    ema.copy_to(net)
    for _ in faults(lambda: ema.restore(net.parameters())):
        if ema.collected_params:  # nothing is back, so that one can try again
            assert same(old, ema.collected_params)
            assert not same(old, list(net.parameters()))
        else:
            assert same(old, list(net.parameters()))
            ema.store(net.parameters())
        ema.copy_to(net)
    assert same(old, list(net.parameters()))


def test_litema_forward() -> None:
    net, ema = prepared()
    start = copy.deepcopy(ema.state_dict())
    expected = copy.deepcopy(ema)
    expected(net)
    old, new = values(list(ema.buffers())[2:]), values(list(expected.buffers())[2:])
    for where in faults(lambda: ema(net)):
        averages = list(ema.buffers())[2:]
        is_updated = same(new, averages)
        assert is_updated or same(old, averages)
        assert ema.num_updates.item() == (2 if is_updated else 1), where
        ema.load_state_dict(start)
    assert same(new, list(ema.buffers())[2:])


def test_half_an_update_does_not_count() -> None:
    net = nn.Linear(2, 2)
    net.weight.data = net.weight.data.bfloat16()  # computed by another kernel than the bias
    ema = LitEma(net, dtype=torch.float32)
    ema(net)  # from now on the plan is in the cache
    start, seen = copy.deepcopy(ema.state_dict()), set()
    nn.init.ones_(net.weight)
    nn.init.ones_(net.bias)
    for where in faults(lambda: ema(net)):
        keys = "weight", "bias"
        written = tuple(not torch.equal(start[key], ema.get_buffer(key)) for key in keys)
        assert ema.num_updates.item() == 1 + written[-1], where
        seen.add(written)
        ema.load_state_dict(start)
    assert seen == {(False, False), (True, False), (True, True)}


def test_an_update_of_shards_counts_once_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with shards.as_rank(0, 2):
        net = nn.Linear(4, 4)
        shard = DTensor.from_local(torch.zeros(2, 4), shards.line(2), [Shard(0)], run_check=False)
        net.weight = nn.Parameter(shard)
        ema = LitEma(net)
        monkeypatch.setattr(ema, "_finish_update", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ema(net)
    assert ema.num_updates.item() == 1


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("hosted", [False, True])
def test_loading_a_state_dict(assign: bool, hosted: bool) -> None:
    net, ema = prepared()
    state = copy.deepcopy(LitEma(net).state_dict())
    whole = values(ema.buffers())
    host = nn.ModuleDict({"ema": ema})
    hosted_state = {f"ema.{key}": value for key, value in state.items()}

    def load() -> None:
        if hosted:
            host.load_state_dict(hosted_state, assign=assign)
        else:
            ema.load_state_dict(state, assign=assign)

    for where in faults(load):
        loaded = same(list(state.values()), list(ema.buffers()))
        assert loaded or same(whole, list(ema.buffers())), where
        for buffer, value in zip(ema.buffers(), whole, strict=True):
            buffer.copy_(value)
    assert same(list(state.values()), list(ema.buffers()))


def test_a_signal_while_a_state_is_loaded() -> None:
    net = nn.Sequential(*[nn.Linear(1, 1) for _ in range(100)])
    ema, other = LitEma(net), LitEma(net)
    for p in net.parameters():
        p.data.add_(1)
    other(net)
    old, new = (copy.deepcopy(each.state_dict()) for each in (ema, other))
    start = time.perf_counter()
    ema.load_state_dict(new)
    took = time.perf_counter() - start
    interrupted = 0

    def ring(*_: object) -> None:
        raise Fault

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for i in range(60):
            ema.load_state_dict(old)
            try:
                signal.setitimer(signal.ITIMER_REAL, took * (i + 1) / 50)
                ema.load_state_dict(new)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Fault:
                interrupted += 1
            torch.set_grad_enabled(True)  # Python may leave a `no_grad` of torch's open
            found = [*ema.state_dict().values()]
            assert same([*old.values()], found) or same([*new.values()], found)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


@pytest.mark.parametrize("which", ["function", "method"])
def test_scope(which: str) -> None:
    net, ema = prepared()
    net.register_buffer("seen", torch.zeros(2))
    shadow = {name: p.detach() + 1 for name, p in net.named_parameters()}
    shadow["seen"] = torch.ones(2)
    objects, old = [*net.parameters(), *net.buffers()], values([*net.parameters(), *net.buffers()])
    addresses = [t.data_ptr() for t in objects]
    versions = [t._version for t in objects]
    entered: list[int] = []

    def use() -> None:
        function = which == "function"
        with emajit.ema_scope(net, shadow) if function else ema.ema_scope(net):
            entered.append(1)
            assert objects[0].data_ptr() != addresses[0]

    count = 0
    for _ in faults(use):
        count += 1
        assert [t.data_ptr() for t in objects] == addresses
        assert [t._version for t in objects] == versions
        assert same(old, objects)
        assert not scope._inside
    assert count > 20
    assert len(entered) > 2  # on the way out, too
    assert [t.data_ptr() for t in objects] == addresses


def test_a_parameter_that_refuses_its_weights_keeps_no_other_from_its_own() -> None:
    net, ema = prepared()
    old, stuck = values(net.parameters()), list(net.parameters())[1]

    class Refuse(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func == Tensor.data.__set__ and args[0] is stuck:  # type: ignore[attr-defined]
                raise Fault
            return func(*args, **kwargs or {})

    inside = ema.ema_scope(net)
    inside.__enter__()
    with pytest.raises(Fault), Refuse():
        inside.__exit__(None, None, None)
    for p, value in zip(net.parameters(), old, strict=True):
        assert torch.equal(p, value) or p is stuck


# A fault between opening a file and its `with` leaves it to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loading_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    like, saved = TREES["several dtypes"](), TREES["several dtypes"]()
    for leaf in like.values():
        leaf.zero_()
    checkpoint.save(path, saved, 3)
    before = values(like.values())
    loaded: list[Any] = []
    for _ in faults(lambda: loaded.append(checkpoint.load(path, like))):
        assert same(before, list(like.values()))
        assert not loaded
    assert_close(loaded[0], (saved, 3))
