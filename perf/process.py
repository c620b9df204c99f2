"""One function in a process of its own: its peak memory is its alone, and its end is not ours."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from perf.errors import PerfError, one_line


def in_process(function: Callable[..., Any], *arguments: object, timeout_s: float | None = None) -> Any:
    """What the function returns.

    Raises:
        PerfError: It raised an error, ended the process or took too long.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(timeout_s):
            raise PerfError(f"not done in {timeout_s:.0f} s")
        result, error = here.recv()
    except EOFError as err:
        process.join()
        raise PerfError(f"the process ended with status {process.exitcode}: too little memory?") from err
    finally:
        process.kill()
        process.join()
    if error:
        raise PerfError(error)
    return result


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        connection.send((function(*arguments), ""))
    except PerfError as err:
        connection.send((None, str(err)))
    except Exception as err:  # whatever goes wrong is this function's result
        connection.send((None, f"{type(err).__name__}: {one_line(err)}"))
