"""Sanity checks while PPO runs, with likely causes for each failure.

They are necessary, not sufficient: a policy trained on shifted logits passes them all. The tests catch such faults.
"""

import math

import jax.numpy as jnp

from gptjax.distributed import hosts
from gptjax.training.loop import NotFinite

# Rounding tolerances: |ratio - 1| of the first minibatch and |KL| of the first iteration. Rows are batched differently
# in the update than in scoring, which changes the order of sums.
_RATIO = {"float32": 1e-3, "bfloat16": 5e-2}
_KL = {"float32": 1e-4, "bfloat16": 1e-4}  # policy and reference go through one program, from matrices of one dtype
_SAMPLER = {"float32": 1e-2, "bfloat16": 0.5}


def sanity_checks(line: dict, iteration: int, dtype, missing_eos: float | None = None) -> list[str]:
    """Warnings, each with likely causes; [] if all checks pass. line: the iteration's metrics. missing_eos: the score
    of a response that does not end, None = its own."""
    name = jnp.dtype(dtype).name
    found = []
    ratio = line["policy/first_ratio_deviation"]
    if not ratio <= _RATIO[name]:
        found.append(
            f"the first minibatch's ratio is off 1 by {ratio:.3g}: old and new log-probabilities come from different "
            "computations (dropout, temperature, dtype, other weights)"
        )
    if iteration == 0 and not abs(line["objective/kl"]) <= _KL[name]:
        found.append(
            f"KL(policy, reference) is {line['objective/kl']:.3g} before the first update: the reference is not the "
            "policy training began with, or is computed differently"
        )
    if line["objective/kl"] < -3 * line["objective/kl_se"] - _KL[name]:
        found.append(
            f"KL is {line['objective/kl']:.3g}, more than three standard errors below 0: samples are not drawn from "
            "the distribution whose log-probabilities are used"
        )
    if not line["policy/rollout_logp_diff"] <= _SAMPLER[name]:
        found.append(
            f"the sampler's log-probabilities differ from the scorer's by up to {line['policy/rollout_logp_diff']:.3g}"
        )
    if missing_eos is not None and not line["response/eos_rate"] > 0:
        found.append(
            f"no response ended, so each was scored rollout.missing_eos={missing_eos:g} and none by the reward, which "
            "teaches nothing: raise rollout.max_new_tokens, start from an SFT model that ends its responses, or set "
            "rollout.missing_eos=None in the config file to score responses as they are"
        )
    return found


def check_iteration(line: dict, iteration: int, dtype, missing_eos: float | None = None):
    """Prints warnings, on process 0. Raises NotFinite if the gradient or the reward is no longer finite."""
    for text in sanity_checks(line, iteration, dtype, missing_eos):
        hosts.warn(f"iteration {iteration + 1}: {text}")
    if line["finite"] < 1 or not math.isfinite(line["objective/rlhf_reward"]):
        raise NotFinite(
            f"Loss or gradient was not finite in iteration {iteration + 1}",
            "Lower optimizer.learning_rate, raise kl.coefficient, or look at the scores in metrics.jsonl.",
        )
