"""The grid of a sweep: cells by plain functions, and the point, a complete run, that a compute budget makes of a cell.

    for cell in product(budget=[1e12, 1e13], depth=[2, 3, 4]):
        at_budget(config, cell["budget"], shape(cell["depth"]))
"""

import builtins
import dataclasses
import fractions
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from ml_collections import config_dict as mlc

from gptjax.config import build
from gptjax.errors import InputError
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.model.spec import GPTConfig
from gptjax.pretrain import pretrain
from gptjax.training.stage import RunResult

Count = Literal["with_embedding", "without_embedding"]
Flops = Literal["6nd", "exact"]
FIGURES = {"nats/token": "loss", "bits/byte": "bits_per_byte"}  # {metric of a result: its key in evaluations.jsonl}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


# --- cells ------------------------------------------------------------------------------------------------


def product(*grids: Iterable[dict], **axes: Iterable) -> list[dict]:
    """Every combination of the cells of the grids and the values of the axes, the last one fastest."""
    factors = [list(grid) for grid in grids] + [[{name: value} for value in values] for name, values in axes.items()]
    return [_merged(cells) for cells in itertools.product(*factors)]


def zip(*grids: Iterable[dict], **axes: Iterable) -> list[dict]:
    """The cells of the grids and the values of the axes side by side. InputError: of different lengths."""
    factors = [list(grid) for grid in grids] + [[{name: value} for value in values] for name, values in axes.items()]
    if len({len(factor) for factor in factors}) > 1:
        lengths = ", ".join(str(len(factor)) for factor in factors)
        raise InputError(f"zip was given {lengths} values: give as many of each, or use product.")
    return [_merged(cells) for cells in builtins.zip(*factors, strict=True)]


def chain(*grids: Iterable[dict]) -> list[dict]:
    """The cells of one grid after those of the other."""
    return list(itertools.chain(*grids))


def subsample(grid: Iterable[dict], count: int, seed: int = 0) -> list[dict]:
    """`count` cells chosen at random, in their order. InputError: there are fewer."""
    cells = list(grid)
    if not 0 <= count <= len(cells):
        raise InputError(f"subsample was asked for {count} of {len(cells)} cells: ask for at most that many.")
    return [cells[i] for i in sorted(random.Random(seed).sample(range(len(cells)), count))]


def _merged(cells: Iterable[dict]) -> dict:
    merged = {}
    for cell in cells:
        if twice := merged.keys() & cell.keys():
            raise InputError(f"The axis {min(twice)!r} is in a grid twice: give it another name or leave one out.")
        merged |= cell
    return merged


# --- points -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """A run of a sweep. name: of its folder and its result. config: the complete config of its run.

    params (N), tokens (D) and flops (C) are None where the sweep is not about compute. count: which parameters are in
    N and whose FLOPs in C; rule: how C was counted (`at_budget`). budget: the compute that was asked for. parent: the
    point whose run this one's is until `branch_step`, where it goes on from that one's checkpoint (`decayed`).
    """

    name: str
    config: mlc.ConfigDict
    params: int | None = None
    tokens: int | None = None
    flops: float | None = None
    count: Count | None = None
    rule: Flops | None = None
    budget: float | None = None
    parent: str | None = None
    branch_step: int = 0

    @property
    def to_compute(self) -> float:
        """FLOPs of the steps that are this point's own."""
        return (self.flops or 0) * (1 - self.branch_step / self.config.steps) if self.parent else self.flops or 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a config file's get_sweep returns. run: the stage, (config, workdir) -> RunResult. metric: what `loss` of a
    result is: 'nats/token', 'bits/byte', or a key of the stage's evaluations."""

    points: Sequence[Point]
    run: Callable[[mlc.ConfigDict, str], RunResult] = pretrain
    metric: str = "nats/token"

    def __post_init__(self):
        names = [point.name for point in self.points]
        if not names:
            raise InputError("The sweep has no points: its grid is empty.")
        for name in names:
            if not _NAME.fullmatch(name):
                raise InputError(f"The point {name!r} is the name of a folder: use letters, digits and . _ + - alone.")
        for point in self.points:
            if point.parent not in (None, *names):
                raise InputError(f"{point.name} branches off {point.parent}, which is not in the sweep: add it.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(
                f"{names.count(twice[0])} points are named {twice[0]}: drop one, or tell them apart by at_budget's tag."
            )


def at_budget(
    config: mlc.ConfigDict, budget: float, shape: dict, *, count: Count = "with_embedding", flops: Flops = "6nd",
    tag: str = "",
) -> Point:  # fmt: skip
    """The point whose run costs `budget` FLOPs: the whole number of steps that comes nearest to it.

    Args:
        config: of pre-training, with batch_size and all of the model that `shape` does not give. Not changed.
        shape: keys of config.model.
        count: 'with_embedding': N is all parameters, and the product with the head is in the FLOPs (Hoffmann et al.
            2022); 'without_embedding': neither (Kaplan et al. 2020).
        flops: of a training token: '6nd' = 6 N; 'exact' = three forwards of every matrix product, attention in full.
        tag: what distinguishes the point from others of this budget and shape, at the end of its name.
    Raises:
        InputError: model.vocab_size is not set; the batch ramps; the budget is less than half a step.
    """
    config, model = _shaped(config, shape)
    per_token, batch_tokens = flops_per_token(model, count, flops), config.batch_size * model.context_length
    steps = round(budget / per_token / batch_tokens)
    if steps < 1:
        raise InputError(
            f"{budget:g} FLOPs are less than one step of {batch_tokens:,} tokens of a model of "
            f"{parameters(model, count):,} parameters: raise the budget, or make the model or the batch smaller."
        )
    return _point(config, model, steps, count, flops, tag, budget)


