"""The coordinate check (Yang et al. 2022, appendix D.1): how far do activations move in the first steps of Adam, at
several widths? Under muP equally far at every width; under standard parametrization farther, the wider the model."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state
from gptjax.training.step import train_program

BASE, HEADS = 64, 2  # the base width, and the heads of all widths: those of a head grow, as attention's 1/d needs
VOCAB, TIME, ROWS, LAYERS = 8, 4, 1, 2
ACTIVATIONS = ("embedding", "attention scores", "attention output", "MLP hidden", "residual stream", "logits")


class WithoutHiddenRate(GPTConfig):
    """muP, but the blocks' matrices learn at the full rate."""

    hidden_rate = 1.0


class WithoutOutputMultiplier(GPTConfig):
    """muP, but the logits are not multiplied."""

    output_multiplier = 1.0


class WithoutAttentionScale(GPTConfig):
    """muP, but scores are divided by the root of d_head."""

    attention_multiplier = 1.0


class Variant(NamedTuple):
    config: type = GPTConfig
    mup: bool = True


VARIANTS = {
    "muP": Variant(), "standard": Variant(mup=False), "hidden learning rate not scaled": Variant(WithoutHiddenRate),
    "no output multiplier": Variant(WithoutOutputMultiplier), "attention 1/sqrt(d)": Variant(WithoutAttentionScale),
}  # fmt: skip


def model(variant: Variant, width: int) -> GPTConfig:
    base = dict(mup_base_width=BASE, mup_base_heads=HEADS) if variant.mup else {}
    return variant.config(VOCAB, LAYERS, HEADS, width, TIME, attention="reference", **base)


def activations(params, config: GPTConfig, tokens_BT) -> dict:
    """{name: array} of a forward pass; those of layers are stacked, [L, ...]."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    (x_BTD, _, _), seen = gpt.GPT(config).apply({"params": params}, tokens_BT, positions, mutable="intermediates")
    seen = seen["intermediates"]
    blocks = seen["blocks"]
    q_LBTHK, k_LBSHK = blocks["attn"]["qk"][0]
    scores = jnp.einsum("lbthk,lbshk->lbhts", q_LBTHK, k_LBSHK) / config.d_head**0.5
    return {
        "embedding": seen["embedding"][0], "attention scores": jnp.tril(scores),
        "attention output": blocks["attn"]["attn_out"][0], "MLP hidden": blocks["mlp"]["c_fc_out"][0],
        "residual stream": blocks["block"][0], "logits": gpt.logits(params, config, x_BTD),
    }  # fmt: skip


def movement(variant: Variant, width: int, *, steps: int, learning_rate: float, seed: int) -> dict[str, list[float]]:
    """{activation: mean |change since initialization| after 1 .. steps steps} on one batch of random tokens."""
    config, mesh = model(variant, width), make_mesh(MeshConfig(), jax.devices()[:1])
    objective = Objective(causal_lm_loss(config, jnp.float32, TIME, mesh))
    train = train_program(objective, gpt.abstract_params, config, OptimizerConfig(), PrecisionConfig(), mesh)
    state = init_state(config, train.tx, PrecisionConfig(), train.shardings, seed)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, TIME + 1), np.int32)
    batch = {"tokens": tokens[None, None], "weights": np.ones((1, 1, ROWS, TIME), np.float32)}
    first, moved = jax.device_get(state.params), {name: [] for name in ACTIVATIONS}
    for _ in range(steps):
        state, _ = train.step(state, batch, np.full(1, learning_rate, np.float32), np.uint32(seed))
        for name, value in jax.device_get(_distance(config, state.params, first, tokens[:, :-1])).items():
            moved[name].append(float(value))
    return moved


@functools.partial(jax.jit, static_argnums=0)
def _distance(config: GPTConfig, params, first, tokens_BT) -> dict:
    now, then = activations(params, config, tokens_BT), activations(first, config, tokens_BT)
    return jax.tree.map(lambda a, b: jnp.abs(a - b).mean(), now, then)


def check(variant: Variant, widths, *, steps: int = 5, learning_rate: float = 1e-3, seeds=(0,)) -> dict:
    """{activation: [steps, widths] mean movement over seeds}."""
    options = dict(steps=steps, learning_rate=learning_rate)
    runs = [[movement(variant, width, **options, seed=seed) for width in widths] for seed in seeds]
    return {name: np.mean([[run[name] for run in row] for row in runs], axis=0).T for name in ACTIVATIONS}


def slopes(moved: dict, widths) -> dict[str, float]:
    """{activation: slope of log movement over log width}, by least squares, the mean of all steps: 0 = the same at
    every width."""
    x = np.log(widths) - np.log(widths).mean()
    return {name: float((np.log(values) @ x / (x @ x)).mean()) for name, values in moved.items()}
