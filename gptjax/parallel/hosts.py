"""Many hosts, one run: found by the cluster's environment, called by roll before JAX joins them, told when one is lost.

    with hosts.join(config, workdir, limit=300):    # the first thing a main does
        pretrain(config, workdir)

Every host runs the same command. Process 0 hears all of them on one TCP connection each, which stays open: a host
that never comes, has another config or code, stops with an error or dies is named on every other within moments,
and none is left waiting. (JAX's own coordination would abort them without a name; it stays as the second guard,
for a machine that vanishes without closing its connections.) Who survives ends too: start the same command again
on all hosts, and it goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax._src import clusters, distributed  # no public names: who is in a job, and the key-value store
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import InputError

LOST = 75  # exit code where another host ended the run (EX_TEMPFAIL): start the same command again
_LONG = 7 * 24 * 3600 * 1000  # ms. Host 0 may tokenise for days; if it dies, the open connection tells


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
        kubernetes = cluster.name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ  # a lone pod
        if cluster.opt_in_only_method or kubernetes or not cluster.is_env_present():
            continue
        if (count := cluster.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return Job(cluster.get_coordinator_address(limit, port), count, cluster.get_process_id())
    return None


def _local_devices() -> list[int] | None:
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


class _Line:
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


def _named(index: int, host: str) -> str:
    return f"process {index} ({host})"


def _differences(index: int, hello: dict, first: dict) -> list[str]:
    mine, theirs = hello["facts"], first["facts"]
    return [
        f"{_named(index, hello['host'])} has {key} {mine.get(key, 'unset')}, process 0 {theirs.get(key, 'unset')}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def call_roll(job: Job, hello: dict, limit: float) -> tuple[dict[int, _Line], dict[int, str]]:
    """Process 0: waits until every process has reported, and answers all of them.

    Returns:
        (the line to each other process, the host name of each process). Raises InputError, after having told those
        who came, naming the processes that did not within `limit` seconds, and what differs from process 0's.
    """
    port, deadline = int(job.address.rpartition(":")[2]), time.monotonic() + limit
    hellos, lines, wrong = {0: hello}, {}, []
    server = socket.create_server(("", port), backlog=job.count)
    with server:
        while len(hellos) < job.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = _Line(server.accept()[0])
            except TimeoutError:
                break
            came = line.hear(limit=5)
            if not (isinstance(came, dict) and came.get("count") == job.count and 0 < came["index"] < job.count):
                line.say({"stop": f"process 0 expects {job.count} processes and ids below that; this one is {came}."})
                continue
            if came["index"] in hellos:
                wrong.append(
                    f"two processes have the id {came['index']}: {hellos[came['index']]['host']} and {came['host']}"
                )
            hellos[came["index"]], lines[came["index"]] = came, line
    if missing := sorted(set(range(job.count)) - hellos.keys()):
        shown = ", ".join(map(str, missing[:20])) + (" and others" if len(missing) > 20 else "")
        there = ", ".join(_named(i, h["host"]) for i, h in sorted(hellos.items())[:20])
        wrong.append(
            f"{len(missing)} of {job.count} processes did not come within {limit:.0f} s: {shown}. There are {there}. "
            "Look at the logs of those missing, or raise --join_limit"
        )
    for index in sorted(hellos.keys() - {0}):
        wrong += _differences(index, hellos[index], hello)[:5]
    if wrong:
        text = "; ".join(wrong) + "." if len(wrong) == 1 else "the hosts do not fit together:\n  " + "\n  ".join(wrong)
        for line in lines.values():
            line.say({"stop": text})
        raise InputError(text)
    return lines, {i: h["host"] for i, h in hellos.items()}


def answer_roll(job: Job, hello: dict, limit: float) -> tuple[_Line, dict]:
    """The others: reports to process 0 and waits for its answer. Raises InputError where it refuses or never comes."""
    host, _, port = job.address.rpartition(":")
    deadline = time.monotonic() + limit
    while True:
        try:
            line = _Line(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not come within {limit:.0f} s: {_named(job.index, socket.gethostname())} found "
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


class _Watch:
    """Hears of hosts that stop; ends this process where one did. On process 0 `lines` go to all others, else to it."""

    def __init__(self, index: int, lines: dict[int, _Line], names: dict[int, str]):
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
                    gone = (
                        f"{_named(key.data, self._names[key.data])} died: killed, out of memory, or its machine lost."
                    )
                    said = {"stopped": f"{gone} Start the same command again on all hosts: it goes on from the last "
                                       "checkpoint.", "code": LOST}  # fmt: skip
                self._tell(said)
                _end(f"error: {said['stopped']}", said["code"])

    def _tell(self, what):
        self._over.set()
        for line in self._lines.values():
            line.say(what)

    def done(self):
        self._tell("done")

    def stopped(self, text: str, code: int):
        self._tell({"stopped": f"{_named(self._index, socket.gethostname())} stopped: {text}", "code": code})


def _end(text: str, code: int):
    """At once: an orderly exit would wait for processes that no longer answer."""
    sys.stdout.flush()
    os.write(2, f"{text}\n".encode())
    os._exit(code)


@contextlib.contextmanager
def join(config, workdir, limit: int = 300):
    """What a main does is done within: joins all hosts of the job, and ends with them. A single process just runs.

    config: the ConfigDict or dict that must be the same on every host, as `workdir` and the software must.
    limit: seconds to wait for the others. Raises InputError naming who is missing or differs.
    """
    job = find_job(limit)
    if job is None:
        yield
        return
    hello = {"index": job.index, "count": job.count, "host": socket.gethostname(),
             "facts": facts(config if isinstance(config, dict) else config.to_dict(), workdir)}  # fmt: skip
    if job.index == 0:
        lines, names = call_roll(job, hello, limit)
        with socket.create_server(("", 0)) as free:
            go = {"port": free.getsockname()[1], "names": [names[i] for i in range(job.count)]}
        for line in lines.values():
            line.say(go)
    else:
        line, go = answer_roll(job, hello, limit)
        lines, names = {0: line}, dict(enumerate(go["names"]))
    watch = _Watch(job.index, lines, names)
    try:
        jax.distributed.initialize(
            f"{job.address.rpartition(':')[0]}:{go['port']}", job.count, job.index, local_device_ids=_local_devices(),
            cluster_detection_method="deactivate" if job.by_hand else None, initialization_timeout=limit,
        )  # fmt: skip
        _check_devices(names)
        yield
        watch.done()
        jax.distributed.shutdown()  # waits for all
    except InputError as error:
        watch.stopped(str(error), 2)
        _end(f"error: {error}", 2)
    except BaseException as error:
        time.sleep(2)  # if this is what another's end looks like from here, the watch says so and ends us
        traceback.print_exc()
        watch.stopped(f"{type(error).__name__}: {str(error)[:300]}", LOST)
        _end("", 1)


def _check_devices(names: dict[int, str]):
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    wrong = [f"{_named(i, names[i])} has {n}" for i, n in enumerate(counts) if n != counts[0]]
    if wrong:
        raise InputError(f"process 0 has {counts[0]} devices, {', '.join(wrong[:20])}: start as many on every host.")


# --- what hosts say to one another --------------------------------------------------------------------------

_numbers, _steps = itertools.count(), itertools.count()  # every host makes the same calls in the same order


def first() -> bool:
    """Whether this is the process that writes: logs, tokenizer, config, samples, reports."""
    return jax.process_index() == 0


def say(text: str):
    """print, on one host."""
    if first():
        print(text, flush=True)


def from_first(make: Callable):
    """What make() gives on process 0, on all of them: a JSON value."""
    if jax.process_count() == 1:
        return make()
    client, key = distributed.global_state.client, f"gptjax/value/{next(_numbers)}"
    if first():
        client.key_value_set(key, json.dumps(make()))
    return json.loads(client.blocking_key_value_get(key, _LONG))


def first_then_others(action: Callable):
    """action() on process 0 and, once it is done, on the others; its result on each.

    Where storage is shared the others find what the first one made; where it isn't, each makes its own.
    """
    if jax.process_count() == 1:
        return action()
    number = next(_numbers)
    result = action() if first() else None
    distributed.global_state.client.wait_at_barrier(f"gptjax/barrier/{number}", _LONG)
    return result if first() else action()


def agree(what: str, value):
    """InputError where a JSON value isn't the one that process 0 has."""
    there = from_first(lambda: value)
    if there != value:
        raise InputError(f"{what} of {_named(jax.process_index(), socket.gethostname())} differ from process 0's: give "
                         "every host the same files, and delete what was cached of others.")  # fmt: skip


