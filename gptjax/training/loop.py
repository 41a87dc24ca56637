"""The training loop every stage runs: dispatch ahead, read late, save before evaluating, stop cleanly.

The loop never waits for the step it has just dispatched: it reads the metrics of the one before. It does wait
before a checkpoint, so that metrics.jsonl on disk is never behind the checkpoint a run resumes from.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from gptjax.console import progress
from gptjax.data import lm
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.model.flops import mfu
from gptjax.objectives.lm import bits_per_byte
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import JsonLines, MetricWriter
from gptjax.training.schedule import Schedule
from gptjax.training.state import TrainState
from gptjax.training.step import memory_needed
from gptjax.training.stopping import Interrupted, stop_on_signals


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data.

    every: steps between evaluations; one more before the first step and after the last.
    batches: how many validation batches, of a mixture of each part; 0 = all of them.
    """

    every: Count = 1000
    batches: int = 0

    def __post_init__(self):
        if self.every < 1 or self.batches < 0:
            raise InputError("eval.every is at least 1 and eval.batches at least 0.")


class TrainingDiverged(InputError):
    """The loss or the gradient stopped being finite."""


class Dispatch:
    """A chunk of consecutive steps as one device call, compiled once for each shape of its batch.

    step_fn: jitted (state, batch, learning rates [steps]) -> (state, metrics [steps]).
    """

    def __init__(self, step_fn, say=hosts.say):
        self._step_fn, self._compiled, self._say = step_fn, {}, say
        self.seconds_compiling = 0.0

    def __call__(self, state, batch, rates):
        key = jax.tree.structure(batch), tuple(x.shape for x in jax.tree.leaves(batch))
        if key not in self._compiled:
            began = time.perf_counter()
            self._compiled[key] = self._step_fn.lower(state, batch, rates).compile()
            seconds = time.perf_counter() - began
            self.seconds_compiling += seconds
            if len(self._compiled) == 1:
                self._announce(self._compiled[key], seconds)
        return self._compiled[key](state, batch, rates)

    def _announce(self, compiled, seconds):
        needed = memory_needed(compiled)
        text = f"compiled the train step in {seconds:.1f} s"
        if needed:
            parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in needed.items())
            text += f"; memory per device: {sum(needed.values()) / 2**20:,.0f} MiB ({parts})"
        self._say(text)


