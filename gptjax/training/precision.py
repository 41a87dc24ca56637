"""Compute precision: float32, bfloat16, or float16 with dynamic loss scaling. Trained parameters stay float32.

bfloat16 has float32's exponent and needs no scaling. float16 gradients vanish below 6e-8, so the loss is
multiplied by a scale that halves when a gradient overflows (that step is skipped) and doubles after 2,000
clean steps (Micikevicius et al. 2018 §3.2; the defaults of torch's GradScaler).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.errors import InputError
from gptjax.ranges import Count, Positive

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Precision of the computation; trained parameters stay float32.

    compute: dtype of activations and matmuls: 'float32', 'bfloat16' or 'float16' (with dynamic loss scaling).
    initial_scale: loss scale of the first step, with float16 only.
    growth_interval: steps without an overflow after which the loss scale doubles, with float16 only.
    """

    compute: str = "float32"
    initial_scale: Positive = 2.0**16
    growth_interval: Count = 2000

    def __post_init__(self):
        if self.compute not in DTYPES:
            raise InputError(f"precision.compute={self.compute!r}: choose one of {', '.join(DTYPES)}.")

    @property
    def dtype(self):
        return DTYPES[self.compute]

    @property
    def scaled(self) -> bool:
        return self.compute == "float16"


class LossScale(NamedTuple):
    scale: jax.Array  # float32
    clean_steps: jax.Array  # int32, since the scale last changed


def initial_loss_scale(c: PrecisionConfig) -> LossScale:
    scale = c.initial_scale if c.scaled else 1.0
    return LossScale(jnp.float32(scale), jnp.int32(0))


def next_loss_scale(c: PrecisionConfig, state: LossScale, finite) -> LossScale:
    """Halved after an overflow, doubled after growth_interval clean steps; constant unless scaled."""
    if not c.scaled:
        return state
    clean = jnp.where(finite, state.clean_steps + 1, 0)
    grow = clean >= c.growth_interval
    scale = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), state.scale / 2)
    return LossScale(jnp.maximum(scale, 1.0), jnp.where(grow, 0, clean))


@functools.partial(jax.jit, static_argnums=1)
def frozen(params, dtype):
    """Parameters of a model that is not trained: matrices in the compute dtype, the others unchanged.

    A matmul casts its matrix to the compute dtype anyway, so the forward pass is bitwise the same, and with 16 bits the
    model takes half the memory. Embeddings are looked up in float32 and cast afterwards, so they stay float32.
    """
    cast = lambda path, p: p.astype(dtype) if path[-1].key == "kernel" and p.ndim > 1 else p
    return jax.tree_util.tree_map_with_path(cast, params)
