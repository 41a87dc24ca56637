"""Does the best learning rate stay the same when the model gets wider? Short runs on text, of each width and rate."""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import Schedule, ScheduleConfig
from gptjax.training.state import init_state
from gptjax.training.step import train_program

BASE, HEADS, LAYERS, VOCAB, TIME, ROWS = 32, 4, 2, 128, 64, 8
LAST = 0.1  # the loss of a run is the mean of this share of its steps, the last ones


def text() -> np.ndarray:
    """The ASCII of the first 2 MB of modules of Python's standard library, in the order of their names."""
    content = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
        if len(content) > 2e6:
            break
    ids = np.frombuffer(content, np.uint8).astype(np.int32)
    return ids[ids < VOCAB]


def losses(width: int, mup: bool, rates, *, steps: int, seed: int = 0) -> list[float]:
    """Of a run at each learning rate: the mean training loss of its last steps, nats per byte; all see the same text in
    the same order."""
    base = dict(mup_base_width=BASE, mup_base_heads=HEADS) if mup else {}
    config = GPTConfig(VOCAB, LAYERS, HEADS, width, TIME, unroll=LAYERS, attention="cpu", **base)
    mesh, precision = make_mesh(MeshConfig(), jax.devices()[:1]), PrecisionConfig()
    objective = Objective(causal_lm_loss(config, jnp.float32, TIME, mesh))
    train = train_program(objective, gpt.abstract_params, config, OptimizerConfig(), precision, mesh)
    ids, rng = text(), np.random.default_rng(seed)
    starts = rng.integers(0, len(ids) - TIME - 1, (steps, ROWS))
    weights = np.ones((1, 1, ROWS, TIME), np.float32)
    found = []
    for rate in rates:
        schedule = Schedule(ScheduleConfig("linear", warmup_fraction=0.1, final_fraction=0.0), batch_size=ROWS,
                            context_length=TIME, learning_rate=rate, steps=steps)  # fmt: skip
        state, trail = init_state(config, train.tx, precision, train.shardings, seed), []
        for step in range(steps):
            rows = ids[starts[step, :, None] + np.arange(TIME + 1)]
            batch = {"tokens": rows[None, None], "weights": weights}
            now = np.full(1, schedule.learning_rate(step), np.float32)
            state, metrics = train.step(state, batch, now, np.uint32(seed))
            trail.append(metrics["loss_sum"])
        nats = np.array(jax.device_get(trail)).ravel() / (ROWS * TIME)
        found.append(float(nats[-max(1, round(LAST * steps)) :].mean()))
    return found
