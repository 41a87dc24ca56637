"""How a run that is asked to end stops: at the next step, with everything saved.

SIGTERM (preemption, scancel, kill), Ctrl-C and SIGHUP (the terminal is gone) ask for it. A second Ctrl-C ends the
process at once, also where it waits for a device or a compilation.
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
_ask: Callable[[], bool] | None = None  # of the loop that runs, for what it calls


class Interrupted(Exception):
    """An evaluation that was left because the run is to stop."""


def leave_if_asked():
    """To be called once a batch by what takes long inside a loop, on every host: raises Interrupted where the run is to
    stop. Outside of stop_on_signals it does nothing."""
    if _ask is not None and _ask():
        raise Interrupted


@contextlib.contextmanager
def stop_on_signals():
    """Yields asked(), True once the process is asked to end, to be called once a step. Of many hosts any one may be
    asked, and all stop at the same step."""
    global _ask
    signals: list[int] = []
    with contextlib.ExitStack() as restored:
        if jax.process_count() > 1:
            # JAX itself hears SIGTERM, and agrees with the other hosts on the step
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
    """Installs `heard`, but for signals that whoever started the process ignores (nohup, jobs in the background)."""
    for number in numbers:
        old = signal.getsignal(number)
        if old in (signal.SIG_IGN, None):
            continue

        def handler(number, frame, old=old):
            if number == signal.SIGINT and hasattr(sys, "ps1"):  # a notebook is not ended: the second one interrupts
                signal.signal(number, old)
            heard(number, frame)

        try:
            signal.signal(number, handler)
        except ValueError:  # not the main thread: whoever runs us handles signals
            return
        restored.callback(signal.signal, number, old)
        if number == signal.SIGINT and not hasattr(sys, "ps1"):
            _watch_for_a_second(restored)


def _watch_for_a_second(restored: contextlib.ExitStack):
    """Answers Ctrl-C from a thread: Python's own handlers wait until the main thread is back from the device."""
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
