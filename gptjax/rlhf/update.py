"""PPO's and GRPO's update: epochs x minibatches of optimizer steps on one iteration's Experience (rollout.py). PPO-ptx
adds the gradient of the language-model loss on pre-training text in the same step.

Sources: Schulman et al. 2017; Ouyang et al. 2022 eq. 2 and appendix C.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptjax.model import gpt
from gptjax.objectives import ppo
from gptjax.objectives.chunked import cross_entropy_sum
from gptjax.parallel.sharding import constrain
from gptjax.rlhf import networks
from gptjax.rlhf.config import UpdateConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.rollout import Experience
from gptjax.rlhf.state import PPOState, phase_keys
from gptjax.training.accumulate import accumulate, apply_gradients


def ppo_gradients(c: UpdateConfig, spec: RLSpec, policy, value, batch: Experience, kl_coefficient=0.0):
    """Gradients on one minibatch of policy loss + value_coefficient x value loss; without a critic, of GRPO's loss.

    Args:
        policy, value: parameters; value is {} without a critic.
        batch: arrays [M, B, ...]: M micro-batches of B episodes. kl_coefficient: of the KL term in GRPO's loss.
    Returns:
        ((d_policy, d_value), metrics by name, means over the actions).
    """
    actions = batch.mask.sum()
    M, B, _ = batch.mask.shape
    by_response = c.normalize == "sequence" or not spec.critic
    count = jnp.maximum(M * B if by_response else actions, 1)
    mean = lambda sum_: sum_ / jnp.maximum(actions, 1)

    def loss(models, micro: Experience):
        policy, value = models
        mask_BR = micro.mask
        states_BRD = networks.policy_states(policy, micro.tokens, micro.real, mask_BR, spec)
        log_prob_BR = networks.log_probs(policy, states_BRD, micro.tokens, spec)
        policy_sum, _, of_policy = ppo.policy_loss(log_prob_BR, micro.log_prob, micro.advantage, mask_BR, c.clip)
        sums = {
            "policy/approxkl": mean(of_policy["approx_kl"]),
            "policy/clipfrac": mean(of_policy["clipped"]),
            "policy/ratio_mean": mean(of_policy["ratio"]),
        }
        if spec.critic:
            value_BR = networks.values(value, states_BRD, micro.tokens, micro.real, mask_BR, spec)
            value_sum, _, of_value = ppo.value_loss(value_BR, micro.value, micro.returns, mask_BR, c.value_clip)
            sums |= {"loss/value": value_sum / count, "value/clipfrac": mean(of_value["clipped"])}
            total = policy_sum + c.value_coefficient * value_sum
        else:
            total = policy_sum = ppo.grpo_loss(
                log_prob_BR, micro.log_prob, micro.ref_log_prob, micro.advantage, mask_BR, c.clip, kl_coefficient
            )[0]
        sums["loss/policy"] = policy_sum / count
        log_ratio_BR = ppo.keep(log_prob_BR - micro.log_prob, mask_BR)
        return total / count, (sums, {"max": log_ratio_BR.max(), "min": log_ratio_BR.min()})

    def gradient(micro, _):
        grads, (sums, extremes) = jax.grad(loss, has_aux=True)((policy, value), micro)
        return (grads, sums), extremes

    (grads, sums), extremes = accumulate(gradient, batch)
    return grads, sums | {
        "policy/ratio_max": jnp.exp(extremes["max"].max()),
        "policy/ratio_min": jnp.exp(extremes["min"].min()),
    }


def ptx_gradient(c: UpdateConfig, spec: RLSpec, policy, text):
    """(gradient of -E[log pi(x)] on pre-training sequences, without gamma; the loss): PPO-ptx's pre-training mix.

    text: {tokens: int [M, B, T + 1]}, negative in padding rows, which are ignored (ptx.PADDING); where documents are
    isolated, also segment_ids and positions, int [M, B, T].
    """
    T = text["tokens"].shape[-1] - 1
    count = (text["tokens"][..., 0] >= 0).sum() * (T if c.ptx_normalize == "token" else 1)

    def loss(policy, micro):
        tokens = micro["tokens"]  # [B, T + 1]
        weights_BT = jnp.broadcast_to((tokens[:, :1] >= 0).astype(jnp.float32), (tokens.shape[0], T))
        tokens = jnp.maximum(tokens, 0)
        x_BTD = gpt.hidden(
            policy, spec.policy, tokens[:, :-1], positions=micro.get("positions"),
            segment_ids=micro.get("segment_ids"), dtype=spec.dtype, mesh=spec.mesh,
        )  # fmt: skip
        w_VD = gpt.unembedding(policy, spec.policy)
        return cross_entropy_sum(x_BTD, w_VD, tokens[:, 1:], weights_BT, spec.loss_chunk) / count

    (total, grads), _ = accumulate(lambda micro, _: (jax.value_and_grad(loss)(policy, micro), ()), text)
    return grads, total


def make_update(c: UpdateConfig, spec: RLSpec, policy_tx, value_tx, clip_norm: float, value_clip_norm: float):
    """Returns update(state, rollout, ptx, learning_rates) -> (state, metrics), to be jitted with the state donated.

    rollout: the Experience of an iteration, arrays [B, ...]. ptx: the `text` of ptx_gradient with a leading axis of
    minibatches, or None. learning_rates: (policy's, value's) of this iteration. metrics: means over the optimizer
    steps; `policy/first_ratio_deviation` is the largest |ratio - 1| of the first step, which must be 0 up to rounding.
    A step whose gradient is not finite changes nothing and sets `finite` to 0.
    """

    def update(state: PPOState, rollout: Experience, ptx, learning_rates):
        key, _, permutation_key = phase_keys(state)
        B = rollout.mask.shape[0]
        size = B // c.minibatches
        order = jax.vmap(lambda k: jax.random.permutation(k, B))(jax.random.split(permutation_key, c.epochs))
        order = order.reshape(c.epochs * c.minibatches, size // (c.microbatch_size or size), -1)  # [steps, M, rows]

        def step(carry, index):
            policy, policy_opt, value, value_opt = carry
            take = lambda a: constrain(a[order[index]], None, "batch", *(None,) * (a.ndim - 1))
            batch = jax.tree.map(take, rollout)
            (d_policy, d_value), metrics = ppo_gradients(c, spec, policy, value, batch, state.kl_coefficient)
            metrics["grad_norm/ppo"] = optax.tree.norm(d_policy)
            metrics["grad_norm/value"] = optax.tree.norm(d_value)
            if ptx is not None:
                text = jax.tree.map(lambda a: a[index % c.minibatches], ptx)
                d_ptx, metrics["loss/ptx"] = ptx_gradient(c, spec, policy, text)
                d_ptx = jax.tree.map(lambda g: c.ptx_coefficient * g, d_ptx)
                metrics["grad_norm/ptx"] = optax.tree.norm(d_ptx)  # gamma included
                dot = optax.tree.vdot(d_policy, d_ptx)
                norms = metrics["grad_norm/ppo"] * metrics["grad_norm/ptx"]
                metrics["grad_norm/cosine"] = dot / jnp.maximum(norms, 1e-12)
                d_policy = jax.tree.map(jnp.add, d_policy, d_ptx)
            metrics["grad_norm/policy"] = optax.tree.norm(d_policy)
            finite = jnp.isfinite(metrics["grad_norm/policy"]) & jnp.isfinite(metrics["grad_norm/value"])
            policy, policy_opt = apply_gradients(
                policy_tx, policy, policy_opt, d_policy, norm=metrics["grad_norm/policy"], clip_norm=clip_norm,
                learning_rate=learning_rates[0], finite=finite,
            )  # fmt: skip
            value, value_opt = apply_gradients(
                value_tx, value, value_opt, d_value, norm=metrics["grad_norm/value"], clip_norm=value_clip_norm,
                learning_rate=learning_rates[1], finite=finite,
            )  # fmt: skip
            metrics["finite"] = finite.astype(jnp.float32)
            return (policy, policy_opt, value, value_opt), metrics

        start = (state.policy, state.policy_opt, state.value, state.value_opt)
        carry, steps = lax.scan(step, start, jnp.arange(order.shape[0]))
        policy, policy_opt, value, value_opt = carry
        metrics = {k: v.mean() for k, v in steps.items()}
        metrics["policy/ratio_max"], metrics["policy/ratio_min"] = (
            steps["policy/ratio_max"].max(), steps["policy/ratio_min"].min()
        )  # fmt: skip
        metrics["policy/first_ratio_deviation"] = jnp.maximum(
            steps["policy/ratio_max"][0] - 1, 1 - steps["policy/ratio_min"][0]
        )
        metrics["finite"] = steps["finite"].min()
        new = dataclasses.replace(
            state, step=state.step + 1, policy=policy, policy_opt=policy_opt, value=value, value_opt=value_opt,
            average=ppo.exponential_moving_average(state.average, policy, c.ema_decay), key=jax.random.key_data(key),
            prompt_position=state.prompt_position + B // spec.group_size,
            ptx_position=state.ptx_position
            + (0 if ptx is None else (ptx["tokens"][..., 0] >= 0).sum(dtype=jnp.int32)),
        )  # fmt: skip
        return new, metrics

    return update
