"""The model: a numpy forward as oracle, its initialization, and what each part must and must not see."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numerics import assert_close, model_terms, tolerance

from gptjax.errors import InputError
from gptjax.model import gpt, layers, plain
from gptjax.model.matmul import matmul
from gptjax.model.spec import GPT1, GPT2, GPTConfig
from gptjax.objectives.chunked import cross_entropy_sum
from gptjax.objectives.lm import causal_lm_loss

TINY = GPTConfig(vocab_size=61, n_layer=3, n_head=2, d_model=16, context_length=12, attention="reference")
VARIANTS = {
    "pre": TINY,
    "post": dataclasses.replace(TINY, norm="post", local_window=3, attention="cpu"),
    "untied": dataclasses.replace(TINY, tied_head=False, local_window=3, mup_base_width=4, mup_base_heads=2),  # muP
}
TERMS = model_terms(TINY, 3)
every_variant = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def random_params(config, seed=0):
    """Every parameter random and large enough to matter, LayerNorm gains and all biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def random_tokens(config, batch=3, time=None, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time or config.context_length))


@functools.partial(jax.jit, static_argnums=1)
def forward(params, config, tokens, positions=None, segment_ids=None, dropout_keys=None):
    x = gpt.hidden(
        params, config, tokens, positions=positions, segment_ids=segment_ids, dropout_keys=dropout_keys
    )
    return x, gpt.logits(params, config, x)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, tokens):
    """((loss, (hidden, logits)), gradients) of what is trained."""

    def loss(params):
        x = gpt.hidden(params, config, tokens[:, :-1])
        w = gpt.unembedding(params, config)
        total = cross_entropy_sum(x, w, tokens[:, 1:], jnp.ones(tokens[:, 1:].shape), 4)
        return total, (x, gpt.logits(params, config, x))

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def plain_gradients(config, params, tokens):
    def loss(params):
        logits = plain.forward(params, config, tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


# --- the oracle -------------------------------------------------------------------------------------------


def numpy_forward(params, c, tokens):
    """(hidden, logits) of GPT-1, 2 and 3 in float64, one row at a time, from the papers."""
    p = {name: np.asarray(a, np.float64) for name, a in flatten_dict(params, sep="/").items()}

    def norm(x, name, layer=None):
        gain, bias = (p[f"{name}/{part}"][... if layer is None else layer] for part in ("scale", "bias"))
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias

    def linear(x, name, layer):
        w, b = p[f"blocks/{name}/kernel"][layer], p[f"blocks/{name}/bias"][layer]
        return x @ w.reshape(len(w), -1) + b.reshape(-1)

    def attend(x, layer):
        q, k, v = np.split(linear(x, "attn/c_attn", layer), 3, axis=-1)
        out = np.zeros_like(q)
        size = c.d_model // c.n_head
        divisor = size / math.sqrt(c.mup_base_width / c.mup_base_heads) if c.mup_base_width else math.sqrt(size)
        for head in range(c.n_head):
            at = slice(head * size, (head + 1) * size)
            for t in range(len(x)):
                first = max(0, t - c.local_window + 1) if c.local_window and layer % 2 == 1 else 0
                scores = k[first : t + 1, at] @ q[t, at] / divisor
                e = np.exp(scores - scores.max())
                out[t, at] = e / e.sum() @ v[first : t + 1, at]
        return linear(out, "attn/c_proj", layer)

    def mlp(x, layer):
        h = linear(x, "mlp/c_fc", layer)
        return linear(0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))), "mlp/c_proj", layer)

    rows = []
    for row in tokens:
        x = p["wte"][row] + p["wpe"][: len(row)]
        for layer in range(c.n_layer):
            if c.norm == "pre":
                x = x + attend(norm(x, "blocks/ln_1", layer), layer)
                x = x + mlp(norm(x, "blocks/ln_2", layer), layer)
            else:
                x = norm(x + attend(x, layer), "blocks/ln_1", layer)
                x = norm(x + mlp(x, layer), "blocks/ln_2", layer)
        rows.append(norm(x, "ln_f") if c.norm == "pre" else x)
    x = np.stack(rows) / (c.d_model / c.mup_base_width if c.mup_base_width else 1)
    return x, x @ p["wte" if c.tied_head else "lm_head"].T


