"""GRPO: the bandit's fixed point in closed form, and the RL loop with groups of samples, end to end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_runs import ppo_config
from runs import arrays, lines, without_times
from test_bandit import ARMS, BATCH, LENGTHS, MODEL, PROMPTS, REWARDS, N, probabilities

from gptjax.aot import programs
from gptjax.config import build
from gptjax.cost import topology
from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.objectives import ppo as objectives
from gptjax.ppo import PPOConfig, ppo
from gptjax.rlhf import rollout
from gptjax.rlhf.config import RolloutConfig, UpdateConfig
from gptjax.rlhf.state import new_state, phase_keys
from gptjax.rlhf.update import make_update
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.optimizer import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.usefixtures("one_device")

BETA, ITERATIONS = 0.5, 100


def share(prompts, responses):
    return [0.2 * r.split().count("zu") for r in responses]


# --- the fixed point --------------------------------------------------------------------------------------


def fixed_point():
    """P(best arm) where GRPO's expected gradient is 0, groups large: with A the advantage, the clipped loss has the
    gradient E[A d log pi] and beta k3 that of KL(ref || pi), so pi (beta - A) = beta ref for every arm. One arm of four
    is worth 1, so A is sqrt((1 - p) / p) there and -sqrt(p / (1 - p)) on the others."""
    low, high = 0.5, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (low, p) if p * (BETA - np.sqrt((1 - p) / p)) > BETA / ARMS else (p, high)
    return p


def test_the_fixed_point_holds_for_every_arm():
    p = fixed_point()
    pi = np.array([p, *[(1 - p) / 3] * 3])
    advantage = (REWARDS - (pi * REWARDS).sum()) / np.sqrt((pi * REWARDS).sum() * (1 - (pi * REWARDS).sum()))
    np.testing.assert_allclose(pi * (BETA - advantage), BETA / ARMS, rtol=1e-9)
    assert p == pytest.approx(0.886, abs=1e-3)


@functools.cache
def trained(beta=BETA):
    """(reference, final state, metrics of every iteration), all of a batch one group."""
    spec = dataclasses.replace(N, group_size=BATCH)
    reference = jax.jit(gpt.init, static_argnums=0)(MODEL, jax.random.key(0))
    reference = {**reference, "lm_head": jnp.zeros_like(reference["lm_head"])}
    tx = make_optimizer(OptimizerConfig(weight_decay=0.0))
    state = new_state(reference, {}, tx, tx, beta, seed=0)
    update = jax.jit(make_update(UpdateConfig(epochs=2, minibatches=2, ema_decay=0.9), spec, tx, tx, 1.0, 1.0),
                     donate_argnums=0)  # fmt: skip
    record = []
    for i in range(ITERATIONS):
        models = rollout.Models(state.policy, state.value, lambda: (reference, None))
        experience, metrics, _ = rollout.collect(
            models, PROMPTS, LENGTHS, phase_keys(state)[1], state.kl_coefficient, spec, RolloutConfig(missing_eos=None),
            rule=lambda tokens, lengths, mask: REWARDS[np.asarray(tokens[:, 1])],
        )  # fmt: skip
        rate = np.float32(6e-3 * (1 - i / ITERATIONS))
        state, more = update(state, experience, None, (rate, rate))
        record.append(metrics | more)
    return reference, state, jax.device_get(record)


@pytest.mark.slow
def test_the_policy_comes_to_the_fixed_point():
    p = probabilities(trained()[1].policy)
    assert p[0] == pytest.approx(fixed_point(), abs=0.015)
    np.testing.assert_allclose(p[1:], (1 - fixed_point()) / 3, atol=0.01)


@pytest.mark.slow
def test_no_value_is_trained_or_told():
    _, state, record = trained()
    assert state.value == {} and int(state.prompt_position) == ITERATIONS
    assert not {"value/mean", "value/explained_var", "loss/value", "value/clipfrac"} & record[0].keys()
    assert record[0]["policy/first_ratio_deviation"] < 1e-5 and record[0]["objective/kl"] == 0


def test_advantages_are_of_the_group():
    """Mean 0 in each group of a prompt, and a group whose samples score the same teaches nothing."""
    score = jnp.array([1.0, 3.0, 5.0, 5.0, 2.0, 4.0])
    advantage = np.asarray(objectives.group_advantages(score, 2)).reshape(3, 2)
    np.testing.assert_allclose(advantage, [[-1, 1], [0, 0], [-1, 1]], atol=2e-4)


# --- the stage --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tuned, alignment):
    options = {"rollout__group_size": 4, "ppo__epochs": 1, "ppo__minibatches": 2, "kl__coefficient": 0.04}
    return lambda **more: ppo_config(tuned, None, alignment["prompts"], **options | more)


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("grpo") / "run"
    assert ppo(config(steps=4), str(workdir), share).finished
    return workdir


def test_a_group_is_samples_of_one_prompt(straight):
    """16 episodes are 4 prompts; a checkpoint has no value network."""
    saved = arrays(straight, 4)
    assert saved["training['prompt_position']"] == 4 * 4
    assert not [path for path in saved if path.startswith("training['value']")]
    first = lines(straight)[0]
    assert first["objective/kl"] == 0.0 and first["objective/group_std"] > 0 and "value/mean" not in first
    assert {"score", "raw_score", "kl", "length", "eos_rate"} <= lines(straight, "evaluations")[0].keys()
    assert load_model(straight).step == 4


def test_killed_and_made_longer_it_is_the_same_run(config, straight, tmp_path):
    class Killed(BaseException):
        pass

    def rule(prompts, responses, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 3:  # an evaluation and an iteration are done
            raise Killed
        return share(prompts, responses)

    with pytest.raises(Killed):
        ppo(config(steps=2), str(tmp_path / "parts"), rule)
    assert Checkpointer(tmp_path / "parts").steps() == [1]
    for steps in (2, 4):
        assert ppo(config(steps=steps), str(tmp_path / "parts"), share).finished
    a, b = arrays(tmp_path / "parts", 4), arrays(straight, 4)
    assert a.keys() == b.keys() and [k for k in a if a[k].tobytes() != b[k].tobytes()] == []
    for name in ("metrics", "evaluations", "samples"):
        assert without_times(lines(tmp_path / "parts", name)) == without_times(lines(straight, name)), name


@pytest.mark.slow
def test_a_rule_is_learned(config, tmp_path):
    options = {"steps": 15, "eval__every": 15, "eval__lm_batches": 0, "checkpoint__every": 15, "batch_size": 32}
    assert ppo(config(ppo__epochs=2, **options), str(tmp_path / "run"), share).finished
    score = [m["objective/score"] for m in lines(tmp_path / "run")]
    assert np.mean(score[-3:]) > 1.5 * np.mean(score[:3])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"batch_size": 18, "ppo__minibatches": 1}, "batch_size=18 is not a multiple of rollout.group_size=4"),
        ({"shared_trunk": True}, "is GRPO, which has no values: set shared_trunk to False"),
    ],
)
def test_bad_input_is_one_clear_error(config, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        ppo(config(**change), str(tmp_path / "run"), share)


def test_aot_lowers_its_rollout(config, tuned):
    """The update is compiled for a TPU in tests/test_aot.py."""
    c = build(PPOConfig, config())
    mesh = topology.topology_mesh(c.mesh, topology.parse("v5e-1"))
    model = dataclasses.replace(load_model(tuned).config, attention="xla")
    program = programs.collect_program(c, model, None, mesh)
    with jax.set_mesh(mesh):
        assert "stablehlo" in program.jitted.lower(*program.arguments).as_text()
    assert not program.parts["value network"]
