"""Averages of what is spread over processes: each of `ranks.CHECKS`, on real ones."""

from __future__ import annotations

import errno
import functools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.testing import assert_close

import emajit
from emajit import checkpoint
from emajit.checkpoint import sharded
from tests import ranks, torchrun

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


Told = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def told(shared: Path) -> Told:
    """Run the quick checks, or the slow ones, once: what each has raised, and by how many."""

    @functools.cache
    def run(which: str) -> dict[str, str]:
        folder = shared / which
        folder.mkdir()
        world = max(n for _, n in (ranks.SLOW if which == "slow" else ranks.QUICK))
        results = folder / "results.json"
        return torchrun.results(world, Path(ranks.__file__), results, folder, which)

    return run


def skip_where_fsdp_does_not_run(name: str) -> None:
    if name in ranks.FSDP and not ranks.HAS_FSDP:
        pytest.skip("fully_shard does not run on a CPU in torch 2.6")


@pytest.mark.parametrize(("name", "world"), ranks.QUICK)
def test(name: str, world: int, told: Told) -> None:
    skip_where_fsdp_does_not_run(name)
    found = told("quick")[f"{name} {world}"]
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), ranks.SLOW)
def test_slow(name: str, world: int, told: Told) -> None:
    skip_where_fsdp_does_not_run(name)
    found = told("slow")[f"{name} {world}"]
    assert not found, found


def rows(first: int, count: int) -> ChunkStorageMetadata:
    """A part of `even`."""
    return ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([count, 5]))