@every_variant
def test_forward_loss_and_gradient_equal_numpy_and_the_plain_form(name):
    """What is trained, beside the papers in float64 and beside plain.forward, which a reader meets first."""
    c = VARIANTS[name]
    params, tokens = random_params(c), random_tokens(c, time=13)
    (loss, (x, logits)), grads = gradients(c, params, tokens)
    expected_x, expected_logits = numpy_forward(params, c, tokens[:, :-1])
    assert x.dtype == logits.dtype == jnp.float32
    assert_close((x, logits), (expected_x, expected_logits), terms=TERMS)
    log_p = expected_logits - np.log(np.exp(expected_logits).sum(-1, keepdims=True))
    assert_close(loss, -np.take_along_axis(log_p, tokens[:, 1:, None], -1).sum(), terms=TERMS)
    assert_close(((loss, logits), grads), plain_gradients(c, params, tokens), terms=TERMS)


def test_fewer_tokens_than_the_context():
    c = VARIANTS["post"]
    params, tokens = random_params(c), random_tokens(c, time=7)
    assert_close(forward(params, c, tokens), numpy_forward(params, c, tokens), terms=TERMS)


def test_bfloat16_activations_are_near():
    c = TINY
    params, tokens = random_params(c), random_tokens(c)
    x, logits = jax.jit(lambda p: (x := gpt.hidden(p, c, tokens, dtype=jnp.bfloat16), gpt.logits(p, c, x)))(params)
    assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    expected = numpy_forward(params, c, tokens)[0]
    assert np.abs(np.asarray(x, np.float64) - expected).max() < 0.2 * expected.std()


