"""The `emajit` command: the entry in `main`, one module for each command, and pictures."""

from emajit.cli.main import main

__all__ = ["main"]