def decayed(
    config: mlc.ConfigDict, shape: dict, *, multiples: Sequence[float] = (0.5, 1, 2, 4),
    tokens_per_parameter: float = 20, count: Count = "with_embedding", flops: Flops = "6nd", tag: str = "",
) -> list[Point]:  # fmt: skip
    """Runs of one shape for several multiples of the compute-optimal tokens, that cost hardly more than the longest:
    all have the warm-up and the stable part of the 'wsd' schedule in common, and each its own decay.

    Each point's run is bit for bit the one that would have been trained by itself: the others begin with the longest
    one's checkpoint where their decay begins. The longest is the first of the points.

    Args:
        config: as `at_budget`, with schedule.kind='wsd' and the warm-up in tokens, which ends before the first decay.
        multiples: of tokens_per_parameter x N tokens.
    Raises:
        InputError: another schedule, or a longer warm-up; multiples that are not whole ones of the smallest.
    """
    config, model = _shaped(config, shape)
    if config.schedule.kind != "wsd" or config.schedule.warmup_fraction or config.schedule.decay_tokens:
        raise InputError("Runs branch off one another only with schedule.kind='wsd' and its warm-up in warmup_tokens.")
    least = min(multiples)
    if any(m / least % 1 for m in multiples):
        raise InputError(f"The multiples {tuple(multiples)} are not whole ones of {least}: their decays do not begin "
                         "where the longest run has checkpoints.")  # fmt: skip
    share = fractions.Fraction(config.schedule.decay_fraction).limit_denominator(1000)
    batch_tokens = config.batch_size * model.context_length
    wanted = least * tokens_per_parameter * parameters(model, count) / batch_tokens
    unit = share.denominator * max(1, round(wanted / share.denominator))  # steps of the shortest run
    stable = int(unit * (1 - share))
    if config.schedule.warmup_tokens >= stable * batch_tokens:
        raise InputError(
            f"schedule.warmup_tokens={config.schedule.warmup_tokens:g} does not end before the shortest run decays, "
            f"after {stable * batch_tokens:,} tokens: lower it, or schedule.decay_fraction."
        )
    config.checkpoint.keep_every = stable
    config.checkpoint.every = max(d for d in range(1, min(config.checkpoint.every, stable) + 1) if stable % d == 0)
    longest, points = max(multiples), []
    for multiple in sorted(multiples, reverse=True):
        times = round(multiple / least)
        point = _point(config, model, unit * times, count, flops, tag, None)
        if multiple != longest:
            point = dataclasses.replace(point, parent=points[0].name, branch_step=stable * times)
        points.append(point)
    return points


def _shaped(config: mlc.ConfigDict, shape: dict) -> tuple[mlc.ConfigDict, ModelConfig]:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(shape)
    if config.model.vocab_size is None:
        raise InputError("The parameters depend on the vocabulary: set config.model.vocab_size in the sweep's config.")
    if config.schedule.ramp_tokens:
        raise InputError("The tokens of a point are counted in whole batches: set schedule.ramp_tokens=0.")
    return config, build(ModelConfig, config.model, "config.model")


def _point(config, model: ModelConfig, steps: int, count: Count, flops: Flops, tag: str, budget: float | None) -> Point:
    config = config.copy_and_resolve_references()
    config.steps = steps
    params, tokens = parameters(model, count), steps * config.batch_size * model.context_length
    compute = flops_per_token(model, count, flops) * tokens
    name = "-".join(filter(None, (short(budget or compute), short_count(params), short_count(tokens), tag)))
    return Point(name, config, params, tokens, compute, count, flops, budget)


def parameters(model: ModelConfig, count: Count) -> int:
    """N: all parameters, or those without embeddings and head."""
    counted = {"with_embedding": architecture.parameter_count, "without_embedding": architecture.non_embedding_count}
    return counted[count](model)


def flops_per_token(model: ModelConfig, count: Count, flops: Flops) -> float:
    """Training FLOPs per token, as in `at_budget`."""
    if flops == "6nd":
        return 6 * parameters(model, count)
    exact = architecture.flops_per_token(model).full
    if count == "with_embedding":
        return exact
    if not isinstance(model, GPTConfig):
        raise InputError("The FLOPs of an LSTM are counted with its head: use count='with_embedding' or flops='6nd'.")
    return exact - 6 * model.vocab_size * model.d_model


def short(value: float) -> str:
    """'1e16', '2.4e19': three digits, so that budgets stay apart."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short_count(value: int) -> str:
    """'350k', '12.3m', '1.3b'."""
    for size, unit in ((1e12, "t"), (1e9, "b"), (1e6, "m"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return str(value)
