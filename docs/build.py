"""Build the site of the guides, from the docstrings: `python docs/build.py [FOLDER]`.

Any warning is an error, and so is a name in backticks that looks like one of emajit's but is none.
"""

from __future__ import annotations

import pkgutil
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc

from emajit import LitEma, checkpoint

# The modules below a module, in the order of the menu; others come behind them. pdoc takes modules
# from `__all__`, which cannot name them: `from emajit import *` would import all of them.
PAGES = {
    "emajit": [
        *("schedules", "guides", "checkpoint", "posthoc", "merging", "integrations", "fused"),
        *("offload", "migrating"),
    ],
    "emajit.guides": ["teachers", "low_precision", "compiled_steps", "sharding"],
    "emajit.integrations": ["lightning", "transformers"],
    "emajit.checkpoint.layouts": [],
}
# The command, and modules whose names are those of `emajit`.
HIDDEN = {"cli", "combine", "functional", "litema", "scope"}
LAYOUTS = "emajit.checkpoint.layouts"


def main(folder: Path) -> None:
    """Write the site into `folder`; raises ValueError for names that are not found."""
    warnings.simplefilter("error")
    # pdoc evaluates the fields of a NamedTuple outside of its module, and then prints their names
    warnings.filterwarnings("ignore", message="Error parsing type annotation ForwardRef")
    for package, first in PAGES.items():
        module = import_module(package)
        below = [*dict.fromkeys(first + _below(package))]
        own = [name for name in getattr(module, "__all__", []) if name not in below]
        module.__all__ = [*own, *below]
    checkpoint.__all__ += ["layouts"]
    for name in _below(LAYOUTS):
        import_module(f"{LAYOUTS}.{name}").__all__ = []  # their docstrings tell all
    for name in ("track", "named_averages", "load_state_dict", "reset_num_updates"):
        setattr(LitEma, name, getattr(LitEma, name))  # pdoc shows no method of a private base
    pdoc.render.configure(docformat="google", math=True, template_directory=Path(__file__).parent)
    pdoc.pdoc("emajit", output_directory=folder)
    for path in folder.rglob("*.html"):
        path.write_text(_without_dead_links(path.read_text()))
    if lost := [*_unlinked(folder)]:
        raise ValueError("expected names of emajit, found\n" + "\n".join(lost))


def _below(package: str) -> list[str]:
    found = pkgutil.iter_modules(import_module(package).__path__)
    return sorted({each.name for each in found if each.name[0] != "_"} - HIDDEN)


def _without_dead_links(page: str) -> str:
    """Unlink methods of foreign bases, such as `state_dict`, which pdoc links but leaves out."""
    held = {*re.findall(r'\bid="([^"]+)"', page)}

    def link(found: re.Match[str]) -> str:
        return found[0] if found[1] in held else found[2]

    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', link, page)


def _unlinked(folder: Path) -> list[str]:
    """The names in backticks on each page that pdoc has found no definition for."""
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in sorted(folder.rglob("*.html"))
        for name in re.findall(r"<code>(emajit(?:\.\w+)+)(?:\(\))?</code>", path.read_text())
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
