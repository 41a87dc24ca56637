"""What tests of whole runs share: a run interrupted by SIGTERM, what a run left behind, a process of its own."""

import json
import os
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gptjax.training.supervised import Dispatch

TIMED = (  # never the same twice
    "tokens_per_second", "prompts_per_second", "examples_per_second", "mfu", "seconds", "time/",
)  # fmt: skip


def one_device_environment(**more) -> dict:
    """Environment of a process that has one CPU device, not the 8 of conftest.py."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
    return {**os.environ, "XLA_FLAGS": flags, **more}


def until_sigterm(run, config, workdir, stop):
    """A stage of training.loop, sent a SIGTERM while step `stop` is being computed; whether it was finished."""
    real = Dispatch.__call__

    def call(self, state, batch, rates):
        result = real(self, state, batch, rates)
        if int(result[0].step) >= stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatch, "__call__", call)
        return run(config, str(workdir))


def lines(workdir, name="metrics"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith(TIMED)} for r in records]


def arrays(workdir, step):
    """{path: numpy array} of a checkpoint: parameters, optimizer state and loss scale, read by Orbax alone."""
    found = {}
    for item in ("params", "training"):
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        path = (workdir / "checkpoints" / str(step) / item).resolve()
        names = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(path).item_metadata.tree)
        )
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=names))
        found |= {item + jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}
    return found


def assert_bitwise(workdir, other, step):
    a, b = arrays(workdir, step), arrays(other, step)
    assert a.keys() == b.keys() and len(a) > 30
    assert [k for k in a if a[k].tobytes() != b[k].tobytes()] == []


def assert_same_run(workdir, other, steps):
    """Checkpoint, metrics and evaluations, bit for bit."""
    assert_bitwise(workdir, other, steps)
    assert [line["step"] for line in lines(workdir)] == list(range(1, steps + 1))
    assert without_times(lines(workdir)) == without_times(lines(other))
    there = {e["step"]: e for e in lines(workdir, "evaluations")}
    assert len(there) == len(lines(workdir, "evaluations"))
    for e in lines(other, "evaluations"):
        assert there[e["step"]] == e
