"""Exponential moving averages of model weights: a pure function over pytrees, and `LitEma`."""

from emajit import schedules
from emajit.functional import init, update, update_
from emajit.litema import LitEma
from emajit.scope import ema_scope

__all__ = ["LitEma", "ema_scope", "init", "schedules", "update", "update_"]
