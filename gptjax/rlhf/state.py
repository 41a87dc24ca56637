"""PPOState: one pytree with everything an iteration changes, so that a resumed run is bitwise identical."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import InputError
from gptjax.parallel.sharding import parameter_shardings
from gptjax.training.offload import Offloaded
from gptjax.training.state import optimizer_shardings, unboxed_shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOState:
    """step: iterations done. average: the policy's moving average, which evaluation and later stages use.
    key: uint32 [2], the data of a PRNG key. prompt_position, ptx_position: prompts and pre-training examples used.
    The frozen reference and reward model are not part of it."""

    step: jax.Array
    policy: Any
    policy_opt: Any
    value: Any
    value_opt: Any
    average: Any
    kl_coefficient: jax.Array
    key: jax.Array
    prompt_position: jax.Array
    ptx_position: jax.Array

    # What a checkpoint calls 'params' and 'training' (training/checkpoint.py).
    def split(self) -> tuple[Any, dict]:
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del rest["step"]
        return rest.pop("average"), rest

    @classmethod
    def join(cls, step, params, training: dict) -> "PPOState":
        return cls(step=step, average=params, **training)


def phase_keys(state: PPOState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Typed keys of this iteration: the next state's, sampling's, the minibatches'."""
    next_key, sampling, minibatches = jax.random.split(jax.random.wrap_key_data(state.key), 3)
    return next_key, sampling, minibatches


def new_state(policy, value, policy_tx, value_tx, kl_coefficient: float, seed: int) -> PPOState:
    """The state before the first iteration. It holds copies: the update donates its state, and the parameters that it
    was made from are used further, as the reference model."""
    policy, value = jax.tree.map(jnp.copy, (policy, value))
    return PPOState(
        step=jnp.int32(0),
        policy=policy,
        policy_opt=policy_tx.init(policy),
        value=value,
        value_opt=value_tx.init(value),
        average=jax.tree.map(jnp.copy, policy),
        kl_coefficient=jnp.float32(kl_coefficient),
        key=jax.random.key_data(jax.random.key(seed)),
        prompt_position=jnp.int32(0),
        ptx_position=jnp.int32(0),
    )


def state_shardings(boxed_policy, boxed_value, policy_tx, value_tx, mesh) -> tuple[PPOState, PPOState]:
    """(abstract state, its shardings): optimizer moments are sharded like their parameters, scalars replicated."""
    if isinstance(policy_tx, Offloaded) or isinstance(value_tx, Offloaded):
        raise InputError(
            "optimizer.offload is not for PPO, whose update is one program of many steps: set it to False."
        )
    policy, value = unboxed_shapes(boxed_policy), unboxed_shapes(boxed_value)
    abstract = jax.eval_shape(lambda p, v: new_state(p, v, policy_tx, value_tx, 0.0, 0), policy, value)
    replicated = NamedSharding(mesh, PartitionSpec())
    policy_places, value_places = parameter_shardings(boxed_policy, mesh), parameter_shardings(boxed_value, mesh)
    return abstract, PPOState(
        step=replicated,
        policy=policy_places,
        policy_opt=optimizer_shardings(policy_tx, abstract.policy_opt, policy_places, replicated),
        value=value_places,
        value_opt=optimizer_shardings(value_tx, abstract.value_opt, value_places, replicated),
        average=policy_places,
        kl_coefficient=replicated,
        key=replicated,
        prompt_position=replicated,
        ptx_position=replicated,
    )
