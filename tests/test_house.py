"""The layout of the sources: what the import contracts cannot say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import emajit

SOURCES = Path(emajit.__file__).parent
CORE = [
    *("functional.py", "scope.py", "schedules.py", "litema.py"),
    *(
        path.name
        for path in SOURCES.glob("_*.py")
        if path.name not in ("__init__.py", "_optimizer.py")
    ),
]
PRIVATE = re.compile(
    r"\btorch\.(?:\w+\.)*_[a-z]\w*|from torch[.\w]* import _|(?:import|from) torch\._"
)


def test_private_names_of_torch_are_in_one_module() -> None:
    for path in SOURCES.rglob("*.py"):
        if path.name != "_torch.py":
            found = PRIVATE.findall(path.read_text())
            assert set(found) <= {"torch._foreach"}, path  # which the documentation names


def test_the_core_names_nothing_above_it() -> None:
    words = re.compile(
        r"\b(fused|FusedOptimizer|offload|Offloaded|checkpoint|Trainer|lightning|cuda)\b"
    )
    for name in CORE:
        text = (SOURCES / name).read_text()
        assert not words.findall(text), name


def test_no_module_is_too_long_to_read() -> None:
    documentation = {"schedules.py", "posthoc.py"}
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        guide = ast.get_docstring(ast.parse(text), clean=False) or ""
        lines = len(text.splitlines()) - len(guide.splitlines())
        if path.name not in documentation:
            assert lines <= (300 if path.parent == SOURCES and path.name in CORE else 400), path
