"""The options and arguments that several commands share, and the examples below a help text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from emajit.checkpoint.layouts import WRITERS


def examples(*lines: str) -> str:
    """The end of a help text; a blank line is a line break in every version of typer."""
    return "\n\n".join(["[bold]Examples[/bold]", *map(escape, lines)])


Of = Literal["averages", "trained"]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES = "float16, bfloat16, float32 or float64"
if TYPE_CHECKING:
    Layout = str
else:
    Layout = Literal[*WRITERS]


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A checkpoint: a file of safetensors or torch.save, or a folder of a trainer, of a "
        "diffusers pipeline or of torch.distributed.checkpoint.",
    ),
]
Names = Annotated[
    Path | None,
    typer.Option(
        metavar="TEXT_FILE",
        help="The names of the parameters in order, one a line, for a checkpoint or a layout that "
        "holds averages without names.",
    ),
]


Key = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Path of the averages in the checkpoint, if several are found: keys joined by dots, "
        "such as ema.module.",
    ),
]
RawKey = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Path of the trained weights in the checkpoint."),
]


SigmaRel = Annotated[
    str | None,
    typer.Option(
        metavar="LENGTHS",
        help="The lengths of ema-pytorch's PostHocEMA, joined by commas in the order of the "
        "training script: its files hold none.",
    ),
]


_FLAT = " and ".join(name for name, writer in WRITERS.items() if writer.safetensors)
_COPIED = ", ".join(name for name, writer in WRITERS.items() if writer.place)
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help=f"The file to write. {_FLAT} become safetensors unless the name ends in .ckpt, .pt, "
        ".pth or .bin; the other layouts are written with torch.save.",
    ),
]
Decay = Annotated[
    float | None,
    typer.Option(help="Decay to write, if the layout holds one.", show_default="the checkpoint's"),
]
Step = Annotated[
    int | None,
    typer.Option(
        help="Number of updates to write, if the layout holds it.", show_default="the checkpoint's"
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="A file of the model's weights: require its names and shapes. Or a folder of "
        "diffusers or transformers: write such a folder, for from_pretrained. Or, for "
        f"{_COPIED}, a checkpoint of the trainer: write a copy of it with these averages.",
    ),
]
Cast = Annotated[
    Dtype | None,
    typer.Option(
        metavar="DTYPE", help=f"Dtype of the written weights: {DTYPES}.", show_default="their own"
    ),
]
_LAYOUTS = [*WRITERS]
LAYOUT = typer.Option(
    metavar="LAYOUT",
    help=f"Layout of the written file: {', '.join(_LAYOUTS[:-1])} or {_LAYOUTS[-1]}.",
)
