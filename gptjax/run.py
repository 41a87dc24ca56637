"""The spine of every stage: lock, config, build, resume or begin, loop, report.

    def build(c: SFTConfig, mesh, claim: Claim) -> Stage: ...      # a main's own part: models, data, objective

    def sft(config, workdir) -> RunResult:
        return run("sft", SFTConfig, build, config, workdir)

`build` refuses what it can before it writes; `claim` makes the workdir the run's, or checks that it is.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath
from ml_collections import config_dict as mlc

from gptjax import config as configs
from gptjax import console, lock, report, run_config
from gptjax.data.corpus import Text
from gptjax.data.records import start_record, write_record
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import Rules, use_rules
from gptjax.training import loop
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import MetricWriter
from gptjax.training.stage import RunConfig, RunResult, Stage


def require(c: RunConfig, texts: Mapping[str, str]):
    """InputError with the text of the first of the config's keys that is not given; 'a,b' means at least one of two."""
    for keys, text in texts.items():
        if all(functools.reduce(getattr, key.split("."), c) is None for key in keys.split(",")):
            raise InputError(text)


class Claim:
    """The workdir of a run that begins or resumes.

    known: whether it holds a run already. resuming: whether that run has a checkpoint to go on from.
    record: of data.json (data/records.py); `begin` starts it.
    """

    def __init__(self, stage: str, workdir, kind: str):
        self.workdir, self._stage, self._kind = epath.Path(workdir), stage, kind
        self.known = hosts.from_first((self.workdir / "config.json").exists)
        self.resuming = run_config.has_checkpoints(self.workdir)
        self.record: dict = {}

    def begin(self, base=None) -> dict:
        """The record of data.json: a new one, or that of the run being resumed. base: the workdir that a stage after
        pre-training starts from."""
        self.record = start_record(self.workdir, self.known, base)
        return self.record

    def check(self, c: RunConfig, **sections):
        """Of a run being resumed: InputError where its config is another. Before data is read, which takes long."""
        if self.known:
            self._claim(c, sections)

    def make(self, c: RunConfig, text: Text | None = None, **sections):
        """Makes a new workdir this run's: data.json, then config.json. text: tokens that data.json is to name."""
        if not self.known:
            write_record(self.workdir, self.record, text)
        self._claim(c, sections)

    def _claim(self, c, sections):
        run_config.claim_workdir(self.workdir, self._stage, c, kind=self._kind, **sections)


def run(name: str, config_class: type[RunConfig], build: Callable[..., Stage], config: mlc.ConfigDict, workdir, *,
        kind: str = "lm") -> RunResult:  # fmt: skip
    """Runs a stage to its end, or until it is asked to stop. The same call resumes it, bitwise identical.

    Args:
        name: of the stage, in config.json. kind: of the model that the workdir holds: 'lm', or 'scalar' (a reward
            model).
        build: (config, mesh, Claim) -> Stage.
    Raises:
        InputError: whatever a user can correct.
    """
    began = time.perf_counter()
    rules = configs.build(Rules, (config.get("mesh") or {}).get("rules") or {}, "config.mesh.rules")
    with console.lenient_output(), use_rules(rules), lock.held(workdir) as workdir:
        c = configs.build(config_class, config)
        mesh = make_mesh(c.mesh)
        stage = build(c, mesh, Claim(name, workdir, kind))
        result = _train(stage, mesh, workdir)
        if hosts.first():
            print(f"{time.perf_counter() - began:.0f} s in all; report: {report.write(workdir)}")
    return result


def resume(checkpointer: Checkpointer, stage: Stage) -> tuple:
    """(state of the newest good checkpoint, seconds of training so far); (None, 0.0) of a new run.

    Checkpoints newer than that one are put aside. InputError: the data have changed, or more steps are done than asked
    for.
    """
    restored = checkpointer.restore(stage.abstract, stage.shardings)
    if restored is None:
        return None, 0.0
    state, meta = restored
    done = int(state.step)
    checkpointer.drop_after(done)
    if meta["data"] != stage.data:
        raise InputError(stage.changed)
    hosts.say(f"resuming from {stage.unit} {done} of {stage.total}")
    if done > stage.total:
        raise InputError(
            f"{checkpointer.workdir} has done {done} {stage.unit}s, more than the {stage.total} asked for: raise "
            "--config.steps."
        )
    return state, meta.get("seconds", 0.0)


def _train(stage: Stage, mesh, workdir) -> RunResult:
    """Whatever stops the run, the checkpoint being written and the last lines are kept."""
    c = stage.config
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from: the newest good checkpoint of this run, else a new one ---
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = resume(checkpointer, stage)
        if state is None:
            state = stage.init()
        stage.init = None  # and with it the weights that the run begins with
        start = int(state.step)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))

        stage.begin(state)
        state, finished, seconds = loop.run(stage, state, checkpointer, writer, seconds)
        if finished:
            stage.finish(state, checkpointer)
        steps, evaluations = int(state.step), writer.evaluations()
    compared = lambda line: line.get("selection", line.get("loss"))
    scored = [e for e in evaluations if compared(e) is not None and math.isfinite(compared(e))]
    return RunResult(
        workdir=str(workdir), finished=finished, steps=steps, metrics=writer.last(),
        evaluation=evaluations[-1] if evaluations else None, best=min(scored, key=compared, default=None),
        flops=stage.flops and stage.flops(steps), seconds=seconds,
    )  # fmt: skip
