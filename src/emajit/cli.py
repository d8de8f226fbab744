"""The `emajit` command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    message = f"emajit: the command needs {error.name}; pip install 'emajit[demo]' brings it"
    raise SystemExit(message) from None

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def emajit() -> None:
    """Exponential moving averages of PyTorch weights."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    decay: Annotated[
        float, typer.Option(help="Of the average, after its warm-up; in [0, 1].")
    ] = 0.999,
    seed: Annotated[int, typer.Option(help="Of the data, the model and the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Default: cuda if there is one, else cpu.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("emajit-demo"),
    posthoc: Annotated[
        bool, typer.Option("--posthoc", help="Also save snapshots, and sweep the averaging length.")
    ] = False,
) -> None:
    """Train a small diffusion model on digits and show what averaging its weights is worth."""
    try:
        from emajit import demo as training  # noqa: PLC0415, seconds that --help need not take
    except ModuleNotFoundError as error:
        message = f"demo needs {error.name}; pip install 'emajit[demo]' brings it"
        raise _Failure(message) from None
    try:
        device = device or training.default_device()
        settings = training.Settings(steps, decay, seed, device, out, posthoc)
    except ValueError as error:
        raise _Failure(str(error)) from None
    try:
        training.run(settings, Console())
    except KeyboardInterrupt:
        raise _Failure(f"interrupted; no file in {out} is half-written", 130) from None


class Dtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


@app.command()
def reconstruct(
    folder: Annotated[Path, typer.Argument(metavar="SNAPSHOT_DIR", help="With the snapshots.")],
    sigma_rel: Annotated[
        list[float],
        typer.Option(help="The length that is wanted, relative to the run; or several."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write; the folder, for several lengths."),
    ],
    more: Annotated[list[float] | None, typer.Argument(hidden=True)] = None,
    step: Annotated[int | None, typer.Option(help="Default: that of the last snapshot.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the file.")] = Dtype.float32,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw profiles and coefficients, beside the result.")
    ] = False,
) -> None:
    """Average the weights of a finished run over another length, from its snapshots."""
    try:
        from emajit import reconstruction  # noqa: PLC0415, seconds that --help need not take
    except ModuleNotFoundError as error:
        message = f"reconstruct needs {error.name}; pip install 'emajit[demo]' brings it"
        raise _Failure(message) from None
    lengths = [*sigma_rel, *(more or [])]
    try:
        reconstruction.run(folder, lengths, out, step, dtype.value, plot, Console())
    except (ValueError, OSError) as error:
        raise _Failure(" ".join(str(error).split())) from None
    except KeyboardInterrupt:
        raise _Failure("interrupted; no file is half-written", 130) from None


class _Failure(Exception):  # noqa: N818, not an error of the program
    """A line for stderr and an exit code, as typer's own exceptions have them."""

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
        line = f"emajit: {error.format_message()}"
        Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
