"""The optimizer's moments in host memory: the same steps, layer by layer; saved, resumed, refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import approx, assert_close
from runs import assert_same_run, lines, until_sigterm
from test_resume import STOP, text, tiny  # noqa: F401 (a fixture)
from test_sharding import F32, MESHES, MODEL, OPTIMIZER, TERMS, train

from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.pretrain import pretrain
from gptjax.rlhf import state as ppo_state
from gptjax.training.offload import MEMORY, moments, update_per_layer
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.state import state_shardings

AWAY = dataclasses.replace(OPTIMIZER, offload=True)
MESH = MESHES["data 2 fsdp 2 tensor 2"]


def on_host(opt_state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(opt_state) if x.ndim}


@pytest.mark.parametrize("name", ["adamw", "gpt1_adam"])
def test_part_by_part_is_the_whole(name):
    """Layers, embedding, a scalar parameter: each is updated once, by its own moments and its own decay; where a step
    is skipped, none is."""
    tx = make_optimizer(OptimizerConfig(name, offload=True, decayed="blocks/kernel|wte"))
    rng = np.random.default_rng(0)
    tree = lambda: {
        "trunk": {"blocks": {"kernel": rng.normal(size=(3, 4, 5)), "bias": rng.normal(size=(3, 5))},
                  "wte": rng.normal(size=(7, 4))},
        "head": {"bias": rng.normal(size=())},
    }  # fmt: skip
    params, first, second = jax.tree.map(jnp.float32, (tree(), tree(), tree()))

    def optimize(finite, params, opt, grads):
        updates, new = tx.update(grads, opt, params)
        moved = jax.tree.map(lambda p, u: p + 0.1 * u, params, updates)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), (moved, new), (params, opt))

    def away(finite, params, opt, grads):
        return update_per_layer(tx, functools.partial(optimize, finite), params, opt, grads)

    to_host = lambda x, moment: jax.device_put(x, x.sharding.with_memory_kind(MEMORY)) if moment else x
    whole, per_layer = jax.jit(optimize), jax.jit(away)
    for finite in (True, False):
        expected, state = (params, tx.init(params)), tx.init(params)
        found = params, jax.tree.map(to_host, state, moments(tx, state))
        for grads in (first, second):
            expected, found = whole(finite, *expected, grads), per_layer(finite, *found, grads)
        assert_close(found, expected, terms=2 * 8)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), found[0], params)
        assert set(jax.tree.leaves(moved)) == {finite}
        assert int(found[1][0].count if name == "adamw" else found[1].count) == 2 * finite


def test_training_with_the_moments_on_the_host():
    """On 8 devices. Two programs, whose sums may be fused in another way, so to rounding."""
    _, _, state, metrics = train(MESH)
    _, _, away, found = train(MESH, AWAY)
    np.testing.assert_array_equal(found["count"], metrics["count"])
    assert_close(found, metrics, terms=TERMS)
    assert_close(away.params, state.params, terms=3)
    assert on_host(away.opt_state) == {"pinned_host"} and on_host(state.opt_state) == {"device"}
    assert int(away.opt_state[0].count) == 3
    for a, b in zip(jax.tree.leaves(away.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        assert a.sharding.spec == b.sharding.spec


@pytest.mark.slow
def test_saved_and_taken_up_again(text, tmp_path):  # noqa: F811
    """Bit for bit; and a run may begin without and go on with it, for the checkpoints are the same."""
    options = {"mesh__data": 2, "mesh__fsdp": 4, "optimizer__eps": 1e-4}
    config = lambda offload: tiny(text, **options, optimizer__offload=offload)
    assert pretrain(config(True), str(tmp_path / "straight")).finished
    for first, name in ((True, "parts"), (False, "began without")):
        assert not until_sigterm(pretrain, config(first), tmp_path / name, STOP).finished
        assert pretrain(config(True), str(tmp_path / name)).finished
    assert_same_run(tmp_path / "parts", tmp_path / "straight", 25)
    a, b = (lines(tmp_path / name) for name in ("began without", "straight"))
    assert [m["loss"] for m in a] == approx([m["loss"] for m in b], terms=TERMS)


def test_where_it_can_not_be():
    tx, boxed = make_optimizer(AWAY), gpt.abstract_params(MODEL)
    with pytest.raises(InputError, match="optimizer.offload needs mesh.stage=1"):
        state_shardings(boxed, tx, F32, make_mesh(MeshConfig(stage=2)))
    value, plain = heads.abstract_scalar_model(MODEL), make_optimizer(OPTIMIZER)
    for pair in ((tx, plain), (plain, tx)):
        with pytest.raises(InputError, match="optimizer.offload is not for PPO"):
            ppo_state.state_shardings(boxed, value, *pair, make_mesh(MeshConfig()))
