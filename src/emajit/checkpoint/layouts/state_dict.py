"""The averaged weights alone, as a model loads them with `load_state_dict`. Only written."""

from __future__ import annotations

from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, Writer


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    return dict(averaged.weights)


LAYOUT = Layout(writer=Writer("state_dict", _state, safetensors=True))
