"""AdamW and GPT-1's Adam against the papers' figures and optax, what decays, and clipping."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import assert_close, unit_roundoff

from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.training.optimizer import OptimizerConfig, decay_mask, make_optimizer, parameter_path
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import new_state
from gptjax.training.step import train_step

DECAYED = {
    "wte", "wpe", "lm_head", "blocks/attn/c_attn/kernel", "blocks/attn/c_proj/kernel", "blocks/mlp/c_fc/kernel",
    "blocks/mlp/c_proj/kernel",
}  # fmt: skip
NOT_DECAYED = {
    "blocks/attn/c_attn/bias", "blocks/attn/c_proj/bias", "blocks/mlp/c_fc/bias", "blocks/mlp/c_proj/bias",
    "blocks/ln_1/scale", "blocks/ln_1/bias", "blocks/ln_2/scale", "blocks/ln_2/bias", "ln_f/scale", "ln_f/bias",
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    """Of a real model with an untied head, 3 layers stacked."""
    config = GPTConfig(17, n_layer=3, n_head=2, d_model=8, context_length=5, tied_head=False)
    return jax.device_get(jax.jit(gpt.init, static_argnums=0)(config, jax.random.key(0)))


def paths(tree):
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def descend(c, params, gradients, rates, hidden_rate=1.0):
    """Parameters after each gradient, as the train step applies updates."""
    tx = make_optimizer(c, hidden_rate)
    state, trail = jax.jit(tx.init)(params), []

    @jax.jit
    def step(g, state, params, rate):
        updates, state = tx.update(g, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    for g, rate in zip(gradients, rates, strict=True):
        params, state = step(g, state, params, np.float32(rate))
        trail.append(jax.device_get(params))
    return trail


@pytest.mark.parametrize(
    "name, expected", [("adamw", [0.89, 0.8863631598]), ("gpt1_adam", [0.8968377856, 0.8999905318])]
)
def test_published_figures(name, expected):
    """p = 1, gradients .5 and -.5, learning rate .1, weight decay .1."""
    c = OptimizerConfig(name=name, b1=0.9, b2=0.999, weight_decay=0.1)
    gradients = [{"kernel": jnp.float32(g)} for g in (0.5, -0.5)]
    trail = descend(c, {"kernel": jnp.float32(1.0)}, gradients, [0.1, 0.1])
    # 1 - .999 has a relative error of a thousand roundoffs, and a step is .1
    assert [float(p["kernel"]) for p in trail] == pytest.approx(expected, abs=0.1 * unit_roundoff("float32") / 0.001)


def test_gpt1_adam_is_not_adamw():
    """eps before the bias correction: a tiny gradient moves less than AdamW's."""
    move = {}
    for name in ("adamw", "gpt1_adam"):
        c = OptimizerConfig(name=name, b1=0.9, b2=0.999, eps=1e-4, weight_decay=0.0)
        move[name] = -float(descend(c, {"kernel": jnp.zeros(())}, [{"kernel": jnp.float32(1e-4)}], [1.0])[0]["kernel"])
    assert move["adamw"] == pytest.approx(0.5, rel=1e-4)
    eps_hat = (1e-5 * 0.1**-1) * 0.001**0.5 / (1e-4 * 0.001**0.5 + 1e-4)
    assert move["gpt1_adam"] == pytest.approx(eps_hat, rel=1e-4)


def test_adamw_is_optax_adamw_with_a_schedule(params):
    rates = [1e-3, 3e-3, 2e-3, 5e-4, 0.0, 1e-2]
    c = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
    rng = np.random.default_rng(1)
    noise = lambda p: np.float32(0.1) * rng.standard_normal(p.shape, np.float32)
    gradients = [jax.tree.map(noise, params) for _ in rates]
    mask = jax.tree_util.tree_map_with_path(lambda path, _: parameter_path(path) in DECAYED, params)
    peer = optax.adamw(lambda t: jnp.asarray(rates)[t], b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, mask=mask)
    state, expected = jax.jit(peer.init)(params), params

    @jax.jit
    def step(g, state, params):
        updates, state = peer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g, got in zip(gradients, descend(c, params, gradients, rates), strict=True):
        expected, state = step(g, state, expected)
        assert_close(got, expected, terms=6 * 12)  # steps, and operations of each