def test_bfloat16_weight_gradients_are_not_rounded():
    """Accumulated in float32: a weight's gradient is a long sum, which 8 bits would lose."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64, 8)), jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(1).standard_normal((8, 3, 5)), jnp.float32)
    d_y = jnp.asarray(np.random.default_rng(2).standard_normal((4, 64, 3, 5)), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: matmul(x, w, ("embed", "qkv", "heads")), x, w)
    d_x, d_w = pull(d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = lambda *names_and_arrays: np.einsum(
        names_and_arrays[0], *(np.asarray(a, np.float64) for a in names_and_arrays[1:])
    )
    assert_close(d_w, exact("bti,btjk->ijk", x, d_y), terms=4 * 64)
    rounded = w.astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact("bti,ijk->btjk", x, rounded), rtol=2**-8, atol=1e-2)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), exact("btjk,ijk->bti", d_y, rounded), rtol=2**-8, atol=1e-2)


# --- initialization ---------------------------------------------------------------------------------------


initialize = jax.jit(gpt.init, static_argnums=0)


@pytest.mark.parametrize("config, residual_std", [(GPT2["124m"], 0.0040825), (GPT1, 0.02)], ids=["gpt2", "gpt1"])
def test_published_initialization(config, residual_std):
    """Weights N(0, .02), residual projections .02/sqrt(2 L) in GPT-2 and .02 in GPT-1, gains 1, biases 0: at the
    published depth, narrower."""
    c = dataclasses.replace(config, d_model=192, vocab_size=5000)
    for name, x in flatten_dict(jax.device_get(initialize(c, jax.random.key(0))), sep="/").items():
        kind = name.split("/")[-1]
        if kind == "scale":
            assert (x == 1).all(), name
        elif kind == "bias":
            assert (x == 0).all(), name
        else:
            std = residual_std if "c_proj" in name else 0.02
            assert x.std() == pytest.approx(std, rel=0.02), name
            assert abs(x.mean()) < 4 * std / x.size**0.5, name


def test_the_loss_at_initialization():
    """ln V + d sigma^2 / 2, for logits of variance d sigma^2 (not ln V), at the published width."""
    c = dataclasses.replace(GPT2["124m"], n_layer=1, attention="cpu", dropout=0.0, vocab_size=5000)
    params = initialize(c, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, (4, 65))
    batch = {"tokens": tokens, "weights": np.ones((4, 64), np.float32)}
    total, count = jax.jit(lambda p, b: causal_lm_loss(c, jnp.float32, 16)(p, b, None))(params, batch)
    assert count == 4 * 64
    assert total / count == pytest.approx(math.log(c.vocab_size) + c.d_model * 0.02**2 / 2, abs=0.06)


def test_every_layer_starts_different_and_the_seed_decides():
    c = GPTConfig(11, 48, 2, 64, 4)
    make = lambda seed: flatten_dict(jax.device_get(initialize(c, jax.random.key(seed))), sep="/")
    a, b, other = make(0), make(0), make(1)
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])
        if name.endswith("kernel") or name in ("wte", "wpe"):
            assert (x != other[name]).mean() > 0.99, name
        if name.endswith("kernel"):
            assert (x[0] != x[1]).mean() > 0.99, name
            # residual projections shrink with depth, here of 48 layers; of 12: test_published_initialization
            assert x.std() == pytest.approx(0.0020412 if "c_proj" in name else 0.02, rel=0.02), name


def test_names_and_shapes_are_gpt2s():
    c = dataclasses.replace(TINY, tied_head=False)
    shapes = {name: x.shape for name, x in flatten_dict(random_params(c), sep="/").items()}
    assert shapes == {
        "wte": (61, 16), "wpe": (12, 16), "lm_head": (61, 16), "ln_f/scale": (16,), "ln_f/bias": (16,),
        "blocks/ln_1/scale": (3, 16), "blocks/ln_1/bias": (3, 16), "blocks/ln_2/scale": (3, 16),
        "blocks/ln_2/bias": (3, 16), "blocks/attn/c_attn/kernel": (3, 16, 3, 16), "blocks/attn/c_attn/bias": (3, 3, 16),
        "blocks/attn/c_proj/kernel": (3, 16, 16), "blocks/attn/c_proj/bias": (3, 16),
        "blocks/mlp/c_fc/kernel": (3, 16, 64), "blocks/mlp/c_fc/bias": (3, 64),
        "blocks/mlp/c_proj/kernel": (3, 64, 16), "blocks/mlp/c_proj/bias": (3, 16),
    }  # fmt: skip
    post = flatten_dict(random_params(VARIANTS["post"]), sep="/").keys()
    assert post == shapes.keys() - {"lm_head", "ln_f/scale", "ln_f/bias"}  # GPT-1: tied, no final LayerNorm


# --- LayerNorm, GELU --------------------------------------------------------------------------------------


def test_layer_norm_epsilon_is_1e_5():
    """On an input of variance 1e-5 it halves the variance; 1e-6, Flax's default, would leave 91 %."""
    x = jnp.float32(1e-5**0.5) * jnp.tile(jnp.array([1.0, -1.0]), 8)
    params = {"params": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
    y = layers.LayerNorm().apply(params, x)
    assert_close(y, np.sign(x) * 0.5**0.5, terms=3 * 16)


def test_layer_norm_of_bfloat16_is_taken_in_float32():
    """Values 256..257 have no variance in 8 bits; gain and bias act before the result is rounded."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(64) + 30, jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean()) / np.sqrt(x64.var() + 1e-5) * 3 - 2
    y = layers.LayerNorm().apply({"params": {"scale": jnp.full(64, 3.0), "bias": jnp.full(64, -2.0)}}, x)
    assert y.dtype == jnp.bfloat16
    canceled = tolerance(2 * 64) * 3 * 30  # the mean of 30 leaves what is about 1, and the gain is 3
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=canceled)


def test_gelu_is_the_tanh_form():
    x = np.linspace(-5, 5, 2001)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    found = np.asarray(layers.gelu(jnp.asarray(x, jnp.float32)))
    assert_close(found, tanh, terms=10)
    assert np.abs(found - erf).max() > 4e-4
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(slope[1:-1], (tanh[2:] - tanh[:-2]) / (x[2:] - x[:-2]), atol=1e-4)


# --- the head ---------------------------------------------------------------------------------------------


def test_a_tied_head_gets_the_gradients_of_both_its_uses():
    tied = dataclasses.replace(VARIANTS["untied"], tied_head=True)
    params, tokens = random_params(tied), random_tokens(tied, time=13)
    (value, _), grads = gradients(tied, params, tokens)
    (value_2, _), grads_2 = gradients(VARIANTS["untied"], {**params, "lm_head": params["wte"]}, tokens)
    assert_close(value, value_2, terms=TERMS)
    scale = np.abs(grads["wte"]).max()
    assert_close(grads["wte"], grads_2["wte"] + grads_2["lm_head"], terms=TERMS)
    for part in ("wte", "lm_head"):
        assert np.abs(grads_2[part]).max() > 0.01 * scale  # neither is negligible


def test_an_untied_head_is_its_own():
    c = VARIANTS["untied"]
    params, tokens = random_params(c), random_tokens(c, time=13)
    assert gpt.unembedding(params, c) is params["lm_head"]
    (_, (x, logits)), _ = gradients(c, params, tokens)
    assert_close(logits, np.asarray(x) @ params["lm_head"].T, terms=TERMS)
    assert gpt.unembedding(random_params(TINY), TINY) is random_params(TINY)["wte"]


# --- what sees what ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def leak(params, config, tokens):
    """|d logits_t / d (embedding of position s)| summed over features: [t, s]. wpe stands in for the embedding."""

    def logits(wpe):
        x = gpt.hidden({**params, "wpe": wpe}, config, tokens)
        return gpt.logits(params, config, x)[0] @ jnp.sin(jnp.arange(config.vocab_size))

    return jnp.abs(jax.jacrev(logits)(params["wpe"])).sum(-1)


@pytest.mark.parametrize("name", ["pre", "post"])  # "untied" is banded too: test_dense_and_banded_layers_alternate
def test_the_future_leaks_exactly_nothing(name):
    c = VARIANTS[name]
    seen = np.asarray(leak(random_params(c), c, random_tokens(c, batch=1)))
    causal = np.tril(np.ones((12, 12), bool))
    assert (seen[~causal] == 0.0).all()
    assert (seen[causal] > 0.0).all()  # three layers, the first of them dense: all of the past is seen


@pytest.mark.parametrize("only", range(4))
def test_dense_and_banded_layers_alternate(only):
    """With the attention of all layers but one switched off, that layer's reach is what is seen."""
    c = dataclasses.replace(TINY, n_layer=4, local_window=3)
    params = jax.tree.map(np.copy, random_params(c))
    for part in ("kernel", "bias"):
        others = [layer for layer in range(4) if layer != only]
        params["blocks"]["attn"]["c_proj"][part][others] = 0
    seen = np.asarray(leak(params, c, random_tokens(c, batch=1))) > 0
    distance = np.arange(12)[:, None] - np.arange(12)[None]
    expected = (distance >= 0) & (distance < (3 if only % 2 else 12))
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("attention", ["reference", "cpu"])
def test_a_window_of_the_whole_context_is_the_dense_program(attention):
    dense, params = dataclasses.replace(TINY, attention=attention), random_params(TINY)
    config = lambda **change: dataclasses.replace(dense, **change)
    program = lambda **change: forward.lower(params, config(**change), random_tokens(TINY)).as_text()
    assert program(local_window=12) == program() != program(local_window=11)


def test_rows_do_not_see_each_other():
    params, tokens = random_params(TINY), random_tokens(TINY, time=13)
    order = np.array([2, 0, 1])
    (value, (x, _)), grads = gradients(TINY, params, tokens)
    (value_2, (shuffled, _)), grads_2 = gradients(TINY, params, tokens[order])
    assert_close(shuffled, np.asarray(x)[order], terms=TERMS)
    assert_close((value, grads), (value_2, grads_2), terms=TERMS)


def test_positions_tell_equal_tokens_apart():
    (_, (x, _)), _ = gradients(TINY, random_params(TINY), np.full((3, 13), 7))
    distances = np.linalg.norm(np.asarray(x)[0, :, None] - np.asarray(x)[0, None], axis=-1)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.01


@pytest.mark.parametrize("norm, attention", [("pre", "cpu"), ("post", "xla")])
def test_packed_documents_equal_the_documents_alone(norm, attention):
    """Two rows of documents of unequal length, against each document in a row of its own. With a window dense and
    banded layers alternate: both, on every path."""
    c = dataclasses.replace(TINY, norm=norm, local_window=3, attention=attention)
    params = random_params(c)
    rng = np.random.default_rng(5)
    rows = [[rng.integers(0, 61, n) for n in lengths] for lengths in ((5, 4, 3), (1, 9, 2))]
    documents = [d for row in rows for d in row]
    tokens = np.zeros((2 + 6, 12), int)  # first the packed rows, then each document alone
    positions, segments = np.tile(np.arange(12), (8, 1)), np.zeros((8, 12), int)
    for i, row in enumerate(rows):
        tokens[i] = np.concatenate(row)
        positions[i] = np.concatenate([np.arange(len(d)) for d in row])
        segments[i] = np.repeat(np.arange(len(row)), [len(d) for d in row])
    for row, document in zip(tokens[2:], documents, strict=True):
        row[: len(document)] = document  # what follows it is the future, and is not seen
    x = np.asarray(forward(params, c, tokens, positions, segments)[0])
    packed, alone = x[:2], x[2:]
    expected = np.stack([np.concatenate([alone[i, : len(documents[i])] for i in at]) for at in ((0, 1, 2), (3, 4, 5))])
    assert_close(packed, expected, terms=TERMS)
    together = np.asarray(forward(params, c, tokens, positions, 0 * segments)[0])
    assert np.abs(together[:2] - expected).max() > 0.1  # of one segment they do see each other


# --- how it is computed -----------------------------------------------------------------------------------


def test_remat_and_scan_unrolling_change_nothing():
    """Of dense and banded layers, by turns; each remat policy by itself: test_remat_policies_trade_memory."""
    base = VARIANTS["untied"]
    params, tokens = random_params(base), random_tokens(base, time=13)
    expected = gradients(base, params, tokens)
    for change in ({"unroll": 3, "remat": "offload"}, {"unroll": 2, "remat": "full"}):
        found = gradients(dataclasses.replace(base, **change), params, tokens)
        assert_close(found, expected, terms=TERMS, err_msg=str(change))


def test_remat_policies_trade_memory_for_recomputation():
    """'none' keeps everything, 'full' recomputes everything, 'dots' keeps the weight matmuls and lies between; all of
    them give the same gradients."""
    memory, flops, results = {}, {}, {}
    for remat in ("none", "dots", "full"):
        c = GPTConfig(64, 4, 2, 64, 64, remat=remat, attention="reference")
        params, tokens = random_params(dataclasses.replace(c, remat="none")), random_tokens(c, 32, 65)
        batch = {"tokens": tokens, "weights": np.ones((32, 64), np.float32)}
        loss = causal_lm_loss(c, jnp.float32, 4)
        compiled = jax.jit(jax.value_and_grad(lambda p, b, f=loss: f(p, b, None)[0])).lower(params, batch).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        flops[remat] = compiled.cost_analysis()["flops"]
        results[remat] = compiled(params, batch)
    assert memory["full"] < 0.9 * memory["dots"] and memory["dots"] < 0.9 * memory["none"], memory
    # 'dots' is spared the weight matmuls that the backward pass needs again: 3 d^2 + d^2 of attention and 4 d^2 of
    # the MLP, its last one feeding only a sum. XLA counts a scanned layer once.
    assert flops["none"] < flops["dots"] < flops["full"] - 0.9 * 2 * 8 * 64**2 * 32 * 64, flops
    for remat in ("dots", "full"):
        assert_close(results[remat], results["none"], terms=model_terms(c, 32), err_msg=remat)


def test_compile_time_does_not_grow_with_depth():
    """The layers are one loop: 24 of them make a program no longer than 4 of them do."""

    def program(n_layer):
        c = dataclasses.replace(TINY, n_layer=n_layer)
        params = jax.eval_shape(lambda key: gpt.init(c, key), jax.random.key(0))
        return gradients.lower(c, params, jax.ShapeDtypeStruct((2, 12), jnp.int32)).as_text().count("\n")

    assert program(24) == program(4)


# --- dropout ----------------------------------------------------------------------------------------------


def test_dropout_is_decided_by_its_key():
    """The masks of a row depend on its key alone, not on the rows beside it."""
    c = dataclasses.replace(TINY, dropout=0.2)
    params, tokens = random_params(c), random_tokens(c)
    drop = lambda tokens, keys: np.asarray(forward(params, c, tokens, dropout_keys=keys)[0])
    keys, others = (jax.random.split(jax.random.key(seed), 3) for seed in (0, 1))
    a, again, other = drop(tokens, keys), drop(tokens, keys), drop(tokens, others)
    without = numpy_forward(params, c, tokens)[0]
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - other).max() > 0.1 and np.abs(a - without).max() > 0.1
    order = np.array([1, 2, 0])
    assert_close(drop(tokens[order], keys[order]), a[order], terms=TERMS)
    same = drop(np.stack([tokens[0]] * 3), keys)
    assert np.abs(same[0] - same[1]).max() > 0.1  # two rows of the same tokens: two masks
    program = lambda config, **options: forward.lower(params, config, tokens, **options).as_text()
    assert program(c) == program(TINY) != program(c, dropout_keys=keys)  # no key: the rate does not matter
    assert program(TINY, dropout_keys=keys) == program(TINY)  # no rate: the key does not


