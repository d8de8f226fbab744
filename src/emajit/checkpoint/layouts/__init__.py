"""Where each library keeps its averages in a checkpoint: a module for each layout.

`emajit.checkpoint.read` knows all of them, and `emajit.checkpoint.write` writes some.

For developers: a new layout is a module with a `LAYOUT` and a line in `_MODULES`. `read`, `write`
and the choices of the command take it from there.
"""

from __future__ import annotations

from importlib import import_module

from emajit.checkpoint.averaged import Layout, Writer

_MODULES = (  # the command shows the layouts in this order
    "state_dict",
    "litema",
    "averaged_model",
    "ema_pytorch",
    "timm",
    "diffusers",
    "torch_ema",
    "native",
    "native_lightning",
    "lightning",
    "nemo",
    "edm2",
    "mmengine",
    "mmcv",
    "composer",
    "torchtitan",
)
LAYOUTS: list[Layout] = [import_module(f"{__name__}.{name}").LAYOUT for name in _MODULES]
WRITERS: dict[str, Writer] = {
    layout.writer.name: layout.writer for layout in LAYOUTS if layout.writer is not None
}
