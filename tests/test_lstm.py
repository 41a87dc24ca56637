"""LSTM and mLSTM: the recurrence against numpy, its gradients, resets, dropout, and a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, tolerance

from gptjax.model import architecture, lstm
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPT1
from gptjax.objectives.lm import causal_lm_loss, lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import parameter_shardings

V, T, B = 17, 10, 4
LSTM = LSTMConfig(V, units=8, d_embed=8, context_length=T)
MLSTM = LSTMConfig(V, units=8, d_embed=6, context_length=T, cell="mlstm", tied_head=False)
BOTH = pytest.mark.parametrize("c", [LSTM, MLSTM], ids=["lstm", "mlstm"])
TERMS = T * (8 + 8 + 8 + 8 + 20)  # of a step: the sums over inputs, m and state, the columns' norms, the gates


def params(c, seed=0):
    """Not as they are initialized: gains other than the columns' norms, biases other than 0."""
    rng, made = np.random.default_rng(seed), init(c, jax.random.key(seed))
    return jax.tree.map(lambda a: (a + 0.3 * rng.normal(size=a.shape)).astype(np.float32), made)


def tokens(seed=0, rows=B, time=T):
    return np.random.default_rng(seed).integers(0, V, (rows, time)).astype(np.int32)


states = jax.jit(lstm.states, static_argnames=("config", "dtype"))
init = jax.jit(architecture.init, static_argnums=0)


# --- the definition -----------------------------------------------------------------------------------------


