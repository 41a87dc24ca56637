"""Runs in one process share their device programs (parallel/sharding.shared): what must be equal, and what need not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import Rules, forget, shared, use_rules
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state
from gptjax.training.step import jit_eval_step, jit_train_step, train_program, train_step
from gptjax.training.supervised import Dispatch

MODEL, ADAM = GPTConfig(12, n_layer=1, n_head=2, d_model=8, context_length=4, attention="cpu"), OptimizerConfig()


def program(model=MODEL, optimizer=ADAM, devices=1):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    objective = Objective(causal_lm_loss(model, jnp.float32, 128, mesh))
    return train_program(objective, gpt.abstract_params, model, optimizer, PrecisionConfig(), mesh)


def test_a_second_run_has_the_same_program_whatever_its_learning_rate():
    other_rate = dataclasses.replace(ADAM, learning_rate=3e-3)
    assert program() is program() is program(optimizer=other_rate)
    mesh, loss = program().shardings.step.mesh, program().objective.loss
    assert jit_eval_step(loss, mesh) is jit_eval_step(loss, mesh)


@pytest.mark.parametrize(
    "other",
    [
        {"devices": 2}, {"model": dataclasses.replace(MODEL, dropout=0.1)},
        {"optimizer": dataclasses.replace(ADAM, weight_decay=0.2)},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_setting_has_another_program(other):
    assert program(**other) is not program()


def test_other_rules_have_another_program():
    with use_rules(Rules(vocab="fsdp", embed="none")):
        under_rules = program(devices=2)
    assert under_rules is not program(devices=2)
    vocabulary = lambda p: p.shardings.params["wte"].spec[0]
    assert vocabulary(under_rules) == "fsdp" and vocabulary(program(devices=2)) is None


def test_it_is_traced_once():
    """The loss is called when the step is traced: once for two runs of two steps each."""
    calls = []

    @shared
    def counted(model, mesh):
        loss = causal_lm_loss(model, jnp.float32, 128, mesh)
        return lambda *args: calls.append(0) or loss(*args)

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = {"tokens": jnp.ones((1, 1, 2, 5), jnp.int32), "weights": jnp.ones((1, 1, 2, 4))}
    losses = []
    for rate in (1e-3, 1e-2):
        optimizer = dataclasses.replace(ADAM, learning_rate=rate)
        run = train_program(
            Objective(counted(MODEL, mesh)), gpt.abstract_params, MODEL, optimizer, PrecisionConfig(), mesh
        )
        state = init_state(MODEL, run.tx, PrecisionConfig(), run.shardings, 0)
        for _ in range(2):
            state, metrics = run.step(state, batch, jnp.full(1, rate))
        losses.append(float(metrics["loss_sum"][0]))
    assert len(calls) == 1 and losses[0] > losses[1]  # the larger rate learned more


def test_seeds_share_a_program_and_have_noise_of_their_own():
    model, mesh = dataclasses.replace(MODEL, dropout=0.5), make_mesh(MeshConfig(), jax.devices()[:1])
    objective = Objective(causal_lm_loss(model, jnp.float32, 128, mesh))
    run = train_program(objective, gpt.abstract_params, model, ADAM, PrecisionConfig(), mesh)
    batch = {"tokens": jnp.ones((1, 1, 2, 5), jnp.int32), "weights": jnp.ones((1, 1, 2, 4))}
    first = lambda: init_state(model, run.tx, PrecisionConfig(), run.shardings, 0)
    loss = lambda *seed: float(run.step(first(), batch, jnp.full(1, 1e-3), *seed)[1]["loss_sum"][0])
    losses = {seed: Dispatch(run.step, seed, say=lambda _: None)(first(), batch, jnp.full(1, 1e-3)) for seed in (0, 7)}
    found = {seed: float(metrics["loss_sum"][0]) for seed, (_, metrics) in losses.items()}
    assert found[0] == loss() and found[7] == loss(jnp.uint32(7)) != found[0]
    own = train_step(objective, run.tx, ADAM.clip_norm, PrecisionConfig(), 7, True)
    assert float(jit_train_step(own, run.shardings)(first(), batch, jnp.full(1, 1e-3))[1]["loss_sum"][0]) == found[7]


def test_forgotten_programs_are_made_again():
    before = program()
    forget()
    assert program() is not before
