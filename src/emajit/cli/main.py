"""The commands of `emajit` and their options; an error becomes one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

try:
    import typer
    from rich.console import Console

    from emajit import checkpoint, merging
    from emajit.checkpoint.averaged import NotOneError
    from emajit.cli.convert import write_averages
    from emajit.cli.inspect import names_in, show_averages
    from emajit.cli.merge import merge_checkpoints
    from emajit.cli.options import (
        DTYPES,
        LAYOUT,
        Cast,
        Checkpoint,
        Decay,
        Dtype,
        Key,
        Layout,
        Like,
        Names,
        Of,
        Out,
        RawKey,
        SigmaRel,
        Step,
        examples,
    )
    from emajit.cli.reconstruct import reconstruct_averages, split
except ModuleNotFoundError as error:
    message = f"emajit: the command needs {error.name}; pip install rich safetensors typer"
    raise SystemExit(message) from None

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="emajit COMMAND --help has examples of each.",
)


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
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Show, write, convert and merge averages of PyTorch weights in checkpoints."""


@app.command(epilog=examples("emajit demo --quick", "emajit demo --seed 1 --out seed-1"))
def demo(
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps.", show_default="2000; 300 with --quick"),
    ] = None,
    decay: Annotated[
        float, typer.Option(help="Decay of the average after its warm-up, in [0, 1].")
    ] = 0.999,
    seed: Annotated[int, typer.Option(help="Seed of the data, the model and the noise.")] = 0,
    device: Annotated[
        str, typer.Option(help="Device to train on.", show_default="cuda if there is one, else cpu")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("emajit-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Train for 300 steps, some seconds.")
    ] = False,
) -> None:
    """Train a small diffusion model on digits and show the gain from averaging its weights."""
    with _errors_in_one_line():
        from emajit.cli import demo as training  # noqa: PLC0415, only the demo needs this second

        torch.set_num_threads(1)  # more threads slow down so small a model
        device = device or training.default_device()
        steps = (300 if quick else 2000) if steps is None else steps
        training.run(training.Settings(steps, decay, seed, device, out), Console())


@app.command(
    epilog=examples(
        "emajit reconstruct snapshots --sigma-rel 0.07 -o averaged.safetensors",
        "emajit reconstruct snapshots --sigma-rel 0.06 0.07 0.08 -o averages --plot",
    )
)
def reconstruct(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="SNAPSHOT_DIR", help="Folder of snapshots, written by posthoc.save."
        ),
    ],
    sigma_rel: Annotated[
        list[str],
        typer.Option(
            metavar="LENGTH...",
            help="The wanted length, relative to the run; or several, each to a file of its own.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write, or for several lengths the folder."),
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="LENGTH", hidden=True)] = None,
    step: Annotated[
        int | None,
        typer.Option(help="End the average at this step.", show_default="the last snapshot's"),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(metavar="DTYPE", help=f"Dtype of the written weights: {DTYPES}.")
    ] = "float32",
    plot: Annotated[
        bool,
        typer.Option(
            "--plot", help="Draw the profiles and coefficients into a PNG beside the result."
        ),
    ] = False,
) -> None:
    """Average the weights of a finished run over another length, from its snapshots.

    The length is the standard deviation of the average's profile over time, divided by the run.
    """
    with _errors_in_one_line():
        source, lengths = split([*sigma_rel, str(folder), *(more or [])])
        reconstruct_averages(source, lengths, out, step, dtype, plot, Console())


