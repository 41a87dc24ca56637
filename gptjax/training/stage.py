"""Stage: what the loop (loop.py) needs of a training stage; and the config keys that all stages share."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gptjax.errors import InputError
from gptjax.parallel.mesh import MeshConfig
from gptjax.ranges import Count, Positive, Seed
from gptjax.training.checkpoint import CheckpointConfig
from gptjax.training.metrics import LogConfig
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import ScheduleConfig

# --- configs ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation before the first step, at regular intervals, and after the last step.

    every: steps between evaluations.
    batches: validation batches of an evaluation, of a mixture that many for each part; 0 = all.
    """

    every: Count = 1000
    batches: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config keys of every stage.

    seed: of parameters, order of the data, dropout and sampling.
    steps: length of the run in steps (in RL: iterations); other keys may give it in other units.
    batch_size: rows of a step, over all devices.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    seed: Seed = 0
    steps: Count | None = None
    batch_size: Count = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Config keys of the stages that learn from a data set.

    epochs: passes over the data, if steps is not given.
    microbatch_size: rows whose gradients are computed at a time; None = all of batch_size.
    steps_per_dispatch: steps per device call.
    """

    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    epochs: Positive | None = None
    microbatch_size: Count | None = None
    steps_per_dispatch: Count = 1

    def __post_init__(self):
        if self.batch_size % self.microbatch_rows:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of microbatch_size={self.microbatch_size}: change one."
            )

    @property
    def microbatch_rows(self) -> int:
        return self.microbatch_size or self.batch_size

    @property
    def rows(self) -> dict[str, int]:
        """Keyword arguments of mesh.check_fits."""
        return {"batch_size": self.batch_size, "microbatch_size": self.microbatch_rows}


# --- evaluators ---------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """figures: for evaluations.jsonl; the best checkpoint is the one with the lowest `selection`, or `loss` if there is
    no `selection` (selection_value). samples: rows for samples.jsonl."""

    figures: dict[str, Any]
    samples: list[dict] = []


def selection_value(figures: dict) -> float | None:
    """The figure that is lowest at the best checkpoint; None if there is none, or it was not finite."""
    return figures.get("selection", figures.get("loss"))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """evaluate: (state) -> Evaluation; it may raise stopping.Interrupted. every: steps between its evaluations, besides
    one before the first step and one after the last; None = only those two."""

    evaluate: Callable[[Any], Evaluation]
    every: int | None = None

    def due(self, step: int, total: int) -> bool:
        return step in (0, total) or bool(self.every) and step % self.every == 0


# --- the stage ----------------------------------------------------------------------------------------------


class Advance(NamedTuple):
    """`count` steps from `first` on: run(state) -> (state, metrics) dispatches them and does not wait."""

    first: int
    count: int
    run: Callable[[Any], tuple[Any, Any]]


@dataclasses.dataclass
class Stage:
    """A run that is ready to start or resume: all input has been checked.

    config: the loop reads the keys of RunConfig. total: steps of the run.
    abstract, shardings: of the state, which has a `step`, and `split` and `join` (checkpoint.py).
    init: () -> the state of a new run; called at most once, then released, because it holds the initial weights.
    data: fingerprint of the training data. changed: the error message if a resumed run has another.
    advances: (plan of (first step, count) pairs, step that the run starts at) -> an iterator of an Advance for each.
    lines: (first, count, metrics of an Advance, seconds per step) -> an iterator of a record of metrics.jsonl for each
        step; it may raise loop.NotFinite. summary: (record) -> text for the progress bar.
    evaluators: those that are due at the same step write one record.
    steps_per_dispatch: the maximum number of steps of an Advance. reads_late: metrics are read after the next steps are
        dispatched. seconds_compiling: () -> seconds so far; not counted as training time. unit: name of a step.
    position: (step) -> further fields of evaluations.jsonl that say how far the run is. flops: (step) -> model FLOPs of
        the steps before it; None = not counted.
    begin: (state) -> None, called before the first step of a start or resume: prints a description of the run.
    finish: (state, checkpointer) -> None, called after the last step.
    """

    config: RunConfig
    total: int
    abstract: Any
    shardings: Any
    init: Callable[[], Any] | None
    data: str
    changed: str
    advances: Callable[[Iterator[tuple[int, int]], int], Iterator[Advance]]
    lines: Callable[[int, int, Any, float], Iterator[dict]]
    summary: Callable[[dict], str]
    evaluators: tuple[Evaluator, ...] = ()
    steps_per_dispatch: int = 1
    reads_late: bool = True
    seconds_compiling: Callable[[], float] = lambda: 0.0
    unit: str = "step"
    position: Callable[[int], dict] = lambda step: {}
    flops: Callable[[int], float] | None = None
    begin: Callable[[Any], None] = lambda state: None
    finish: Callable[[Any, Any], None] = lambda state, checkpointer: None


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run.

    finished: False after SIGTERM or Ctrl-C, with everything saved. steps: done so far. metrics: last record of
    metrics.jsonl. evaluation: last record of evaluations.jsonl. best: the record with the lowest `selection` or loss.
    These three are None if there is no record. flops: model FLOPs of training; None = not counted. seconds: of
    training, since the run was first started.
    """

    workdir: str
    finished: bool
    steps: int
    metrics: dict | None
    evaluation: dict | None
    best: dict | None
    flops: float | None
    seconds: float
