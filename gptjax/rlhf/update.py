"""PPO's update: E epochs of M minibatches over one rollout, the pre-training gradient summed in (PPO-ptx).

Sources: Schulman et al. 2017; Ouyang et al. 2022 eq. 2 and appendix C.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.objectives import ppo
from gptjax.objectives.chunked import cross_entropy_sum
from gptjax.parallel.sharding import constrain
from gptjax.ranges import BelowOne, Count, Positive
from gptjax.rlhf import networks
from gptjax.rlhf.networks import Networks
from gptjax.rlhf.rollout import Rollout
from gptjax.rlhf.state import PPOState, phase_keys


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """The update: epochs x minibatches optimizer steps an iteration.

    epochs: passes over the episodes of an iteration.
    minibatches: optimizer steps of an epoch.
    microbatch_size: responses whose gradients are computed at a time; None = the whole minibatch.
    clip: epsilon of the clipped policy loss.
    value_clip: epsilon of the clipped value loss.
    value_coefficient: weight of the value loss; it matters where the trunk is shared.
    normalize: what the policy and value losses are means over: 'token' (all actions of the minibatch) or 'sequence'
        (sums of a response, over responses).
    ptx_coefficient: gamma of PPO-ptx; 0 = plain PPO.
    ptx_normalize: log pi(x) as a mean over 'token's or summed over a 'sequence': the paper does not say, and gamma
        means nothing without it.
    ema_decay: decay per iteration of the policy's moving average, which checkpoints and evaluations use; 0 = no
        average.
    """

    epochs: Count = 4
    minibatches: Count = 1
    microbatch_size: Count | None = None
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    value_coefficient: float = 1.0
    normalize: str = "token"
    ptx_coefficient: float = 0.0
    ptx_normalize: str = "token"
    ema_decay: BelowOne = 0.992

    def __post_init__(self):
        if self.epochs < 1 or self.minibatches < 1:
            raise InputError("ppo.epochs and ppo.minibatches are at least 1.")
        if self.clip <= 0 or self.value_clip <= 0 or self.ptx_coefficient < 0 or not 0 <= self.ema_decay < 1:
            raise InputError("ppo: clip and value_clip > 0, ptx_coefficient >= 0, ema_decay in [0, 1).")
        for name in ("normalize", "ptx_normalize"):
            if getattr(self, name) not in ("token", "sequence"):
                raise InputError(f"ppo.{name}={getattr(self, name)!r}: choose token or sequence.")


def ppo_gradients(c: UpdateConfig, n: Networks, policy, value, batch: Rollout):
    """Gradients of policy loss + c_v value loss on one minibatch, and its statistics.

    batch: arrays [micro-batches, rows, ...]. Returns ((d_policy, d_value), statistics as means over the actions).
    """
    actions = batch.mask.sum()
    count = jnp.maximum(actions if c.normalize == "token" else batch.mask.shape[0] * batch.mask.shape[1], 1)

    def loss(networks_, micro: Rollout):
        policy, value = networks_
        states = networks.policy_states(policy, micro.tokens, micro.real, micro.mask, n)
        log_prob = networks.log_probs(policy, states, micro.tokens, n)
        v = networks.values(value, states, micro.tokens, micro.real, micro.mask, n)
        policy_sum, _, of_policy = ppo.policy_loss(log_prob, micro.log_prob, micro.advantage, micro.mask, c.clip)
        value_sum, _, of_value = ppo.value_loss(v, micro.value, micro.returns, micro.mask, c.value_clip)
        total = (policy_sum + c.value_coefficient * value_sum) / count
        log_ratio = ppo.keep(log_prob - micro.log_prob, micro.mask)
        sums = {
            "loss/policy": policy_sum / count,
            "loss/value": value_sum / count,
            "policy/approxkl": of_policy["approx_kl"] / jnp.maximum(actions, 1),
            "policy/clipfrac": of_policy["clipped"] / jnp.maximum(actions, 1),
            "policy/ratio_mean": of_policy["ratio"] / jnp.maximum(actions, 1),
            "value/clipfrac": of_value["clipped"] / jnp.maximum(actions, 1),
        }
        extremes = {"max": log_ratio.max(), "min": log_ratio.min()}
        return total, (sums, extremes)

    gradient = jax.grad(loss, has_aux=True)
    if batch.mask.shape[0] == 1:
        grads, (sums, extremes) = gradient((policy, value), jax.tree.map(lambda a: a[0], batch))
    else:

        def accumulate(carry, micro):
            grads, (sums, extremes) = gradient((policy, value), micro)
            return jax.tree.map(jnp.add, carry, (grads, sums)), extremes

        shapes = jax.eval_shape(gradient, (policy, value), jax.tree.map(lambda a: a[0], batch))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (shapes[0], shapes[1][0]))
        (grads, sums), extremes = lax.scan(accumulate, zeros, batch)
    return grads, sums | {
        "policy/ratio_max": jnp.exp(extremes["max"].max()),
        "policy/ratio_min": jnp.exp(extremes["min"].min()),
    }


def ptx_gradient(c: UpdateConfig, n: Networks, policy, text):
    """Gradient of -E[log pi(x)] on pre-training sequences (without gamma), and the loss.

    text: {tokens: int [micro-batches, rows, time + 1]}, below 0 in rows that count for nothing (ptx.PADDING), and where
    documents are isolated segment_ids and positions, int [micro-batches, rows, time].
    """
    micro, _, time = text["tokens"].shape
    count = (text["tokens"][..., 0] >= 0).sum() * ((time - 1) if c.ptx_normalize == "token" else 1)

    def loss(policy, x):
        tokens = x["tokens"]
        weights = jnp.broadcast_to((tokens[:, :1] >= 0).astype(jnp.float32), (tokens.shape[0], time - 1))
        tokens = jnp.maximum(tokens, 0)
        h = gpt.hidden(
            policy, n.policy, tokens[:, :-1], positions=x.get("positions"), segment_ids=x.get("segment_ids"),
            dtype=n.dtype, mesh=n.mesh,
        )  # fmt: skip
        return cross_entropy_sum(h, gpt.unembedding(policy, n.policy), tokens[:, 1:], weights, n.loss_chunk) / count

    gradient = jax.value_and_grad(loss)
    if micro == 1:
        return gradient(policy, jax.tree.map(lambda a: a[0], text))[::-1]
    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, policy))
    (total, grads), _ = lax.scan(
        lambda carry, x: (jax.tree.map(jnp.add, carry, gradient(policy, x)), None), zeros, text
    )
    return grads, total


def make_update(c: UpdateConfig, n: Networks, policy_tx, value_tx, clip_norm: float, value_clip_norm: float):
    """Returns update(state, rollout, ptx, learning_rates) -> (state, metrics), to be jitted with the state donated.

    ptx: the `text` of ptx_gradient with a leading axis of minibatches, or None. learning_rates: (policy's, value's) of
    this iteration. metrics: means over the optimizer steps, and of the first one `policy/first_ratio_deviation`, the
    largest |ratio - 1|, which must be 0 but for rounding. A step whose gradient is not finite changes nothing and
    sets `finite` to 0.
    """

    def optimize(params, opt, grads, tx, limit, rate, finite):
        norm = optax.tree.norm(grads)
        if limit:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12)), grads)
        updates, new_opt = tx.update(grads, opt, params)
        new = jax.tree.map(lambda p, u: p + rate * u, params, updates)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), (new, new_opt), (params, opt))

    def update(state: PPOState, rollout: Rollout, ptx, learning_rates):
        key, _, permutation_key = phase_keys(state)
        B = rollout.mask.shape[0]
        size = B // c.minibatches
        order = jax.vmap(lambda k: jax.random.permutation(k, B))(jax.random.split(permutation_key, c.epochs))
        order = order.reshape(c.epochs * c.minibatches, size // (c.microbatch_size or size), -1)

        def step(carry, index):
            policy, policy_opt, value, value_opt = carry
            take = lambda a: constrain(a[order[index]], None, "batch", *(None,) * (a.ndim - 1))
            batch = jax.tree.map(take, rollout)
            (d_policy, d_value), metrics = ppo_gradients(c, n, policy, value, batch)
            metrics["grad_norm/ppo"] = optax.tree.norm(d_policy)
            metrics["grad_norm/value"] = optax.tree.norm(d_value)
            if ptx is not None:
                text = jax.tree.map(lambda a: a[index % c.minibatches], ptx)
                d_ptx, metrics["loss/ptx"] = ptx_gradient(c, n, policy, text)
                d_ptx = jax.tree.map(lambda g: c.ptx_coefficient * g, d_ptx)
                metrics["grad_norm/ptx"] = optax.tree.norm(d_ptx)  # with gamma: as it enters the step
                dot = optax.tree.vdot(d_policy, d_ptx)
                norms = metrics["grad_norm/ppo"] * metrics["grad_norm/ptx"]
                metrics["grad_norm/cosine"] = dot / jnp.maximum(norms, 1e-12)
                d_policy = jax.tree.map(jnp.add, d_policy, d_ptx)
            metrics["grad_norm/policy"] = optax.tree.norm(d_policy)
            finite = jnp.isfinite(metrics["grad_norm/policy"]) & jnp.isfinite(metrics["grad_norm/value"])
            policy, policy_opt = optimize(policy, policy_opt, d_policy, policy_tx, clip_norm, learning_rates[0], finite)
            value, value_opt = optimize(value, value_opt, d_value, value_tx, value_clip_norm, learning_rates[1], finite)
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
            prompt_position=state.prompt_position + B,
            ptx_position=state.ptx_position
            + (0 if ptx is None else (ptx["tokens"][..., 0] >= 0).sum(dtype=jnp.int32)),
        )  # fmt: skip
        return new, metrics

    return update
