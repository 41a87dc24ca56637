"""A queue in a folder: which worker has which point, how each attempt ended, and the results.

    claims/NAME@0003.json        the third attempt at a point; who created it has the point
    claims/NAME@0003.beat.json   written again and again by its owner, with the steps that its run has done
    claims/NAME@0003.end.json    how it ended, if anybody was there to write it
    results/NAME.json            the point's result, created once
    results.jsonl                all results, gathered from those files

An attempt is claimed by creating its file, which one process alone can do (files.py). Nothing is ever taken back:
whoever takes over a point whose owner is gone creates the next attempt, and an owner that finds a next attempt has lost
the point. An owner is gone when its beat has not changed for `lease` seconds of the clock of the worker that looks, so
that clocks need not agree; or at once if both are on one machine and its process has ended.
"""

import dataclasses
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from gptjax import json_files
from gptjax.queue.files import Folder

DONE, FAILED, RELEASED, RESET = "done", "failed", "released", "reset"  # how an attempt ended


@dataclasses.dataclass
class State:
    """Of a point. kind: 'waiting', 'running', 'finished' (it has a result) or 'failed' (as often as allowed).

    attempts: made so far. owner: of the last one. beat: the last one's (Lease). reason: why the last one that failed
    did."""

    kind: str
    attempts: int = 0
    owner: dict | None = None
    beat: dict | None = None
    reason: str | None = None


