"""Context managers whose cleanup runs whenever a signal arrives."""

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
    """Like `contextlib.contextmanager`, but a signal cannot prevent the `finally` block.

    Python runs signal handlers (Ctrl-C) when it enters a Python function and after it has called a
    C function. contextlib's `__exit__` is a Python function: an interrupt as it starts skips the
    generator's `finally`. Here only C code runs before that `finally`, so its first call of a C
    function is made before any handler can raise.

    However the `with` ends, the generator is closed: it sees GeneratorExit, not the exception.
    """

    @wraps(function)
    def enter(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[None]:
        return _Context(partial(function, *args, **kwargs))

    return enter


class _Context(ContextDecorator, io.IOBase, AbstractContextManager[None]):
    """An `io.IOBase`, for its `__exit__` and finalizer in C: both call `close`."""

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
