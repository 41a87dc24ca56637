"""PPO on a task whose optimum is known in closed form (experiments/ppo_exact)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import approx, assert_close, model_terms

from experiments.ppo_exact.task import EOS, LENGTH, MODEL, Task, responses

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def task():
    return Task(0)


def test_there_are_341_responses_each_once():
    tokens, mask = responses()
    assert tokens.shape == mask.shape == (341, LENGTH) and len({tuple(t) for t in tokens}) == 341
    ended = (tokens == EOS).any(1)
    assert (~ended).sum() == 4**4 and [(mask.sum(1)[ended] == n).sum() for n in (1, 2, 3, 4)] == [1, 4, 16, 64]


def test_probabilities_sum_to_1(task):
    for log_p in (task.log_ref, task.log_optimum):
        assert_close(jnp.exp(log_p).sum(1), np.ones(3), terms=model_terms(MODEL))


def test_the_reference_has_closed_nothing_and_the_optimum_all(task):
    figures = task.figures(task.reference)
    assert figures["gap"] == 0.0 and figures["kl_to_reference"] == 0.0 and figures["kl_to_optimum"] > 1.0
    assert float(task.objective(task.log_optimum)) == approx(task.j_optimum, terms=3 * 341, scale=1)


def test_no_policy_beats_the_optimum(task):
    """Moved a little in any direction, the optimum is worse."""
    for i in range(5):
        moved = task.log_optimum + 0.1 * jax.random.normal(jax.random.key(i), task.log_optimum.shape)
        moved = moved - jax.nn.logsumexp(moved, axis=1, keepdims=True)
        assert float(task.objective(moved)) < task.j_optimum


def test_sampled_responses_get_their_own_reward(task):
    tokens, _ = responses()
    whole = np.concatenate([np.zeros((341, 3), np.int32), tokens], axis=1)
    for prompt in range(3):
        np.testing.assert_array_equal(task.score(whole, np.full(341, prompt)), task.rewards[prompt])


def run(module, *arguments) -> list[dict]:
    """In a process of its own: eight virtual devices in this one make it several times as slow."""
    environment = {**os.environ, "NPROC": "2"}
    result = subprocess.run(
        [sys.executable, "-m", module, "--json", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_ppo_reaches_the_optimum():
    for result in run("experiments.ppo_exact", "--seeds=5"):
        assert result["gap"] >= 0.98 and result["kl_to_optimum"] <= 0.05, result


@pytest.mark.slow
def test_pretraining_gradients_cure_the_alignment_tax():
    """In half of the iterations, with and without them."""
    plain, cured = run("experiments.ppo_exact.ptx", "--coefficients=0,1", "--iterations=60")
    assert plain["tax"] > 20 * cured["tax"] and min(plain["gap"], cured["gap"]) > 0.95


@pytest.mark.long
def test_the_more_of_them_the_lower_the_tax():
    plain, little, much = run("experiments.ppo_exact.ptx", "--coefficients=0,0.1,1", "--iterations=120")
    assert plain["tax"] > 10 * little["tax"] and little["tax"] > 2 * much["tax"]
    assert min(plain["gap"], little["gap"], much["gap"]) > 0.95
