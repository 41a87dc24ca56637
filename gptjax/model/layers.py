"""What the layers of gpt.py are made of: LayerNorm, linear layers, GELU, dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.model.matmul import matmul

LAYER_NORM_EPS = 1e-5  # all three papers' code; Flax's own default is 1e-6
INIT_STD = 0.02


def scaled(x, multiplier: float):
    """x times a multiplier, in x's dtype; x itself where that is 1."""
    return x if multiplier == 1 else x * multiplier


def normal(std, *names):
    return nn.with_logical_partitioning(nn.initializers.normal(std), names)


def constant(value, *names):
    return nn.with_logical_partitioning(nn.initializers.constant(value), names)


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", constant(1.0, "norm"), (x.shape[-1],))
        bias = self.param("bias", constant(0.0, "norm"), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centered = x32 - mean
        variance = jnp.mean(centered * centered, -1, keepdims=True)
        return (centered * lax.rsqrt(variance + LAYER_NORM_EPS) * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    features: tuple[int, ...]
    names: tuple[str, ...]  # logical axes: input, then one for each of features
    std: float

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal(self.std, *self.names), (x.shape[-1], *self.features))
        # A bias as wide as the residual stream is as small as a LayerNorm's: never sharded.
        bias_names = tuple("norm" if n == "embed" else n for n in self.names[1:])
        bias = self.param("bias", constant(0.0, *bias_names), self.features)
        # Named, because a remat policy cannot see the dot inside a custom VJP.
        y = checkpoint_name(matmul(x, kernel, self.names), "matmul")
        return (y.astype(jnp.float32) + bias).astype(x.dtype)  # the bias's gradient sums in float32


def _gelu(x):
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu(x):
    """The tanh form (GPT-1 to 3): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in float32 inside.

    The backward pass recomputes from x, so that a layer saves one [B, T, F] array, not four. A custom VJP, because the
    remat policy of the layer would override a jax.checkpoint in it.
    """
    return _gelu(x)


def _gelu_backward(x, d_y):
    x, d_y = lax.optimization_barrier((x, d_y))  # or XLA saves the forward pass's tanh where there is no loop of layers
    return jax.vjp(_gelu, x)[1](d_y)


gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def drop(x_BTD, rate, keys_B, site):
    """keys_B: a key for each row, or None for no dropout; site: the number of the place in the model (`fold`)."""
    if keys_B is None or not rate:
        return x_BTD
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape[1:]))(fold(keys_B, site))
    return jnp.where(keep, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


def fold(keys_B, site):
    """Every row has a key, every place with dropout a number (of a GPT 3 per layer, then the embedding). A mask depends
    on these two alone: not on the other rows, nor on the pipeline stage or micro-batch that the row is computed in."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, site)
