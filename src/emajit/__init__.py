"""Exponential moving averages of model weights: a pure function over pytrees, and `LitEma`.

For developers. An update goes `functional` (alpha of the decay and the step), `_plan.find` (the
leaves, checked and paired by `_tree`; the cache), `_choose` (which kernel for which leaf),
`_kernels` (the arithmetic), with `_compile` in between where leaves are compiled. What a change
touches, beside its tests:

    a schedule, a bias-corrected average   schedules.py
    averages that go back into training    combine.py
    a layout of checkpoints                checkpoint/layouts/: a module, and a line in __init__.py
    a torch release                        _torch.py
    how "auto" chooses                     _choose.py
    an integration                         integrations/: a module; pyproject.toml for its extra
    a command                              cli/: a module, and an entry in main.py
    a decay for each parameter             functional.py (alphas), _plan.py (one for each leaf)
    what counts as one tensor, or overlaps _alias.py, _tree.py
    which average is of which parameter    _tracking.py, _names.py
    a device without float64 (MPS)         _devices.py; functional, _compile, _controls, schedules
    a rounding mode                        _rounding.py, _kernels.py, _choose.py, functional.py
    how a scope is entered and left        scope.py, _exchange.py (tensors), _context.py (signals)
"""

from emajit import schedules
from emajit._names import select
from emajit.combine import bema, pull_
from emajit.functional import init, update, update_, update_many, update_many_
from emajit.litema import LitEma
from emajit.scope import averaged_module, ema_scope

__all__ = [
    "LitEma",
    "averaged_module",
    "bema",
    "ema_scope",
    "init",
    "pull_",
    "schedules",
    "select",
    "update",
    "update_",
    "update_many",
    "update_many_",
]
