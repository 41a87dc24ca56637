"""The roll call of a run on many hosts, before JAX joins them, and word of those that are lost (hosts.py uses it).

Process 0 hears every other one on a TCP connection at the address that the cluster names, and keeps it open. JAX's own
coordination aborts all processes, naming none, where one does not come, and knows of a dead one after 100 s; it stays
as the second guard, for a machine that vanishes without closing its connections.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

from jax._src import clusters  # no public name: JAX's detection of the job a process is part of

from gptjax.errors import InputError

LOST = 75  # exit code where another host ended the run (EX_TEMPFAIL): start the same command again


# --- which job this process is part of ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """address: host:port of process 0. by_hand: named by JAX_COORDINATOR_ADDRESS, not found by JAX's detection."""

    address: str
    count: int
    index: int
    by_hand: bool = False


def find_job(limit: int) -> Job | None:
    """The job of several processes this one belongs to, or None: nothing is asked of the network to find that out.

    By hand: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Else what JAX detects: Cloud TPU
    VMs, GKE, SLURM steps, Open MPI, indexed Kubernetes jobs.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given:
        if missing := [name for name in names if name not in given]:
            raise InputError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three on every host.")
        address, count, index = (given[name] for name in names)
        port = address.rpartition(":")[2]
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and port.isdecimal()):
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: give host:port "
                "and an id from 0 to the number less 1."
            )
        return Job(address, int(count), int(index), by_hand=True) if int(count) > 1 else None
    for cluster in clusters.ClusterEnv._cluster_types:
        lone_pod = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        if cluster.opt_in_only_method or lone_pod or not cluster.is_env_present():
            continue
        if (count := cluster.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return Job(cluster.get_coordinator_address(limit, port), count, cluster.get_process_id())
    return None


def local_devices() -> list[int] | None:
    """What jax.distributed.initialize is to see: [] = all. Under SLURM it would take one device a task, also where a
    node has one task for all of its devices."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_NTASKS_PER_NODE", ""))
    return [] if tasks.split("(")[0] == "1" else None


