"""The 4-armed bandit: one-token PPO through sample, score, finish and update comes to the optimum in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import model_terms, tolerance

from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.rlhf import rollout
from gptjax.rlhf.config import UpdateConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import new_state, phase_keys
from gptjax.rlhf.update import make_update
from gptjax.training.optimizer import OptimizerConfig, make_optimizer

ARMS, BETA, BATCH, ITERATIONS = 4, 0.5, 512, 80
REWARDS = np.array([1, 0, 0, 0], np.float32)
MODEL = GPTConfig(5, n_layer=1, n_head=2, d_model=16, context_length=2, attention="reference", tied_head=False)
N = RLSpec(policy=MODEL, value=None, reward=None, response=1, eos_id=None, pad_id=4, vocab=ARMS)
PROMPTS, LENGTHS = np.zeros((BATCH, 1), np.int32), np.ones(BATCH, np.int32)


@functools.cache
def trained():
    """(reference, final state, metrics of every iteration). The reference is uniform: its un-embedding is 0."""
    reference = jax.jit(gpt.init, static_argnums=0)(MODEL, jax.random.key(0))
    reference = {**reference, "lm_head": jnp.zeros_like(reference["lm_head"])}
    tx = make_optimizer(OptimizerConfig(weight_decay=0.0))
    state = new_state(reference, {"head": heads.new_head(16, None)}, tx, tx, BETA, seed=0)
    config = UpdateConfig(epochs=2, minibatches=2, ema_decay=0.9)
    update = jax.jit(make_update(config, N, tx, tx, 1.0, 1.0), donate_argnums=0)
    record = []
    for i in range(ITERATIONS):
        tokens, mask, _ = rollout.sample(state.policy, PROMPTS, LENGTHS, phase_keys(state)[1], N)
        scored = rollout.score(state.policy, state.value, reference, None, tokens, LENGTHS, mask, N)
        experience, metrics = rollout.compute_advantages(
            scored, REWARDS[np.asarray(tokens[:, 1])], state.kl_coefficient, eos_id=None, missing_eos=None, gamma=1.0,
            lam=0.95,
        )  # fmt: skip
        rate = np.float32(4.5e-3 * (1 - i / ITERATIONS))
        state, more = update(state, experience, None, (rate, rate))
        record.append(metrics | more)
    return reference, state, jax.device_get(record)


@jax.jit
def _probabilities(policy):
    x = gpt.hidden(policy, MODEL, np.zeros((1, 1), np.int32))
    return jax.nn.softmax(gpt.logits(policy, MODEL, x)[0, 0, :ARMS])


def probabilities(policy):
    return np.asarray(_probabilities(policy), np.float64)


def objective(p):
    return (p * REWARDS).sum() - BETA * (p * np.log(p * ARMS)).sum()


def test_the_closed_form_is_the_published_one():
    best = np.exp(REWARDS / BETA) / np.exp(REWARDS / BETA).sum()
    assert best[0] == pytest.approx(0.711235, abs=1e-6) and best[1] == pytest.approx(0.096255, abs=1e-6)
    assert objective(best) == pytest.approx(0.477229, abs=1e-6)
    assert BETA * math.log(np.exp(REWARDS / BETA).mean()) == pytest.approx(0.477229, abs=1e-6)
    assert (best * np.log(best * ARMS)).sum() == pytest.approx(0.468011, abs=1e-6)


def test_it_begins_at_the_reference():
    reference, _, record = trained()
    np.testing.assert_array_equal(probabilities(reference), 0.25)
    rounding = math.log(ARMS) * tolerance(model_terms(MODEL))
    assert record[0]["objective/kl"] == 0 and record[0]["policy/first_ratio_deviation"] < rounding
    assert record[0]["objective/entropy"] == pytest.approx(math.log(ARMS), rel=1e-6)


def test_the_policy_comes_to_the_optimum():
    p = probabilities(trained()[1].policy)
    assert p[0] == pytest.approx(0.711235, abs=0.01)
    np.testing.assert_allclose(p[1:], 0.096255, atol=0.01)


def test_the_objective_comes_to_its_maximum():
    assert objective(probabilities(trained()[1].policy)) == pytest.approx(0.477229, abs=0.01)
    last = np.mean([line["objective/rlhf_reward"] for line in trained()[2][-20:]])
    assert last == pytest.approx(0.477229, abs=4 * 0.5 / math.sqrt(20 * BATCH))  # as the samples measure it


def test_the_moving_average_comes_there_too():
    assert probabilities(trained()[1].average)[0] == pytest.approx(0.711235, abs=0.01)


def test_at_the_optimum_every_arm_is_worth_the_same():
    """r - beta log(pi/ref) is the objective itself for each arm, which is what the value head has learned."""
    _, state, record = trained()
    p = probabilities(state.policy)
    np.testing.assert_allclose(REWARDS - BETA * np.log(p * ARMS), 0.477229, atol=0.06)
    assert record[-1]["value/mean"] == pytest.approx(0.477229, abs=0.05)
