"""Stages that learn from a data set: optimizer steps on the batches of a schedule, several per dispatch."""

import itertools
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from gptjax.data import lm
from gptjax.distributed import hosts
from gptjax.model.flops import mfu
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import bits_per_byte
from gptjax.parallel.sharding import batch_sharding
from gptjax.training.loop import NotFinite
from gptjax.training.metrics import JsonLines
from gptjax.training.noise_scale import Averages
from gptjax.training.schedule import Schedule
from gptjax.training.stage import Advance, Stage, TrainConfig
from gptjax.training.step import TrainProgram, memory_needed


def supervised(
    c: TrainConfig, program: TrainProgram, batches, schedule: Schedule, mesh, *, workdir,
    flops_per_token: float | None = None, **fields,
) -> Stage:  # fmt: skip
    """A Stage of optimizer steps on batches[0 .. schedule.steps - 1].

    Args:
        batches: batches[t] is the batch of step t: numpy arrays of this host's rows (hosts.batch_rows) and scalars.
            Without target_bytes there is no bits_per_byte.
        flops_per_token: training FLOPs, for MFU and RunResult; None = neither is reported.
        fields: the other fields of Stage.
    """
    dispatch, lines = Dispatch(program.step, c.seed), _Lines(c, program.objective, schedule, flops_per_token)

    def advances(steps: Iterator[tuple[int, int]], start: int) -> Iterator[Advance]:
        if start < schedule.steps:
            for text in schedule.warnings():
                hosts.say(f"warning: {text}")
            _compare_rates(workdir, schedule, start)
            lines.resume(workdir, start)
        sharding = batch_sharding(mesh, 2)
        for first, count, batch in device_batches(batches, steps, c.microbatch_rows, sharding, start, schedule.steps):
            rates = np.array([schedule.learning_rate(s) for s in range(first, first + count)], np.float32)
            yield Advance(first, count, lambda state, batch=batch, rates=rates: dispatch(state, batch, rates))

    return Stage(
        config=c,
        total=schedule.steps,
        abstract=program.abstract,
        shardings=program.shardings,
        advances=advances,
        lines=lines,
        summary=lines.summary,
        steps_per_dispatch=1 if schedule.ramping else c.steps_per_dispatch,  # the ramp's rows change from step to step
        seconds_compiling=lambda: dispatch.seconds_compiling,
        position=lambda step: {"tokens_seen": schedule.tokens_before(step)},
        flops=flops_per_token and (lambda step: flops_per_token * schedule.tokens_before(step)),
        **fields,
    )


def make_schedule(c: TrainConfig, tokens: int, batches) -> Schedule:
    """The Schedule of a config's steps or epochs. tokens: of a row. batches: with steps(epochs)."""
    steps = c.steps if c.steps is not None else batches.steps(c.epochs)
    return Schedule(
        c.schedule, batch_size=c.batch_size, context_length=tokens, learning_rate=c.optimizer.learning_rate, steps=steps
    )


class Dispatch:
    """Runs consecutive steps as one device call, compiled once for each shape of the batch.

    step: jitted (state, batch, learning rates [steps], seed) -> (state, metrics [steps]).
    """

    def __init__(self, step, seed: int = 0, say=hosts.say):
        self._step, self._seed, self._compiled, self._say = step, np.uint32(seed), {}, say
        self.seconds_compiling = 0.0

    def __call__(self, state, batch, rates):
        key = jax.tree.structure(batch), tuple(x.shape for x in jax.tree.leaves(batch))
        if key not in self._compiled:
            began = time.perf_counter()
            self._compiled[key] = self._step.lower(state, batch, rates, self._seed).compile()
            seconds = time.perf_counter() - began
            self.seconds_compiling += seconds
            if len(self._compiled) == 1:
                self._announce(self._compiled[key], seconds)
        return self._compiled[key](state, batch, rates, self._seed)

    def _announce(self, compiled, seconds):
        needed = memory_needed(compiled)
        text = f"compiled the train step in {seconds:.1f} s"
        if needed:
            parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in needed.items())
            text += f"; memory per device: {sum(needed.values()) / 2**20:,.0f} MiB ({parts})"
        self._say(text)