@app.command(
    epilog=examples("emajit inspect model.ckpt", "emajit inspect model.ckpt --json | jq .average")
)
def inspect(
    file: Checkpoint,
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Show distances of the modules at this depth; 0 is the whole model.",
            show_default="the blocks",
        ),
    ] = None,
    sigma_rel: SigmaRel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Show the averages in a checkpoint: layout, step, decay, distance to the trained weights."""
    with _errors_in_one_line():
        options = names, key, raw_key, depth, sigma_rel
        show_averages(file, *options, as_json=as_json, console=Console())


@app.command(
    epilog=examples(
        "emajit extract model.ckpt -o averaged.safetensors",
        "emajit extract checkpoint-500 -o averaged --like checkpoint-500",
    )
)
def extract(
    file: Checkpoint,
    out: Out,
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    like: Like = None,
    layout: Annotated[Layout, LAYOUT] = "state_dict",
    decay: Decay = None,
    step: Step = None,
    dtype: Cast = None,
) -> None:
    """Write the averaged weights of a checkpoint into a file of their own."""
    convert(file, out, layout, names, key, raw_key, like, decay, step, dtype)


@app.command(
    epilog=examples(
        "emajit convert model.ckpt -o swa.pt --layout averaged-model",
        "emajit convert timm.pth -o ldm.ckpt --layout litema --decay 0.9999",
        "emajit convert model.pt -o next.ckpt --layout lightning --like last.ckpt",
        "emajit convert run-20 -o back --layout diffusers-ema --like run-20/unet",
    )
)
def convert(
    file: Checkpoint,
    out: Out,
    layout: Annotated[Layout, LAYOUT],
    names: Names = None,
    key: Key = None,
    raw_key: RawKey = None,
    like: Like = None,
    decay: Decay = None,
    step: Step = None,
    dtype: Cast = None,
) -> None:
    """Write the averages of a checkpoint in another library's layout, to go on with them there."""
    with _errors_in_one_line():
        found = checkpoint.read(file, names=(listed := names_in(names)), key=key, raw_key=raw_key)
        write_averages(file, found, listed, out, layout, like, decay, step, dtype, Console())


@app.command(
    epilog=examples(
        "emajit merge --last 5 checkpoints/ -o merged.safetensors",
        "emajit merge a.pt b.pt c.pt -o merged.pt --coefficients 0.2,0.3,0.5",
    )
)
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Files or folders, from the oldest to the newest; with --last one folder of them.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The file to write, or a new folder if the first source is one."
        ),
    ],
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="uniform, ema:BETA, wsm:linear, wsm:cosine, wsm:1-sqrt, or numbers joined by "
            "commas.",
            show_default="uniform",
        ),
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="K", help="Merge the last K checkpoints in the folder.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP",
            help="Write the mean of the steps after START up to STOP. Needs, at both, the mean "
            "since the start of the run: snapshots of schedules.uniform(), or icefall's files.",
        ),
    ] = None,
    of: Annotated[
        Of | None,
        typer.Option(
            metavar="WHICH",
            help="Weights to merge if a checkpoint holds both: averages or trained.",
        ),
    ] = None,
    key: Key = None,
    names: Names = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Base model of PEFT adapters: add the mean of the products of A and B to it.",
        ),
    ] = None,
    integers: Annotated[
        Literal["last", "equal"],
        typer.Option(
            metavar="RULE",
            help="last takes integer tensors from the last source; equal requires equal ones.",
        ),
    ] = "last",
    allow_any_sum: Annotated[
        bool, typer.Option("--allow-any-sum", help="Allow coefficients that do not sum to 1.")
    ] = False,
    to: Annotated[
        merging.Form | None,
        typer.Option(
            metavar="FORM",
            help="Form of the result: safetensors, torch (torch.save), folder (for "
            "from_pretrained) or distributed (torch.distributed.checkpoint).",
            show_default="as the name of --out says, else the first source's",
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
    except OSError as error:
        told = error.filename is not None and error.strerror  # without "[Errno 2]"
        raise _Failure(f"{told}: {error.filename!r}" if told else _one_line(error)) from None
    except ValueError as error:
        is_table = isinstance(error, NotOneError)
        raise _Failure(str(error) if is_table else _one_line(error)) from None
    except KeyboardInterrupt:
        raise _Failure("interrupted; no file is half-written", 130) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
        if not isinstance(error, _Failure):  # of typer
            line = " ".join(line.replace("Value error, ", "").split())
        if line:  # empty after a call without a command, which shows the help
            console = Console(stderr=True)
            console.print(f"emajit: {line}", markup=False, highlight=False, soft_wrap=True)
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
