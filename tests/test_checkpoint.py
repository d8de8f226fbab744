"""A shadow in a file: exact, whole or not at all, whatever is done to the file or the process."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

import emajit
from emajit import LitEma, checkpoint, schedules
from emajit.checkpoint import files
from emajit.checkpoint.saved import Record
from tests import strategies

ROOT = Path(__file__).parents[1]


WRAPPED = TwoTensor(torch.ones(1), torch.ones(1))  # type: ignore[no-untyped-call]


class Nameless:
    """A node without names for its children."""

    def __init__(self, child: Any) -> None:
        self.child = child


pytree.register_pytree_node(
    Nameless, lambda node: ([node.child], None), lambda children, _: Nameless(*children)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ema.safetensors"


def small() -> dict[str, Any]:
    return {
        "encoder": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2).bfloat16()},
        "heads": [torch.tensor(0.5).double(), None, torch.tensor([3, 4])],
    }


def assert_same_bits(expected: Any, found: Any) -> None:
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class TestRoundTrip:
    @given(strategies.tree_pairs(), st.integers(0, 2**63 - 1))
    def test_any_tree(self, tmp_path_factory: Any, trees: tuple[Any, Any], step: int) -> None:
        path = tmp_path_factory.getbasetemp() / "any.safetensors"
        shadow, _ = trees
        assume(all(t is None or t.dtype in files._CODES for t in pytree.tree_leaves(shadow)))
        like = emajit.init(shadow)
        for leaf in pytree.tree_leaves(like):
            if leaf is not None:
                leaf.zero_()
        checkpoint.save(path, shadow, step)
        found, count = checkpoint.load(path, like)
        assert count == step
        assert pytree.tree_structure(found) == pytree.tree_structure(shadow)
        assert_same_bits(shadow, found)
        for a, b in zip(pytree.tree_leaves(like), pytree.tree_leaves(found), strict=True):
            assert a is None or (a.stride() == b.stride() and a is not b)

    def test_every_dtype_of_the_format_is_read_by_its_own_library(self, path: Path) -> None:
        bits = torch.arange(1, 49, dtype=torch.uint8)
        shadow = {
            code: torch.tensor([True, False]) if code == "BOOL" else bits.view(dtype)
            for dtype, code in files._CODES.items()
        }
        checkpoint.save(path, shadow, 0)
        with safe_open(path, "pt") as file:
            for code in shadow:
                assert file.get_slice(code).get_dtype() == code
        for found in (load_file(path), checkpoint.load(path, shadow)[0]):
            assert found.keys() == shadow.keys()
            for code, leaf in shadow.items():
                assert torch.equal(found[code].view(torch.uint8), leaf.view(torch.uint8))

    def test_names_are_paths(self, path: Path) -> None:
        checkpoint.save(path, [small(), small()], 2)
        names = {f"{i}.{name}" for i in (0, 1) for name in NAMES}
        assert load_file(path).keys() == names
        found, _ = checkpoint.load(path, [small(), small()])
        assert_same_bits([small(), small()], found)

    def test_ties_are_written_once_and_stay(self, path: Path) -> None:
        w = torch.ones(3)
        shadow = {"b": w, "c": torch.zeros(1), "a": w}
        checkpoint.save(path, shadow, 0)
        assert load_file(path).keys() == {"b", "c"}
        for order in ("abc", "cba"):
            found, _ = checkpoint.load(path, {name: shadow[name] for name in order})
            assert found["a"] is found["b"]
            assert list(found) == list(order)
        untied = {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(1)}
        found, _ = checkpoint.load(path, untied)
        assert found["a"].tolist() == found["b"].tolist() == [1.0] * 3
        assert found["a"] is not found["b"]

    def test_a_single_tensor_and_nothing(self, path: Path) -> None:
        trees: tuple[Any, ...] = (torch.arange(3), {}, [], {"a": None})
        for tree in trees:
            checkpoint.save(path, tree, torch.tensor(7))
            found, step = checkpoint.load(path, tree)
            assert step == 7
            assert_close(found, tree)

    def test_lazy_bits_are_resolved(self, path: Path) -> None:
        shadow = {"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag}
        checkpoint.save(path, shadow, 0)
        found, _ = checkpoint.load(path, emajit.init(shadow))
        assert found["conj"].tolist() == [1 - 2j]
        assert found["neg"].tolist() == [-2.0]

    def test_metadata_is_for_the_user(self, path: Path) -> None:
        checkpoint.save(path, small(), 3, metadata={"run": "a \u00e9"})
        with safe_open(path, "pt") as file:
            assert file.metadata()["run"] == "a \u00e9"
        changed = path.read_bytes().replace(b'"run":"a', b'"run":"b')
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is corrupt"):
            checkpoint.load(path, small())
        for taken in ("format", "emajit"):
            with pytest.raises(ValueError, match="metadata: expected keys of your own"):
                checkpoint.save(path, small(), 3, metadata={taken: "a"})
        with pytest.raises(TypeError, match="metadata: expected strings, found 'a': 1"):
            checkpoint.save(path, small(), 3, metadata={"a": 1})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="metadata: expected a dict, found str"):
            checkpoint.save(path, small(), 3, metadata="a")  # type: ignore[arg-type]

    def test_what_is_loaded_is_not_the_file(self, path: Path) -> None:
        checkpoint.save(path, {"w": torch.ones(3)}, 0)
        found, _ = checkpoint.load(path, {"w": nn.Parameter(torch.zeros(3))})
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert found["w"].tolist() == [1.0] * 3
        assert not found["w"].requires_grad


NAMES = ("encoder.weight", "encoder.bias", "heads.0", "heads.2")


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("encoder"), r"with encoder\.bias, encoder\.weight too"),
            (lambda t: t.update(extra=torch.ones(1)), "without extra"),
            (
                lambda t: t.update(Heads=t.pop("heads")),
                r"without Heads\.0, Heads\.2 and with heads",
            ),
            (lambda t: t["heads"].reverse(), r"'heads\.0': expected shape \(2,\) in torch.int64"),
            (
                lambda t: t["encoder"].update(weight=torch.ones(3, 2)),
                r"'encoder\.weight': expected shape \(3, 2\) in torch.float32 as in like, found s",
            ),
            (lambda t: t["encoder"].update(bias=torch.ones(2)), r"found shape \(2,\) in torch.bf"),
            (
                lambda t: t["encoder"].update(bias=t["heads"][2].bfloat16(), weight=None),
                r"with encoder\.weight too",
            ),
        ],
    )
    def test_a_tree_that_differs(self, path: Path, change: Any, message: str) -> None:
        checkpoint.save(path, small(), 3)
        like = small()
        change(like)
        before = pytree.tree_map(lambda leaf: None if leaf is None else leaf.clone(), like)
        with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
            checkpoint.load(path, like)
        assert_same_bits(before, like)

    def test_a_tie_that_the_file_does_not_have(self, path: Path) -> None:
        checkpoint.save(path, {"a": torch.ones(2), "b": torch.zeros(2)}, 0)
        w = torch.zeros(2)
        with pytest.raises(ValueError, match="expected 'b' tied to 'a' as in like"):
            checkpoint.load(path, {"a": w, "b": w})
        a, b = torch.ones(2), torch.zeros(2)
        checkpoint.save(path, {"a": a, "b": b, "c": a, "d": b}, 0)
        with pytest.raises(ValueError, match="expected 'd' tied to 'c' as in like"):
            checkpoint.load(path, {"a": torch.ones(2), "b": torch.ones(2), "c": w, "d": w})

    def test_every_truncation(self, path: Path) -> None:
        checkpoint.save(path, small(), 3)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"^{path}: "):
                checkpoint.load(path, small())
        path.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=f"^{path}: "):
            checkpoint.load(path, small())

    def test_every_byte_that_is_another(self, path: Path) -> None:
        """It is refused, or it was none that matters, such as a space."""
        checkpoint.save(path, small(), 3)
        whole, harmless = path.read_bytes(), 0
        expected = checkpoint.read(path).weights
        expected = {name: value.clone() for name, value in expected.items()}
        for i in range(len(whole)):
            for flip in (1, 2, 16, 26, 28, 255):  # 26 and 28 make F32 of U32 and I32 of it
                path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
                with pytest.raises(ValueError, match=f"^{path}: |unharmed"):
                    found = checkpoint.read(path)
                    assert found.step == 3
                    assert_same_bits(expected, found.weights)
                    harmless += 1
                    raise ValueError("unharmed")
        assert harmless < 50

    def test_files_from_before_there_was_a_checksum_of_shapes(self, path: Path) -> None:
        checkpoint.save(path, small(), 3)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(file.metadata()["emajit"])
        del record["forms"]
        save_file(tensors, path, metadata={"emajit": json.dumps(record)})
        assert_same_bits(small(), checkpoint.load(path, small())[0])

    def test_the_corrupt_leaf_is_named(self, path: Path) -> None:
        checkpoint.save(path, small(), 3)
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1  # of the narrowest numbers, which come last
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=r"'encoder\.bias' is corrupt"):
            checkpoint.load(path, small())

    @given(st.binary(max_size=200), st.booleans())
    def test_any_bytes(self, tmp_path_factory: Any, content: bytes, framed: bool) -> None:
        path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
        with pytest.raises(ValueError, match=r"bytes\.safetensors: expected"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    @given(
        st.recursive(
            st.one_of(st.none(), st.integers(), st.floats(), st.text("wF32", max_size=4)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(
                        ["__metadata__", "emajit", "w", "dtype", "shape", "data_offsets", "step"]
                    ),
                    inner,
                    max_size=4,
                ),
            ),
        )
    )
    def test_any_header(self, tmp_path_factory: Any, header: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "header.safetensors"
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match=r"header\.safetensors: expected"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    @given(
        record=st.one_of(
            st.none(),
            st.text(max_size=8),
            st.fixed_dictionaries(
                {},
                optional={
                    "step": st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=3)),
                    "tied": st.one_of(
                        st.dictionaries(st.sampled_from("vw"), st.sampled_from(["w", "x", 1])),
                        st.lists(st.integers(), max_size=2),
                    ),
                    "more": st.integers(),
                },
            ),
        ),
        crc32=st.one_of(
            st.dictionaries(st.sampled_from("vw"), st.sampled_from([1, ""])), st.just("w")
        ),
    )
    def test_any_record(self, tmp_path_factory: Any, record: Any, crc32: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "record.safetensors"
        whole = {**record, "crc32": crc32} if isinstance(record, dict) else record
        header = {"emajit": json.dumps(whole)}
        save_file({"w": torch.zeros(1)}, path, metadata=header)
        with pytest.raises(ValueError, match=r"record\.safetensors: "):
            checkpoint.load(path, {"w": torch.zeros(1)})

    @pytest.mark.parametrize(
        ("record", "more"),
        [
            (Record(-1, {}, {}), {}),
            (Record(1, {"w": "w"}, {}), {}),
            (Record(1, {"v": "u"}, {}), {}),
            (Record(1, {}, {}), {"another": 1}),
        ],
    )
    def test_a_record_that_cannot_be(
        self, path: Path, record: Record, more: dict[str, int]
    ) -> None:
        def header(*known: Any) -> dict[str, str]:
            told = record.header(*known)
            return told | {"emajit": json.dumps(json.loads(told["emajit"]) | more)}

        files.write_tensors(path, {"w": torch.zeros(1)}, header, record.seed())
        with pytest.raises(ValueError, match="expected a step and a checksum of each tensor"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    def test_a_record_without_end(self, path: Path) -> None:
        save_file({"w": torch.zeros(1)}, path, metadata={"emajit": "[" * 100_000})
        with pytest.raises(ValueError, match="expected a step and a checksum of each tensor"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    def test_files_of_others(self, path: Path) -> None:
        save_file({"w": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="expected a file of emajit"):
            checkpoint.load(path, {"w": torch.zeros(1)})
        torch.save({"w": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="expected a whole safetensors file, found"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    def test_nothing_is_ever_unpickled(self, path: Path) -> None:
        bomb = pickle.dumps(Bomb(str(path.parent / "exploded")))
        path.write_bytes(bomb)
        with pytest.raises(ValueError, match="expected a whole safetensors file"):
            checkpoint.load(path, {"w": torch.zeros(1)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
        with pytest.raises(ValueError, match="expected a whole safetensors file"):
            checkpoint.load(path, {"w": torch.zeros(1)})
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        pickle.loads(bomb)
        assert (path.parent / "exploded").exists()

    def test_a_header_that_nothing_would_read(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "_LONGEST_HEADER", 1000)
        with pytest.raises(ValueError, match=r"at most 1,000 bytes, found 1,1.. bytes of"):
            checkpoint.save(path, {"w": torch.ones(1)}, 0, metadata={"long": "x" * 1000})
        assert not list(path.parent.iterdir())

    def test_what_cannot_be_loaded_to(self, path: Path) -> None:
        checkpoint.save(path, {"w": torch.ones(1)}, 0)
        for leaf in (torch.ones(1, device="meta"), torch.ones(1).to_sparse()):
            with pytest.raises(ValueError, match="like: 'w': expected a dense tensor"):
                checkpoint.load(path, {"w": leaf})

    def test_duplicate_keys(self, path: Path) -> None:
        entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        text = f"{{{entry},{entry}}}".encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(ValueError, match="expected"):
            checkpoint.load(path, {"w": torch.zeros(1)})

    def test_no_file(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=str(path)):
            checkpoint.load(path, {})
        with pytest.raises(IsADirectoryError, match=str(path.parent)):
            checkpoint.load(path.parent, {})

    @pytest.mark.parametrize(
        ("shadow", "step", "error", "message"),
        [
            ({"w": 1.0}, 0, TypeError, r"shadow\['w'\]: expected a tensor or None, found float"),
            (nn.Linear(1, 1), 0, TypeError, "found Linear; pass a dict of tensors"),
            (
                {"w": torch.ones(1).to(torch.complex128)},
                0,
                ValueError,
                "'w': expected a dtype",
            ),
            ({"w": torch.eye(2).to_sparse()}, 0, ValueError, "found Tensor in torch.sparse_coo"),
            (
                {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
                0,
                ValueError,
                r"shadow\['a'\]\['b'\]: expected a name of its own, found 'a.b', as shadow",
            ),
            ({"__metadata__": torch.ones(1)}, 0, ValueError, "which safetensors reserves"),
            ({"w": torch.ones(1)}, -1, ValueError, "step: expected the number of updates so far"),
            (
                {"w": torch.ones(1)},
                1.5,
                TypeError,
                "step: expected an int or .* found 1.5",
            ),
            ({"k\udcff": torch.ones(1)}, 0, ValueError, "expected names and metadata in Unicode"),
            ({"w": WRAPPED}, 0, ValueError, "'w': expected a dense tensor, found TwoTensor"),
            ({"u": Nameless(torch.ones(1))}, 0, ValueError, "shadow: expected names for all chi"),
            (
                {"w": torch.ones(1, device="meta")},
                0,
                ValueError,
                "Tensor in torch.strided on meta",
            ),
        ],
    )
    def test_what_cannot_be_saved(
        self, path: Path, shadow: Any, step: Any, error: type[Exception], message: str
    ) -> None:
        checkpoint.save(path, small(), 3)
        before = path.read_bytes()
        with pytest.raises(error, match=message):
            checkpoint.save(path, shadow, step)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class TestAtomic:
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_fault_at_every_step_leaves_the_old_file_or_the_new(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        calls: list[str] = []
        when = 0

        def failing(owner: Any, name: str) -> None:
            function = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                if len(calls) == when:
                    raise error
                return function(*arguments, **options)

            monkeypatch.setattr(owner, name, call)

        owners = ((files, "header"), (files, "memory"), (os, "fsync"), (Path, "replace"))
        for owner, name in owners:
            failing(owner, name)
        while True:
            fault, when = when + 1, 0
            checkpoint.save(path, small(), 3)
            old = path.read_bytes()
            when = fault
            calls.clear()
            try:
                checkpoint.save(path, [small()], 4)
            except type(error):
                if calls[-2:] != ["replace", "fsync"]:  # the name is the new file's by then
                    assert path.read_bytes() == old
                else:
                    assert checkpoint.load(path, [small()])[1] == 4
                assert [p.name for p in path.parent.iterdir()] == [path.name]
            else:
                break
        assert set(calls) == {name for _, name in owners}
        assert calls[-3:] == ["fsync", "replace", "fsync"]  # of the file, then of its folder
        assert when > 10

    def test_a_killed_process_leaves_the_old_file_or_the_new(self, path: Path) -> None:
        done = python(KILLED, path)
        assert done.returncode == 0, done.stderr
        old, new = map(int, done.stdout.split())
        assert old + new == 200
        assert min(old, new) > 0

    def test_a_full_disk_leaves_the_old_file(self, path: Path) -> None:
        done = python(FULL, path)
        assert done.returncode == 0, done.stderr
        assert "File too large" in done.stdout
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_two_writers_do_not_mix(self, path: Path) -> None:
        trees = [{"w": torch.full((2**18,), float(i))} for i in range(4)]

        def write(i: int) -> None:
            for _ in range(10):
                checkpoint.save(path, trees[i], i)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if path.exists():
                found, step = checkpoint.load(path, trees[0])
                assert torch.equal(found["w"], trees[step]["w"])
        for thread in threads:
            thread.join()
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_the_file_is_like_any_other(self, path: Path) -> None:
        plain = path.parent / "plain"
        plain.touch()
        checkpoint.save(path, small(), 3)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    def test_a_private_file_stays_private(self, path: Path) -> None:
        path.touch(mode=0o600)
        checkpoint.save(path, small(), 3)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_what_is_no_file_is_not_replaced(self, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(OSError, match="expected a regular file to write"):
            checkpoint.save(path, small(), 3)
        assert path.is_fifo()

    def test_a_link_stays_a_link(self, path: Path) -> None:
        (path.parent / "folder").mkdir()
        target = path.parent / "folder" / "target"
        path.symlink_to(target)
        checkpoint.save(path, small(), 3)
        assert path.is_symlink()
        assert checkpoint.load(target, small())[1] == 3

    def test_no_folder(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere'$"):
            checkpoint.save(path.parent / "nowhere" / "ema", small(), 3)
        path.touch()
        with pytest.raises(NotADirectoryError):
            checkpoint.save(path / "ema", small(), 3)
        with pytest.raises(IsADirectoryError):
            checkpoint.save(path.parent, small(), 3)


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from emajit import checkpoint

torch.set_num_threads(1)  # threads do not survive a fork
path = Path(sys.argv[1])
random.seed(0)

def tree(n):
    return {str(i): torch.full((2**14,), float(n)) for i in range(32)}

checkpoint.save(path, tree(0), 0)
began = time.perf_counter()
checkpoint.save(path, tree(0), 0)
duration = time.perf_counter() - began
last, outcomes = 0, [0, 0]
for n in range(1, 201):
    new = tree(n)
    child = os.fork()
    if not child:
        checkpoint.save(path, new, n)
        time.sleep(60)
    time.sleep(random.uniform(0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found, step = checkpoint.load(path, new)
    assert step in (last, n), (step, last, n)
    assert all(leaf.eq(step).all() for leaf in found.values())
    outcomes[step == n] += 1
    last = step
    names = {p.name for p in path.parent.iterdir()} - {path.name}
    assert all(name.endswith(".part") for name in names), names
print(*outcomes)
"""

