"""Graceful stopping: a run that gets a signal ends after the current step, with everything saved.

The signals are SIGTERM (preemption, scancel, kill), Ctrl-C and SIGHUP (the terminal was closed). A second Ctrl-C ends
the process at once, even while it waits for a device or a compilation.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

import jax

from gptjax.distributed import hosts
from gptjax.errors import INTERRUPTED

_HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # not on Windows
_ask: Callable[[], bool] | None = None  # of the running loop, for the functions that it calls


class Interrupted(Exception):
    """An evaluation was abandoned because the run has been asked to stop."""


def leave_if_asked():
    """Raises Interrupted if the run has been asked to stop. Long evaluations call it once per batch, on every host.
    Outside of stop_on_signals it does nothing."""
    if _ask is not None and _ask():
        raise Interrupted


@contextlib.contextmanager
def stop_on_signals():
    """Yields asked(), which is True once the process has been asked to stop; it is called once per step. With several
    hosts any of them may get the signal, and all stop at the same step."""
    global _ask
    signals: list[int] = []
    with contextlib.ExitStack() as restored:
        if jax.process_count() > 1:
            # JAX itself handles SIGTERM and agrees with the other hosts on the step
            heard = lambda number, _: os.kill(os.getpid(), signal.SIGTERM)
            _handle((signal.SIGINT, *_HANGUP), heard, restored)
            reached = lambda: bool(signals) or hosts.stop_asked() and not signals.append(signal.SIGTERM)
        else:
            heard = lambda number, _: signals.append(number)
            _handle((signal.SIGTERM, signal.SIGINT, *_HANGUP), heard, restored)
            reached = lambda: bool(signals)
        restored.callback(globals().update, _ask=_ask)
        _ask = reached
        yield reached


def _handle(numbers, heard: Callable, restored: contextlib.ExitStack):
    """Installs `heard`, except for signals that the parent process set to be ignored (nohup, background jobs)."""
    for number in numbers:
        old = signal.getsignal(number)
        if old in (signal.SIG_IGN, None):
            continue

        def handler(number, frame, old=old):
            if number == signal.SIGINT and hasattr(sys, "ps1"):  # in a notebook the second one interrupts a cell
                signal.signal(number, old)
            heard(number, frame)

        try:
            signal.signal(number, handler)
        except ValueError:  # not the main thread: the caller handles signals
            return
        restored.callback(signal.signal, number, old)
        if number == signal.SIGINT and not hasattr(sys, "ps1"):
            _watch_for_a_second(restored)


def _watch_for_a_second(restored: contextlib.ExitStack):
    """Handles Ctrl-C in a thread: Python's own handlers wait until the main thread returns from the device."""
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        heard = 0
        while byte := os.read(read, 1):
            heard += byte[0] == signal.SIGINT
            if heard == 1 and byte[0] == signal.SIGINT:
                _tell("asked to stop: finishing this step and saving it; Ctrl-C again ends at once, without saving")
            elif heard > 1:
                _tell("ended at once, without saving")
                os._exit(INTERRUPTED)
        os.close(read)

    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    restored.callback(os.close, write)
    restored.callback(signal.set_wakeup_fd, old)


def _tell(text: str):
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
