"""The runs of the study, as a sweep's config file. All have two layers: only the width, the tokens and the seed differ.

    python -m gptjax.sweep --config=experiments/scaling_laws/grid.py:coarse --workdir=DIR --config.data.source=PATH

rates: three learning rates at one size.
coarse: 2 budgets x 3 sizes, 4 apart, to see where the optimum is.
ladder@RATIO: 4 budgets, 4 apart, x 5 sizes, from 1/4 to 4 times the one that gets RATIO tokens a parameter, and two
    more seeds of two cells. Sizes are 2 apart, so that each occurs at several budgets (approach 1).
target@RATIO: the run to forecast, of 10 times the largest budget. It is a pre-training config too.
"""

import math

from configs.scaling import isoflop
from gptjax.config import choose
from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig
from gptjax.sweep.grid import Point, Sweep, at_budget, chain, parameters, product

BUDGETS = (5e9, 2e10, 8e10, 3.2e11)
TARGET = 10 * BUDGETS[-1]
RATIOS = (1 / 4, 1 / 2, 1, 2, 4)  # sizes, by that in the middle
COARSE, COARSE_BUDGETS = 20, (4e10, 1.6e11)  # tokens per parameter before anything is known
RATE = 4e-3  # of a width of 64; in proportion to 1 / sqrt(width)


def get_config(argument="ladder"):
    preset, ratio = parsed(argument)
    return target(base(), ratio).config if preset == "target" else base()


def get_sweep(config, argument="ladder"):
    preset, ratio = parsed(argument)
    if preset == "rates":
        runs = [point(config, COARSE_BUDGETS[0], 1, ratio=ratio, rate=rate) for rate in (RATE / 2, RATE, 2 * RATE)]
    elif preset == "coarse":
        runs = [point(config, **cell, ratio=ratio) for cell in product(budget=COARSE_BUDGETS, size=RATIOS[::2])]
    elif preset == "target":
        runs = [target(config, ratio)]
    else:
        cells = product(budget=BUDGETS, size=RATIOS)
        cells = chain(cells, product(budget=BUDGETS[1:3], size=[1], seed=[1, 2]))
        runs = [point(config, **cell, ratio=ratio) for cell in cells]
    return Sweep(runs, metric="bits/byte")


def target(config, ratio: float) -> Point:
    return point(config, TARGET, 1, ratio=ratio)


def parsed(argument: str) -> tuple[str, float]:
    """(preset, tokens per parameter of the size in the middle of each budget)."""
    preset, _, ratio = argument.partition("@")
    choose(dict.fromkeys(("rates", "coarse", "ladder", "target")), preset, "preset")
    try:
        return preset, float(ratio or COARSE)
    except ValueError:
        raise InputError(f"{argument}: {ratio!r} is no number of tokens per parameter: write ladder@20.") from None


def base():
    """What all runs share: configs/scaling/isoflop.py's, with a quarter of its batch: the shortest runs are short."""
    c = isoflop.base()
    c.batch_size = 4
    c.steps_per_dispatch = 1  # else what is left at a run's end is a program of its own, compiled for that run alone
    c.eval.batches = 256
    c.checkpoint.every = 2000
    return c


def point(config, budget, size, seed=0, *, ratio, rate=None) -> Point:
    """The run of a budget and a size, in terms of the one that gets `ratio` tokens a parameter. rate: of the learning,
    at a width of 64."""
    model = shape(config, size * math.sqrt(budget / 6 / ratio))
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.optimizer.learning_rate = (rate or RATE) * math.sqrt(64 / model["d_model"])
    tag = f"rate{rate:g}" if rate else f"seed{seed}" if seed else ""
    return at_budget(config, budget, model, count=isoflop.COUNT, flops=isoflop.FLOPS, tag=tag)


def shape(config, size: float) -> dict:
    """Keys of config.model: two layers, as wide as comes nearest to `size` parameters, in proportion."""

    def distance(width):
        model = GPTConfig(config.model.vocab_size, 2, 1, width, config.model.context_length)
        return abs(math.log(parameters(model, isoflop.COUNT) / size))

    width = min([*range(2, 16), *range(16, 32, 4), *range(32, 257, 8)], key=distance)
    return dict(n_layer=2, d_model=width, n_head=1 if width < 32 else 2 if width < 64 else 4, unroll=2)
