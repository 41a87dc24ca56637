"""A train step wired as pretrain.py wires it, for benchmarks."""

import numpy as np

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state
from gptjax.training.step import train_program


def make_step(model: GPTConfig, compute: str = "float32"):
    """(state, jitted step over [steps, micro-batches, rows, ...] arrays), AdamW with clipping, one device."""
    precision, mesh = PrecisionConfig(compute), make_mesh(MeshConfig())
    objective = Objective(causal_lm_loss(model, precision.dtype, chunk=128, mesh=mesh))
    train = train_program(objective, gpt.abstract_params, model, OptimizerConfig(), precision, mesh)
    return init_state(model, train.tx, precision, train.shardings, seed=0), train.step


def random_tokens(vocab: int, rows: int, context: int) -> np.ndarray:
    """int32 [rows, context + 1], the same in every process."""
    return np.random.default_rng(0).integers(0, vocab, (rows, context + 1), dtype=np.int32)


def as_batch(tokens: np.ndarray):
    """One step of one micro-batch, as the train step takes it."""
    tokens = tokens[None, None]
    return {"tokens": tokens, "weights": np.ones(tokens[..., 1:].shape, np.float32)}