class TestFolder:
    """What several processes have written, read by this one."""

    @pytest.fixture
    def shadow(self) -> dict[str, Tensor]:
        return emajit.init(ranks.whole_params())

    @pytest.fixture
    def folder(self, tmp_path: Path, shadow: dict[str, Tensor]) -> Path:
        checkpoint.save_sharded(tmp_path / "ema", shadow, 7)
        return tmp_path / "ema"

    def test_of_two_processes(self, told: Told, shared: Path) -> None:
        told("quick")
        folder = shared / "quick" / "saved-by-2"
        expected = emajit.init(ranks.whole_params(), dtype=torch.float64)
        loaded, step = checkpoint.load_sharded(folder, expected)
        found = checkpoint.read(folder)
        assert (step, found.step, found.layout) == (41, 41, "emajit")
        for name, value in expected.items():
            assert_close(loaded[name], value, rtol=0, atol=0)
            assert_close(found.weights[name], value, rtol=0, atol=0)

    def test_round_trip(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        assert [*folder.parent.iterdir()] == [folder]
        like = emajit.init(ranks.whole_params())
        loaded, step = checkpoint.load_sharded(folder, like)
        assert step == 7
        assert all(torch.equal(loaded[name], value) for name, value in shadow.items())

    def test_ties(self, tmp_path: Path) -> None:
        tied = torch.ones(3)
        checkpoint.save_sharded(tmp_path / "a", {"a": tied, "b": tied}, 0)
        loaded, _ = checkpoint.load_sharded(tmp_path / "a", {"a": tied, "b": tied})
        assert loaded["a"] is loaded["b"]
        checkpoint.save_sharded(tmp_path / "b", {"a": tied, "b": tied + 1}, 0)
        with pytest.raises(ValueError, match="expected 'b' tied as in like"):
            checkpoint.load_sharded(tmp_path / "b", {"a": tied, "b": tied})

    def test_what_is_not_a_number(self, tmp_path: Path) -> None:
        odd = torch.tensor([1.0, float("nan"), float("inf")])
        for name, shadow in (("a", {"w": odd}), ("b", {"w": odd, "v": odd})):
            checkpoint.save_sharded(tmp_path / name, shadow, 0)
            loaded, _ = checkpoint.load_sharded(tmp_path / name, shadow)
            assert_close(loaded, shadow, rtol=0, atol=0, equal_nan=True)

    def test_what_has_no_numbers(self, tmp_path: Path) -> None:
        for odd in (torch.ones(2, device="meta"), torch.eye(2).to_sparse()):
            with pytest.raises(
                ValueError, match=r"'shadow\.w': expected a dense tensor, found Tens"
            ):
                checkpoint.save_sharded(tmp_path / "a", {"w": odd}, 0)
        assert not [*tmp_path.iterdir()]

    def test_a_disk_that_is_full(
        self, tmp_path: Path, shadow: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(FileSystemWriter, "write_data", full)
        with pytest.raises(OSError, match=r"No space left on device.*ema") as raised:
            checkpoint.save_sharded(tmp_path / "ema", shadow, 7)
        assert raised.value.errno == errno.ENOSPC
        assert not (tmp_path / "ema").exists()

    def test_is_never_overwritten(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        with pytest.raises(FileExistsError):
            checkpoint.save_sharded(folder, shadow, 8)
        assert checkpoint.load_sharded(folder, shadow)[1] == 7

    def test_half_written(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        (folder / ".metadata").unlink()
        with pytest.raises(ValueError, match="ema: expected a complete folder"):
            checkpoint.load_sharded(folder, shadow)

    def test_another_kill_left_something(self, tmp_path: Path, shadow: dict[str, Tensor]) -> None:
        (tmp_path / ".ema.part").mkdir()
        (tmp_path / ".ema.part" / "__9_0.distcp").write_bytes(b"old")
        checkpoint.save_sharded(tmp_path / "ema", shadow, 7)
        assert sorted(p.name for p in (tmp_path / "ema").iterdir()) == [".metadata", "__0_0.distcp"]
        assert not (tmp_path / ".ema.part").exists()

    @pytest.mark.parametrize("left", [0, 1, 100, -1])
    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
    def test_truncated(self, name: str, left: int, folder: Path, shadow: dict[str, Tensor]) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:left])
        before = {key: value.clone() for key, value in shadow.items()}
        with pytest.raises(ValueError, match="ema"):
            checkpoint.load_sharded(folder, shadow)
        assert all(torch.equal(before[key], value) for key, value in shadow.items())

    def test_any_byte_of_the_index_that_is_another(
        self, folder: Path, shadow: dict[str, Tensor]
    ) -> None:
        """Refused, or nothing that is read depends on it."""
        index = (folder / ".metadata").read_bytes()
        refused = 0
        for i in range(len(index)):
            flipped = index[i] ^ 1 << i % 8
            (folder / ".metadata").write_bytes(index[:i] + bytes([flipped]) + index[i + 1 :])
            try:
                loaded, step = checkpoint.load_sharded(folder, shadow)
            except ValueError:
                refused += 1
            else:
                assert step == 7
                assert all(torch.equal(loaded[name], value) for name, value in shadow.items()), i
        assert refused > len(index) / 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda entry: entry.chunks.clear(),
            lambda entry: entry.chunks.append(entry.chunks[0]),
            lambda entry: setattr(entry, "chunks", [rows(0, 6), rows(3, 6)]),
            lambda entry: setattr(entry, "chunks", None),
            lambda entry: setattr(entry, "properties", None),
            lambda entry: setattr(entry, "size", 7),
            lambda entry: setattr(entry.chunks[0], "sizes", torch.Size([1, 2])),
            lambda entry: setattr(entry.chunks[0], "offsets", torch.Size([3, 3])),
        ],
    )
    def test_chunks_that_are_not_the_whole(
        self, folder: Path, shadow: dict[str, Tensor], change: Any
    ) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index.state_dict_metadata["shadow.even"])
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(ValueError, match=r"ema/.metadata: expected the index of a checkpoint"):
            checkpoint.load_sharded(folder, shadow)
        with pytest.raises(ValueError, match=r"ema/.metadata: expected the index of a checkpoint"):
            checkpoint.read(folder)

    def test_no_parent(self, tmp_path: Path, shadow: dict[str, Tensor]) -> None:
        with pytest.raises(FileNotFoundError, match=r"'.*no/such'"):
            checkpoint.save_sharded(tmp_path / "no" / "such" / "ema", shadow, 1)

    def test_missing_file(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        (folder / "__0_0.distcp").unlink()
        with pytest.raises(ValueError, match="ema: expected the data that its index lists"):
            checkpoint.load_sharded(folder, shadow)

    def test_executes_nothing(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {folder}/executed",)

        (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
        for use in (
            lambda: checkpoint.load_sharded(folder, shadow),
            lambda: checkpoint.read(folder),
        ):
            with pytest.raises(ValueError, match=r"system is nothing that a \.metadata holds"):
                use()
        assert not (folder / "executed").exists()

    def test_misfits(self, folder: Path, shadow: dict[str, Tensor]) -> None:
        for like, message in (
            ({**shadow, "more": torch.ones(1)}, "without more"),
            ({"even": shadow["even"]}, "with few, none, scalar, uneven too"),
            ({**shadow, "few": torch.ones(4)}, r"'few': expected shape \(4,\)"),
            ({**shadow, "few": shadow["few"].half()}, "'few': expected .*float16"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoint.load_sharded(folder, like)

    def test_without_a_step(self, tmp_path: Path, shadow: dict[str, Tensor]) -> None:
        sharded.write(tmp_path / "ema", {f"shadow.{name}": v for name, v in shadow.items()})
        with pytest.raises(ValueError, match="expected a step"):
            checkpoint.load_sharded(tmp_path / "ema", shadow)

    def test_step_is_a_count(self, tmp_path: Path, shadow: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="step: expected the number of updates"):
            checkpoint.save_sharded(tmp_path / "ema", shadow, -1)
        assert not [*tmp_path.iterdir()]


def test_no_folder_is_a_model_of_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a complete folder"):
        checkpoint.load_sharded(tmp_path, {})
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="expected a complete folder"):
        checkpoint.load_sharded(tmp_path, {})
