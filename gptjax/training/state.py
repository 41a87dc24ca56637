"""The train state: one pytree with everything that a step changes, and its sharded initialization."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.linen import meta
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import InputError
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.parallel.sharding import parameter_shardings, shared
from gptjax.training.offload import MEMORY, Offloaded, moments
from gptjax.training.precision import LossScale, PrecisionConfig, initial_loss_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """There is no PRNG key: every key is derived from (seed, step), so there is none to save."""

    step: jax.Array  # int32: steps done
    params: Any  # float32
    opt_state: Any
    loss_scale: LossScale

    # What a checkpoint calls 'params' and 'training' (checkpoint.py).
    def split(self) -> tuple[Any, dict]:
        return self.params, {"opt_state": self.opt_state, "loss_scale": self.loss_scale}

    @classmethod
    def join(cls, step, params, training: dict) -> "TrainState":
        return cls(step, params, **training)


def new_state(params, tx: optax.GradientTransformation, precision: PrecisionConfig) -> TrainState:
    return TrainState(jnp.int32(0), params, tx.init(params), initial_loss_scale(precision))


def state_shardings(boxed_params, tx, precision: PrecisionConfig, mesh) -> tuple[TrainState, TrainState]:
    """(abstract state, its shardings): optimizer moments are sharded like their parameters, scalars replicated.

    jit(tx.init) alone would replicate the moments on every device, because zeros depend on no input.
    """
    param_shardings = parameter_shardings(boxed_params, mesh)
    params = unboxed_shapes(boxed_params)
    abstract = jax.eval_shape(lambda p: new_state(p, tx, precision), params)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt = optimizer_shardings(tx, abstract.opt_state, param_shardings, replicated)
    if isinstance(tx, Offloaded):
        if mesh.shape["stage"] > 1:
            raise InputError(
                "optimizer.offload needs mesh.stage=1: moments are moved from the host one layer at a time, and each "
                "pipeline stage has its own layers. Use mesh.fsdp."
            )
        to_host = lambda s, moment: s.with_memory_kind(MEMORY) if moment else s
        opt = jax.tree.map(to_host, opt, moments(tx, abstract.opt_state))
    scale = jax.tree.map(lambda _: replicated, abstract.loss_scale)
    return abstract, TrainState(replicated, param_shardings, opt, scale)


def unboxed_shapes(boxed):
    """The abstract parameters without their logical axis names."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), meta.unbox(boxed))


def optimizer_shardings(tx, opt_state, param_shardings, replicated):
    """The shardings of an optimizer state: moments as their parameters, everything else replicated."""
    return optax.tree.map_params(
        tx, lambda _, s: s, opt_state, param_shardings, transform_non_params=lambda _: replicated
    )


def init_state(config: ModelConfig, tx, precision, shardings: TrainState, seed: int) -> TrainState:
    """New parameters and optimizer state, each shard initialized on its own device."""
    leaves, structure = jax.tree.flatten(shardings)
    return _initializer(config, tx, precision, structure, tuple(leaves))(jax.random.key(seed))


@shared
def _initializer(config: ModelConfig, tx, precision, structure, leaves: tuple):
    make = lambda key: new_state(architecture.init(config, key), tx, precision)
    return jax.jit(make, out_shardings=jax.tree.unflatten(structure, leaves))
