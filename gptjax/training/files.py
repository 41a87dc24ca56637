"""Records that a run appends to files while it trains, also when the disk is full.

A failed write of a log does not stop training: it is reported once, and the records are kept in memory until they can
be written.
"""

import os
import time
from collections.abc import Callable

from etils import epath

from gptjax.distributed import hosts

LIMIT = 64 * 2**20  # most bytes of unwritten records in memory, per file; beyond it the oldest are dropped
_AT_ONCE, _EVERY = 8192, 30.0  # bytes and seconds of records that are collected before they are written without flush()

_failing: dict[str, str] = {}  # path: why it cannot currently be written


def attempt(path, write: Callable[[], None]) -> bool:
    """Calls write() and returns whether it succeeded. An OSError is reported once for all files and attempts."""
    try:
        write()
    except Exception as error:
        if not isinstance(error, OSError) and "://" not in str(path):  # object stores raise other errors
            raise
        if not _failing:
            hosts.warn(
                f"{path} cannot be written ({reason(error)}): training continues, and what is missing is written "
                "when possible"
            )
        _failing[str(path)] = reason(error)
        return False
    if _failing.pop(str(path), None) and not _failing:
        hosts.warn(f"{path} and everything else that could not be written is complete again")
    return True


def give_up(path):
    """Forgets the failure of a path that will not be written any more."""
    _failing.pop(str(path), None)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


class AppendFile:
    """Appends records to a file, in order, each completely or not at all.

    add() collects records and writes them now and then; flush() writes all of them. Both return normally if that fails:
    the records stay in memory (up to LIMIT) for the next attempt. Object stores cannot append: each flush writes the
    complete file.

    keep: (bytes of the existing file) -> the bytes to keep; None = all.
    """

    def __init__(self, path, keep: Callable[[bytes], bytes] | None = None):
        self.path, self.pending, self.dropped = epath.Path(path), [], 0
        self._remote = "://" in str(self.path)
        exists = self.path.exists()
        there = self.path.read_bytes() if exists else b""
        content = keep(there) if keep else there
        self._size = len(content)  # bytes of the file that are good
        self._content = content if self._remote or not there.startswith(content) else None  # to be rewritten
        self._synced, self._waiting, self._failed, self._tried = exists and content == there, 0, False, time.monotonic()
        self.flush()

    def add(self, record: bytes):
        self.pending.append(record)
        self._waiting, self._synced = self._waiting + len(record), False
        while self._waiting > LIMIT:
            self._waiting -= len(self.pending.pop(0))
            self.dropped += 1
        enough = self._waiting >= _AT_ONCE and not self._failed and not self._remote
        if enough or time.monotonic() - self._tried > _EVERY:
            self._attempt(sync=False)

    def flush(self) -> bool:
        """Writes all records. Returns whether everything is on disk."""
        if not self._synced:
            self._synced = self._attempt(sync=True)
        return self._synced

    def _attempt(self, sync: bool) -> bool:
        self._failed, self._tried = not attempt(self.path, lambda: self._write(sync)), time.monotonic()
        return not self._failed

    def _write(self, sync: bool):
        data = b"".join(self.pending)
        if self._remote:
            self.path.write_bytes(self._content + data)
            self._content += data
        else:
            self._append(data, sync)
        self.pending.clear()
        self._waiting = 0

    def _append(self, data: bytes, sync: bool):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._content is not None:
            temporary = self.path.parent / f".{self.path.name}.tmp"
            try:
                temporary.write_bytes(self._content)
                temporary.replace(self.path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            self._content = None
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            end = min(self._size, os.fstat(file).st_size)
            os.ftruncate(file, end)
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(file, memoryview(data)[written:], end + written)
                if sync:
                    os.fsync(file)  # network file systems report a full disk only here
            except OSError:
                os.ftruncate(file, end)  # leaves no partial record
                raise
        finally:
            os.close(file)
        self._size = end + len(data)