def all_true(flag: bool) -> bool:
    """Whether a flag is true on every host."""
    if jax.process_count() == 1:
        return flag
    client, key = distributed.global_state.client, f"gptjax/flag/{next(_numbers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", str(int(flag)))
    client.wait_at_barrier(f"{key}/all", _LONG)
    return all(value == "1" for _, value in client.key_value_dir_get(f"{key}/"))


def only_first(action: Callable):
    """action() on process 0; the others go on when it is done."""
    first_then_others(lambda: action() if first() else None)


def stop_asked() -> bool:
    """Whether all hosts are to save and stop now, for one of them was asked to end (SIGTERM: preemption, scancel).

    Every host calls it once a step; all get True at the same one."""
    return multihost_utils.reached_preemption_sync_point(next(_steps))


# --- arrays over all hosts ----------------------------------------------------------------------------------


def _row_axis(sharding: NamedSharding) -> int:
    """The first axis that is cut up: the rows of a batch, behind whole axes of steps and micro-batches."""
    return next(i for i, axes in enumerate(sharding.spec) if axes is not None)


def rows_here(sharding: NamedSharding, rows: int) -> np.ndarray:
    """int64 [n], ascending: which of a batch's rows this host's devices hold, whatever the mesh.

    Where a mesh's other axes (tensor, seq, stage) cross hosts, several hosts hold the same rows.
    """
    if jax.process_count() == 1:
        return np.arange(rows)
    shape = [sharding.mesh.size] * len(sharding.spec)
    shape[_row_axis(sharding)] = rows
    held = np.zeros(rows, bool)
    for index in sharding.addressable_devices_indices_map(tuple(shape)).values():
        held[index[_row_axis(sharding)]] = True
    return np.flatnonzero(held)


def batch_rows(sharding: NamedSharding, microbatch_rows: int) -> Callable[[int], np.ndarray]:
    """rows of a batch -> those of them this host holds, where each micro-batch lies over all hosts."""
    here = rows_here(sharding, microbatch_rows)
    return lambda rows: (np.arange(0, rows, microbatch_rows)[:, None] + here).ravel()


def global_array(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array over all hosts from the rows that this one holds (rows_here), its other axes whole."""
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    axis, cut = _row_axis(sharding), sharding.spec[_row_axis(sharding)]
    ways = int(np.prod([sharding.mesh.shape[a] for a in ((cut,) if isinstance(cut, str) else cut)]))
    here = rows_here(sharding, ways)
    size = local.shape[axis] // len(here)

    def shard(index):
        start = int(np.searchsorted(here, (index[axis].start or 0) // size)) * size
        return local[(*index[:axis], slice(start, start + size), *index[axis + 1 :])]

    shape = (*local.shape[:axis], size * ways, *local.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, shard)


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array over all hosts from the whole of it, which every host has."""
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def whole(array) -> np.ndarray:
    """The whole of an array on every host; all of them must ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
