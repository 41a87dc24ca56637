"""Console output that works on any terminal, pipe or log file, and progress bars.

Output must never end a training run: not a character outside the terminal's encoding, a closed pipe (`| head`), a lost
terminal or a log file on a full disk.
"""

import contextlib
import math
import os
import sys
import time
import warnings

from tqdm import tqdm


class _Lenient:
    """A text stream that ignores write errors; characters outside its encoding are written as \\u escapes."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: closed
            _redirect_to_null(self._stream, error)
        return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            _redirect_to_null(self._stream, error)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _redirect_to_null(stream, error):
    """Redirects a stream without a reader to /dev/null; otherwise flushing its buffer at exit would raise."""
    if isinstance(error, BrokenPipeError) and stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextlib.contextmanager
def lenient_output():
    """Context manager in which print does not raise, whatever happens to stdout and stderr."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Lenient(stream) for stream in (out, err))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Lenient):
                stream.flush()
        sys.stdout, sys.stderr = out, err


def plain_warnings():
    """For a command: warnings.warn prints only its message, not the source line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def escape_unprintable():
    """For a command: characters outside the encoding of stdout and stderr are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone():
    """For a command whose output went to `| head`: writes nothing more, not even at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _redirect_to_null(stream, error)


# --- progress ---------------------------------------------------------------------------------------------


def progress(iterable=None, *, disable: bool = False, **options) -> tqdm:
    """A tqdm bar on stderr. If that is not a terminal: a line at the start, every 30 s and at the end, or with
    leave=False only those in between. options: of tqdm. TQDM_MININTERVAL and TQDM_DISABLE have their usual meaning."""
    if disable or sys.stderr is None:
        options["disable"] = True  # otherwise not passed: an argument would override TQDM_DISABLE
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(iterable, **{"file": sys.stderr, "dynamic_ncols": True, **options})
    every = float(os.environ.get("TQDM_MININTERVAL", 30))
    options |= {"file": sys.stderr, "mininterval": every, "maxinterval": every}
    if options.get("leave", True) is False:
        options["delay"] = max(options.get("delay", 0), every)
    return _Lines(iterable, **options)


class _Lines(tqdm):
    """A progress bar as lines of a log: nothing is overwritten, and lines are at least `mininterval` apart."""

    _shown = -math.inf

    @staticmethod
    def status_printer(file):
        def print_status(text):
            if text:
                file.write(f"{text}\n")
                file.flush()

        return print_status

    def refresh(self, *args, **kwargs):
        now = time.monotonic()
        if now - self._shown >= 0.9 * self.mininterval:  # tqdm's own clock may be a moment ahead
            self._shown = now
            super().refresh(*args, **kwargs)

    def moveto(self, n):
        pass

    def clear(self, *args, **kwargs):
        pass

    def close(self):
        if self.disable:
            return
        if self.leave is not False and self.n != self.initial and self.start_t + self.delay < self._time():
            super().refresh()
        self.disable = True
        self._decr_instances(self)
