"""Files that others have made anew: zipped again, with a name twice, no file at all."""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from emajit import checkpoint


def averaged() -> AveragedModel:
    return AveragedModel(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_was_zipped_again(tmp_path: Path, method: int) -> None:
    """What is compressed in it cannot be mapped from the disk."""
    model = averaged()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", method) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record.filename))
    found = checkpoint.read(tmp_path / "b.pt")
    for name, expected in model.module.state_dict().items():
        assert torch.equal(found.weights[name], expected), name


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint16, torch.complex128])
def test_a_record_that_is_shorter_than_its_tensor(
    tmp_path: Path, method: int, dtype: torch.dtype
) -> None:
    """torch reads what is behind it in the file or in memory."""
    state = {"n_averaged": torch.tensor(3), "module.w": torch.ones(100).to(dtype)}
    torch.save(state, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", method) as target,
    ):
        for record in source.infolist():
            held = source.read(record.filename)
            is_long = "/data/" in record.filename and len(held) >= 200
            target.writestr(record.filename, held[:-1] if is_long else held)
    assert torch.equal(checkpoint.read(tmp_path / "a.pt").weights["w"], state["module.w"])
    size = 100 * dtype.itemsize
    with pytest.raises(ValueError, match=rf"b\.pt: .*expected {size:,} bytes, found"):
        checkpoint.read(tmp_path / "b.pt")


def test_a_record_twice(tmp_path: Path) -> None:
    """torch takes the first of the two, Python the last, of which the length was checked."""
    torch.save({"n_averaged": torch.tensor(3), "module.w": torch.ones(100)}, tmp_path / "a.pt")
    for twice in ("data/1", "data.pkl", "more/data.pkl"):
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as source,
            zipfile.ZipFile(tmp_path / "b.pt", "w") as target,
            warnings.catch_warnings(action="ignore"),  # of the name twice
        ):
            target.writestr(f"a/{twice}", source.read("a/data.pkl")[:2])
            for record in source.infolist():
                target.writestr(record.filename, source.read(record.filename))
        with pytest.raises(ValueError, match="expected one pickle and each record once"):
            checkpoint.read(tmp_path / "b.pt")


def test_a_pickle_that_repeats_itself(tmp_path: Path) -> None:
    """200 kB in the file, and 200 MB of instructions."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/data.pkl", b"\x80\x02" + b"N0" * (100 << 20) + b"N.")
    assert (tmp_path / "a.pt").stat().st_size < 2**18
    start = time.perf_counter()
    with pytest.raises(ValueError, match="names and shapes, found 209,715,204 bytes in 2"):
        checkpoint.read(tmp_path / "a.pt")
    assert time.perf_counter() - start < 5  # of a slow machine


def test_the_garbage_collector_goes_on(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a whole file"):
        checkpoint.read(tmp_path / "broken.pt")
    assert gc.isenabled()


def test_storages_that_tensors_share_and_no_plain_containers(tmp_path: Path) -> None:
    whole = torch.arange(20.0)
    state = {
        "shadow": {"a": whole[:5], "b": whole[15:]},
        "step": 3,
        "set": {1, 2},
        "path": tmp_path,
    }
    torch.save(state, tmp_path / "a.pt")
    found = checkpoint.read(tmp_path / "a.pt").weights
    assert found["b"].tolist() == [15, 16, 17, 18, 19]


def test_a_name_twice(tmp_path: Path) -> None:
    """safetensors takes the last of the two."""
    path = tmp_path / "twice.safetensors"
    step = {"dtype": "I32", "shape": [], "data_offsets": [0, 4]}
    entries = [{"dtype": code, "shape": [], "data_offsets": [4, 8]} for code in ("F32", "I32")]
    named = ",".join(f'"module.w":{json.dumps(entry)}' for entry in entries)
    text = f'{{"n_averaged":{json.dumps(step)},{named}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"expected each name once, found two of 'module\.w'"):
        checkpoint.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have a name")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(OSError, match="expected a regular file to read"):
        checkpoint.read(tmp_path / "pipe.pt")
    with pytest.raises(OSError, match="expected a regular file to read"):
        checkpoint.load(tmp_path / "pipe.pt", {"w": torch.zeros(1)})