class _Lines:
    """Makes the records of metrics.jsonl from the metrics of train_step, [steps]."""

    def __init__(self, c: TrainConfig, objective: Objective, schedule: Schedule, flops_per_token: float | None):
        self._objective, self._schedule, self._flops_per_token = objective, schedule, flops_per_token
        self._scaled = c.precision.scaled  # float16 skips a step that is not finite, instead of stopping
        self._devices = jax.devices()
        self._noise = Averages()

    def resume(self, workdir, start: int):
        """Goes on with the averages of the last line up to step `start` that has them."""
        if start and hosts.first():
            parts = ("noise/squared_gradient", "noise/trace")
            lines = [line for line in JsonLines.read(workdir / "metrics.jsonl") if line["step"] <= start]
            before = [[line[part] for part in parts] for line in lines if parts[0] in line]
            self._noise = Averages(*before[-1]) if before else Averages()

    def __call__(self, first: int, count: int, metrics, seconds: float) -> Iterator[dict]:
        for i in range(count):
            yield self._line(first + i + 1, jax.tree.map(lambda x, i=i: x[i], metrics), seconds)

    def _line(self, step: int, metrics, seconds: float) -> dict:
        nats, count, norm = (float(metrics[k]) for k in ("loss_sum", "count", "grad_norm"))
        # with float16 a step is skipped and the scale lowered, until the scale is 1
        if not metrics["finite"] and not (self._scaled and metrics["loss_scale"] > 1):
            raise NotFinite(
                f"The loss became {nats} (gradient norm {norm}) at step {step}",
                "Lower optimizer.learning_rate, lengthen schedule.warmup_tokens, or look at the data of that step.",
            )
        line = {"step": step, "tokens_seen": self._schedule.tokens_before(step), "loss": nats / max(count, 1)}
        if "target_bytes" in metrics:
            line["bits_per_byte"] = float(bits_per_byte(nats, max(int(metrics["target_bytes"]), 1)))
        unit, flops = self._objective.unit, self._flops_per_token
        line |= {
            **self._objective.metrics({k: float(v) for k, v in metrics["sums"].items()}),
            "grad_norm": norm,
            "learning_rate": self._schedule.learning_rate(step - 1),
            f"batch_{unit}": int(count),
            f"{unit}_per_second": count / seconds,
            "mfu": flops and mfu(flops * count / seconds, self._devices[0].device_kind, len(self._devices)),
        }
        if "noise" in metrics:
            line |= self._noise.add(step, *map(float, metrics["noise"]))
        if self._scaled:
            line |= {"loss_scale": float(metrics["loss_scale"]), "skipped": int(not metrics["finite"])}
        return line

    def summary(self, line: dict) -> str:
        unit = self._objective.unit
        shown = [f"{k.replace('_', ' ')} {line[k]:.3f}" for k in ("loss", "bits_per_byte", "accuracy") if k in line]
        return f"{', '.join(shown)}, {line[f'{unit}_per_second']:,.0f} {unit}/s"


def _compare_rates(workdir, schedule: Schedule, start: int):
    """Prints a note if the step before `start` had a learning rate other than the schedule's: the length of the run
    changed, or an earlier version with another schedule started it."""
    if not start or not hosts.first():
        return
    before = [line for line in JsonLines.read(workdir / "metrics.jsonl") if line["step"] == start]
    now = schedule.learning_rate(start - 1)
    if before and not math.isclose(before[-1].get("learning_rate", now), now, rel_tol=1e-6):
        print(
            f"the learning rate of step {start:,} was {before[-1]['learning_rate']:.4g}; by the schedule as it is now "
            f"it would have been {now:.4g}, and the run continues with {schedule.learning_rate(start):.4g}"
        )


def micro_batches(batch: dict[str, np.ndarray], microbatch_rows: int) -> dict[str, np.ndarray]:
    """[rows, ...] -> [M, microbatch_rows, ...]."""
    return {k: v.reshape(-1, microbatch_rows, *v.shape[1:]) for k, v in batch.items()}


def device_batches(batches, plan: Iterator[tuple[int, int]], microbatch_rows: int, sharding, start: int, stop: int):
    """Yields (first step, steps, arrays on the devices [steps, M, B, ...]) for each (first, steps) of `plan`.

    Args:
        batches: as in `supervised`; read ahead from `start` to `stop`.
        microbatch_rows: rows of a micro-batch, over all hosts.
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
