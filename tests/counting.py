"""What counts: a `torch.compile` backend its graphs, a mode the operators; and memory."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Counting:
    """Counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


STATUS = Path("/proc/self/status")
tells_memory = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux to tell memory")


def own_memory() -> int:
    """Bytes in use by this process; not those of files, which come and go with other needs.

    What is freed is returned first, of which glibc keeps some MB or more, as it happens.
    """
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return int(STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024
