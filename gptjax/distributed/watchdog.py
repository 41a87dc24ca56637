"""Ends a process that neither works nor dies."""

import contextlib
import faulthandler
import functools
import sys


@contextlib.contextmanager
def watchdog(seconds: float | None):
    """Yields heartbeat(), to be called once a step: after `seconds` without it the process writes the stack of each of
    its threads and ends. None = never."""
    if seconds is None:
        yield lambda: None
        return
    heartbeat = functools.partial(faulthandler.dump_traceback_later, seconds, exit=True, file=sys.__stderr__)
    heartbeat()
    try:
        yield heartbeat
    finally:
        faulthandler.cancel_dump_traceback_later()
