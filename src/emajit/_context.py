"""Contexts that no signal keeps from being left."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from functools import partial, wraps
from typing import ParamSpec

P = ParamSpec("P")


def contextmanager(
    function: Callable[P, Iterator[None]],
) -> Callable[P, AbstractContextManager[None]]:
    """As `contextlib.contextmanager`, but a signal cannot keep `finally` from running.

    Python runs the handlers of signals, such as that of Ctrl-C, as it enters a function written in
    Python and after it has called one written in C. The `__exit__` of contextlib is the former: an
    interrupt at its start leaves the generator where it is. Here everything up to the generator's
    own `finally` is C, and so the first call of a C function there comes before any interrupt.

    The generator is closed, whatever ends the `with`, so that only its `finally` runs.
    """

    @wraps(function)
    def enter(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[None]:
        return _Context(partial(function, *args, **kwargs))

    return enter


class _Context(ContextDecorator, io.IOBase, AbstractContextManager[None]):
    """A file to Python, whose `__exit__`, in C, calls `close`; so does its end, if it is lost."""

    def __init__(self, start: Callable[[], Iterator[None]]) -> None:
        self._start = start

    def __enter__(self) -> None:  # type: ignore[override]
        running = self._start()
        try:
            next(running)
            self.close = running.close  # type: ignore[method-assign, attr-defined]
        except BaseException:
            running.close()  # type: ignore[attr-defined]
            raise

    __exit__ = io.IOBase.__exit__
