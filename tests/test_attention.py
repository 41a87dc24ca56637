"""Every attention path against one oracle, softmax attention and its gradient in numpy float64.

Splash runs in the Pallas interpreter here; that it compiles for a TPU is shown in test_aot_tpu.py. cuDNN needs a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from numerics import assert_close, tolerance

from gptjax.model.attention import attention, causal_mask, cpu, reference_attention, resolve
from gptjax.model.attention.cpu import cpu_attention
from gptjax.model.attention.fused import fused_attention
from gptjax.model.attention.splash import splash_attention
from gptjax.parallel.mesh import MeshConfig, make_mesh

# (q, k, v, window, segment_ids) -> out; each the function behind one path, with no look at the window first
PATHS = {
    "reference": lambda q, k, v, window, segments: reference_attention(q, k, v, window=window, segment_ids=segments),
    "xla": lambda q, k, v, window, segments: fused_attention(q, k, v, window, segments, "xla"),
    "cpu": lambda q, k, v, window, segments: cpu_attention(q, k, v, segments, window),
    "splash": lambda q, k, v, window, segments: splash_attention(q, k, v, window, segments, None, interpret=True),
}


def inputs(batch, time, heads, d_head, seed=0):
    """q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((batch, time, heads, d_head), np.float32) for _ in range(4))


def some_segments(batch, time, seed=0):
    """A few documents per row, cut at different places in each."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.random((batch, time)) < 3 / time, axis=1).astype(np.int32)


def mask_of(batch, time, window=None, segments=None):
    """bool [batch, query, key], cell by cell from its definition."""
    q, k = np.arange(time)[:, None], np.arange(time)[None]
    mask = np.broadcast_to((k <= q) & (q - k < (window or time)), (batch, time, time))
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def oracle(q, k, v, d_out, window=None, segments=None):
    """Output and gradients in q, k, v: [batch, time, head, d_head] float64."""
    q, k, v, d_out = (np.asarray(a).astype(np.float64).swapaxes(1, 2) for a in (q, k, v, d_out))
    scale = 1 / np.sqrt(q.shape[-1])
    s = np.where(mask_of(q.shape[0], q.shape[2], window, segments)[:, None], q @ k.swapaxes(-1, -2) * scale, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = d_out @ v.swapaxes(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
    return [a.swapaxes(1, 2) for a in (p @ v, d_s @ k, d_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_out)]


@functools.partial(jax.jit, static_argnames=("path", "window"))
def value_and_gradients(path, window, segments, q, k, v, d_out):
    out, pull = jax.vjp(lambda q, k, v: PATHS[path](q, k, v, window, segments), q, k, v)
    return (out, *pull(d_out))


def check(path, batch, time, heads, d_head, window=None, segments=None):
    arrays = inputs(batch, time, heads, d_head)
    found = value_and_gradients(path, window, segments, *arrays)
    assert all(a.dtype == jnp.float32 for a in found)
    same(found, oracle(*arrays, window, segments))


def same(found, expected):
    """Output, or output and gradients: sums over features and over positions of the softmax and the product with it.
    What d_q and d_k are sums of cancels, the more the fewer keys are seen: it is of d_v's magnitude."""
    time, _, d_head = expected[0].shape[1:]
    names = ("out", "d_q", "d_k", "d_v")[: len(expected)]
    found, expected = dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True))
    assert_close(found.pop("out"), expected.pop("out"), terms=d_head + 2 * time)
    if expected:
        largest = max(np.abs(a).max() for a in expected.values())
        assert_close(found, expected, terms=2 * (d_head + 2 * time), scale=largest)


# --- value and gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, window, packed",
    [
        *[("cpu", window, True) for window in (1, 63, 65, 130)],
        *[("cpu", window, False) for window in (None, 64, 129)],
        ("reference", None, True), ("reference", 64, False), ("xla", None, False), ("xla", 64, True),
    ],
)  # fmt: skip
def test_path_equals_the_oracle(path, window, packed):
    """130 positions: two whole blocks of the cpu path and two positions more; windows about a block's edge."""
    check(path, 2, 130, 2, 8, window, some_segments(2, 130) if packed else None)


