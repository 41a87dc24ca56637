"""The scan over layers: the compiled program does not grow with depth."""

import jax
import numpy as np

from experiments.benchmarks import setup
from gptjax.model.spec import GPTConfig
from gptjax.training.state import new_state


def program_size(layers, unroll, monkeypatch):
    abstract = lambda config, tx, precision, shardings, seed: jax.eval_shape(
        lambda key: new_state(setup.gpt.init(config, key), tx, precision), jax.random.key(seed)
    )
    monkeypatch.setattr(setup, "init_state", abstract)  # shapes are enough to lower a program
    state, step = setup.make_step(GPTConfig(64, layers, 2, 32, 16, attention="reference", unroll=unroll))
    batch = setup.as_batch(setup.random_tokens(64, 2, 16))
    return len(step.lower(state, batch, np.array([1e-3], np.float32)).as_text())


def test_the_program_of_a_train_step_does_not_grow_with_depth(monkeypatch):
    two, forty_eight, laid_out = (program_size(*n, monkeypatch) for n in ((2, 1), (48, 1), (9, 9)))
    assert abs(forty_eight - two) < 0.03 * two  # the sizes written in it have more digits
    assert laid_out > 1.5 * two  # laid out, it does: the measure can tell
