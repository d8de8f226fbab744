"""The `emajit` command: the entry in `main`, one module a command, and the pictures they draw."""

from emajit.cli.main import main

__all__ = ["main"]
