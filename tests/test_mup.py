"""muP: the standard model at the base width, the same function in both parametrizations, Table 8's scalings, and the
coordinate check, which must see each of them missing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numerics import assert_close, model_terms
from test_gpt import forward, random_params, random_tokens
from test_optimizer import descend

from experiments.mup import coordinates
from gptjax.config import build
from gptjax.errors import InputError
from gptjax.interop import huggingface
from gptjax.model import architecture, gpt, heads, mup
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import PrecisionConfig
from gptjax.training.step import train_program

STANDARD = GPTConfig(17, n_layer=2, n_head=2, d_model=16, context_length=8, attention="reference")
WIDE = dataclasses.replace(STANDARD, mup_base_width=4, mup_base_heads=2)  # 4 times as wide, heads too
HIDDEN = {f"blocks/{name}/kernel" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}


def test_at_the_base_width_it_is_the_standard_program():
    """Train step and initialization lower to the same program, so that all bits are the same."""
    lowered = []
    for config in (STANDARD, dataclasses.replace(STANDARD, mup_base_width=16, mup_base_heads=2)):
        mesh, precision = make_mesh(MeshConfig(), jax.devices()[:1]), PrecisionConfig()
        objective = Objective(causal_lm_loss(config, jnp.float32, 8, mesh))
        train = train_program(objective, gpt.abstract_params, config, OptimizerConfig(), precision, mesh)
        batch = {"tokens": np.zeros((1, 1, 2, 9), np.int32), "weights": np.ones((1, 1, 2, 8), np.float32)}
        step = train.step.lower(train.abstract, batch, np.ones(1, np.float32), np.uint32(0)).as_text()
        init = jax.jit(functools.partial(gpt.init, config)).lower(jax.random.key(0)).as_text()
        lowered.append((step, init))
    assert lowered[0] == lowered[1]


def test_initial_weights():
    """Those of the blocks' matrices are the standard ones over sqrt(4), all others are the standard ones."""
    init = lambda config: flatten_dict(jax.jit(gpt.init, static_argnums=0)(config, jax.random.key(0)), sep="/")
    for name, array in init(STANDARD).items():
        np.testing.assert_array_equal(init(WIDE)[name], array / 2 if name in HIDDEN else array, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "gpt1_adam"])
def test_the_blocks_matrices_learn_at_the_hidden_rate_and_decay_at_the_full_one(name):
    assert WIDE.hidden_rate == 1 / 4 and architecture.hidden_rate(WIDE) == 1 / 4
    c = OptimizerConfig(name, weight_decay=0.1, decayed="kernel")
    params = {"trunk": random_params(STANDARD), "head": heads.new_head(16, jax.random.key(0))}  # of a reward model
    gradients = jax.tree.map(lambda p: 0.3 + 0 * p, params)
    after = [flatten_dict(descend(c, params, [gradients], [1.0], rate)[0], sep="/") for rate in (1.0, 1 / 4)]
    decay = flatten_dict(descend(c, params, [jax.tree.map(jnp.zeros_like, params)], [1.0])[0], sep="/")
    for path, p in flatten_dict(params, sep="/").items():
        full, scaled = after[0][path] - decay[path], after[1][path] - decay[path]
        expected = full / 4 if path.removeprefix("trunk/") in HIDDEN else full
        assert_close(scaled, expected, terms=16, stored=float(np.abs(p).max()), err_msg=path)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("base", [4, 5])  # multipliers 1/4 and 1/2; 5/16 and sqrt(5/16)
def test_an_export_is_the_same_function_in_standard_parametrization(tmp_path, norm, base):
    standard = dataclasses.replace(STANDARD, norm=norm, tied_head=norm == "pre", attention="auto")
    config = dataclasses.replace(standard, mup_base_width=base, mup_base_heads=1 if base == 5 else 2)
    params, tokens = random_params(config), random_tokens(config)
    huggingface.write(tmp_path / "a", config, params)
    plain, folded = huggingface.read(tmp_path / "a")
    assert plain == standard
    assert_close(forward(folded, plain, tokens), forward(params, config, tokens), terms=model_terms(plain, 3))
    if base == 4:  # powers of two: nothing is rounded
        flat, query = flatten_dict(folded, sep="/"), flatten_dict(params, sep="/")["blocks/attn/c_attn/kernel"][:, :, 0]
        np.testing.assert_array_equal(2 * flat["blocks/attn/c_attn/kernel"][:, :, 0], query)


def test_settings_that_make_no_sense():
    for fields, says in (
        ({"mup_base_width": 4}, "needs both"), ({"mup_base_heads": 2}, "needs both"),
        ({"mup_base_width": 5, "mup_base_heads": 2}, "not a multiple"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            dataclasses.replace(STANDARD, **fields)


def test_an_lstm_has_no_mup():
    section = dict(cell="lstm", vocab_size=17, units=8, d_embed=8, context_length=8, mup_base_width=4, mup_base_heads=1)
    with pytest.raises(InputError, match="Unknown key config.model.mup_base_width: there are cell, "):
        build(architecture.ModelConfig, section, "config.model")
    assert architecture.hidden_rate(LSTMConfig(17, 8, 8, 8)) == 1


def test_weights_do_not_go_from_one_parametrization_to_another():
    assert {"mup_base_width", "mup_base_heads"} <= architecture.shape(WIDE).keys()
    assert mup.fold(STANDARD, {})[0] is STANDARD


# --- the coordinate check ---------------------------------------------------------------------------------

WIDER = 256
FLAT = 0.25  # a factor of a power of the width that is missing changes a slope by 1/2 or 1


@functools.cache
def movement(name: str, width: int) -> dict:
    return coordinates.check(coordinates.VARIANTS[name], [width], steps=4, seeds=(0, 1))


def slopes(name: str) -> dict[str, float]:
    """From the base width, where all variants are one model, to a wider one."""
    narrow, wide = movement("muP", coordinates.BASE), movement(name, WIDER)
    both = {key: np.concatenate([narrow[key], wide[key]], axis=1) for key in wide}
    return coordinates.slopes(both, [coordinates.BASE, WIDER])


def test_under_mup_all_activations_move_as_far_at_any_width():
    found = slopes("muP")
    assert set(found) == set(coordinates.ACTIVATIONS) and max(map(abs, found.values())) < FLAT, found


@pytest.mark.parametrize(
    "name, where",
    [("hidden learning rate not scaled", "MLP hidden"), ("no output multiplier", "logits"),
     ("attention 1/sqrt(d)", "attention scores")],
)  # fmt: skip
def test_a_scaling_that_is_missing_is_seen(name, where):
    found = slopes(name)
    assert found[where] > FLAT and found[where] - slopes("muP")[where] > FLAT, found
