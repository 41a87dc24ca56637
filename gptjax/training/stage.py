"""What a main gives the loop (loop.py): a Stage, and the config keys that all stages have."""

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
    """Validation, before the first step, every so many steps, and after the last.

    every: steps between evaluations.
    batches: how many validation batches, of a mixture of each part; 0 = all of them.
    """

    every: Count = 1000
    batches: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Of every stage.

    seed: of parameters, order of the data, dropout and sampling.
    steps: steps of the run (iterations of RL); other keys may say it in other units.
    batch_size: rows of a step over all devices.
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
    """Of the stages that learn from a data set.

    epochs: passes over the data, where steps is not given.
    microbatch_size: rows computed at a time, None = all of batch_size.
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
        """As mesh.check_fits takes them."""
        return {"batch_size": self.batch_size, "microbatch_size": self.microbatch_rows}


# --- evaluators ---------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """figures: of evaluations.jsonl; `selection`, where there is one, else `loss`, is what the best checkpoint has
    lowest. samples: rows of samples.jsonl."""

    figures: dict[str, Any]
    samples: list[dict] = []


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """evaluate: state -> Evaluation; it may raise stopping.Interrupted. every: steps between its evaluations, besides
    one before the first step and one after the last; None = those two alone."""

    evaluate: Callable[[Any], Evaluation]
    every: int | None = None

    def due(self, step: int, total: int) -> bool:
        return step in (0, total) or bool(self.every) and step % self.every == 0


# --- the stage ----------------------------------------------------------------------------------------------


class Advance(NamedTuple):
    """`count` steps from `first` on: run(state) -> (state, metrics), dispatched and not waited for."""

    first: int
    count: int
    run: Callable[[Any], tuple[Any, Any]]


@dataclasses.dataclass
class Stage:
    """A run, ready to begin or resume. Everything that can be refused has been refused.

    config: of which the loop reads the keys of RunConfig. total: steps of the run.
    abstract, shardings: of the state, which has a `step`, and `split` and `join` (checkpoint.py).
    init: () -> the state of a new run; called at most once and dropped, for it holds the weights that it begins with.
    data: fingerprint of the training data; changed: what to say where a resumed run finds another.
    advances: (plan of (first step, count), step the run starts at) -> an Advance for each.
    lines: (first, count, metrics of an Advance, seconds per step) -> an iterator of a record of metrics.jsonl for each
        step; it may raise loop.NotFinite. summary: a record -> text for the progress bar.
    evaluators: all due at a step make one record.
    steps_per_dispatch: most steps of an Advance. reads_late: metrics are read once the next steps are dispatched.
    seconds_compiling: so far, which are not training time. unit: what a step is called.
    position: step -> what else tells how far the run is, for evaluations.jsonl. flops: model FLOPs of the steps before
        a step, None = not counted.
    begin: (state) -> None, before the first step of this start: what the run is, printed.
    finish: (state, checkpointer) -> None, after the last step.
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
    """What a run came to. finished: False after SIGTERM or Ctrl-C, with everything saved. steps: done. metrics: the
    last record of metrics.jsonl, evaluation: of evaluations.jsonl, best: the one with the lowest loss or `selection`;
    None where there is none. flops: model FLOPs of training, None = not counted. seconds: of training, of all starts.
    """

    workdir: str
    finished: bool
    steps: int
    metrics: dict | None
    evaluation: dict | None
    best: dict | None
    flops: float | None
    seconds: float
