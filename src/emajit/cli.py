"""The `emajit` command."""

from __future__ import annotations

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
) -> None:
    """Train a small diffusion model on digits and show what averaging its weights is worth."""
    try:
        from emajit import demo as training  # noqa: PLC0415, seconds that --help need not take
    except ModuleNotFoundError as error:
        message = f"demo needs {error.name}; pip install 'emajit[demo]' brings it"
        raise _Failure(message) from None
    try:
        settings = training.Settings(steps, decay, seed, device or training.default_device(), out)
    except ValueError as error:
        raise _Failure(str(error)) from None
    try:
        training.run(settings, Console())
    except KeyboardInterrupt:
        raise _Failure(f"interrupted; no file in {out} is half-written", 130) from None


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
