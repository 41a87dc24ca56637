"""The train and evaluation steps, for any loss that is a sum over tokens.

A loss function takes (params, microbatch, dropout_keys) and returns (sum, count), or (sum, count, {name: further
sum}); dropout_keys: of the rows [rows], or None. Gradients of the sums are accumulated over micro-batches in float32
and divided once by the count of the whole global batch, so that one big batch and many small ones give the same step
however their tokens are spread.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.training.offload import Offloaded, update_per_layer
from gptjax.training.precision import PrecisionConfig, next_loss_scale
from gptjax.training.state import TrainState


def train_step(loss_fn, tx, clip_norm: float, precision: PrecisionConfig, seed: int, dropout: bool, weigh=None):
    """Returns step(state, (batch, learning_rate)) -> (state, metrics), to be jitted or scanned over.

    Every array of the batch is [micro-batches, rows, ...]; `weights` is one of them. metrics: loss_sum, count,
    grad_norm, finite, loss_scale, sums (what the loss returns besides), and target_bytes where the batch has them. A
    step whose loss or gradient is not finite changes nothing but the counters. weigh: batch -> batch, for weights that
    depend on the whole global batch.
    """

    def step(state: TrainState, batch_and_rate):
        batch, learning_rate = batch_and_rate
        batch = weigh(batch) if weigh else batch
        n_micro, *one = batch["weights"].shape
        # A row's noise depends on its place in the whole batch, not on the micro-batch it is computed in.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 0)
        keys_of = lambda index: jax.vmap(jax.random.fold_in, (None, 0))(key, index * one[0] + jnp.arange(one[0]))
        # A static denominator keeps the scaled loss near a mean: float16 would overflow on a sum.
        scale = state.loss_scale.scale / math.prod(one)

        def scaled_loss(params, micro, index):
            sums = loss_fn(params, micro, keys_of(index) if dropout else None)
            return sums[0] * scale, sums

        gradient = jax.grad(scaled_loss, has_aux=True)

        def accumulate(carry, indexed):
            grads, sums = carry
            return jax.tree.map(jnp.add, (grads, sums), gradient(state.params, *indexed)), None

        first = jax.tree.map(lambda a: a[0], batch)
        if n_micro == 1:
            grads, sums = gradient(state.params, first, 0)
        else:
            zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)
            start = zeros(jax.eval_shape(gradient, state.params, first, 0))
            (grads, sums), _ = lax.scan(accumulate, start, (batch, jnp.arange(n_micro)))
        total, count, *further = sums
        inverse = 1 / (scale * jnp.maximum(count, 1))
        grads = jax.tree.map(lambda g: g * inverse, grads)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(total)
        if clip_norm:
            shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)

        def optimize(params, opt_state, grads):
            updates, new_opt = tx.update(grads, opt_state, params)
            new = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), (new, new_opt), (params, opt_state))

        if isinstance(tx, Offloaded):
            params, opt_state = update_per_layer(tx, optimize, state.params, state.opt_state, grads)
        else:
            params, opt_state = optimize(state.params, state.opt_state, grads)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            loss_scale=next_loss_scale(precision, state.loss_scale, finite),
        )
        metrics = {
            "loss_sum": total,
            "count": count,
            "grad_norm": grad_norm,
            "finite": finite,
            "loss_scale": state.loss_scale.scale,
            "sums": further[0] if further else {},
        }
        if "target_bytes" in batch:  # on the device, for it knows each row once however many hosts hold it
            metrics["target_bytes"] = batch["target_bytes"].sum()
        return new, metrics

    return step


def jit_train_step(step, shardings: TrainState):
    """Jitted and donated, over arrays with a leading axis of steps: [steps, micro-batches, rows, ...].

    Small models spend longer being dispatched than computed, so several steps go in one dispatch.
    """

    def steps(state, batches, learning_rates):
        if learning_rates.shape[0] == 1:  # no loop: XLA:CPU runs straight-line code faster
            state, metrics = step(state, (jax.tree.map(lambda a: a[0], batches), learning_rates[0]))
            return state, jax.tree.map(lambda m: m[None], metrics)
        return lax.scan(step, state, (batches, learning_rates))

    whole = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(steps, donate_argnums=0, out_shardings=(shardings, whole))


def jit_eval_step(loss_fn, mesh):
    """eval_step(params, batch) -> (loss sum, count, {further sums, and target_bytes where the batch has them}), the
    batch without a micro-batch axis."""

    def evaluate(params, batch):
        total, count, *further = loss_fn(params, batch, None)
        sums = {k: v.sum() for k, v in batch.items() if k == "target_bytes"}
        return total, count, sums | (further[0] if further else {})

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def memory_needed(compiled) -> dict[str, int] | None:
    """Bytes per device as the compiler counts them, or None where the backend does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # temporaries have in them what lies in host memory from beginning to end
    arguments = analysis.argument_size_in_bytes
    temporaries = analysis.temp_size_in_bytes - analysis.host_argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {"state and batch": arguments, "temporaries": temporaries, "outputs": max(outputs, 0)}
