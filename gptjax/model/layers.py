"""What the layers of gpt.py are made of: LayerNorm, linear layers with a VJP of their own, GELU."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.objectives.language import dot_over_tokens
from gptjax.parallel.rules import constrain

LAYER_NORM_EPS = 1e-5  # all three papers' code; Flax's own default is 1e-6
INIT_STD = 0.02


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
        centred = x32 - mean
        variance = jnp.mean(centred * centred, -1, keepdims=True)
        return (centred * lax.rsqrt(variance + LAYER_NORM_EPS) * scale + bias).astype(x.dtype)


def _flat(a, lead: int):
    """[..., features...] -> [tokens, features] on one device, where XLA:CPU multiplies 2-D operands a quarter
    faster; unchanged on a mesh, where merging sharded axes would move data."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return a.reshape(math.prod(a.shape[:lead]), math.prod(a.shape[lead:]))
    return a


def _dot(a, b, a_axes, b_axes):
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _to_multiply(w, dtype, names):
    """A weight as it is multiplied by: in the dtype of the activations, and whole but for the tensor axis. FSDP's
    gather is here, layer by layer: left to itself the compiler moves activations where the context is cut up too."""
    return constrain(w.astype(dtype), *("features" if name == "embed" else name for name in names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, names):
    """x [..., in] @ w [in, ...]: in the dtype of x, accumulated in float32; w is the float32 master, its axes' logical
    names are `names`."""
    x2, w2 = _flat(x, x.ndim - 1), _flat(_to_multiply(w, x.dtype, names), 1)
    y = _dot(x2, w2, (x2.ndim - 1,), (0,)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def _matmul_backward(names, residuals, d_y):
    x, w = residuals
    lead = x.ndim - 1
    x2, d_y2, w2 = _flat(x, lead), _flat(d_y, lead), _flat(_to_multiply(w, d_y.dtype, names), 1)
    tokens, out = tuple(range(x2.ndim - 1)), tuple(range(x2.ndim - 1, d_y2.ndim))
    d_x = _dot(d_y2, w2, out, tuple(range(1, w2.ndim))).astype(x.dtype)
    # The weight's gradient stays float32: rounding it to bf16 would lose what accumulation adds up.
    d_w = dot_over_tokens(x2, d_y2, len(tokens)).astype(w.dtype)
    return d_x.reshape(x.shape), constrain(d_w.reshape(w.shape), *names)


_matmul.defvjp(lambda x, w, names: (_matmul(x, w, names), (x, w)), _matmul_backward)


class Linear(nn.Module):
    features: tuple[int, ...]
    names: tuple[str, ...]  # logical axes: input, then one for each of features
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal(self.std, *self.names), (x.shape[-1], *self.features))
        # A bias as wide as the residual stream is as small as a LayerNorm's: never sharded.
        bias_names = tuple("norm" if n == "embed" else n for n in self.names[1:])
        bias = self.param("bias", constant(0.0, *bias_names), self.features)
        # Named, because a remat policy cannot see the dot inside a custom VJP.
        y = checkpoint_name(_matmul(x, kernel, self.names), "matmul")
        return (y.astype(jnp.float32) + bias).astype(x.dtype)  # the bias's gradient sums in float32


def _gelu(x):
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu(x):
    """The tanh form (GPT-1 to 3): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in float32 inside.

    Its backward pass recomputes from x, so that a layer keeps one [B, T, F] array, not four: as a VJP of its own, for
    the remat policy around it would decide about what lies in a jax.checkpoint.
    """
    return _gelu(x)


def _gelu_backward(x, d_y):
    x, d_y = lax.optimization_barrier((x, d_y))  # or XLA keeps the forward pass's tanh where there is no loop of layers
    return jax.vjp(_gelu, x)[1](d_y)


gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)
