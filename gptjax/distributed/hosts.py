"""Multi-host runs: joining the hosts at the start, ending them together, and communication between them.

    with hosts.join(config, workdir, limit=300):    # the first thing a main does
        pretrain(config, workdir)

Every host runs the same command. If a host is missing, has a different config or code, stops with an error or dies,
every other host names it within moments and exits too; none is left waiting (handshake.py). The same command, started
again on all hosts, resumes from the last checkpoint.
"""

import contextlib
import itertools
import json
import logging
import socket
import sys
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed  # no public name: the key-value store of the job
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed import gpu_flags, handshake
from gptjax.errors import INTERRUPTED, InputError

_LONG = 7 * 24 * 3600 * 1000  # ms. Process 0 may tokenize for days; if it dies, the open connection shows it


@contextlib.contextmanager
def join(config, workdir, limit: int = 300):
    """Context manager around a whole main: joins all hosts of the job and ends together with them. Does nothing for a
    single process.

    Args:
        config: ConfigDict or dict; it, `workdir` and the software must be equal on every host.
        limit: seconds to wait for the other processes.
    Raises:
        InputError: processes are missing or differ; the message names them.
    """
    job = handshake.find_job(limit)
    gpu_flags.prepare(verbose=job is None or job.index == 0)
    if job is None:
        yield
        return
    hello = {"index": job.index, "count": job.count, "host": socket.gethostname(),
             "facts": handshake.facts(config if isinstance(config, dict) else config.to_dict(), workdir)}  # fmt: skip
    if job.index == 0:
        connections, names = handshake.accept_processes(job, hello, limit)
        with socket.create_server(("", 0)) as free:
            start = {"port": free.getsockname()[1], "names": [names[i] for i in range(job.count)]}
        for connection in connections.values():
            connection.send(start)
    else:
        connection, start = handshake.register(job, hello, limit)
        connections, names = {0: connection}, dict(enumerate(start["names"]))
    watch = handshake.Watch(job.index, connections, names)
    logging.getLogger(distributed.__name__).setLevel(logging.WARNING)
    coordinator = f"{job.address.rpartition(':')[0]}:{start['port']}"
    try:
        jax.distributed.initialize(
            coordinator, job.count, job.index, handshake.local_devices(),
            cluster_detection_method="deactivate" if job.manual else None, initialization_timeout=limit,
        )  # fmt: skip
        _check_devices(names)
        yield
        watch.done()
        jax.distributed.shutdown()  # waits for all
    except InputError as error:
        watch.stopped(str(error), 2)
        handshake.exit_now(f"error: {error}", 2)
    except KeyboardInterrupt:  # before or after the training itself, which saves (training/stopping.py)
        watch.stopped("interrupted by Ctrl-C", handshake.HOST_LOST)
        handshake.exit_now("interrupted", INTERRUPTED)
    except BaseException as error:
        time.sleep(2)  # if another process's failure caused this error, the watch reports it and ends this one
        traceback.print_exc()
        watch.stopped(f"{type(error).__name__}: {str(error)[:300]}", handshake.HOST_LOST)
        handshake.exit_now("", 1)


def _check_devices(names: dict[int, str]):
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    wrong = [f"{handshake.process_name(i, names[i])} has {n}" for i, n in enumerate(counts) if n != counts[0]]
    if wrong:
        raise InputError(
            f"Process 0 has {counts[0]} devices, {', '.join(wrong[:20])}: start every process with the same number."
        )


# --- communication between hosts ----------------------------------------------------------------------------

_numbers, _steps = itertools.count(), itertools.count()  # every host makes the same calls in the same order


def first() -> bool:
    """Whether this is the process that writes: logs, tokenizer, config, samples, reports."""
    return jax.process_index() == 0


def say(text: str):
    """Prints, on process 0 only."""
    if first():
        print(text, flush=True)


def warn(text: str):
    """Prints a warning to stderr, on process 0 only."""
    if first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def from_first(make: Callable):
    """make() of process 0, broadcast to every process. The value must be JSON-serializable."""
    if jax.process_count() == 1:
        return make()
    client, key = distributed.global_state.client, f"gptjax/value/{next(_numbers)}"
    if first():
        client.key_value_set(key, json.dumps(make()))
    value = json.loads(client.blocking_key_value_get(key, _LONG))
    client.wait_at_barrier(f"{key}/read", _LONG)
    if first():
        client.key_value_delete(key)
    return value


def first_then_others(action: Callable):
    """Runs action() on process 0 and then, when it has returned, on the others; returns its result on each.

    On shared storage the others find what process 0 has made; otherwise each makes its own.
    """
    if jax.process_count() == 1:
        return action()
    number = next(_numbers)
    result = action() if first() else None
    distributed.global_state.client.wait_at_barrier(f"gptjax/barrier/{number}", _LONG)
    return result if first() else action()


def agree(what: str, value):
    """Raises InputError where a JSON value differs from that of process 0. what: a plural that begins the sentence."""
    if from_first(lambda: value) != value:
        name = handshake.process_name(jax.process_index(), socket.gethostname())
        raise InputError(
            f"{what} of {name} differ from those of process 0: give every host the same files, and delete any stale "
            "cache."
        )


def all_true(flag: bool) -> bool:
    """Whether a flag is true on every host."""
    if jax.process_count() == 1:
        return flag
    client, key = distributed.global_state.client, f"gptjax/flag/{next(_numbers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", str(int(flag)))
    client.wait_at_barrier(f"{key}/all", _LONG)
    return all(value == "1" for _, value in client.key_value_dir_get(f"{key}/"))


def only_first(action: Callable):
    """Runs action() on process 0; the others wait until it has returned."""
    first_then_others(lambda: action() if first() else None)


def stop_asked() -> bool:
    """Whether all hosts should save and stop now, because one of them received SIGTERM (preemption, scancel).

    Every host must call it once per step; all get True at the same step."""
    return multihost_utils.reached_preemption_sync_point(next(_steps))


# --- arrays over all hosts ----------------------------------------------------------------------------------


def _row_axis(sharding: NamedSharding) -> int:
    """The first sharded axis: the rows of a batch, after unsharded axes of steps and micro-batches."""
    return next(i for i, axes in enumerate(sharding.spec) if axes is not None)


def rows_here(sharding: NamedSharding, rows: int) -> np.ndarray:
    """int64 [n], ascending: the rows of a batch that this host's devices hold, on any mesh.

    If the other mesh axes (tensor, seq, stage) span hosts, several hosts hold the same rows.
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
    """Function from the number of rows of a batch to those that this host holds, int64 [n], ascending. Each micro-batch
    of `microbatch_rows` rows is sharded over all hosts."""
    here = rows_here(sharding, microbatch_rows)
    return lambda rows: (np.arange(0, rows, microbatch_rows)[:, None] + here).ravel()


def global_array(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from each host's own rows (rows_here); `local` has the full size along every other axis."""
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    axis = _row_axis(sharding)
    mesh_axes = sharding.spec[axis]
    mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    num_shards = int(np.prod([sharding.mesh.shape[a] for a in mesh_axes]))
    here = rows_here(sharding, num_shards)
    size = local.shape[axis] // len(here)

    def shard(index):
        start = int(np.searchsorted(here, (index[axis].start or 0) // size)) * size
        return local[(*index[:axis], slice(start, start + size), *index[axis + 1 :])]

    shape = (*local.shape[:axis], size * num_shards, *local.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, shard)


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a value that every host has in full."""
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def whole(array) -> np.ndarray:
    """The full array on every host, gathered where it is sharded over hosts; every host must call it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def replicated(mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())