def test_exactly_matrices_and_embeddings_decay(params):
    mask = paths(decay_mask(params))
    assert {name for name, on in mask.items() if on} == DECAYED
    assert {name for name, on in mask.items() if not on} == NOT_DECAYED
    stacked = paths(params)
    assert stacked["blocks/ln_1/scale"].shape == (3, 8)  # two axes, yet a gain
    assert stacked["blocks/attn/c_attn/bias"].ndim == 3  # three, yet a bias


def test_the_kernel_of_a_scalar_head_decays_and_its_bias_does_not():
    """As in Hugging Face's Trainer and TRL: a linear layer to one output has a matrix like any other."""
    config = GPTConfig(17, n_layer=1, n_head=2, d_model=8, context_length=5)
    mask = paths(decay_mask(nn.meta.unbox(heads.abstract_scalar_model(config))))
    assert (mask["head/kernel"], mask["head/bias"]) == (True, False)
    assert {name for name, on in mask.items() if on} == {f"trunk/{n}" for n in DECAYED - {"lm_head"}} | {"head/kernel"}


@pytest.mark.parametrize("name", ["adamw", "gpt1_adam"])
def test_decay_reaches_the_masked_parameters_and_no_other(params, name):
    c = OptimizerConfig(name=name, b1=0.9, b2=0.999, weight_decay=0.1)
    params = jax.tree.map(lambda p: p + 1.0, params)
    after = paths(descend(c, params, [jax.tree.map(np.zeros_like, params)], [0.1])[0])
    correction = 0.001**0.5 / 0.1 if name == "gpt1_adam" else 1.0
    for path, p in paths(params).items():
        shrunk = p * (1 - 0.1 * 0.1 * correction) if path in DECAYED else p
        assert_close(after[path], shrunk, terms=4, err_msg=path)
        assert path in DECAYED or np.array_equal(after[path], shrunk)


def test_the_decayed_pattern_is_the_configs(params):
    c = OptimizerConfig(decayed=r"^wte$", weight_decay=0.5)
    after = paths(descend(c, params, [jax.tree.map(np.zeros_like, params)], [1.0])[0])
    changed = {path for path, p in paths(params).items() if not np.array_equal(p, after[path])}
    assert changed == {"wte"}


# --- clipping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip, scale", [(2.5, 2.5), (100.0, 5.0), (0.0, 5.0)])
def test_the_gradient_is_cut_to_its_global_norm(clip, scale):
    """Gradient (3, 4) over two parameters: norm 5. Plain descent shows what the optimizer was given."""

    def loss(params, batch, key):
        return 3 * params["a"] + 4 * params["b"], jnp.float32(1)

    descent = optax.scale(-1.0)
    step = jax.jit(train_step(Objective(loss), descent, clip, PrecisionConfig(), seed=0, dropout=False))
    state = new_state({"a": jnp.float32(0), "b": jnp.float32(0)}, descent, PrecisionConfig())
    new, metrics = step(state, ({"weights": jnp.ones((1, 1, 1))}, jnp.float32(0.5)))
    got = np.array([new.params["a"], new.params["b"]])
    assert_close(got, -0.5 * scale * np.array([0.6, 0.8]), terms=6)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)  # told before it is cut


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"name": "adam"}, "adamw or gpt1_adam"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"b1": 1.0}, "b1"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"decayed": "("}, "regular expression"),
    ],
)
def test_bad_fields(fields, says):
    with pytest.raises(InputError, match=says):
        OptimizerConfig(**fields)