@pytest.mark.parametrize("time", [1, 63, 65, 128])
def test_cpu_path_at_odd_lengths(time):
    check("cpu", 2, time, 2, 8, None, some_segments(2, time))


@pytest.mark.parametrize(
    "time, d_head, window, packed",
    [
        (256, 128, 100, False),
        (384, 64, 129, True),  # three blocks of 128
        (200, 64, None, True),  # not whole blocks
    ],
)
def test_splash_equals_the_oracle(time, d_head, window, packed):
    check("splash", 2, time, 2, d_head, window, some_segments(2, time) if packed else None)


@pytest.mark.parametrize("path, window", [("reference", 70), ("xla", None), ("cpu", 70), ("splash", 70)])
def test_bfloat16_is_as_close_as_its_eight_bits(path, window):
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs(2, 128, 2, 64)]
    segments = some_segments(2, 128)
    found = value_and_gradients(path, window, segments, *arrays)
    expected = oracle(*arrays, window, segments)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), found, expected, strict=True):
        assert a.dtype == jnp.bfloat16, name
        error = np.abs(np.asarray(a).astype(np.float64) - b)
        # one rounding to 8 bits is 2^-8 of the element; the rest is rounded probabilities and score gradients
        assert (error < 2**-8 * np.abs(b) + 2e-2).all(), (name, error.max())
        assert error.mean() < 3e-3, (name, error.mean())


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_cpu_path_at_any_shape(data):
    time = data.draw(st.integers(1, 140), "time")
    window = data.draw(st.none() | st.integers(1, 150), "window")
    batch, heads, d_head = (data.draw(st.integers(1, 3), name) for name in ("batch", "heads", "d_head"))
    segments = some_segments(batch, time, seed=time) if data.draw(st.booleans(), "packed") else None
    check("cpu", batch, time, heads, d_head, window, segments)


@pytest.mark.parametrize("at_once", [1, 2])
def test_cpu_path_with_few_rows_at_a_time(at_once, monkeypatch):
    """However many batch rows the cache is taken to hold, here of four: the loop's steps are put together again."""
    monkeypatch.setattr(cpu, "_CACHE_BYTES", at_once * 4 * 2 * 64 * 70)
    assert cpu._rows_at_once(4, 2, 70) == at_once
    q, k, v, d_out = inputs(4, 70, 2, 8)
    segments = some_segments(4, 70)

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v: cpu_attention(q, k, v, segments, 9), q, k, v)
        return out, *pull(d_out)

    same(run(q, k, v, d_out), oracle(q, k, v, d_out, 9, segments))


@pytest.mark.parametrize("batch, expected", [(12, 4), (7, 1), (2, 2), (1, 1), (5, 5)])
def test_rows_at_once_divide_the_batch(batch, expected, monkeypatch):
    monkeypatch.setattr(cpu, "_CACHE_BYTES", 5 * 4 * 2 * 64 * 70)  # five rows fit
    assert cpu._rows_at_once(batch, 2, 70) == expected


def test_cpu_path_sharded_over_rows_and_heads():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    q, k, v, d_out = inputs(8, 70, 2, 8)
    segments = some_segments(8, 70)
    placed = jax.device_put((q, k, v, d_out), NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
    with jax.set_mesh(mesh):
        found = value_and_gradients("cpu", 9, segments, *placed)
    same(found, oracle(q, k, v, d_out, 9, segments))


def test_scores_far_apart_stay_finite():
    """Scores of +-1e4: the softmax is a choice, its gradient nearly nothing, and nothing overflows."""
    q, k, v, d_out = inputs(1, 65, 1, 4)
    for path in ("reference", "xla", "cpu"):
        found = value_and_gradients(path, None, None, 300 * q, 300 * k, v, d_out)
        expected = oracle(300 * q, 300 * k, v, d_out)
        assert all(np.isfinite(a).all() for a in found)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-2)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_band_of_the_whole_context_is_dense_bit_for_bit(path):
    arrays = inputs(2, 128, 2, 64)
    dense = value_and_gradients(path, None, None, *arrays)
    for window in (128,) if path == "splash" else (128, 4096):
        for a, b in zip(value_and_gradients(path, window, None, *arrays), dense, strict=True):
            np.testing.assert_array_equal(a, b)


