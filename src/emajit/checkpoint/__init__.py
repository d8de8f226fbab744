"""Averages in files: `save` and `load` for a shadow and its step, `read` and `write` for others.

`save` and `load` keep a shadow in a safetensors file, written atomically, and read whole or not
at all. The file has the names of a dict of named parameters, for any program that reads
safetensors. `save_sharded` and `load_sharded` keep a shadow of DTensors in a folder of
`torch.distributed.checkpoint`. `read` finds the averages in a checkpoint of another library, and
`write` writes them in another layout; `emajit.checkpoint.layouts` has a module for each layout.
"""

from emajit.checkpoint.averaged import Averaged
from emajit.checkpoint.native import load, load_sharded, save, save_sharded
from emajit.checkpoint.reading import Candidate, candidates, read, read_all
from emajit.checkpoint.writing import write

__all__ = [
    "Averaged",
    "Candidate",
    "candidates",
    "load",
    "load_sharded",
    "read",
    "read_all",
    "save",
    "save_sharded",
    "write",
]
