"""AdamW and GPT-1's own Adam, as optax transformations whose updates are for a learning rate of 1.

The train step multiplies them by its learning rate (schedule.py), so the optimizer state holds no schedule, and a run
can be resumed with another length.
"""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.errors import InputError
from gptjax.model.mup import HIDDEN
from gptjax.ranges import BelowOne, Positive
from gptjax.training.offload import Offloaded

DECAYED = r"(^|/)(kernel|wte|wpe|lm_head)$"  # never biases or gains, whatever their stacked rank


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of the parameters.

    name: 'adamw' (Loshchilov & Hutter 2019) or 'gpt1_adam', the Adam of GPT-1's released code.
    learning_rate: the peak; warm-up and decay are fractions of it.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay of the parameters that match `decayed`; 0 = none.
    decayed: regular expression of the paths of the parameters that decay. GPT-3 says only "weight decay of 0.1"; the
        choice is ours (nanoGPT's: matrices and embeddings). The kernel of a scalar head is a matrix [d_model, 1] and
        decays too, as in Hugging Face's Trainer and TRL, which exempt only biases and LayerNorms.
    clip_norm: global norm that the gradient is clipped to; 0 = no clipping.
    offload: keep the moments in host memory, and one layer's at a time on the device (training/offload.py): the same
        steps, slower by the time of the transfers.
    """

    name: str = "adamw"
    learning_rate: Positive = 6e-4
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: float = 0.1
    decayed: str = DECAYED
    clip_norm: float = 1.0
    offload: bool = False

    def __post_init__(self):
        if self.name not in ("adamw", "gpt1_adam"):
            raise InputError(f"optimizer.name={self.name!r}: choose adamw or gpt1_adam.")
        if self.learning_rate <= 0 or not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1 or self.clip_norm < 0:
            raise InputError("optimizer: learning_rate > 0, b1 and b2 in [0, 1), clip_norm >= 0.")
        try:
            re.compile(self.decayed)
        except re.error as error:
            raise InputError(f"optimizer.decayed is not a regular expression: {error}.") from error


def parameter_path(path) -> str:
    """'blocks/mlp/c_fc/kernel' for a key path of jax.tree_util."""
    return "/".join(str(k.key) for k in path)


def decay_mask(params, pattern: str = DECAYED):
    """Tree of bool: which parameters weight decay touches, by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(pattern, parameter_path(path))), params)


def make_optimizer(c: OptimizerConfig, hidden_rate: float = 1.0) -> optax.GradientTransformation:
    """An optimizer whose updates are multiplied by the learning rate and added to the parameters. It does not clip.

    hidden_rate: factor of Adam's updates of the blocks' matrices (muP, model/mup.py), not of their weight decay.
    """
    mask = lambda params: decay_mask(params, c.decayed)
    if c.name == "gpt1_adam":
        tx = gpt1_adam(c.b1, c.b2, c.eps, c.weight_decay, mask, hidden_rate)
    elif hidden_rate == 1:
        tx = optax.adamw(1.0, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=mask)
    else:
        tx = optax.chain(
            optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
            optax.stateless(lambda updates, _: _at_hidden_rate(updates, hidden_rate)),
            optax.add_decayed_weights(c.weight_decay, mask),
            optax.scale_by_learning_rate(1.0),
        )
    return Offloaded(tx.init, tx.update) if c.offload else tx


def _at_hidden_rate(updates, rate: float):
    """Updates by Adam alone, those of the blocks' matrices times their relative learning rate."""
    at_rate = lambda path, u: u * rate if re.search(HIDDEN, parameter_path(path)) else u
    return updates if rate == 1 else jax.tree_util.tree_map_with_path(at_rate, updates)


class Gpt1AdamState(NamedTuple):
    count: jax.Array  # int32
    mu: optax.Updates
    nu: optax.Updates


def gpt1_adam(b1, b2, eps, weight_decay, mask, hidden_rate: float = 1.0) -> optax.GradientTransformation:
    """Adam of openai/finetune-transformer-lm's opt.py, which is not AdamW:

        p <- p - lr sqrt(1 - b2^t)/(1 - b1^t) (m/(sqrt(v) + eps) + l2 p)

    eps is added before the bias correction ("eps-hat") and the correction multiplies the decay too.
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return Gpt1AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params):
        count = state.count + 1
        t = count.astype(jnp.float32)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        decay = jax.tree.map(lambda p, on: weight_decay * p if on else 0.0, params, mask(params))
        moves = _at_hidden_rate(jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), hidden_rate)
        updates = jax.tree.map(lambda move, d: -correction * (move + d), moves, decay)
        return updates, Gpt1AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