class Queue:
    """A worker's view of the queue. workdir: of the points. lease: seconds. attempts: failures that a point may have.
    clock: seconds, of any origin."""

    def __init__(self, workdir, *, lease: float = 60.0, attempts: int = 3, clock: Callable[[], float] = time.monotonic):
        self.folder, self.lease, self.attempts, self._clock = Folder(workdir), lease, attempts, clock
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # {attempt: (its beat, when that was first seen)}
        self._read: dict[str, dict] = {}  # files that never change
        self.me = identity()

    # --- what is known --------------------------------------------------------------------------------

    def states(self, names: Iterable[str]) -> dict[str, State]:
        """{name: State} of the points. The claims are listed before the results: an attempt that is missing its end
        here has a result by the time that is asked for, or none."""
        claims = self.folder.names("claims")
        results = {name.removesuffix(".json") for name in self.folder.names("results")}
        last: dict[str, int] = {}
        for file in claims:
            name, _, rest = file.rpartition("@")
            last[name] = max(last.get(name, 0), int(rest.partition(".")[0]))
        there = set(claims)
        return {name: self._state(name, last.get(name, 0), name in results, there) for name in names}

    def _state(self, name: str, last: int, has_result: bool, there: set[str]) -> State:
        if has_result:
            return State("finished", last)
        owner, beat, alive = None, None, False
        if last and f"{_attempt(name, last)}.end.json" not in there:
            owner = self._json(f"{_attempt(name, last)}.json")
            beat = self.folder.read(f"claims/{_attempt(name, last)}.beat.json")
            alive = self._alive(_attempt(name, last), owner, beat)
        failures = self._failures(name, last - alive, there)
        reason = failures[-1] if failures else None
        if len(failures) >= self.attempts and not alive:
            return State("failed", last, reason=reason)
        return State("running" if alive else "waiting", last, owner, _parsed(beat), reason)

    def _failures(self, name: str, last: int, there: set[str]) -> list[str | None]:
        """Why those of the first `last` attempts failed that did, since they were reset. An attempt whose machine went
        away has too, if its run came no further than it had been: the point may be what takes machines down, while a
        machine that is preempted has done some steps."""
        failures, furthest = [], 0
        for k in range(1, last + 1):
            attempt = _attempt(name, k)
            if f"{attempt}.end.json" in there:
                end = self._json(f"{attempt}.end.json")
                failures = [] if end.get("how") == RESET else failures
                failures += [end.get("reason")] * (end.get("how") == FAILED)
            elif self._machine_lost(name, k, there):
                step = (_parsed(self.folder.read(f"claims/{attempt}.beat.json")) or {}).get("step", 0)
                if step <= furthest:
                    failures.append(f"{self._json(f'{attempt}.json').get('host')} went away while it was at it")
                furthest = max(furthest, step)
        return failures

    def _machine_lost(self, name: str, k: int, there: set[str]) -> bool:
        """Whether an attempt that has not ended was taken over, or can be, from another machine: on its own it is seen
        whether a process alone was killed."""
        owner, following = self._json(f"{_attempt(name, k)}.json"), f"{_attempt(name, k + 1)}.json"
        machines = owner.get("machine"), (self._json(following) if following in there else self.me).get("machine")
        return None not in machines and machines[0] != machines[1]

    def _alive(self, attempt: str, owner: dict, beat: bytes | None) -> bool:
        if ended(owner):
            return False
        before, since = self._seen.get(attempt, (None, None))
        if since is None or beat != before:
            self._seen[attempt] = (beat, self._clock())
            return True
        return self._clock() - since < self.lease

    def _json(self, file: str) -> dict:
        """Of a file of claims/ that does not change once it is there."""
        if file not in self._read:
            self._read[file] = _parsed(self.folder.read(f"claims/{file}")) or {}
        return self._read[file]

    # --- taking a point, and giving it back -----------------------------------------------------------

    def acquire(self, names: Iterable[str]) -> "Lease | None":
        """The first of the points that is free; None if none is."""
        states = self.states(names := list(names))
        for name in names:
            if states[name].kind == "waiting":
                attempt = states[name].attempts + 1
                if self.folder.create(f"claims/{_attempt(name, attempt)}.json", _bytes(self.me)):
                    lease = Lease(self, name, attempt)
                    if not self.folder.exists(f"results/{name}.json"):
                        return lease
                    lease.end(DONE)  # by an owner who was given up too early
        return None

    def finish(self, lease: "Lease", row: dict):
        """Keeps the result of a point, the first one if there are two, and gathers all."""
        self.keep(lease, row)
        gather(self.folder)

    def keep(self, lease: "Lease", row: dict):
        """Keeps the result of a point, the first one if there are two."""
        self.folder.create(f"results/{lease.name}.json", _bytes(row))
        lease.end(DONE)

    def result(self, name: str) -> dict | None:
        """The result of a point; None if it has none."""
        return _parsed(self.folder.read(f"results/{name}.json"))

    def fail_attempt_of(self, pid: int, reason: str) -> bool:
        """Ends the attempt of a worker of this machine that has died, as failed; whether it was at one."""
        files, found = self.folder.names("claims"), False
        for file in files:
            attempt = file.removesuffix(".json")
            if "." in attempt.rpartition("@")[2] or f"{attempt}.end.json" in files:
                continue
            owner = self._json(file)
            if owner.get("pid") == pid and ended(owner):
                found |= self.folder.create(f"claims/{attempt}.end.json", _bytes({"how": FAILED, "reason": reason}))
        return found

    def reset_failures(self, names: Iterable[str]) -> list[str]:
        """Lets points that have failed be tried again; returns which."""
        failed = [name for name, state in self.states(names).items() if state.kind == "failed"]
        for name in failed:
            attempt = _attempt(name, self.states([name])[name].attempts + 1)
            if self.folder.create(f"claims/{attempt}.json", _bytes(self.me)):
                self.folder.create(f"claims/{attempt}.end.json", _bytes({"how": RESET}))
        return failed