def by_numpy(p, c, row):
    """(h, c) after each token of one row, in float64, written from the papers' equations."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    sigmoid, U = lambda x: 1 / (1 + np.exp(-x)), c.units

    def matrix(part):
        w = part["kernel"].reshape(len(part["kernel"]), -1)
        return w / np.linalg.norm(w, axis=0) * part["gain"].reshape(-1) if c.cell == "mlstm" else w

    wx, wh, b = matrix(p["cell"]["x"]), matrix(p["cell"]["h"]), p["cell"]["x"]["bias"].reshape(-1)
    h, cell, out = np.zeros(U), np.zeros(U), []
    for token in row:
        x = p["wte"][token]
        m = (x @ matrix(p["cell"]["mx"])) * (h @ matrix(p["cell"]["mh"])) if c.cell == "mlstm" else h
        i, f, o, u = np.split(x @ wx + m @ wh + b, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(u)
        h = sigmoid(o) * np.tanh(cell)
        out.append((h, cell))
    return tuple(np.array(a) for a in zip(*out, strict=True))


@BOTH
def test_the_states_are_numpys(c):
    p, x = params(c), tokens()
    h_BTU, c_BTU = states(p, c, x)
    for row, h_TU, c_TU in zip(x, h_BTU, c_BTU, strict=True):
        assert_close((h_TU, c_TU), by_numpy(p, c, row), terms=TERMS)
    head, bias = (p["wte"], 0) if c.tied_head else (p["lm_head"], p["lm_bias"])
    assert_close(architecture.logits(p, c, h_BTU), np.asarray(h_BTU) @ np.asarray(head).T + np.asarray(bias), terms=16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_it_is_the_same_function(dtype):
    p, x = params(MLSTM), tokens()
    (h, _), (h32, _) = states(p, MLSTM, x, dtype=dtype), states(p, MLSTM, x)
    assert h.dtype == dtype and np.abs(np.asarray(h, np.float32) - h32).max() < tolerance(T, dtype)


def test_parameter_counts():
    """Radford et al. 2017's, with its gains; GPT-1's baseline; and the closed form is what there is."""
    assert lstm.parameter_count(LSTMConfig(256, 4096, 64, 256, cell="mlstm", tied_head=False)) == 86_319_360
    assert 86_319_360 == 86_278_400 + 40_960
    baseline = LSTMConfig(GPT1.vocab_size, 2048, 2048, 512)
    assert lstm.parameter_count(baseline) == 116_461_568
    assert abs(lstm.parameter_count(baseline) / architecture.parameter_count(GPT1) - 1) < 1e-3
    for c in (LSTM, MLSTM, dataclasses.replace(LSTM, tied_head=False, d_embed=3)):
        shapes = jax.tree.map(jnp.shape, init(c, jax.random.key(0)))
        of = lambda tree: sum(int(np.prod(s)) for s in jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, tuple)))
        assert of(shapes) == lstm.parameter_count(c)
        assert of(shapes["cell"]) == lstm.non_embedding_count(c)


def test_initialization():
    """Columns of 1/sqrt(inputs), gains that change nothing, and a forget gate that is open."""
    c = LSTMConfig(300, 200, 100, 8, cell="mlstm", tied_head=False)
    p = init(c, jax.random.key(0))
    for name, inputs in {"x": 100, "h": 200, "mx": 100, "mh": 200}.items():
        part = p["cell"][name]
        sd = float(part["kernel"].std() * np.sqrt(inputs))
        assert abs(sd - 1) < 4 / np.sqrt(2 * part["kernel"].size), name
        np.testing.assert_allclose(lstm._kernel(part), part["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(p["cell"]["x"]["bias"], np.eye(4)[1][:, None] * np.ones(200))
    tied = init(LSTMConfig(300, 200, 200, 8), jax.random.key(0))
    for table, std in ((p["wte"], 1), (p["lm_head"], 0.02), (tied["wte"], 0.02)):
        assert abs(float(table.std()) / std - 1) < 4 / np.sqrt(2 * table.size)


# --- what it must not see -----------------------------------------------------------------------------------


@BOTH
def test_no_state_depends_on_what_comes_after(c):
    p, x = params(c), tokens()
    other = x.copy()
    other[:, 6:] = (other[:, 6:] + 1) % V
    one, two = states(p, c, x)[0], states(p, c, other)[0]
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (np.abs(one[:, 6:] - two[:, 6:]).max(-1) > 0).all()


@BOTH
def test_a_segment_begins_with_a_state_of_0(c):
    p, x = params(c), tokens()
    whole = states(p, c, x, segment_ids=np.array([[1] * 4 + [2] * 6] * B))
    assert_close([a[:, :4] for a in whole], [*states(p, c, x[:, :4])], terms=TERMS)
    assert_close([a[:, 4:] for a in whole], [*states(p, c, x[:, 4:])], terms=TERMS)


def test_a_state_goes_on():
    p, x = params(MLSTM), tokens()
    h, c = states(p, MLSTM, x[:, :4])
    rest = states(p, MLSTM, x[:, 4:], state=lstm.State(h[:, -1], c[:, -1]))
    assert_close(list(rest), [a[:, 4:] for a in states(p, MLSTM, x)], terms=TERMS)


# --- gradients ----------------------------------------------------------------------------------------------


def plainly(p, c, tokens_BT, segments_BT):
    """The sum of squares of h and of tanh(c), differentiated through a loop that has no derivative of its own."""
    kernels = {name: lstm._kernel(part) for name, part in p["cell"].items()}
    h_BU = c_BU = jnp.zeros((len(tokens_BT), c.units))
    total = 0.0
    for t in range(tokens_BT.shape[1]):
        keep = segments_BT[:, t] == segments_BT[:, t - 1] if t else jnp.ones(len(tokens_BT), bool)
        h_BU, c_BU = jnp.where(keep[:, None], h_BU, 0), jnp.where(keep[:, None], c_BU, 0)
        x = p["wte"][tokens_BT[:, t]]
        m = (x @ kernels["mx"]) * (h_BU @ kernels["mh"]) if "mx" in kernels else h_BU
        z = jnp.einsum("be,egu->bgu", x, kernels["x"]) + jnp.einsum("bu,ugv->bgv", m, kernels["h"])
        h_BU, c_BU = lstm._gates(z + p["cell"]["x"]["bias"], c_BU)
        total += (h_BU**2).sum() + (jnp.tanh(c_BU) ** 2).sum()
    return total


@BOTH
def test_gradients_are_those_of_the_plain_loop(c):
    p, x = params(c), tokens(time=6)
    segments = np.array([[1] * 4 + [2] * 2, [1] * 6, [1] * 6, [1] + [2] * 5])

    def scanned(p):
        h, cell = lstm.states(p, c, x, segment_ids=segments)
        return (h**2).sum() + (jnp.tanh(cell) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(scanned))(p)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: plainly(p, c, x, segments)))(p)
    assert_close(value, expected, terms=TERMS + B * T * 8)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    assert_close(grads, expected_grads, terms=2 * TERMS + B * T, scale=largest)


@BOTH
def test_gradients_by_finite_differences(c):
    """Central differences of the loss along random directions, in float64."""
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    p = params(c)
    loss = lambda p: causal_lm_loss(c, jnp.float32, 4)(p, batch, None)[0]
    grads = jax.jit(jax.grad(loss))(p)
    direction = jax.tree.map(lambda a: jnp.sign(a), grads)
    along = jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)
    move = lambda eps: jax.tree.map(lambda a, d: np.float64(a) + eps * np.float64(d), p, direction)

    def by_hand(p):
        total = 0.0
        for row in batch["tokens"]:
            h, _ = by_numpy(p, c, row[:-1])
            z = h @ (p["wte"] if c.tied_head else p["lm_head"]).T + (0 if c.tied_head else p["lm_bias"])
            z = z - z.max(-1, keepdims=True)
            total -= (z - np.log(np.exp(z).sum(-1, keepdims=True)))[np.arange(T), row[1:]].sum()
        return total

    eps = 1e-5
    slope = (by_hand(move(eps)) - by_hand(move(-eps))) / (2 * eps)
    np.testing.assert_allclose(sum(map(float, jax.tree.leaves(along))), slope, rtol=1e-4)


@BOTH
def test_the_loss_that_is_trained_is_the_plain_one(c):
    """With the head's bias as a column of the matrix."""
    p = params(c)
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    batch["segment_ids"] = np.array([[1] * 4 + [2] * 6] * B)
    one = jax.jit(jax.value_and_grad(lambda p: causal_lm_loss(c, jnp.float32, 4)(p, batch, None)[0]))(p)
    two = jax.jit(jax.value_and_grad(lambda p: lm_loss(p, c, batch)[0]))(p)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(two[1]))
    assert_close(one, two, terms=2 * TERMS + B * T, scale=largest)


