"""Files of `torch.save`, read without running any of what they pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from emajit.checkpoint import archives, files

# The names in a pickle of tensors and plain containers, which torch allows.
_OF_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.[A-Z]\w+Storage"
)


class Opaque:
    """Replaces a pickled object: its class is not imported and runs no code."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __bool__(self) -> bool:
        raise TypeError(f"expected a value, found a pickled {type(self).__name__}")


def _opaque(path: str) -> type[Opaque]:
    module, _, name = path.rpartition(".")
    return type(name, (Opaque,), {"__module__": module})


def load_torch(path: Path) -> Any:
    """The content of a file of `torch.save`, mapped from the disk where possible.

    Only tensors and plain containers are unpickled; an `Opaque` replaces any other object, such as
    the hyperparameters of a training script, or a whole module. The format of torch before 1.6
    allows no other objects. Raises ValueError, with the path, for a broken file.
    """
    with files.opened_to_read(path) as file:
        start = file.read(2)
    zipped = start == b"PK"
    if not (zipped or start[:1] == b"\x80"):
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
