"""A train step wired as pretrain.py wires it, for benchmarks."""

import numpy as np

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state, state_shardings
from gptjax.training.step import jit_train_step, train_step


def make_step(model: GPTConfig, compute: str = "float32"):
    """(state, jitted step over [steps, micro-batches, rows, ...] arrays), AdamW with clipping, one device."""
    precision, tx, mesh = PrecisionConfig(compute), make_optimizer(OptimizerConfig()), make_mesh(MeshConfig())
    _, shardings = state_shardings(gpt.abstract_params(model), tx, precision, mesh)
    state = init_state(model, tx, precision, shardings, seed=0)
    loss = causal_lm_loss(model, precision.dtype, chunk=128, mesh=mesh)
    return state, jit_train_step(train_step(loss, tx, 1.0, precision, 0, dropout=model.dropout > 0), shardings)


def random_tokens(vocab: int, rows: int, context: int) -> np.ndarray:
    """int32 [rows, context + 1], the same in every process."""
    return np.random.default_rng(0).integers(0, vocab, (rows, context + 1), dtype=np.int32)


def as_batch(tokens: np.ndarray):
    """One step of one micro-batch, as the train step takes it."""
    tokens = tokens[None, None]
    return {"tokens": tokens, "weights": np.ones(tokens[..., 1:].shape, np.float32)}
