"""The loop that every stage runs: signals, watchdog, schedule of evaluations and checkpoints, and how a run ends.

Metrics are read one dispatch late (Stage.reads_late), so that the device need not wait for the host; only before a
checkpoint or an evaluation does the loop wait for the steps it has dispatched. So metrics.jsonl on disk is never behind
the checkpoint that a run resumes from. A step is saved before it is evaluated.
"""

import contextlib
import time
from collections.abc import Iterator

import jax

from gptjax.console import progress
from gptjax.distributed import hosts
from gptjax.distributed.watchdog import watchdog
from gptjax.errors import InputError
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import MetricWriter
from gptjax.training.stage import Stage, selection_value
from gptjax.training.stopping import Interrupted, stop_on_signals


class TrainingDiverged(InputError):
    """The loss or the gradient is no longer finite."""


class NotFinite(Exception):
    """Raised by Stage.lines. what: a sentence without its period; fix: what to change."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def plan(start: int, stop: int, size: int, *boundaries: int | None, at=()) -> Iterator[tuple[int, int]]:
    """Yields (first step, number of steps) of each dispatch: at most `size` steps, which do not cross a multiple of a
    boundary or a step of `at`."""
    step = start
    while step < stop:
        ends = [step + size, stop, *((step // b + 1) * b for b in boundaries if b), *(a for a in at if a > step)]
        yield step, min(ends) - step
        step = min(ends)


def run(stage: Stage, state, checkpointer: Checkpointer, writer: MetricWriter, seconds: float):
    """Runs steps state.step .. stage.total - 1. seconds: training time before this start.

    Returns (state, whether the run is finished, total seconds of training). It is not finished after SIGTERM or Ctrl-C
    (stopping.py), and then everything is saved. Raises TrainingDiverged, which names the step and the last good
    checkpoint, and InputError if the last checkpoint could not be written.
    """
    return _Loop(stage, state, checkpointer, writer, seconds).run()


class _Loop:
    def __init__(self, stage: Stage, state, checkpointer: Checkpointer, writer: MetricWriter, seconds: float):
        self.c, self.stage, self.state = stage.config, stage, state
        self.checkpointer, self.writer = checkpointer, writer
        self.step = self.start = int(state.step)
        self.saved = self.start or None  # the newest step with a checkpoint
        self.pending = None  # (first step, steps, metrics) of the last dispatch, not recorded yet
        self.clock = _Clock(seconds)
        evaluations = writer.evaluations()
        for line in evaluations:  # in case best.json was not written
            checkpointer.report(line["step"], selection_value(line))
        self.evaluated = {line["step"] for line in evaluations}

    def run(self):
        c, stage = self.c, self.stage
        self.bar = progress(total=stage.total, initial=self.start, unit=stage.unit, disable=not hosts.first())
        profiler = _Profiler(self.checkpointer.workdir, self.start + c.log.profile_start, c.log.profile_steps)
        with stop_on_signals() as asked_to_stop, watchdog(c.log.stuck_after) as heartbeat, profiler:
            stopping = not self.evaluate()
            heartbeat()
            self.clock.lap()
            every = (c.checkpoint.every, *(e.every for e in stage.evaluators))
            steps = plan(self.start, self.start if stopping else stage.total, stage.steps_per_dispatch, *every,
                         at=profiler.ends)  # fmt: skip
            for advance in stage.advances(steps, self.start):
                profiler.before(advance.first)
                self.advance(advance)
                stopping = asked_to_stop()
                heartbeat()
                at_end = self.step == stage.total or stopping
                due = not stopping and any(e.due(self.step, stage.total) for e in stage.evaluators)
                save = at_end or self.step % c.checkpoint.every == 0
                if save or due or self.step >= profiler.stop_at:
                    self.record()
                profiler.after(self.step)
                if save:
                    self.save()
                if due and not self.evaluate():
                    stopping = True  # a resumed run evaluates this step
                    self.save()
                if stopping:
                    break
            self.bar.close()
            on_disk = self.checkpointer.wait() and (self.saved == self.step or self.step == 0)
        finished = self.step == stage.total and not stopping
        self.close(finished, on_disk)
        return self.state, finished, self.clock.total()

    def advance(self, advance):
        """Dispatches steps, and records the metrics of the previous dispatch, or of this one (Stage.reads_late)."""
        compiling = self.stage.seconds_compiling()
        self.state, metrics = advance.run(self.state)
        self.clock.leave_out(self.stage.seconds_compiling() - compiling)
        self.record()
        self.pending, self.step = (advance.first, advance.count, metrics), advance.first + advance.count
        if not self.stage.reads_late:
            self.record()

    def record(self):
        """Waits for the metrics of the last dispatch and writes their lines of metrics.jsonl."""
        if self.pending is None:
            return
        first, count, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        seconds = self.clock.lap() / count
        try:
            for line in self.stage.lines(first, count, metrics, seconds):
                if line["step"] % self.c.log.every == 0 or line["step"] == self.stage.total:
                    self.writer.train({**line, "seconds": self.clock.total()})
        except NotFinite as error:  # the lines of earlier steps are written
            self.bar.close()
            self.writer.flush()
            text = f"{error.what}; training stopped and {self.last_good()}. {error.fix}"
            raise TrainingDiverged(text) from error
        self.bar.update(count)
        if line["step"] % self.c.log.every == 0:
            self.bar.set_postfix_str(self.stage.summary(line), refresh=False)

    def last_good(self) -> str:
        self.checkpointer.wait()
        good = self.checkpointer.steps()
        newest = f"the last good checkpoint is {self.stage.unit} {good[-1]}" if good else ""
        return newest or "no checkpoint had been written yet"

    def evaluate(self) -> bool:
        """Runs the evaluators due at this step. Returns False if the run was asked to stop before they were done."""
        step, due = self.step, [e for e in self.stage.evaluators if e.due(self.step, self.stage.total)]
        if not due or step in self.evaluated:
            return True
        figures, samples = {}, []
        with self.clock.paused():
            try:
                for evaluator in due:
                    found = evaluator.evaluate(self.state)
                    figures |= found.figures
                    samples += found.samples
            except Interrupted:
                return False
            self.writer.samples(step, samples)
            if not figures:
                return True
            self.evaluated.add(step)
            self.writer.evaluation({"step": step, **self.stage.position(step), **figures})
            self.checkpointer.report(step, selection_value(figures))
            self.bar.clear()
            shown = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in figures.items() if isinstance(v, float)]
            hosts.say(f"{self.stage.unit} {step}: validation {', '.join(shown)}")
        return True

    def save(self):
        """Saves a checkpoint of this step, unless there is one; metrics.jsonl is flushed first."""
        if self.saved == self.step:
            return
        with self.clock.paused():
            self.writer.flush()
            if self.checkpointer.save(
                self.step, self.state, {"seconds": self.clock.total(), "data": self.stage.data}
            ):
                self.saved = self.step

    def close(self, finished: bool, on_disk: bool):
        """Prints how the run ended. Raises InputError if its last checkpoint or best.json is not on disk."""
        unit, checkpointer = self.stage.unit, self.checkpointer
        if not finished:
            hosts.say(
                f"asked to stop: saved {unit} {self.saved}; the same command resumes from there" if self.saved
                else f"asked to stop before the first {unit}; the same command starts again"
            )  # fmt: skip
        if not on_disk:
            raise InputError(
                f"The run stopped at {unit} {self.step} but its last checkpoint could not be written: free some disk "
                f"space and give the same command again, which resumes from {unit} "
                f"{max(checkpointer.steps(), default=0)}."
            )
        if not checkpointer.best_written and getattr(self.c, "selection", "last") != "last":
            raise InputError(
                f"The best checkpoint is {unit} {checkpointer.best}, but {checkpointer.directory}/best.json, which "
                "later stages read, could not be written: free some disk space and give the same command again."
            )


class _Clock:
    """Wall time of training, compiling, evaluating and saving excluded."""

    def __init__(self, before: float):
        self._total, self._last, self._out = before, time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds since the last lap, without pauses."""
        now = time.perf_counter()
        seconds, self._last, self._out = max(now - self._last - self._out, 1e-9), now, 0.0
        self._total += seconds
        return seconds

    def total(self) -> float:
        return self._total

    def leave_out(self, seconds: float):
        self._out += seconds

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.leave_out(time.perf_counter() - began)


class _Profiler(contextlib.AbstractContextManager):
    """Traces `steps` steps from step `start` on into workdir/profile, for TensorBoard or xprof."""

    def __init__(self, workdir, start, steps):
        self.directory, self.start = str(workdir) + "/profile", start
        self.stop_at = start + steps if steps else float("inf")
        self.ends = (start, start + steps) if steps else ()
        self._steps, self._on = steps, False

    def before(self, step):
        if self._steps and not self._on and self.start <= step < self.stop_at:
            jax.profiler.start_trace(self.directory)
            self._on = True

    def after(self, step):
        if self._on and step >= self.stop_at:
            self.__exit__(None, None, None)
            hosts.say(f"profile of steps {self.start}..{step - 1}: {self.directory}")

    def __exit__(self, *exc):
        if self._on:
            jax.profiler.stop_trace()
            self._on, self._steps = False, 0
            self.stop_at = float("inf")
