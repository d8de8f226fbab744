"""The commands of `emajit` and their options; an error becomes one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

try:
    import typer
    from rich.console import Console

    from emajit import checkpoint, merging
    from emajit.checkpoint.averaged import NotOneError
    from emajit.checkpoint.layouts import WRITERS
    from emajit.cli.convert import write_averages
    from emajit.cli.inspect import names_in, show_averages
    from emajit.cli.merge import merge_checkpoints
    from emajit.cli.reconstruct import reconstruct_averages
except ModuleNotFoundError as error:
    message = f"emajit: the command needs {error.name}; pip install rich safetensors typer"
    raise SystemExit(message) from None

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = metadata.version("emajit")
        except metadata.PackageNotFoundError:  # run from its sources
            number = "(not installed)"
        typer.echo(f"emajit {number}")
        raise typer.Exit


@app.callback()
def emajit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    """Exponential moving averages of PyTorch weights."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    decay: Annotated[
        float, typer.Option(help="Decay of the average after its warm-up, in [0, 1].")
    ] = 0.999,
    seed: Annotated[int, typer.Option(help="Seed of the data, the model and the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Default: cuda if there is one, else cpu.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("emajit-demo"),
    posthoc: Annotated[
        bool, typer.Option("--posthoc", help="Also save snapshots, and sweep the averaging length.")
    ] = False,
) -> None:
    """Train a small diffusion model on digits and show the gain from averaging its weights."""
    with _errors_in_one_line():
        from emajit.cli import demo as training  # noqa: PLC0415, only the demo needs this second

        torch.set_num_threads(1)  # more threads slow down so small a model
        device = device or training.default_device()
        training.run(training.Settings(steps, decay, seed, device, out, posthoc), Console())


Of = Literal["averages", "trained"]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
if TYPE_CHECKING:
    Layout = str
else:
    Layout = Literal[*WRITERS]


@app.command()
def reconstruct(
    folder: Annotated[Path, typer.Argument(metavar="SNAPSHOT_DIR", help="Folder of snapshots.")],
    sigma_rel: Annotated[
        list[float],
        typer.Option(
            help="The wanted length, relative to the run; put several behind SNAPSHOT_DIR."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write; the folder, for several lengths."),
    ],
    more: Annotated[list[float] | None, typer.Argument(metavar="SIGMA_REL", hidden=True)] = None,
    step: Annotated[int | None, typer.Option(help="Default: the last snapshot's step.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights in the file.")] = "float32",
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw profiles and coefficients, beside the result.")
    ] = False,
) -> None:
    """Average the weights of a finished run over another length, from its snapshots."""
    with _errors_in_one_line():
        lengths = [*sigma_rel, *(more or [])]
        reconstruct_averages(folder, lengths, out, step, dtype, plot, Console())


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A file of safetensors or torch.save; or a folder of a trainer, a diffusers pipeline, "
        "or torch.distributed.checkpoint.",
    ),
]
Names = Annotated[
    Path | None,
    typer.Option(
        help="A text file with the names of the parameters in order, one a line, for layouts by "
        "position."
    ),
]


Key = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Path of the averages, if the file does not show it: keys joined by dots, such as "
        "ema.module.",
    ),
]
RawKey = Annotated[
    str | None, typer.Option(metavar="PATH", help="Path of the trained weights, likewise.")
]