FULL = """
import resource, sys
from pathlib import Path
import torch
from emajit import checkpoint

path = Path(sys.argv[1])
checkpoint.save(path, {"w": torch.ones(1000)}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    checkpoint.save(path, {"w": torch.ones(2**20)}, 2)
except OSError as error:
    print(error)
shadow, step = checkpoint.load(path, {"w": torch.zeros(1000)})
assert step == 1 and shadow["w"].eq(1).all()
"""


# Resuming: the same numbers in a process of its own.
STEPS = 100
SAVED_AT = (3, 90)  # within the warm-up of a decay of 0.9, which ends at step 79, and behind it
SCHEDULE = schedules.warmup(0.9)
RUNS: list[tuple[Any, Any, tuple[torch.dtype, ...]]] = [
    (backend, rounding, dtypes)  # averages of several dtypes, in one graph
    for backend in ("eager", "auto", "inductor")
    for rounding, dtypes in (
        ("nearest", (torch.float32,)),
        ("stochastic", (torch.bfloat16, torch.float16)),
    )
]


def params_at(step: int) -> dict[str, Tensor]:
    """What a training would have made of the parameters."""
    x = torch.arange(24.0).reshape(4, 6) + step
    return {"a.weight": x.sin(), "a.bias": x[0].cos(), "scale": x[0, 0].tan()}