def chunks(start: int, stop: int, size: int, *boundaries: int, at=()) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of each dispatch; none runs across a multiple of a boundary or a step of `at`."""
    step = start
    while step < stop:
        ends = [step + size, stop, *((step // b + 1) * b for b in boundaries if b), *(a for a in at if a > step)]
        yield step, min(ends) - step
        step = min(ends)


@contextlib.contextmanager
def ends_when_stuck(seconds: float | None):
    """Yields alive(), to be called once a step: `seconds` without it end the process (LogConfig.stuck_after)."""
    if seconds is None:
        yield lambda: None
        return
    alive = functools.partial(faulthandler.dump_traceback_later, seconds, exit=True, file=sys.__stderr__)
    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def train(
    c,
    state: TrainState,
    step_fn,
    batches,
    *,
    mesh,
    schedule: Schedule,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    evaluate: Callable[[object], dict] | None,
    data: str,
    seconds_before: float,
    train_flops_per_token: float | None = None,
    figures: Callable[[dict], dict] | None = None,
    unit: str = "tokens",
) -> tuple[TrainState, bool]:
    """Runs steps state.step .. schedule.steps - 1.

    Args:
        c: a stage's config; read are its checkpoint, eval, log, precision, microbatch_rows and steps_per_dispatch.
        step_fn: jitted (state, stacked batches, learning rates [steps]) -> (state, metrics [steps]): jit_train_step.
        batches: batches[t] is step t's, numpy arrays of this host's rows (hosts.batch_rows) and scalars. Without
            target_bytes there is no bits_per_byte.
        evaluate: params -> {'loss', ...}; its record goes to evaluations.jsonl. Where it has a 'selection', that is
            what the best checkpoint has lowest, else the loss.
        data, seconds_before: fingerprint of the data and training time of earlier starts: Checkpointer.resume.
        figures: the step's further sums (step.py) -> {name: figure} for metrics.jsonl.
        unit: what the loss counts: batch_<unit>, <unit>_per_second.
    Returns:
        (state, whether the run is finished): False after a SIGTERM or Ctrl-C (stopping.py), with everything saved.
    Raises:
        TrainingDiverged: naming the step and the checkpoint to go back to.
    """
    devices, dispatch, log, start = jax.devices(), Dispatch(step_fn), c.log, int(state.step)
    if start < schedule.steps:
        for text in schedule.warnings():
            hosts.say(f"warning: {text}")
        _compare_rates(checkpointer.workdir, schedule, start)
    stops_on_overflow = not c.precision.scaled  # float16 skips a step that is not finite instead
    clock = _Clock(seconds_before)
    bar = progress(total=schedule.steps, initial=start, unit="step", disable=not hosts.first())

    def record(first, count, metrics):
        metrics = jax.device_get(metrics)
        seconds = clock.lap() / count
        for i in range(count):
            step = first + i + 1
            # float16 has nothing left to lower once its scale is 1
            if not metrics["finite"][i] and (stops_on_overflow or metrics["loss_scale"][i] <= 1):
                bar.close()
                writer.flush()
                _diverged(step, float(metrics["loss_sum"][i]), float(metrics["grad_norm"][i]), checkpointer)
            if step % log.every and step != schedule.steps:
                continue
            count_i = float(metrics["count"][i])
            nats = float(metrics["loss_sum"][i])
            line = {
                "step": step,
                "tokens_seen": schedule.tokens_before(step),
                "loss": nats / max(count_i, 1),
                **(_bits(nats, metrics["target_bytes"][i]) if "target_bytes" in metrics else {}),
                **(figures({k: float(v[i]) for k, v in metrics["sums"].items()}) if figures else {}),
                "grad_norm": float(metrics["grad_norm"][i]),
                "learning_rate": schedule.learning_rate(step - 1),
                f"batch_{unit}": int(count_i),
                f"{unit}_per_second": count_i / seconds,
                "mfu": train_flops_per_token
                and mfu(train_flops_per_token * count_i / seconds, devices[0].device_kind, len(devices)),
                "seconds": clock.total(),
            }
            if not stops_on_overflow:
                line |= {"loss_scale": float(metrics["loss_scale"][i]), "skipped": int(not metrics["finite"][i])}
            writer.train(line)
        bar.update(count)
        if step % log.every == 0:
            shown = [f"{k.replace('_', ' ')} {line[k]:.3f}" for k in ("loss", "bits_per_byte", "accuracy") if k in line]
            bar.set_postfix_str(f"{', '.join(shown)}, {line[f'{unit}_per_second']:,.0f} {unit}/s", refresh=False)

    def assess(step) -> bool:
        """Whether the step could be evaluated, before the run was asked to stop."""
        if evaluate is None:
            return True
        with clock.paused():
            try:
                result = evaluate(state.params)
            except Interrupted:
                return False
            writer.evaluation({"step": step, "tokens_seen": schedule.tokens_before(step), **result})
            checkpointer.report(step, result.get("selection", result["loss"]))
            bar.clear()
            shown = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in result.items() if isinstance(v, float)]
            hosts.say(f"step {step}: validation {', '.join(shown)}")
        return True

    def save(step):
        with clock.paused():
            writer.flush()
            return checkpointer.save(step, state, {"seconds": clock.total(), "data": data})

    evaluations = writer.evaluations()
    for line in evaluations:  # best.json may not have been written
        checkpointer.report(line["step"], line.get("selection", line.get("loss")))
    evaluated = {line["step"] for line in evaluations}
    profiler = _Profiler(checkpointer.workdir, start + log.profile_start, log.profile_steps)
    pending, step, saved, stopping = None, start, start if start else -1, False
    rows, by_row = c.microbatch_rows, batch_sharding(mesh, 2)
    at_once = 1 if schedule.ramping else c.steps_per_dispatch  # under the ramp the rows change from step to step
    with stop_on_signals() as asked_to_stop, ends_when_stuck(log.stuck_after) as alive, profiler:
        if start not in evaluated and (start % c.eval.every == 0 or start == schedule.steps):
            stopping = not assess(start)
            alive()
        stop = start if stopping else schedule.steps
        plan = chunks(start, stop, at_once, c.checkpoint.every, c.eval.every, at=profiler.ends)
        clock.lap()
        for first, count, batch in device_batches(batches, plan, rows, by_row, start, schedule.steps):
            profiler.before(first)
            rates = np.array([schedule.learning_rate(s) for s in range(first, first + count)], np.float32)
            compiling = dispatch.seconds_compiling
            state, metrics = dispatch(state, batch, rates)
            clock.leave_out(dispatch.seconds_compiling - compiling)
            if pending is not None:
                record(*pending)
            pending, step = (first, count, metrics), first + count
            stopping = asked_to_stop()
            alive()
            at_end = step == schedule.steps or stopping
            if at_end or step % c.checkpoint.every == 0 or step % c.eval.every == 0 or step >= profiler.stop_at:
                record(*pending)
                pending = None
            profiler.after(step)
            if at_end or step % c.checkpoint.every == 0:
                if save(step):
                    saved = step
            if not stopping and (step % c.eval.every == 0 or step == schedule.steps) and not assess(step):
                stopping = True  # resuming the run evaluates this step
                if saved != step and save(step):
                    saved = step
            if stopping:
                break
        bar.close()
        on_disk = checkpointer.wait() and (saved == step or step == 0)
    finished = step == schedule.steps and not stopping
    if not finished:
        hosts.say(
            f"asked to stop: saved step {saved}; the same command goes on from there" if saved >= 0
            else "asked to stop before the first step; the same command starts again"
        )  # fmt: skip
    if not on_disk:
        raise InputError(
            f"The run stopped at step {step} but its last checkpoint could not be written: free some disk space and "
            f"give the same command again, which goes on from step {max(checkpointer.steps(), default=0)}."
        )
    if not checkpointer.best_written and getattr(c, "selection", "last") != "last":
        raise InputError(
            f"The best checkpoint is step {checkpointer.best}, and {checkpointer.directory}/best.json, which tells "
            "later stages, could not be written: free some disk space and give the same command again."
        )
    return state, finished


def _compare_rates(workdir, schedule: Schedule, start: int):
    """Says so where the step before `start` had another learning rate than the schedule now gives it: the length of the
    run changed, or it began with a version whose schedule was another."""
    if not start or not hosts.first():
        return
    before = [line for line in JsonLines.read(workdir / "metrics.jsonl") if line["step"] == start]
    now = schedule.learning_rate(start - 1)
    if before and not math.isclose(before[-1].get("learning_rate", now), now, rel_tol=1e-6):
        print(
            f"the learning rate of step {start:,} was {before[-1]['learning_rate']:.4g}; by the schedule as it is now "
            f"it would have been {now:.4g}, and the run continues with {schedule.learning_rate(start):.4g}"
        )


def _bits(nats, n_bytes) -> dict:
    return {"bits_per_byte": float(bits_per_byte(nats, max(int(n_bytes), 1)))}


def _diverged(step, loss, grad_norm, checkpointer):
    checkpointer.wait()
    good = checkpointer.steps()
    where = f"the last good checkpoint is step {good[-1]}" if good else "no checkpoint had been written yet"
    raise TrainingDiverged(
        f"The loss became {loss} (gradient norm {grad_norm}) at step {step}; training stopped and {where}. "
        "Lower optimizer.learning_rate, lengthen schedule.warmup_tokens, or look at the data of that step."
    )


class _Clock:
    """Wall time spent training: compiling, evaluating and saving are not counted."""

    def __init__(self, before: float):
        self._total, self._last, self._out = before, time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
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
    """A trace of steps start .. stop - 1 in workdir/profile, for TensorBoard or xprof."""

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


def micro_batches(batch: dict[str, np.ndarray], microbatch_rows: int) -> dict[str, np.ndarray]:
    """[rows, ...] -> [micro-batches, rows of one, ...]."""
    return {k: v.reshape(-1, microbatch_rows, *v.shape[1:]) for k, v in batch.items()}


def device_batches(batches, plan: Iterator[tuple[int, int]], microbatch_rows: int, sharding, start: int, stop: int):
    """(first step, steps, arrays on the devices [steps, micro-batches, rows, ...]) for each (first, steps) of `plan`.

    Args:
        batches: as `train` takes them; read ahead from `start` to `stop`.
        microbatch_rows: of one micro-batch, over all hosts.
        sharding: of the arrays.
    """
    rows_here = len(hosts.rows_here(sharding, microbatch_rows))
    read = lm.iterate(batches, start, stop)
    for first, count in plan:
        arrays = []
        for step, batch in itertools.islice(read, count):
            assert step == first + len(arrays), "the loader and the loop disagree on the step"
            arrays.append(micro_batches({k: v for k, v in batch.items() if isinstance(v, np.ndarray)}, rows_here))
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *arrays)
        yield first, count, jax.tree.map(lambda a: hosts.global_array(a, sharding), stacked)
