"""The worker processes of one command: those that die are replaced, and the attempts that they were at have failed."""

import signal
import subprocess
from collections.abc import Callable

from gptjax.errors import INTERRUPTED, InputError

LOST = 75  # exit code of a worker whose point another one has taken over


class Workers:
    """Worker processes. failed: (pid, reason) -> whether a worker that has died had a point, whose attempt it ends."""

    def __init__(self, count: int, command: list[str], environment: dict, failed: Callable[[int, str], bool]):
        self._command, self._environment, self._failed = command, environment, failed
        self._running = [self._start() for _ in range(count)]
        self.stopping, self._unexplained = False, 0
        signal.signal(signal.SIGTERM, lambda *_: self.stop())

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self._command, env=self._environment)

    def stop(self):
        """Has every worker save and end; the points are free again."""
        self.stopping = True
        for process in self._running:
            if process.poll() is None:
                process.terminate()

    def check(self) -> bool:
        """Whether any is still at work, after replacing those that have died. Each is looked at once: one that dies
        meanwhile is at work until the next check, which replaces it."""
        at_work = False
        for i, process in enumerate(self._running):
            code = process.poll()
            at_work |= code is None
            if code in (None, 0) or self.stopping:
                continue
            if code not in (LOST, INTERRUPTED):
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                had_point = self._failed(process.pid, f"its worker ended with {how}")
                self._unexplained = 0 if had_point else self._unexplained + 1
                if self._unexplained > 3:
                    self.stop()
                    raise InputError(f"Workers end with {how} before they have a point: read their output above.")
            if code == INTERRUPTED:
                self.stopping = True
            else:
                self._running[i] = self._start()
                at_work = True
        return at_work

    @property
    def count(self) -> int:
        return sum(process.poll() is None for process in self._running)