def begin(dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Tensor]]:
    return [emajit.init(params_at(0), dtype=dtype) for dtype in dtypes]


def train(shadow: list[Any], steps: range, run: tuple[Any, Any, Any]) -> list[Any]:
    backend, rounding, _ = run
    for step in steps:
        options: Any = {"decay": SCHEDULE, "backend": backend, "rounding": rounding}
        emajit.update_(shadow, [params_at(step) for _ in shadow], step, **options)
    return shadow


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in params_at(-1).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value))


def train_litema(ema: LitEma, steps: range) -> LitEma:
    model = Model()
    for step in steps:
        for p, value in zip(model.parameters(), params_at(step).values(), strict=True):
            p.data.copy_(value)
        ema(model)
    return ema


def resume(folder: Path) -> None:
    """Go on with everything that was saved; what came of it is in results.pt."""
    results: dict[Any, Any] = {}
    for number, run in enumerate(RUNS):
        like = begin(run[2])
        for k in SAVED_AT:
            shadow, step = checkpoint.load(folder / f"{number}-{k}.safetensors", like)
            results[f"{number}-{k}"] = train(shadow, range(step, STEPS), run)
            saved = torch.load(folder / f"{number}-{k}.pt", weights_only=True)
            steps = range(saved["step"], STEPS)
            results[f"{number}-{k}-pt"] = train(saved["shadow"], steps, run)
    for backend in ("eager", "inductor"):
        for k in SAVED_AT:
            ema = LitEma(Model(), backend=backend)  # the decay comes with the state
            ema.load_state_dict(torch.load(folder / f"{backend}-{k}.pt", weights_only=True))
            results[f"{backend}-{k}"] = train_litema(ema, range(k, STEPS)).state_dict()
    torch.save(results, folder / "results.pt")


