"""The scan over layers: the compiled program does not grow with depth."""

import numpy as np

from experiments.benchmarks.setup import as_batch, make_step, random_tokens
from gptjax.model.spec import GPTConfig


def program_size(layers, unroll=1):
    state, step = make_step(GPTConfig(64, layers, 2, 32, 16, attention="reference", unroll=unroll))
    batch = as_batch(random_tokens(64, 2, 16))
    return len(step.lower(state, batch, np.array([1e-3], np.float32)).as_text())


def test_the_program_of_a_train_step_does_not_grow_with_depth():
    two, twelve, forty_eight = (program_size(n) for n in (2, 12, 48))
    assert abs(twelve - two) < 0.03 * two  # the sizes written in it have more digits
    assert abs(forty_eight - two) < 0.03 * two
    assert program_size(12, unroll=12) > 1.5 * twelve  # laid out, it does: the measure can tell
