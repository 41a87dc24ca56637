"""Many hosts, one run: joined at the start, ended together, and what they say to one another between.

    with hosts.join(config, workdir, limit=300):    # the first thing a main does
        pretrain(config, workdir)

Every host runs the same command. A host that never comes, has another config or code, stops with an error or dies is
named on every other within moments, and none is left waiting (handshake.py). Who survives ends too: start the same
command again on all hosts, and it resumes from the last checkpoint.
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

_LONG = 7 * 24 * 3600 * 1000  # ms. Host 0 may tokenize for days; if it dies, the open connection tells


@contextlib.contextmanager
def join(config, workdir, limit: int = 300):
    """What a main does is done within: joins all hosts of the job, and ends with them. A single process just runs.

    config: the ConfigDict or dict that must be the same on every host, as `workdir` and the software must.
    limit: seconds to wait for the others. Raises InputError naming who is missing or differs.
    """
    job = handshake.find_job(limit)
    gpu_flags.prepare(say=job is None or job.index == 0)
    if job is None:
        yield
        return
    hello = {"index": job.index, "count": job.count, "host": socket.gethostname(),
             "facts": handshake.facts(config if isinstance(config, dict) else config.to_dict(), workdir)}  # fmt: skip
    if job.index == 0:
        lines, names = handshake.call_roll(job, hello, limit)
        with socket.create_server(("", 0)) as free:
            go = {"port": free.getsockname()[1], "names": [names[i] for i in range(job.count)]}
        for line in lines.values():
            line.say(go)
    else:
        line, go = handshake.answer_roll(job, hello, limit)
        lines, names = {0: line}, dict(enumerate(go["names"]))
    watch = handshake.Watch(job.index, lines, names)
    logging.getLogger(distributed.__name__).setLevel(logging.WARNING)
    coordinator = f"{job.address.rpartition(':')[0]}:{go['port']}"
    try:
        jax.distributed.initialize(
            coordinator, job.count, job.index, handshake.local_devices(),
            cluster_detection_method="deactivate" if job.by_hand else None, initialization_timeout=limit,
        )  # fmt: skip
        _check_devices(names)
        yield
        watch.done()
        jax.distributed.shutdown()  # waits for all
    except InputError as error:
        watch.stopped(str(error), 2)
        handshake.end(f"error: {error}", 2)
    except KeyboardInterrupt:  # before or after the training itself, which saves (training/stopping.py)
        watch.stopped("interrupted by Ctrl-C", handshake.LOST)
        handshake.end("interrupted", INTERRUPTED)
    except BaseException as error:
        time.sleep(2)  # if this is what another's end looks like from here, the watch says so and ends us
        traceback.print_exc()
        watch.stopped(f"{type(error).__name__}: {str(error)[:300]}", handshake.LOST)
        handshake.end("", 1)


def _check_devices(names: dict[int, str]):
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    wrong = [f"{handshake.named(i, names[i])} has {n}" for i, n in enumerate(counts) if n != counts[0]]
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


def warn(text: str):
    """A warning on stderr, on one host."""
    if first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def from_first(make: Callable):
    """What make() gives on process 0, on all of them: a JSON value."""
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
        here = handshake.named(jax.process_index(), socket.gethostname())
        raise InputError(
            f"{what} of {here} differ from process 0's: give every host the same files, and delete what is cached of "
            "others."
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