@functools.partial(jax.jit, static_argnames=("path", "window"))
def gradients_of_each_output(path, window, segments, q, k, v):
    """|d out_t / d (q, k, v)_s| summed over features: three [t, s]."""
    pull = jax.vjp(lambda q, k, v: PATHS[path](q, k, v, window, segments), q, k, v)[1]
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), q.dtype)
    at_time = jnp.eye(q.shape[1], dtype=q.dtype)
    grads = jax.lax.map(lambda one: pull(weights * one[None, :, None, None]), at_time, batch_size=16)
    return [jnp.abs(g).sum((1, 3, 4)) for g in grads]


@pytest.mark.parametrize(
    "path, window, packed",
    [
        ("reference", 7, True), ("xla", 7, True), ("cpu", None, True), ("cpu", 7, True), ("cpu", 65, False),
        ("splash", 7, True),
    ],
)  # fmt: skip
def test_nothing_leaks_through_a_mask(path, window, packed):
    """Gradients from what a position may not see are 0.0, and from what it may see they are not."""
    time = 128 if path == "splash" else 80
    q, k, v, _ = inputs(1, time, 2, 4)
    segments = some_segments(1, time) if packed else None
    mask = mask_of(1, time, window, segments)[0]
    d_q, d_k, d_v = (np.asarray(g) for g in gradients_of_each_output(path, window, segments, q, k, v))
    assert (d_k[~mask] == 0.0).all() and (d_v[~mask] == 0.0).all()
    assert (d_v[mask] > 0.0).all()
    off_diagonal = ~np.eye(time, dtype=bool)
    assert (d_q[off_diagonal] == 0.0).all()
    if window != 1:  # one key alone has probability 1 whatever its score is
        several = mask.sum(1) > 1
        assert (d_k[mask & several[:, None]] > 0.0).mean() > 0.99 and (d_q.diagonal()[several] > 0.0).all()


def test_causal_mask():
    rows = lambda window: causal_mask(jnp.arange(4), jnp.arange(4), window).astype(int).tolist()
    assert rows(None) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows(1) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert rows(2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    batched = causal_mask(jnp.array([[5], [2]]), jnp.arange(6), 3)  # a new token against a cache, at slots 5 and 2
    assert batched.astype(int).tolist() == [[[0, 0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0, 0]]]


# --- dropout ----------------------------------------------------------------------------------------------


def dropped_probabilities(rate, key, time=32, batch=16):
    """The probabilities themselves: q = 0 makes them 1/(t+1), v = identity reads them out."""
    q = np.zeros((batch, time, 2, time), np.float32)
    v = np.broadcast_to(np.eye(time, dtype=np.float32)[:, None, :], (batch, time, 2, time))
    run = jax.jit(lambda q, v, keys: attention(q, q, v, path="auto", dropout=rate, dropout_keys=keys))
    return np.asarray(run(q, v, jax.random.split(key, batch))).swapaxes(1, 2)


def test_dropout_drops_and_rescales_probabilities():
    rate = 0.3
    p = dropped_probabilities(rate, jax.random.key(0))  # [batch, head, query, key]
    causal = np.tril(np.ones((32, 32), bool))
    scaled = np.where(causal, 1 / (1 - rate) / np.arange(1, 33)[:, None], 0.0)
    assert (p[..., ~causal] == 0.0).all()
    kept = p > 0
    np.testing.assert_allclose(p, np.where(kept, scaled, 0.0), rtol=tolerance(32))
    n = kept[..., causal].size
    assert abs(kept[..., causal].mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
    # every batch row and head has a mask of its own
    first = kept[..., causal].reshape(-1, causal.sum())
    assert len(np.unique(first, axis=0)) == len(first)
    np.testing.assert_allclose(p[:, :, -1].sum(-1).mean(), 1.0, atol=0.08)


def program(attend, q, k, v, d_out, **arrays):
    """Attention and its gradient as they go to the compiler: the same text computes the same bits."""

    def run(q, k, v, d_out, arrays):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, **arrays), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run).lower(q, k, v, d_out, arrays).as_text()