@pytest.mark.inductor
def test_resume_in_a_new_process_is_exact(tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    for number, run in enumerate(RUNS):
        shadow = begin(run[2])
        done = 0
        for k in SAVED_AT:
            train(shadow, range(done, k), run)
            checkpoint.save(tmp_path / f"{number}-{k}.safetensors", shadow, k)
            torch.save({"shadow": shadow, "step": k}, tmp_path / f"{number}-{k}.pt")
            done = k
        train(shadow, range(done, STEPS), run)
        for k in SAVED_AT:
            expected[f"{number}-{k}"] = expected[f"{number}-{k}-pt"] = shadow
    for backend in ("eager", "inductor"):
        ema = LitEma(Model(), decay=0.9, backend=backend)
        done = 0
        for k in SAVED_AT:
            train_litema(ema, range(done, k))
            torch.save(ema.state_dict(), tmp_path / f"{backend}-{k}.pt")
            done = k
        train_litema(ema, range(done, STEPS))
        expected |= dict.fromkeys((f"{backend}-{k}" for k in SAVED_AT), ema.state_dict())
    code = "import sys; from pathlib import Path; from tests import test_checkpoint as this;"
    done_process = python(code + "this.resume(Path(sys.argv[1]))", tmp_path)
    assert done_process.returncode == 0, done_process.stderr
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert_same_bits(expected, dict(found))
    assert not torch.equal(expected["0-3"][0]["scale"], params_at(STEPS - 1)["scale"])
