"""Each fault that a figure of PPO would show raises its alarm, and a sound iteration none."""

import jax.numpy as jnp
import pytest

from gptjax.rlhf import sanity_checks
from gptjax.training.loop import NotFinite

GOOD = {
    "policy/first_ratio_deviation": 1e-6, "objective/kl": 0.0, "objective/kl_se": 0.1, "policy/rollout_logp_diff": 1e-5,
    "objective/rlhf_reward": 0.3, "finite": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "fault, iteration, message",
    [
        ({"policy/first_ratio_deviation": 0.1}, 5, "ratio is off 1 by 0.1"),
        ({"policy/first_ratio_deviation": float("nan")}, 5, "ratio"),
        ({"objective/kl": 0.01}, 0, "before the first update"),
        ({"objective/kl": float("nan")}, 0, "before the first update"),
        ({"objective/kl": -0.5}, 5, "three standard errors below 0"),
        ({"policy/rollout_logp_diff": 0.6}, 5, "sampler"),
        ({"policy/rollout_logp_diff": float("nan")}, 5, "sampler"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_fault_has_its_alarm(fault, iteration, message, dtype):
    found = sanity_checks.sanity_checks(GOOD | fault, iteration, dtype)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_alarm_when_all_is_well(dtype):
    assert sanity_checks.sanity_checks(GOOD, 0, dtype) == []
    later = GOOD | {"objective/kl": 3.0}
    assert sanity_checks.sanity_checks(later, 1, dtype) == []
    assert sanity_checks.sanity_checks(GOOD | {"objective/kl": -0.29}, 1, dtype) == []  # within three standard errors


def test_responses_that_never_end_have_an_alarm():
    """Then missing_eos takes the place of every score, and the figures look well."""
    line = GOOD | {"response/eos_rate": 0.0}
    (found,) = sanity_checks.sanity_checks(line, 3, jnp.float32, missing_eos=-1.0)
    assert "no response ended" in found and "rollout.missing_eos=-1" in found and "max_new_tokens" in found
    assert sanity_checks.sanity_checks(line, 3, jnp.float32, missing_eos=None) == []
    assert sanity_checks.sanity_checks(line | {"response/eos_rate": 1 / 512}, 3, jnp.float32, missing_eos=-1.0) == []


@pytest.mark.parametrize("bad", [{"finite": 0.75}, {"finite": 0.0}, {"objective/rlhf_reward": float("nan")}])
def test_training_stops_where_something_is_not_finite(bad, capsys):
    sanity_checks.check_iteration(GOOD, 0, jnp.float32)
    assert capsys.readouterr().err == ""
    with pytest.raises(NotFinite, match="not finite in iteration 4$") as caught:
        sanity_checks.check_iteration(GOOD | bad, 3, jnp.float32)
    assert "optimizer.learning_rate" in caught.value.fix