def test_dropout_depends_on_the_row_alone_and_leaves_the_recurrence():
    """The state is what a step gets, undropped: with embeddings undropped h is h without dropout, scaled or 0."""
    c = dataclasses.replace(LSTM, dropout=0.25)
    p, x, keys = params(LSTM), tokens(), jax.random.split(jax.random.key(3), B)
    run = jax.jit(lambda keys, x: architecture.hidden(p, c, x, dropout_keys=keys))
    out, other = run(keys, x), run(keys[::-1], x[::-1])[::-1]
    np.testing.assert_array_equal(out, other)
    h, _ = lstm.states(p, c, x, dropout_keys=keys)
    kept = np.asarray(out) != 0
    np.testing.assert_allclose(out, np.where(kept, h / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)
    assert np.abs(h - states(p, LSTM, x)[0]).max() > 0.01  # the embeddings' dropout
    np.testing.assert_array_equal(architecture.hidden(p, c, x), states(p, c, x)[0])


# --- on a mesh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [LSTM, pytest.param(MLSTM, marks=pytest.mark.slow)], ids=["lstm", "mlstm"])
def test_data_2_fsdp_2_is_one_device(c):
    """Loss and gradients, documents and dropout included; and the parameters are where fsdp wants them."""
    c = dataclasses.replace(c, dropout=0.2)
    p, keys = params(c), jax.random.split(jax.random.key(5), B)
    batch = {"tokens": tokens(time=T + 1), "weights": np.ones((B, T), np.float32)}
    batch["segment_ids"] = np.array([[1] * 4 + [2] * 6] * B)
    found = []
    for devices, axes in ((1, {}), (4, {"data": 2, "fsdp": 2})):
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
        shardings = parameter_shardings(architecture.abstract_params(c), mesh)
        loss = causal_lm_loss(c, jnp.float32, 4, mesh)
        gradient = jax.jit(jax.value_and_grad(lambda p, k, loss=loss: loss(p, batch, k)[0]))
        with jax.set_mesh(mesh):
            found.append(jax.device_get(gradient(jax.device_put(p, shardings), keys)))
    assert shardings["cell"]["h"]["kernel"].shard_shape((8, 4, 8)) == (4, 4, 8)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(found[0][1]))
    assert_close(found[1], found[0], terms=2 * TERMS + B * T, scale=largest)
