"""The tests are tested: each fault that PPO implementations have shipped must turn the alignment tests red.

experiments/ppo_exact/mutations.py plants the fault, by GPTJAX_MUTATION in the environment (conftest.py).
"""

import json
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


@pytest.fixture(scope="module")
def said(once):
    """{fault: what pytest said, and its exit code}."""

    def mutants(folder):
        tests = {name: str(ROOT / "tests" / test) for name, test in CAUGHT_BY.items()}
        subprocess.run(
            [sys.executable, ROOT / "tests" / "mutants.py", folder, json.dumps(tests)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=1500,
        )  # fmt: skip
        return {name: (folder / f"{name}.txt").read_text() for name in tests}

    return once(mutants)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_goes_red_for(name, said):
    said, code = said[name], int(said[name].split()[-1])
    assert code == 1, f"rc {code}: {name} went unnoticed\n{said[-2000:]}"
    assert "AssertionError" in said, said[-3000:]  # not a crash


def test_every_fault_has_a_test():
    assert CAUGHT_BY.keys() == MUTATIONS.keys()


def test_an_unknown_fault_is_refused():
    with pytest.raises(InputError, match="no mutation 'nothing'"):
        plant("nothing")