@app.command()
def inspect(
    file: Checkpoint,
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="Depth of the modules in the distances; default, the blocks."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the averages in a checkpoint: layout, step, decay, distance to the trained weights."""
    with _errors_in_one_line():
        show_averages(file, names, key, raw_key, depth, as_json=as_json, console=Console())


_FLAT = " and ".join(name for name, writer in WRITERS.items() if writer.safetensors)
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help=f"The file to write. {_FLAT} are written as safetensors, or with torch.save if the "
        "name ends in .ckpt, .pt, .pth or .bin.",
    ),
]
Decay = Annotated[
    float | None,
    typer.Option(help="Decay to write, if the layout holds one; default, the checkpoint's."),
]
Step = Annotated[
    int | None, typer.Option(help="Number of updates taken; default, the checkpoint's.")
]
Like = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="A file of the model's weights, whose names and shapes the averages must have; or a "
        "folder of diffusers or transformers, to write such a folder, for from_pretrained.",
    ),
]
Cast = Annotated[Dtype | None, typer.Option(help="Dtype of the weights; default, their own.")]


@app.command()
def extract(
    file: Checkpoint,
    out: Out,
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    like: Like = None,
    layout: Annotated[
        Layout, typer.Option("--format", help="Layout of the written file.")
    ] = "state_dict",
    decay: Decay = None,
    step: Step = None,
    dtype: Cast = None,
) -> None:
    """Write the averaged weights of a checkpoint into a file of their own."""
    convert(file, out, layout, names, key, raw_key, like, decay, step, dtype)


@app.command()
def convert(
    file: Checkpoint,
    out: Out,
    layout: Annotated[Layout, typer.Option("--to", help="Layout of the written file.")],
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    like: Like = None,
    decay: Decay = None,
    step: Step = None,
    dtype: Cast = None,
) -> None:
    """Write the averages of a checkpoint in another layout, to go on with them there."""
    with _errors_in_one_line():
        found = checkpoint.read(file, names=(listed := names_in(names)), key=key, raw_key=raw_key)
        write_averages(file, found, listed, out, layout, like, decay, step, dtype, Console())


@app.command()
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="From the oldest to the newest; with --last, one folder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The file, or a new folder if the first source is a folder."
        ),
    ],
    coefficients: Annotated[
        str | None,
        typer.Option(
            help="uniform (the default), ema:BETA, wsm:linear, wsm:cosine, wsm:1-sqrt, or numbers "
            "with commas."
        ),
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="K", help="The last K checkpoints in the folder.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP",
            help="The mean of the steps behind START up to STOP, from means since the start of the "
            "run at both: snapshots of schedules.uniform(), or icefall's checkpoints.",
        ),
    ] = None,
    of: Annotated[
        Of | None, typer.Option(help="Which weights, where a checkpoint holds both.")
    ] = None,
    key: Key = None,
    names: Names = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", help="Base of PEFT adapters; the products of A and B are added to it."
        ),
    ] = None,
    integers: Annotated[
        Literal["last", "equal"],
        typer.Option(help="Integer tensors: take the last source's, or require equal ones."),
    ] = "last",
    allow_any_sum: Annotated[
        bool, typer.Option("--allow-any-sum", help="Take coefficients that do not sum to 1.")
    ] = False,
    to: Annotated[
        merging.Form | None,
        typer.Option(
            help="The written form: folder is for from_pretrained, distributed for "
            "torch.distributed.checkpoint. Default: as the name says, else the first source's."
        ),
    ] = None,
    dtype: Cast = None,
) -> None:
    """Average the weights of several checkpoints of a run."""
    with _errors_in_one_line():
        merge_checkpoints(
            sources,
            out,
            coefficients,
            last,
            window,
            dtype,
            Console(),
            of=of,
            key=key,
            names=names_in(names),
            base=base,
            integers=integers,
            allow_any_sum=allow_any_sum,
            to=to,
        )


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turn an expected error inside into a `_Failure`."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"this needs {error.name}; pip install matplotlib numpy scikit-learn"
        raise _Failure(message) from None
    except (ValueError, OSError) as error:
        is_table = isinstance(error, NotOneError)
        raise _Failure(str(error) if is_table else " ".join(str(error).split())) from None
    except KeyboardInterrupt:
        raise _Failure("interrupted; no file is half-written", 130) from None


class _Failure(Exception):  # noqa: N818, not an error of the program
    """A line for stderr and an exit code, like typer's own exceptions."""

    def __init__(self, line: str, exit_code: int = 2) -> None:
        super().__init__(line)
        self.exit_code = exit_code

    def format_message(self) -> str:
        return str(self)


def main() -> int:
    """Run the command. Returns the exit code: 2, with one line on stderr, for an unusable value."""
    try:
        result: Any = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        line = error.format_message()
        line = line if isinstance(error, _Failure) else " ".join(line.split())
        if line:  # empty after a call without a command, which shows the help
            console = Console(stderr=True)
            console.print(f"emajit: {line}", markup=False, highlight=False, soft_wrap=True)
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
