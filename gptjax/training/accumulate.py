"""Gradient accumulation over micro-batches, and one optimizer step with clipping and a check for non-finite values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.training.offload import Offloaded, update_per_layer


def accumulate(function: Callable, batch):
    """Sums a function's results over micro-batches, in float32.

    Args:
        function: (micro-batch, its index) -> (tree to sum, tree to stack).
        batch: arrays [M, B, ...]: M micro-batches of B rows. A single one is not put in a loop: XLA:CPU runs
            straight-line code faster.
    Returns:
        (sums, stacked [M, ...]).
    """
    first = jax.tree.map(lambda a: a[0], batch)
    M = jax.tree.leaves(batch)[0].shape[0]
    if M == 1:
        sums, stacked = function(first, 0)
        return sums, jax.tree.map(lambda a: a[None], stacked)

    def add(sums, micro):
        new, stacked = function(*micro)
        return jax.tree.map(jnp.add, sums, new), stacked

    shapes, _ = jax.eval_shape(function, first, 0)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), shapes)
    return lax.scan(add, zeros, (batch, jnp.arange(M)))


def apply_gradients(tx, params, opt_state, grads, *, norm, clip_norm: float, learning_rate, finite):
    """One optimizer step: clips the gradients to a global norm (0 = no clipping); changes nothing unless `finite`.

    Args:
        tx: an optax transformation whose updates are for a learning rate of 1 (optimizer.py).
        norm: of the gradients; finite: bool, whether the step is taken.
    Returns:
        (params, opt_state).
    """
    if clip_norm:
        shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * shrink, grads)

    def optimize(params, opt_state, grads):
        updates, new_opt = tx.update(grads, opt_state, params)
        new = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), (new, new_opt), (params, opt_state))

    if isinstance(tx, Offloaded):
        return update_per_layer(tx, optimize, params, opt_state, grads)
    return optimize(params, opt_state, grads)
