"""PPO's device programs, built from shapes alone: ppo.py runs them and `aot` lowers them."""

import dataclasses
from typing import Any

import jax
import optax

from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import batch_shards, check_fits
from gptjax.parallel.sharding import shared
from gptjax.rlhf.config import PPOConfig, UpdateConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import PPOState, state_shardings
from gptjax.rlhf.update import make_update
from gptjax.training.optimizer import OptimizerConfig, make_optimizer


def make_spec(
    c: PPOConfig, policy: GPTConfig, reward: GPTConfig | None, mesh, *, eos_id: int, pad_id: int, vocab: int
) -> RLSpec:
    """The RLSpec of a run. policy, reward: configs of the models that the run starts from. Raises InputError if they or
    the batch cannot be divided over the mesh."""
    options = dataclasses.replace(c.model, dropout=0.0)  # or the ratio of the first minibatch would not be 1
    policy = options.apply(policy)
    value = None if c.shared_trunk or c.rollout.group_size > 1 else options.apply(reward) if reward else policy
    rows = c.batch_size // c.ppo.minibatches
    micro = c.ppo.microbatch_size or rows
    check_fits(mesh.shape, n_head=policy.n_head, batch_size=rows, microbatch_size=micro)
    for trunk in filter(None, (policy, value)):
        pipeline.make_plan(trunk, mesh.shape, micro)
    shards = batch_shards(mesh.shape)
    if c.rollout.forward_rows and c.rollout.forward_rows % shards:
        raise InputError(
            f"rollout.forward_rows={c.rollout.forward_rows} is not divisible over the {shards} devices that rows are "
            "sharded over: use a multiple of them."
        )
    return RLSpec(
        policy=policy, value=value, reward=reward, response=c.rollout.max_new_tokens, eos_id=eos_id, pad_id=pad_id,
        vocab=vocab, temperature=c.rollout.temperature, loss_chunk=c.loss_chunk, dtype=c.precision.dtype, mesh=mesh,
        group_size=c.rollout.group_size,
    )  # fmt: skip


def context_lengths(spec: RLSpec) -> dict[str, int]:
    """{name: context length} of all models that read a prompt and its response."""
    models = {"policy": spec.policy, "value network": spec.value, "reward model": spec.reward}
    return {name: model.context_length for name, model in models.items() if model}


@dataclasses.dataclass(frozen=True)
class PPOProgram:
    """abstract, shardings: of the PPOState. update: of update.make_update, jitted, with the state donated."""

    policy_tx: optax.GradientTransformation
    value_tx: optax.GradientTransformation
    abstract: PPOState
    shardings: PPOState
    update: Any


def ppo_program(c: PPOConfig, spec: RLSpec) -> PPOProgram:
    """The PPOProgram of a run; the same one for equal settings of update, optimizers and models."""
    return _ppo_program(c.ppo, c.optimizer, c.value_optimizer, spec)


@shared
def _ppo_program(c: UpdateConfig, optimizer: OptimizerConfig, value_optimizer: OptimizerConfig, spec: RLSpec):
    policy_tx, value_tx = make_optimizer(optimizer), make_optimizer(value_optimizer)
    abstract, shardings = state_shardings(*boxed_params(spec), policy_tx, value_tx, spec.mesh)
    update = make_update(c, spec, policy_tx, value_tx, optimizer.clip_norm, value_optimizer.clip_norm)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    return PPOProgram(policy_tx, value_tx, abstract, shardings, jitted)


def boxed_params(spec: RLSpec) -> tuple:
    """Abstract parameters, with logical axis names, of policy and value network."""
    policy = gpt.abstract_params(spec.policy)
    if not spec.critic:
        return policy, {}
    if spec.value is None:
        return policy, {"head": heads.abstract_head(spec.policy)}
    return policy, heads.abstract_scalar_model(spec.value)