def facts(config: dict, workdir) -> dict[str, str]:
    """What must be the same on every host, by name: the config, key by key, and the software."""

    def flat(value, name):
        if isinstance(value, dict):
            return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
        return {name: repr(value)}

    root = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + path.read_bytes())
    versions = {
        name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    python = ".".join(map(str, sys.version_info[:3]))
    return {**flat(config, "config"), "workdir": str(workdir), "python": python, **versions,
            "the code of gptjax": code.hexdigest()[:12]}  # fmt: skip


# --- the roll call ------------------------------------------------------------------------------------------


class Line:
    """A connection that carries one JSON value per line. hear() waits, and is None where the other end is gone."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._reader = connection, connection.makefile("r")

    def say(self, value):
        with contextlib.suppress(OSError):  # who is gone is noticed by who hears
            self._connection.sendall((json.dumps(value) + "\n").encode())

    def hear(self, limit: float | None = None):
        self._connection.settimeout(limit)
        try:
            line = self._reader.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None

    def fileno(self):
        return self._connection.fileno()


def named(index: int, host: str) -> str:
    return f"process {index} ({host})"


def _differences(index: int, hello: dict, first: dict) -> list[str]:
    mine, theirs = hello["facts"], first["facts"]
    return [
        f"{named(index, hello['host'])} has {key} {mine.get(key, 'unset')}, process 0 {theirs.get(key, 'unset')}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def call_roll(job: Job, hello: dict, limit: float) -> tuple[dict[int, Line], dict[int, str]]:
    """Process 0: waits until every process has reported, and answers all of them.

    Returns:
        (the line to each other process, the host name of each process). Raises InputError, after having told those
        who came, naming the processes that did not within `limit` seconds, and what differs from process 0's.
    """
    port, deadline = int(job.address.rpartition(":")[2]), time.monotonic() + limit
    both = socket.has_dualstack_ipv6()
    hellos, lines, came_too, wrong = {0: hello}, {}, [], []
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=job.count
        )
    except OSError as error:
        raise InputError(f"process 0 cannot listen on port {port} ({error}): name another on every host.") from error
    with server:
        while len(hellos) < job.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = Line(server.accept()[0])
            except TimeoutError:
                break
            came = line.hear(limit=5)
            if not (isinstance(came, dict) and came.get("count") == job.count and 0 <= came["index"] < job.count):
                line.say({"stop": f"process 0 expects {job.count} processes and ids below that; this one says {came}."})
            elif came["index"] in hellos:
                came_too.append(line)
                there = hellos[came["index"]]["host"]
                wrong.append(f"two processes have the id {came['index']}: one on {there}, one on {came['host']}")
            else:
                hellos[came["index"]], lines[came["index"]] = came, line
    if missing := sorted(set(range(job.count)) - hellos.keys()):
        shown = ", ".join(map(str, missing[:20])) + (" and others" if len(missing) > 20 else "")
        there = ", ".join(named(i, h["host"]) for i, h in sorted(hellos.items())[:20])
        wrong.append(
            f"{len(missing)} of {job.count} processes did not come within {limit:.0f} s: {shown}. Present: {there}. "
            "Look at the logs of those missing, or raise --join_limit"
        )
    for index in sorted(hellos.keys() - {0}):
        wrong += _differences(index, hellos[index], hello)[:5]
    if wrong:
        text = "; ".join(wrong) + "." if len(wrong) == 1 else "the hosts do not fit together:\n  " + "\n  ".join(wrong)
        for line in (*lines.values(), *came_too):
            line.say({"stop": text})
        raise InputError(text)
    return lines, {i: h["host"] for i, h in hellos.items()}


def answer_roll(job: Job, hello: dict, limit: float) -> tuple[Line, dict]:
    """The others: reports to process 0 and waits for its answer. Raises InputError where it refuses or never comes."""
    host, _, port = job.address.rpartition(":")
    deadline = time.monotonic() + limit
    while True:
        try:
            line = Line(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not come within {limit:.0f} s: {named(job.index, socket.gethostname())} found "
                    f"nobody at {job.address} ({error}). Look at its log, or raise --join_limit."
                ) from error
            time.sleep(0.2)
    line.say(hello)
    answer = line.hear(limit + 10)  # process 0 may have begun to wait later
    if answer is None:
        raise InputError(f"process 0 at {job.address} went away before all processes had come: look at its log.")
    if "stop" in answer:
        raise InputError(answer["stop"])
    return line, answer


# --- together until the end ---------------------------------------------------------------------------------


class Watch:
    """Hears of hosts that stop; ends this process where one did. On process 0 `lines` go to all others, else to it."""

    def __init__(self, index: int, lines: dict[int, Line], names: dict[int, str]):
        self._index, self._lines, self._names, self._over = index, lines, names, threading.Event()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self):
        waiting = selectors.DefaultSelector()
        for index, line in self._lines.items():
            waiting.register(line, selectors.EVENT_READ, index)
        while waiting.get_map():
            for key, _ in waiting.select():
                said = key.fileobj.hear()
                waiting.unregister(key.fileobj)  # whatever it was: it says no more
                if said == "done" or self._over.is_set():
                    continue
                if not said:
                    gone = f"{named(key.data, self._names[key.data])} died: killed, out of memory, or its machine lost."
                    said = {"stopped": f"{gone} Start the same command again on all hosts: it goes on from the last "
                                       "checkpoint.", "code": LOST}  # fmt: skip
                self._tell(said)
                end(f"error: {said['stopped']}", said["code"])

    def _tell(self, what):
        self._over.set()
        for line in self._lines.values():
            line.say(what)

    def done(self):
        self._tell("done")

    def stopped(self, text: str, code: int):
        self._tell({"stopped": f"{named(self._index, socket.gethostname())} stopped: {text}", "code": code})


def end(text: str, code: int):
    """At once: an orderly exit would wait for processes that no longer answer."""
    sys.stdout.flush()
    os.write(2, f"{text}\n".encode())
    os._exit(code)
