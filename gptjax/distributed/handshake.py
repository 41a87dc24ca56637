"""The handshake of a run on many hosts, before JAX initializes, and the detection of hosts that are lost later.

Process 0 accepts a TCP connection from every other process at the coordinator's address and keeps it open. JAX's own
coordination service aborts all processes without naming the one that is missing, and notices a dead one only after
100 s. It stays as a second guard, for a machine that vanishes without closing its connections. Used by hosts.py.
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

from jax._src import clusters  # no public name: JAX's detection of the job that a process is part of

from gptjax.errors import InputError

HOST_LOST = 75  # exit code where another host ended the run (EX_TEMPFAIL): start the same command again


# --- which job this process is part of ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """address: host:port of process 0. manual: given by JAX_COORDINATOR_ADDRESS, not detected by JAX."""

    address: str
    count: int
    index: int
    manual: bool = False


def find_job(timeout: int) -> Job | None:
    """The multi-process job that this process belongs to, or None. Deciding that there is none needs no network.

    Set by hand: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise what JAX detects:
    Cloud TPU VMs, GKE, SLURM steps, Open MPI, indexed Kubernetes jobs.

    Args:
        timeout: seconds that JAX may take to find the coordinator.
    Raises:
        InputError: the three variables are incomplete or malformed.
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
                f"JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index} do not describe "
                "a process: give host:port and an id from 0 to the number of processes less 1."
            )
        return Job(address, int(count), int(index), manual=True) if int(count) > 1 else None
    for cluster in clusters.ClusterEnv._cluster_types:
        lone_pod = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        if cluster.opt_in_only_method or lone_pod or not cluster.is_env_present():
            continue
        if (count := cluster.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return Job(cluster.get_coordinator_address(timeout, port), count, cluster.get_process_id())
    return None


def local_devices() -> list[int] | None:
    """local_device_ids for jax.distributed.initialize: [] = all, None = JAX's default. Under SLURM that is one device
    per task, even where a node runs a single task for all of its devices."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_NTASKS_PER_NODE", ""))
    return [] if tasks.split("(")[0] == "1" else None


def facts(config: dict, workdir) -> dict[str, str]:
    """What must be equal on every host, by name: the config, key by key, the workdir and the software versions."""

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


# --- the handshake ------------------------------------------------------------------------------------------


class Connection:
    """A TCP connection that carries one JSON value per line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._reader = connection, connection.makefile("r")

    def send(self, value):
        """Sends a value; does nothing where the peer is gone, which recv reports."""
        with contextlib.suppress(OSError):
            self._connection.sendall((json.dumps(value) + "\n").encode())

    def recv(self, timeout: float | None = None):
        """Blocks for the next value; None where the peer is gone or `timeout` seconds have passed."""
        self._connection.settimeout(timeout)
        try:
            line = self._reader.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None

    def fileno(self):
        return self._connection.fileno()


def process_name(index: int, host: str) -> str:
    """How messages name a process: its id and host."""
    return f"process {index} ({host})"


def _differences(index: int, hello: dict, first: dict) -> list[str]:
    mine, theirs = hello["facts"], first["facts"]
    return [
        f"On {process_name(index, hello['host'])} {key} is {mine.get(key, 'unset')}, "
        f"on process 0 it is {theirs.get(key, 'unset')}."
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def accept_processes(job: Job, hello: dict, timeout: float) -> tuple[dict[int, Connection], dict[int, str]]:
    """Process 0's side: waits until every process has registered, then checks that they match.

    Args:
        hello: {'index', 'count', 'host', 'facts'} of this process.
        timeout: seconds to wait for all of them.
    Returns:
        (connection to each other process, host name of every process), both by process id.
    Raises:
        InputError: processes are missing, have the same id or differ from process 0. Every process that registered
            gets the same message.
    """
    port, deadline = int(job.address.rpartition(":")[2]), time.monotonic() + timeout
    both = socket.has_dualstack_ipv6()
    hellos, connections, duplicates, problems = {0: hello}, {}, [], []
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=job.count
        )
    except OSError as error:
        raise InputError(f"Process 0 cannot listen on port {port} ({error}): give every host another one.") from error
    with server:
        while len(hellos) < job.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = Connection(server.accept()[0])
            except TimeoutError:
                break
            got = connection.recv(timeout=5)
            if not (isinstance(got, dict) and got.get("count") == job.count and 0 <= got["index"] < job.count):
                connection.send({
                    "stop": f"Process 0 expects {job.count} processes with ids from 0 to {job.count - 1}, and received "
                            f"{got}: start the same job on every host."
                })  # fmt: skip
            elif got["index"] in hellos:
                duplicates.append(connection)
                other = hellos[got["index"]]["host"]
                problems.append(
                    f"Two processes have the id {got['index']}, on {other} and on {got['host']}: give each its own."
                )
            else:
                hellos[got["index"]], connections[got["index"]] = got, connection
    if missing := sorted(set(range(job.count)) - hellos.keys()):
        shown = ", ".join(map(str, missing[:20])) + (" and others" if len(missing) > 20 else "")
        present = ", ".join(process_name(i, h["host"]) for i, h in sorted(hellos.items())[:20])
        problems.append(
            f"{len(missing)} of {job.count} processes did not connect within {timeout:.0f} s: {shown}. "
            f"Present: {present}. Look at the logs of the missing ones, or raise --join_limit."
        )
    differences = [d for i in sorted(hellos.keys() - {0}) for d in _differences(i, hellos[i], hello)[:5]]
    if differences:
        problems += [*differences, "Start the same command with the same software on every host."]
    if problems:
        text = problems[0] if len(problems) == 1 else "\n  ".join(["The job cannot start:", *problems])
        for connection in (*connections.values(), *duplicates):
            connection.send({"stop": text})
        raise InputError(text)
    return connections, {i: h["host"] for i, h in hellos.items()}


def register(job: Job, hello: dict, timeout: float) -> tuple[Connection, dict]:
    """The side of every other process: sends its `hello` to process 0 and waits for the answer.

    Returns:
        (connection to process 0, its answer).
    Raises:
        InputError: process 0 does not answer within `timeout` seconds, ends, or refuses this process.
    """
    host, _, port = job.address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = Connection(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                me = process_name(job.index, socket.gethostname())
                raise InputError(
                    f"Process 0 did not answer within {timeout:.0f} s: {me} cannot connect to {job.address} ({error}). "
                    "Look at the log of process 0, or raise --join_limit."
                ) from error
            time.sleep(0.2)
    connection.send(hello)
    answer = connection.recv(timeout + 10)  # process 0 may have started to wait later
    if answer is None:
        raise InputError(
            f"Process 0 at {job.address} ended before all processes had registered: look at its log for the cause."
        )
    if "stop" in answer:
        raise InputError(answer["stop"])
    return connection, answer


# --- failure detection --------------------------------------------------------------------------------------


class Watch:
    """Ends this process when another one fails, and tells the others when this one does.

    connections: on process 0 one to every other process, elsewhere the one to process 0; names: host of each process.
    """

    def __init__(self, index: int, connections: dict[int, Connection], names: dict[int, str]):
        self._index, self._connections, self._names = index, connections, names
        self._finished = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        selector = selectors.DefaultSelector()
        for index, connection in self._connections.items():
            selector.register(connection, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                message = key.fileobj.recv()
                selector.unregister(key.fileobj)  # the first message is the last one
                if message == "done" or self._finished.is_set():
                    continue
                if not message:
                    dead = process_name(key.data, self._names[key.data])
                    message = {
                        "stopped": f"Lost {dead}: it was killed, ran out of memory, or its machine is gone. Start the "
                                   "same command again on all hosts: it resumes from the last checkpoint.",
                        "code": HOST_LOST,
                    }  # fmt: skip
                self._broadcast(message)
                exit_now(f"error: {message['stopped']}", message["code"])

    def _broadcast(self, message):
        self._finished.set()
        for connection in self._connections.values():
            connection.send(message)

    def done(self):
        """Reports an orderly end."""
        self._broadcast("done")

    def stopped(self, reason: str, code: int):
        """Reports that this process stops with an error; the others exit with `code`."""
        name = process_name(self._index, socket.gethostname())
        self._broadcast({"stopped": f"Stopped by {name}: {reason}", "code": code})


def exit_now(text: str, code: int):
    """Exits without cleaning up, which would wait for processes that no longer answer."""
    sys.stdout.flush()
    os.write(2, f"{text}\n".encode())
    os._exit(code)
