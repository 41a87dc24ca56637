"""The matrix product of every linear layer: float32 accumulation, float32 weight gradients from 16-bit operands."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.parallel.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, w, names):
    """x [..., in] @ w [in, out...] -> [..., out...] in the dtype of x, accumulated in float32.

    w: the float32 parameter; names: the logical names of its axes.
    """
    x2, w2 = _flat(x, x.ndim - 1), _flat(_for_matmul(w, x.dtype, names), 1)
    y = _dot(x2, w2, (x2.ndim - 1,), (0,)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def _matmul_backward(names, residuals, d_y):
    x, w = residuals
    lead = x.ndim - 1
    x2, d_y2, w2 = _flat(x, lead), _flat(d_y, lead), _flat(_for_matmul(w, d_y.dtype, names), 1)
    tokens, out = tuple(range(x2.ndim - 1)), tuple(range(x2.ndim - 1, d_y2.ndim))
    d_x = _dot(d_y2, w2, out, tuple(range(1, w2.ndim))).astype(x.dtype)
    # The weight's gradient stays float32: rounding it to bf16 would lose what accumulation adds up.
    d_w = dot_over_tokens(x2, d_y2, len(tokens)).astype(w.dtype)
    return d_x.reshape(x.shape), constrain(d_w.reshape(w.shape), *names)


matmul.defvjp(lambda x, w, names: (matmul(x, w, names), (x, w)), _matmul_backward)


def dot_over_tokens(x, d_y, lead: int):
    """The gradient of a weight: x [tokens..., in], d_y [tokens..., out...] -> float32 [in, out...], summed over the
    `lead` leading axes.

    XLA:CPU runs at half speed where the left operand must be transposed, so there the narrower of the two is
    transposed first.
    """
    tokens = tuple(range(lead))
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)

    def transposed_first(x, d_y):
        x2, d_y2 = (a.reshape(math.prod(a.shape[:lead]), -1) for a in (x, d_y))
        transposed_dot = lambda a, b: dot(lax.optimization_barrier(a.T), b, (((1,), (0,)), ((), ())))
        d_w = transposed_dot(x2, d_y2) if x2.shape[1] <= d_y2.shape[1] else transposed_dot(d_y2, x2).T
        return d_w.reshape(x.shape[-1], *d_y.shape[lead:])

    plain = lambda x, d_y: dot(x, d_y, ((tokens, tokens), ((), ())))
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        return plain(x, d_y)
    return lax.platform_dependent(x, d_y, cpu=transposed_first, default=plain)


def _for_matmul(w, dtype, names):
    """A weight in the dtype of the activations, sharded over the tensor axis alone. FSDP's all-gather is here, layer by
    layer: otherwise the compiler moves activations where the context is sharded too."""
    return constrain(w.astype(dtype), *("features" if name == "embed" else name for name in names))


def _flat(a, lead: int):
    """[..., features...] -> [tokens, features] on one device, where XLA:CPU multiplies 2-D operands a quarter
    faster; unchanged on a mesh, where merging sharded axes would move data."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return a.reshape(math.prod(a.shape[:lead]), math.prod(a.shape[lead:]))
    return a


def _dot(a, b, a_axes, b_axes):
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)