class Lease:
    """A point that this worker has. Within `with lease.kept(...)` its beat is written."""

    def __init__(self, queue: Queue, name: str, attempt: int):
        self.queue, self.name, self.attempt = queue, name, attempt
        self.how: str | None = None  # it ended
        self._beats = 0

    def lost(self) -> bool:
        """Whether another worker has taken the point over."""
        return self.queue.folder.exists(f"claims/{_attempt(self.name, self.attempt + 1)}.json")

    def beat(self, **progress):
        """Renews the lease. progress: of the run, for the view of all runs."""
        self._beats += 1
        record = {"beat": self._beats, **progress}
        self.queue.folder.write(f"claims/{_attempt(self.name, self.attempt)}.beat.json", _bytes(record))

    def end(self, how: str, reason: str | None = None):
        self.how = how
        record = {"how": how, "reason": reason, "worker": self.queue.me["worker"]}
        self.queue.folder.create(f"claims/{_attempt(self.name, self.attempt)}.end.json", _bytes(record))

    def kept(self, progress: Callable[[], dict], on_lost: Callable[[], None]):
        """Context manager: a thread that renews the lease, five times as often as needed. on_lost: called from the
        thread once the point is another worker's, before anything more is written."""
        return _Heartbeat(self, progress, on_lost)


class _Heartbeat:
    def __init__(self, lease: Lease, progress, on_lost):
        self._lease, self._progress, self._on_lost = lease, progress, on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        failing, lease = False, self._lease.queue.lease
        while True:
            try:
                if self._lease.lost():
                    return self._on_lost()
                self._lease.beat(**self._progress())
                failing = False
            except Exception as error:  # storage that cannot be reached now: the lease runs out if it stays so
                if not failing:
                    print(f"warning: the lease of {self._lease.name} cannot be renewed ({type(error).__name__}: "
                          f"{error}); after {lease:g} s another worker takes the point. Is the workdir's storage "
                          "there?", flush=True)  # fmt: skip
                failing = True
            # storage that is back may hold another's claim: until that is seen, the run goes on writing
            if self._stop.wait(min(lease / 5, 1.0) if failing else lease / 5):
                return

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


# --- results ----------------------------------------------------------------------------------------------


def gather(folder: Folder) -> list[dict]:
    """All results, by name, which it writes to results.jsonl, and again while further ones have come. So whoever
    writes last has seen all that were there, in whichever order workers get here."""
    while True:
        files = folder.names("results")
        rows = [_result(folder, file) for file in files]
        rows = [row for row in rows if row is not None]
        text = "".join(json_files.dumps(row) + "\n" for row in rows).encode()
        if (folder.read("results.jsonl") or b"") != text:
            folder.write("results.jsonl", text)
        if folder.names("results") == files:
            return rows


def _result(folder: Folder, file: str) -> dict | None:
    row = _parsed(folder.read(f"results/{file}"))
    if row is None:
        print(f"warning: {folder.path}/results/{file} is damaged and was left out: delete it to have the point's run "
              "looked at again.")  # fmt: skip
    return row


# --- who a worker is --------------------------------------------------------------------------------------


def identity() -> dict:
    """This process, for claims. machine: what tells whether another process could see it end; None = not known."""
    pid = os.getpid()
    return {"worker": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "machine": _machine(),
            "started": _started(pid), "since": time.strftime("%F %T %z")}  # fmt: skip


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None if there is none, or it has ended and is not reaped yet.

    Its first thread ends before the others when it is killed: until these have ended too, its files are locked.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    threads, began = int(fields[16]), fields[18]
    return None if state in "ZX" and threads <= 1 else began


def ended(owner: dict) -> bool:
    """Whether the owner of a claim was a process of this machine that has ended."""
    machine = owner.get("machine")
    return machine is not None and machine == _machine() and _started(owner["pid"]) != owner["started"]


def end_with(parent: int):
    """Asks this process to stop, as SIGTERM does, once the process that started it is gone."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        print("the command that this worker belongs to has ended: it saves and ends too", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _attempt(name: str, number: int) -> str:
    return f"{name}@{number:04d}"


def _bytes(record: dict) -> bytes:
    return json_files.dumps(record).encode()


def _parsed(data: bytes | None) -> dict | None:
    try:
        return json.loads(data) if data is not None else None
    except ValueError:
        return None
