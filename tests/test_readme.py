"""The README's Python runs as it stands, and its commands are those of the project."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROMISES = (ROOT / "tests" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning's, of its default logger
def test_python_blocks_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    found = blocks("python")
    assert len(found) >= 3
    missing = {name for name in ("accelerate", "lightning", "transformers") if not find_spec(name)}
    for number, block in enumerate(found):
        if missing & {*re.findall(r"\w+", block)}:
            continue
        exec(compile(block, f"README.md block {number}", "exec"), vars(module))  # noqa: S102
    if missing:
        pytest.skip(f"ran all blocks but those of {', '.join(sorted(missing))}, for want of them")


def test_commands() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert 'pip install -c .ci/constraints.txt ".[demo]" && emajit demo' in lines
    assert 'pip install -c .ci/constraints.txt -e ".[test]" && pytest -n 2' in lines


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_promises_are_held_by_tests_that_exist() -> None:
    rows = re.findall(r"^\|.*\| (`\w+\.py::.*) \|$", PROMISES, flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        source = ""
        for name in re.findall(r"`([^`]+)`", row):
            file, _, test = name.partition("::")
            if file.endswith(".py"):
                source = (ROOT / "tests" / file).read_text()
            else:
                test = file
            assert not test or f"def {test}(" in source, name


def test_the_package_page_has_no_dead_link() -> None:
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    page = README
    for each in hook["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(each["pattern"], each["replacement"], page)
    assert "](" not in page
    assert "| `averaged_module` |" in page
    assert all(block in page for block in blocks("python"))
