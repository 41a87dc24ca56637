"""What tests of whole runs share: a run interrupted by SIGTERM, what a run left behind, a process of its own."""

import io
import json
import os
import random
import runpy
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import app, flags

from gptjax.training.supervised import Dispatch

TIMED = (  # never the same twice
    "tokens_per_second", "prompts_per_second", "examples_per_second", "mfu", "seconds", "time/",
)  # fmt: skip


def one_device_environment(**more) -> dict:
    """Environment of a process that has one CPU device, not the 8 of conftest.py."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
    return {**os.environ, "XLA_FLAGS": flags, **more}


def nonsense(folder) -> Path:
    """A file of nonsense words, the source of small runs."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(60)]
    path = folder / "words.txt"
    path.write_text("".join(rng.choice(words) + rng.choice(" \n") for _ in range(4000)))
    return path


def main_of(module, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m module *arguments`, run in this process: without the imports."""
    app.define_help_flags()
    before, out, err = set(flags.FLAGS), io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module has been imported before
        for name, value in (("argv", [module, *arguments]), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, value)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    for stream in (out, err):
        stream.seek(0)
    return code, out.read(), err.read()


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
