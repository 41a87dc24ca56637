"""What tests of whole runs share: a run interrupted by SIGTERM, what a run left behind, a process of its own."""

import contextlib
import dataclasses
import io
import json
import os
import runpy
import signal
import sys
import types
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import app, flags

from gptjax import pretrain as stage
from gptjax.evals import lm as evaluation
from gptjax.training.supervised import Dispatch

TIMED = (  # never the same twice
    "tokens_per_second", "prompts_per_second", "examples_per_second", "mfu", "seconds", "time/",
)  # fmt: skip


def one_device_environment(**more) -> dict:
    """Environment of a process that has one CPU device, not the 8 of conftest.py."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
    return {**os.environ, "XLA_FLAGS": flags, **more}


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


class _Compiled:
    """A jitted train step, compiled once for each shape of its batch."""

    def __init__(self, step):
        self._step, self._programs = step, {}

    def lower(self, state, batch, rates):
        key = jax.tree.structure(batch), tuple(x.shape for x in jax.tree.leaves(batch))
        if key not in self._programs:
            self._programs[key] = self._step.lower(state, batch, rates).compile()
        return types.SimpleNamespace(compile=lambda: self._programs[key])


@contextlib.contextmanager
def shared_programs():
    """pretrain() traces and compiles once for all runs of this process that compute the same: most of a small run's
    time. Each run still makes or restores its own state, batches and records."""
    program, eval_step, init_state = stage.program, evaluation.jit_eval_step, stage.init_state
    programs, eval_steps, states = {}, {}, {}

    def kept_program(c, model, mesh):
        numbers = repr((c.optimizer, c.precision, c.seed, c.loss_chunk, c.mesh))
        key = numbers, model, mesh, stage.causal_lm_loss
        if key not in programs:
            made = program(c, model, mesh)
            programs[key] = dataclasses.replace(made, step=_Compiled(made.step))
        return programs[key]

    def kept_eval_step(loss, mesh):
        if (loss, mesh) not in eval_steps:
            eval_steps[loss, mesh] = eval_step(loss, mesh)
        return eval_steps[loss, mesh]

    def kept_state(model, tx, precision, shardings, seed):
        key = model, tx, precision, seed, jax.tree.structure(shardings), tuple(jax.tree.leaves(shardings))
        if key not in states:
            states[key] = jax.device_get(init_state(model, tx, precision, shardings, seed))
        return jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), states[key], shardings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "program", kept_program)
        patch.setattr(stage, "init_state", kept_state)
        patch.setattr(evaluation, "jit_eval_step", kept_eval_step)
        yield


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
