"""The tests are tested: each fault that PPO implementations have shipped must turn the alignment tests red.

experiments/ppo_exact/mutations.py plants the fault, by GPTJAX_MUTATION in the environment (conftest.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.ppo_exact.mutations import MUTATIONS, plant
from gptjax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVE, ROLLOUT, UPDATE = "test_ppo_objective.py", "test_rollout.py", "test_update.py"
CAUGHT_BY = {  # one file that notices; others may too
    "logits_off_by_one": ROLLOUT,
    "k3_in_reward": OBJECTIVE,
    "k2_in_reward": OBJECTIVE,
    "eos_as_pad": f"{ROLLOUT}::test_after_end_of_sequence_there_is_padding_alone",
    "value_after_the_end": OBJECTIVE,
    "min_for_max": OBJECTIVE,
    "integer_rewards": OBJECTIVE,
    "temperature_mismatch": ROLLOUT,
    "fixed_key": f"{ROLLOUT}::test_noise_differs_between_rows_keys_and_iterations",
    "score_one_slot_late": OBJECTIVE,
    "missing_loss_mask": OBJECTIVE,
    "whitening_over_pads": OBJECTIVE,
    "positions_count_padding": ROLLOUT,
    "mean_of_means": f"{UPDATE}::test_the_gradient_is_that_of_the_formula",
    "value_not_clipped_against_the_old": OBJECTIVE,
    "missing_eos_forgiven": f"{ROLLOUT}::test_only_a_response_without_end_of_sequence_gets_its_penalty",
}


def run(mutation: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    return subprocess.run(
        [*command, str(ROOT / "tests" / CAUGHT_BY[mutation])],
        cwd=ROOT, env={**os.environ, "GPTJAX_MUTATION": mutation}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_goes_red_for(name):
    result = run(name)
    assert result.returncode == 1, f"rc {result.returncode}: {name} went unnoticed\n{result.stdout[-2000:]}"
    assert "AssertionError" in result.stdout, result.stdout[-3000:]  # not a crash


def test_every_fault_has_a_test():
    assert CAUGHT_BY.keys() == MUTATIONS.keys()


def test_an_unknown_fault_is_refused():
    with pytest.raises(InputError, match="no mutation 'nothing'"):
        plant("nothing")
