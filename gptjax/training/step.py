"""The train and evaluation steps of any Objective, a loss that is a sum over tokens or rows (objectives/base.py).

Gradients of the sums are accumulated over micro-batches in float32 and divided once by the count of the global batch,
so that the step does not depend on how the batch is divided into micro-batches.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.objectives.base import Objective, Sums
from gptjax.parallel.sharding import shared
from gptjax.training.accumulate import accumulate, apply_gradients
from gptjax.training.noise_scale import gradient_and_noise, squared_norm
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig, next_loss_scale
from gptjax.training.state import TrainState, state_shardings


def train_step(
    objective: Objective, tx, clip_norm: float, precision: PrecisionConfig, seed: int, dropout: bool,
    noise_scale: bool = False,
):  # fmt: skip
    """Returns step(state, (batch, learning_rate), seed) -> (state, metrics), to be jitted or scanned over.

    Args:
        tx: an optax transformation whose updates are for a learning rate of 1 (optimizer.py).
        clip_norm: global norm that gradients are clipped to; 0 = no clipping.
        seed: of dropout's noise, where the step gets none. dropout: whether the loss gets dropout keys.
        noise_scale: whether the metrics of several micro-batches have noise, (|G|^2, tr(Sigma)) (noise_scale.py).

    The batch is a dict of arrays [M, B, ...], M micro-batches of B rows; `weights` is one of them. metrics: loss_sum,
    count, grad_norm, finite, loss_scale, sums (the objective's extra sums), and target_bytes (UTF-8 bytes of the
    targets) if the batch has it. A step whose loss or gradient is not finite changes only the step counter and the loss
    scale.
    """

    def step(state: TrainState, batch_and_rate, seed=seed):
        batch, learning_rate = batch_and_rate
        batch = objective.prepare(batch)
        rows = batch["weights"].shape[1]
        # A row's dropout noise depends on its index in the global batch, not on its micro-batch.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 0)
        keys_of = lambda index: jax.vmap(jax.random.fold_in, (None, 0))(key, index * rows + jnp.arange(rows))
        # A static denominator keeps the scaled loss near a mean: float16 would overflow on a sum.
        scale = state.loss_scale.scale / math.prod(batch["weights"].shape[1:])

        def gradient(micro, index):
            def scaled_loss(params):
                sums = Sums(*objective.loss(params, micro, keys_of(index) if dropout else None))
                return sums.total * scale, sums

            grads, sums = jax.grad(scaled_loss, has_aux=True)(state.params)
            return (grads, sums), (sums.count, squared_norm(grads)) if noise_scale else ()

        (grads, sums), of_parts = accumulate(gradient, batch)
        inverse = 1 / (scale * jnp.maximum(sums.count, 1))
        grads = jax.tree.map(lambda g: g * inverse, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.total)
        params, opt_state = apply_gradients(
            tx, state.params, state.opt_state, grads, norm=grad_norm, clip_norm=clip_norm, learning_rate=learning_rate,
            finite=finite,
        )  # fmt: skip
        loss_scale = next_loss_scale(precision, state.loss_scale, finite)
        metrics = {
            "loss_sum": sums.total,
            "count": sums.count,
            "grad_norm": grad_norm,
            "finite": finite,
            "loss_scale": state.loss_scale.scale,
            "sums": sums.extra,
        }
        if "target_bytes" in batch:  # on the device: a row is counted once, however many hosts hold it
            metrics["target_bytes"] = batch["target_bytes"].sum()
        if noise_scale and batch["weights"].shape[0] > 1:
            counts_M, norms_M = of_parts
            norms_M = norms_M / (scale * jnp.maximum(counts_M, 1)) ** 2
            metrics["noise"] = gradient_and_noise(counts_M, norms_M, sums.count, grad_norm**2)
        return TrainState(state.step + 1, params, opt_state, loss_scale), metrics

    return step


def jit_train_step(step, shardings: TrainState):
    """Jits several steps as one program, with the state donated: (state, batches [steps, M, B, ...], learning rates
    [steps], seed) -> (state, metrics [steps]). Without a seed the step uses its own.

    Dispatching a step of a small model takes longer than computing it, so several steps go in one dispatch.
    """

    def steps(state, batches, learning_rates, *seed):
        if learning_rates.shape[0] == 1:  # no loop: XLA:CPU runs straight-line code faster
            state, metrics = step(state, (jax.tree.map(lambda a: a[0], batches), learning_rates[0]), *seed)
            return state, jax.tree.map(lambda m: m[None], metrics)
        return lax.scan(lambda state, xs: step(state, xs, *seed), state, (batches, learning_rates))

    replicated = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(steps, donate_argnums=0, out_shardings=(shardings, replicated))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainProgram:
    """What a stage runs on the devices; its main runs it, `aot` lowers it. Hashed by identity.

    tx: the optimizer. abstract, shardings: the TrainState's shapes and shardings. step: returned by `jit_train_step`;
    it gets the run's seed.
    """

    objective: Objective
    tx: optax.GradientTransformation
    abstract: TrainState
    shardings: TrainState
    step: Any


def train_program(
    objective: Objective, abstract_params, model: ModelConfig, optimizer: OptimizerConfig, precision: PrecisionConfig,
    mesh, noise_scale: bool = False,
) -> TrainProgram:  # fmt: skip
    """The TrainProgram of an objective; the same one for equal arguments, whatever the learning rate.

    abstract_params: (model) -> abstract parameters, in Flax's boxes with logical axis names, as
        architecture.abstract_params.
    noise_scale: as in `train_step`.
    """
    optimizer = dataclasses.replace(optimizer, learning_rate=1.0)  # the step takes it as an argument
    return _train_program(objective, abstract_params, model, optimizer, precision, mesh, noise_scale)


@shared
def _train_program(objective, abstract_params, model, optimizer, precision, mesh, noise_scale) -> TrainProgram:
    tx = make_optimizer(optimizer, architecture.hidden_rate(model))
    abstract, shardings = state_shardings(abstract_params(model), tx, precision, mesh)
    dropout = model.dropout > 0 or objective.dropout
    step = train_step(objective, tx, optimizer.clip_norm, precision, 0, dropout, noise_scale)
    return TrainProgram(objective, tx, abstract, shardings, jit_train_step(step, shardings))


@shared
def jit_eval_step(loss, mesh):
    """Returns eval_step(params, batch [B, ...]) -> (loss sum, count, {the objective's extra sums, and target_bytes if
    the batch has it}). loss: of an Objective."""

    def evaluate(params, batch):
        sums = Sums(*loss(params, batch, None))
        return sums.total, sums.count, {k: v.sum() for k, v in batch.items() if k == "target_bytes"} | sums.extra

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def memory_needed(compiled) -> dict[str, int] | None:
    """Bytes per device by the compiler's memory analysis; None if the backend has none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # temp_size_in_bytes includes arguments that stay in host memory
    arguments = analysis.argument_size_in_bytes
    temporaries = analysis.temp_size_in_bytes - analysis.host_argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {"state and batch": arguments, "temporaries": temporaries, "outputs": max(outputs, 0)}
