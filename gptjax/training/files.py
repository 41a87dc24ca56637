"""Records that a run adds to files while it trains, and what becomes of them where the disk is full.

No line of a log is worth a training run: what cannot be written is reported once, kept in memory, and written when
there is room.
"""

import os
import time
from collections.abc import Callable

from etils import epath

from gptjax.distributed import hosts

LIMIT = 64 * 2**20  # bytes of records that wait for room, per file; beyond it the oldest are dropped
_AT_ONCE, _EVERY = 8192, 30.0  # bytes and seconds of records that are collected before they are written unasked

_failing: dict[str, str] = {}  # path: why it cannot be written at the moment


def attempt(path, write: Callable[[], None]) -> bool:
    """write(), and whether it succeeded: an OSError is reported once, however many files and attempts it concerns."""
    try:
        write()
    except Exception as error:
        if not isinstance(error, OSError) and "://" not in str(path):  # object stores have errors of their own
            raise
        if not _failing:
            hosts.warn(
                f"{path} cannot be written ({reason(error)}): training goes on, and what is missing is written when it "
                "can be"
            )
        _failing[str(path)] = reason(error)
        return False
    if _failing.pop(str(path), None) and not _failing:
        hosts.warn(f"{path} and everything else that could not be written is complete again")
    return True


def give_up(path):
    """Nothing more will be written to path."""
    _failing.pop(str(path), None)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


class AppendFile:
    """Records at the end of a file: each is there completely or not at all, and in order.

    add() collects and writes now and then; flush() writes what there is. Both return normally where that fails: the
    records wait in memory (LIMIT) for the next attempt. Object stores cannot append: there the file is written
    completely at each flush.

    keep: the bytes of the file that is there -> those of them that stay (None = all).
    """

    def __init__(self, path, keep: Callable[[bytes], bytes] | None = None):
        self.path, self.pending, self.dropped = epath.Path(path), [], 0
        self._remote = "://" in str(self.path)
        exists = self.path.exists()
        there = self.path.read_bytes() if exists else b""
        content = keep(there) if keep else there
        self._size = len(content)  # how far the file is good
        self._content = content if self._remote or not there.startswith(content) else None  # to be written as a whole
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
        """Whether everything is on disk now."""
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
                    os.fsync(file)  # over a network it is only here that a full disk shows
            except OSError:
                os.ftruncate(file, end)  # no part of a record stays
                raise
        finally:
            os.close(file)
        self._size = end + len(data)