@functools.partial(jax.jit, static_argnums=0)
def block_outputs(config, params, keys):
    """[layer, batch, time, feature]"""
    tokens = jnp.zeros((len(keys), 12), int)
    sown = gpt.GPT(config).apply({"params": params}, tokens, tokens, dropout_keys=keys, mutable="intermediates")[1]
    return sown["intermediates"]["blocks"]["block"][0]


def block_outputs_under_dropout(config, ones):
    """block_outputs of a model that is all zeros but for the parameters named: those are 1."""
    params = flatten_dict(random_params(config), sep="/")
    params = {k: np.full_like(v, any(k.endswith(one) for one in ones)) for k, v in params.items()}
    return np.asarray(block_outputs(config, unflatten_dict(params, sep="/"), jax.random.split(jax.random.key(0), 40)))


def near(share, n):
    """A share of n independent draws, to four standard deviations."""
    return pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_dropout_acts_on_the_embedding_and_on_both_residual_branches_of_every_layer():
    """Embeddings of 1, then branches of 1 (a bias alone): each adds 0 or 1/(1-p), by draws of its own."""
    c = dataclasses.replace(TINY, dropout=0.25)
    units = 0.75 * block_outputs_under_dropout(c, ones=["wte", "c_proj/bias"])
    assert_close(units, units.round(), terms=9)
    units = units.round().astype(int)
    layers = np.diff(units, axis=0)  # what layers 1 and 2 added: 0, 1 or 2 branches kept
    assert units[0].max() == 3 and layers.max() == 2  # the embedding and two branches; two branches
    for n, draws in ((units[0], 3), *((layer, 2) for layer in layers)):
        assert (n == draws).mean() == near(0.75**draws, n.size)  # independent: the draws multiply
        assert n.mean() == pytest.approx(0.75 * draws, abs=4 * (draws * 0.1875 / n.size) ** 0.5)
    assert ((layers[0] == 2) & (layers[1] == 2)).mean() == near(0.75**4, layers[0].size)  # so do layers'
    assert (units[0, 0] != units[0, 1]).any() and (units[0, :, 0] != units[0, :, 1]).any()


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_dropout_acts_on_the_branches_of_gpt1(part):
    """Post-LN: one branch of 1 onto zeros; what was kept stands above the mean after the LayerNorm."""
    c = dataclasses.replace(TINY, dropout=0.25, norm="post", n_layer=1)
    out = block_outputs_under_dropout(c, ones=[f"{part}/c_proj/bias", "scale"])
    assert (out > 0.1).mean() == near(0.75, out.size)


def test_more_tokens_than_the_context_are_refused():
    """Gathering clamps: all beyond the last position would get its embedding."""
    params = jax.eval_shape(lambda key: gpt.init(TINY, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, TINY.context_length + 1), jnp.int32)
    for run in (gpt.hidden, lambda p, c, t: gpt.prefill(p, c, t, t, t)):
        with pytest.raises(InputError, match=f"exceed the model's context of {TINY.context_length}"):
            jax.eval_shape(lambda p, t, run=run: run(p, TINY, t), params, tokens)
