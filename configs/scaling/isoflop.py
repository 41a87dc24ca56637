"""IsoFLOP grid: at each compute budget models of several sizes, each trained on the tokens that the budget leaves.

    python -m gptjax.sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --workers=2

cpu (default): 4 budgets from 3e11 to 1e13 FLOPs x 5 sizes, from 1/4 to 4 times the one that gets 20 tokens a parameter
    (Hoffmann et al. 2022, approach 2), and two more seeds of two cells: 24 runs, 7.8e13 FLOPs.
coarse: 2 budgets x 3 sizes, 4 apart, to see where the optimum is: set TOKENS_PER_PARAMETER from it.
wsd: 3 sizes x .5, 1, 2 and 4 times 20 tokens a parameter, the shorter runs branches of the longest: 12 runs, 2.7e13
    FLOPs of the 4.6e13 that they would cost one by one (Hu et al. 2024 §4).
target: the one run to forecast: 1e14 FLOPs, ten times the largest budget. It is a pre-training config too:
    python -m gptjax.pretrain --config=configs/scaling/isoflop.py:target --workdir=runs/target

The loss is in bits per byte of one held-out text, the same for all seeds. The text is Python's standard library; its
tokens are fewer than the longest runs take, so that these see some more than once: for a study give a larger one with
--config.data.source=PATH. N is all parameters and C = 6 N D; COUNT and FLOPS below choose otherwise.
"""

import math

from gptjax.config import choose, config_dict
from gptjax.model.spec import GPTConfig
from gptjax.pretrain import PretrainConfig
from gptjax.sweep.grid import Sweep, at_budget, chain, decayed, parameters, product

PRESETS = {"sweep": ["cpu", "coarse", "wsd", "target"], "pretrain": ["target"]}  # by command, for --help

TOKENS_PER_PARAMETER = 20  # of the size in the middle of each budget
COUNT, FLOPS = "with_embedding", "6nd"
BUDGETS = {"cpu": (3e11, 1e12, 3e12, 1e13), "coarse": (3e11, 3e12), "wsd": (), "target": (1e14,)}
RATIOS = {"cpu": (1 / 4, 1 / 2, 1, 2, 4), "coarse": (1 / 4, 1, 4), "target": (1,)}  # sizes, by that in the middle
WSD_SIZES, WARMUP = (33e3, 86e3, 206e3), 1  # parameters; tokens of warm-up for each of them
SHAPES = (  # n_layer, d_model
    (1, 16), (1, 24), (1, 32), (1, 48), (2, 48), (2, 64), (2, 80), (3, 80), (3, 96), (4, 96), (4, 128), (5, 128),
    (5, 160), (6, 160), (6, 192), (6, 224), (6, 256),
)  # fmt: skip


def get_config(preset="cpu"):
    if choose(BUDGETS, preset, "preset") == BUDGETS["target"]:
        return points(base(), "target")[0].config
    return base()


def get_sweep(config, preset="cpu"):
    return Sweep(points(config, preset), metric="bits/byte")


def base():
    """What all runs share."""
    c = config_dict(PretrainConfig)
    c.data.update(source="stdlib", tokenizer="bpe:512", validation="0.05", split_seed=0)
    c.model.update(vocab_size=512, context_length=128)
    c.batch_size, c.steps_per_dispatch = 16, 10
    c.optimizer.update(b2=0.95, weight_decay=0.1)
    c.schedule.update(kind="cosine", warmup_fraction=0.05, final_fraction=0.1)
    c.eval.update(every=10**6, batches=64)  # before the first step and after the last
    c.checkpoint.update(every=500, keep_last=1, keep_best=False)
    c.log.update(every=10, tensorboard=False)
    return c


def points(config, preset):
    if preset == "wsd":
        return [p for size in WSD_SIZES for p in decayed(*stable(config, size), count=COUNT, flops=FLOPS)]
    cells = product(budget=BUDGETS[preset], ratio=RATIOS[preset], seed=[0])
    if preset == "cpu":
        cells = chain(cells, product(budget=[3e11, 3e12], ratio=[1], seed=[1, 2]))
    return [point(config, **cell) for cell in cells]


def point(config, budget, ratio, seed):
    model = shape(config, ratio * math.sqrt(budget / 6 / TOKENS_PER_PARAMETER))
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.optimizer.learning_rate = learning_rate(model["d_model"])
    return at_budget(config, budget, model, count=COUNT, flops=FLOPS, tag=f"seed{seed}" if seed else "")


def stable(config, size):
    """Config and shape of runs that have their beginning in common."""
    model, config = shape(config, size), config.copy_and_resolve_references()
    config.optimizer.learning_rate = learning_rate(model["d_model"])
    config.schedule.update(kind="wsd", warmup_fraction=0.0, warmup_tokens=WARMUP * size, final_fraction=0.0)
    return config, model


def shape(config, size):
    """Keys of config.model: the shape whose N is nearest to `size`, in proportion."""

    def distance(layers_and_width):
        n_layer, d_model = layers_and_width
        model = GPTConfig(config.model.vocab_size, n_layer, 1, d_model, config.model.context_length)
        return abs(math.log(parameters(model, COUNT) / size))

    n_layer, d_model = min(SHAPES, key=distance)
    return dict(n_layer=n_layer, d_model=d_model, n_head=max(1, d_model // 32), unroll=n_layer)


def learning_rate(d_model):
    return 4e-3 * math.sqrt(64 / d_model)
