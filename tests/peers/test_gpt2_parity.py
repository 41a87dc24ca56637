"""gptjax's published tasks give the numbers of lm-evaluation-harness's own task files (requirements-peers.txt)."""

import pytest

NEEDS = "needs lm-eval, torch and transformers: pip install -r requirements-peers.txt"
pytest.importorskip("lm_eval", reason=NEEDS)
pytest.importorskip("torch", reason=NEEDS)

from experiments.gpt2_parity import random_weights  # noqa: E402


def test_random_weights_get_the_same_numbers_from_both():
    found = random_weights.compare()
    assert {a.task for a in found} == random_weights.TASKS.keys() and len(found) == 10
    assert sum(0 < a.ours < 1 for a in found if a.metric.startswith("acc")) >= 4  # or nothing was tested
    assert "hellaswag" in random_weights.table(found)
