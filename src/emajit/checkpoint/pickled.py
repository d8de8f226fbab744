"""Files of `torch.save`, read without running any of what they pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emajit.checkpoint import archives, files

# The names in a pickle of tensors and plain containers, which torch allows.
_OF_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.[A-Z]\w+Storage"
)


class Opaque:
    """Replaces a pickled object: its class is not imported and runs no code.

    `holds_tensors` tells a module, and other objects with weights, from settings.
    """

    holds_tensors = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.holds_tensors = _holds_tensors(state)

    def __bool__(self) -> bool:
        raise TypeError(f"expected a value, found a pickled {type(self).__name__}")


def _holds_tensors(state: object, depth: int = 3) -> bool:
    """Whether there is a tensor at most `depth` containers deep, as the parameters of a module."""
    if isinstance(state, Opaque):
        return state.holds_tensors
    if not isinstance(state, Mapping | list | tuple) or not depth:
        return isinstance(state, Tensor)
    inner = state.values() if isinstance(state, Mapping) else state
    return any(_holds_tensors(each, depth - 1) for each in inner)


def _opaque(path: str) -> type[Opaque]:
    module, _, name = path.rpartition(".")
    return type(name, (Opaque,), {"__module__": module})


def load_torch(path: Path) -> Any:
    """The content of a file of `torch.save`, mapped from the disk where possible.

    Only tensors and plain containers are unpickled; an `Opaque` replaces any other object, such as
    the hyperparameters of a training script, or a whole module. The format of torch before 1.6
    allows no other objects. Raises ValueError, with the path, for a broken file.
    """
    start = files.start_of_torch(path)
    zipped = start == b"PK"
    if not start:
        raise ValueError(f"{path}: expected a file of safetensors or torch.save, found another")
    try:
        scan = archives.scan(path) if zipped else archives.Scan(is_stored=False, names=set())
        names = [] if all(map(_OF_TENSORS.fullmatch, scan.names)) else unsafe_names(path)
        with torch.serialization.safe_globals([(_opaque(name), name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=scan.is_stored, weights_only=True)
    except Exception as error:  # noqa: BLE001, whatever a broken file makes of a parser
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
        raise ValueError(
            f"{path}: expected a whole file of torch.save with tensors and plain containers, "
            f"since nothing else is unpickled, found: {reason or type(error).__name__:.300}"
        ) from None


def unsafe_names(path: Path) -> list[str]:
    """The classes and functions that `torch.load` would refuse; in a large file this is slow."""
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)