def test_every_path_drops_the_same():
    arrays = inputs(2, 128, 2, 8)
    more = dict(segment_ids=some_segments(2, 128), dropout_keys=jax.random.split(jax.random.key(3), 2))
    expected = program(functools.partial(reference_attention, window=40, dropout=0.5), *arrays, **more)
    for path in ("auto", "reference", "xla", "cpu", "splash", "cudnn"):
        found = functools.partial(attention, path=path, window=40, dropout=0.5)
        assert program(found, *arrays, **more) == expected, path
    assert program(functools.partial(reference_attention, window=40), *arrays, **more) != expected


def test_without_a_key_or_a_rate_nothing_is_dropped():
    arrays, keys = inputs(1, 16, 2, 8), jax.random.split(jax.random.key(0), 1)
    for path in ("reference", "cpu"):
        expected = program(functools.partial(attention, path=path), *arrays)
        assert program(functools.partial(attention, path=path, dropout=0.5), *arrays) == expected
        assert program(functools.partial(attention, path=path, dropout=0.0), *arrays, dropout_keys=keys) == expected


# --- which path -------------------------------------------------------------------------------------------


def test_resolve():
    assert [resolve("auto", p) for p in ("cpu", "tpu", "gpu", "cuda", "METAL")] == [
        "cpu", "splash", "cudnn", "cudnn", "xla"
    ]  # fmt: skip
    assert resolve("reference", "tpu") == "reference"


@pytest.mark.parametrize("path", ["splash", "cudnn"])
def test_shapes_and_dtypes_that_a_kernel_does_not_take_go_to_xla(path):
    """Splash wants at least 128 positions, cuDNN 16 bits."""
    arrays, segments = inputs(2, 100, 2, 8), some_segments(2, 100)
    found, expected, other = (
        program(functools.partial(attention, path=name, window=9), *arrays, segment_ids=segments)
        for name in (path, "xla", "cpu")
    )
    assert found == expected != other


@pytest.mark.parametrize("path", ["auto", "xla"])
def test_attention_takes_window_and_segments_to_its_path(path):
    arrays = inputs(2, 70, 2, 8)
    segments = some_segments(2, 70)
    for window, rows in ((5, segments), (70, segments), (71, None)):
        run = jax.jit(functools.partial(attention, path=path, window=window, segment_ids=rows))
        found = run(*arrays[:3])
        same([found], oracle(*arrays, window, rows)[:1])


# --- splash over a mesh -----------------------------------------------------------------------------------


def splash_over(mesh, arrays, window=None, segments=None):
    with jax.set_mesh(mesh):
        f = jax.jit(lambda q, k, v, s: splash_attention(q, k, v, window, s, mesh, interpret=True))
        return np.asarray(f(*arrays[:3], segments))


def test_splash_sharded_over_rows_and_heads():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    arrays, segments = inputs(4, 128, 2, 64), some_segments(4, 128)
    found = splash_over(mesh, arrays, 50, segments)
    same([found], oracle(*arrays, 50, segments)[:1])


def test_splash_with_the_context_cut_up():
    """Each device's queries begin elsewhere in the mask; values and gradients, dense, banded and of documents."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    q, k, v, d_out = inputs(2, 256, 2, 64)
    segments = some_segments(2, 256)
    for window, ids in ((None, None), (150, segments)):

        @jax.jit
        def found(q, k, v, d_out, window=window, ids=ids):
            splash = functools.partial(splash_attention, window=window, segment_ids=ids, mesh=mesh, interpret=True)
            out, pull = jax.vjp(splash, q, k, v)
            return out, *pull(d_out)

        with jax.set_mesh(mesh):
            got = found(q, k, v, d_out)
        same(got, oracle(q, k, v, d_out, window, ids))


def test_splash_on_one_mesh_after_another():
    """One process, two meshes: what is cached for the first must not be tied to its devices."""
    arrays = inputs(8, 128, 1, 64)
    expected = oracle(*arrays)[:1]
    for devices in (8, 2):
        mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[-devices:])
        same([splash_over(mesh, arrays)], expected)
