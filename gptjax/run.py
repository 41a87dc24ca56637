"""Runs a stage from start to end: lock, config, build, resume or begin, loop, report.

    def build(c: SFTConfig, mesh, claim: Claim) -> Stage: ...      # a main's own part: models, data, objective

    def sft(config, workdir) -> RunResult:
        return run("sft", SFTConfig, build, config, workdir)

`build` raises what errors it can before it writes anything. `claim` records in a new workdir which run it
belongs to, or checks that an existing one belongs to this run.
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
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import use_rules
from gptjax.training import loop
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import MetricWriter
from gptjax.training.stage import RunConfig, RunResult, Stage, selection_value


def require(c: RunConfig, texts: Mapping[str, str]):
    """texts: {key of the config: error message}; 'a,b' as a key means at least one of the two. InputError: the message
    of the first one that is not given."""
    for keys, text in texts.items():
        if all(functools.reduce(getattr, key.split("."), c) is None for key in keys.split(",")):
            raise InputError(text)


class Claim:
    """The workdir of a run that begins or resumes.

    known: whether it holds a run already. resuming: whether that run has a checkpoint to resume from.
    record: the contents of data.json (data/records.py), from `begin`.

    `build` calls check, begin and make, in this order.
    """

    def __init__(self, stage: str, workdir, kind: str):
        self.workdir, self._stage, self._kind = epath.Path(workdir), stage, kind
        self.known = hosts.from_first((self.workdir / "config.json").exists)
        self.resuming = run_config.has_checkpoints(self.workdir)
        self.record: dict = {}
        if not self.known:
            run_config.refuse_orphans(self.workdir, self.resuming)

    def begin(self, base=None) -> dict:
        """The contents of data.json: the existing ones, or those of a new run, not yet written. base: the workdir
        that a stage after pre-training starts from."""
        self.record = start_record(self.workdir, self.known, base)
        return self.record

    def check(self, c: RunConfig, **sections):
        """InputError if the workdir holds a run with another config. Before data is read, which can take long."""
        if self.known:
            self._claim(c, sections)

    def make(self, c: RunConfig, tokenizer: Tokenizer, text: Text | None = None, **sections):
        """Writes data.json, config.json and then the tokenizer into a new workdir; checks config.json of an existing
        one, of which nothing changes where it is another run's. text: the tokens that data.json records. sections:
        further sections of config.json, as for `check`."""
        if not self.known:
            write_record(self.workdir, self.record, text)
        self._claim(c, sections)
        self.save(tokenizer)

    def save(self, tokenizer: Tokenizer):
        """Writes the tokenizer into the workdir: by `make`, or after `check`, where a text that `make` needs is to be
        tokenized with it."""
        hosts.only_first(lambda: tokenizer.save(self.workdir / "tokenizer"))

    def _claim(self, c, sections):
        run_config.claim_workdir(self.workdir, self._stage, c, kind=self._kind, **sections)


def run(name: str, config_class: type[RunConfig], build: Callable[..., Stage], config: mlc.ConfigDict, workdir, *,
        kind: str = "lm") -> RunResult:  # fmt: skip
    """Runs a stage to its end, or until SIGTERM or Ctrl-C. The same call resumes it, bitwise identical.

    Args:
        name: of the stage, in config.json. kind: of the model that the workdir holds: 'lm', or 'scalar' (a reward
            model).
        build: (config, mesh, Claim) -> Stage.
    Raises:
        InputError: any user-correctable error.
    """
    began = time.perf_counter()
    with console.lenient_output(), use_rules(configs.sharding_rules(config)), lock.held(workdir) as workdir:
        c = configs.build(config_class, config)
        mesh = make_mesh(c.mesh)
        stage = build(c, mesh, Claim(name, workdir, kind))
        result = _train(stage, mesh, workdir)
        if hosts.first():
            print(f"{time.perf_counter() - began:.0f} s in total; report: {report.write(workdir)}")
    return result


def resume(checkpointer: Checkpointer, stage: Stage) -> tuple:
    """(state of the newest good checkpoint, seconds of training so far); (None, 0.0) of a new run.

    Newer, damaged checkpoints are moved to checkpoints-damaged. InputError: the data have changed, or more steps are
    done than the config asks for.
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
    """Any exception still closes checkpointer and writer: a checkpoint being written and the last lines are kept."""
    c = stage.config
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from: the newest good checkpoint of this run, else a new one ---
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = resume(checkpointer, stage)
        if state is None:
            state = stage.init()
        stage.init = None  # releases the initial weights
        start = int(state.step)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))

        stage.begin(state)
        state, finished, seconds = loop.run(stage, state, checkpointer, writer, seconds)
        if finished:
            stage.finish(state, checkpointer)
        steps, evaluations = int(state.step), writer.evaluations()
    scored = [e for e in evaluations if selection_value(e) is not None and math.isfinite(selection_value(e))]
    return RunResult(
        workdir=str(workdir), finished=finished, steps=steps, metrics=writer.last(),
        evaluation=evaluations[-1] if evaluations else None, best=min(scored, key=selection_value, default=None),
        flops=stage.flops and stage.flops(steps), seconds=seconds,
    )  # fmt: skip
