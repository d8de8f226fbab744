"""What a killed process leaves on the disk: a copy of a folder before each change of its files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"}
_watchers: list[Any] = []


@contextmanager
def moments(folder: Path, copies: Path) -> Iterator[list[Path]]:
    """A list of copies of `folder`: before each operation inside that changes a file, and after."""
    found: list[Path] = []

    def copy() -> None:
        _watchers.clear()  # copying is an operation too
        found.append(copies / f"{len(found)}")
        shutil.copytree(folder, found[-1], symlinks=True)
        _watchers.append(watch)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if event != "open" and event not in _CHANGES:
            return
        below = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # as rmtree goes down
        paths = [Path(path) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
        if below or any(folder in path.absolute().parents for path in paths):
            copy()

    if not hasattr(sys, "_emajit_watches"):  # an audit hook cannot be removed
        sys._emajit_watches = True  # type: ignore[attr-defined]
        sys.addaudithook(lambda *event: [watcher(*event) for watcher in _watchers])
    _watchers.append(watch)
    try:
        yield found
        copy()
    finally:
        _watchers.clear()
