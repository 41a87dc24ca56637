"""Requests scored in packed rows that share what they have in common, against each request by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, model_terms

from gptjax.errors import InputError
from gptjax.model import gpt, plain
from gptjax.model.attention import tree_attention
from gptjax.model.attention.tree import tree_mask
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.tasks.likelihood import log_likelihoods
from gptjax.tasks.packing import pack, row_capacity
from gptjax.tasks.requests import Request, rolling_windows, truncated
from gptjax.trained import Model

CONFIG = GPTConfig(vocab_size=97, context_length=200, n_layer=2, n_head=2, d_model=16, local_window=8, attention="cpu")


@pytest.fixture(scope="module")
def model():
    params = jax.jit(lambda key: gpt.init(CONFIG, key))(jax.random.key(0))
    params = jax.tree.map(lambda p: p * 4, params)  # far from uniform, so that an error is seen
    return Model(CONFIG, params, None, jnp.float32, 0, make_mesh(MeshConfig(), jax.devices()[:1]))


def made_requests(seed: int = 0) -> list[Request]:
    """A shared prefix, contexts of four choices, one-token choices, a repeated request, one that another begins with,
    short and long ones."""
    rng = np.random.default_rng(seed)
    draw = lambda n: tuple(map(int, rng.integers(0, 97, n)))
    prefix, out = draw(30), []
    for _ in range(8):
        context = prefix + draw(rng.integers(1, 9))
        out += [Request(context, draw(rng.integers(1, 7))) for _ in range(4)]
    question = prefix + draw(5)
    out += [Request(question, (choice,)) for choice in (1, 2, 3, 4)]
    out += [out[3], Request(out[5].context, out[5].continuation + draw(2)), Request(draw(1), draw(150))]
    out += [Request(draw(n), draw(2)) for n in (1, 1, 3, 90)]
    order = rng.permutation(len(out))
    return [out[i] for i in order]


def by_itself(model, requests):
    """(log-probability, greedy) of each request by the plain forward pass."""
    longest = max(len(r.context) + len(r.continuation) for r in requests)
    tokens = np.array([([*r.context, *r.continuation] + [0] * longest)[:longest] for r in requests])
    log_probs = jax.jit(lambda t: jax.nn.log_softmax(plain.forward(model.params, CONFIG, t), axis=-1))(tokens)
    out = []
    for request, row in zip(requests, np.asarray(log_probs), strict=True):
        predictions = row[len(request.context) - 1 :][: len(request.continuation)]
        chosen = predictions[np.arange(len(predictions)), list(request.continuation)]
        out.append((float(chosen.sum()), bool((predictions.argmax(-1) == request.continuation).all())))
    return out


def test_packed_rows_score_as_each_request_by_itself(model):
    requests = made_requests()
    expected = by_itself(model, requests)
    scores = log_likelihoods(model, requests, rows=2)
    terms = model_terms(CONFIG, time=157)
    scale = max(abs(value) for value, _ in expected)
    assert_close(np.array([s.log_prob for s in scores]), np.array([v for v, _ in expected]), terms=terms, scale=scale)
    assert [s.greedy for s in scores] == [hit for _, hit in expected]
    assert [s.tokens for s in scores] == [len(r.continuation) for r in requests]


def test_greedy_continuation_is_found_greedy(model):
    context, likeliest = (5, 6, 7), []
    forward = jax.jit(lambda tokens: plain.forward(model.params, CONFIG, tokens))
    for i in range(3):
        tokens = np.array([[*context, *likeliest] + [0] * (3 - i)])
        likeliest.append(int(forward(tokens)[0, 2 + i].argmax()))
    other = (likeliest[0], (likeliest[1] + 1) % 97, likeliest[2])
    right, wrong = log_likelihoods(model, [Request(context, tuple(likeliest)), Request(context, other)])
    assert right.greedy and right.last_greedy and not wrong.greedy


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_decisions_do_not_depend_on_what_is_scored_together(model, rows):
    requests = made_requests(1)
    scores = log_likelihoods(model, requests, rows=rows)
    alone = by_itself(model, requests)
    values, expected = (np.array([s.log_prob for s in scores]), np.array([v for v, _ in alone]))
    assert np.array_equal(np.argsort(values, kind="stable"), np.argsort(expected, kind="stable"))


def test_rows_are_spread_over_a_mesh(model):
    requests = made_requests()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = log_likelihoods(Model(CONFIG, model.params, None, jnp.float32, 0, mesh), requests, rows=3)
    one = log_likelihoods(model, requests, rows=3)
    terms, values = model_terms(CONFIG, time=157), [np.array([s.log_prob for s in scores]) for scores in (spread, one)]
    assert_close(*values, terms=terms, scale=abs(values[1]).max())


def test_what_requests_share_is_packed_once():
    requests = [Request((1, 2, 3, 4, 5), (choice, 9)) for choice in (6, 7, 8)] + [Request((1, 2, 3), (10,))]
    (row,) = pack(requests)[128]
    assert list(row.tokens[:8]) == [1, 2, 3, 4, 5, 6, 7, 8] and not row.tokens[8:].any()
    assert list(row.positions[:8]) == [0, 1, 2, 3, 4, 5, 5, 5]
    assert list(row.visible_until[:9]) == [8, 8, 8, 8, 8, 6, 7, 8, 9]
    (apart,) = pack(requests, share=False)[128]
    assert int((apart.positions > 0).sum()) == 3 * 5 + 2


def test_every_request_is_in_a_row_that_it_fits():
    requests = made_requests(2)
    packed = pack(requests)
    seen = [i for rows in packed.values() for row in rows for i, _, _ in row.asked]
    assert sorted(set(seen)) == list(range(len(requests)))
    assert all(len(row.tokens) == length for length, rows in packed.items() for row in rows)
    assert {len(row.tokens) for rows in packed.values() for row in rows} <= {128, 256, 384, 512}
    assert row_capacity(Request((1,) * 500, (1,) * 13)) == 512 and row_capacity(Request((1,) * 500, (1,) * 14)) == 1024


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("path", ["cpu", "xla"])
def test_tree_attention_is_softmax_over_the_path_from_the_root(path, window):
    row = next(rows[0] for rows in pack(made_requests(3)[:20]).values())
    T = len(row.tokens)
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (np.asarray(jax.random.normal(key, (1, T, 2, 8))) for key in keys)
    visible_until, positions = row.visible_until[None], row.positions[None]
    out = tree_attention(q, k, v, visible_until, positions, window, path)
    expected = np.zeros_like(out[0])
    for t in range(T):
        seen = [s for s in range(t + 1) if row.visible_until[s] > t]
        if window:
            seen = [s for s in seen if row.positions[t] - row.positions[s] < window]
        for head in range(2):
            scores = k[0, seen, head] @ q[0, t, head] / 8**0.5
            weights = np.exp(scores - scores.max())
            expected[t, head] = weights @ v[0, seen, head] / weights.sum()
    assert_close(out[0], expected, terms=8 + T)
    mask = tree_mask(visible_until, positions, window)[0]
    assert mask.sum(-1).min() >= 1


def test_golden_rolling_windows():
    windows = list(rolling_windows(99, list(range(10)), 4))
    assert windows == [Request((99,), (0, 1, 2, 3)), Request((3,), (4, 5, 6, 7)), Request((5, 6, 7), (8, 9))]
    assert list(rolling_windows(99, [5, 6], 4)) == [Request((99,), (5, 6))]
    assert list(rolling_windows(99, list(range(8)), 4))[1] == Request((3,), (4, 5, 6, 7))


@pytest.mark.parametrize("length", range(1, 14))
def test_rolling_windows_score_each_token_once(length):
    windows = list(rolling_windows(99, list(range(length)), 4))
    assert [token for w in windows for token in w.continuation] == list(range(length))
    for w in windows:
        assert len(w.context) + len(w.continuation) <= 5
        assert w.context == (99,) or [*w.context, w.continuation[0]] == list(range(w.context[0], w.continuation[0] + 1))


def test_long_requests_lose_their_beginning_not_their_continuation():
    kept, cut = truncated(Request(tuple(range(10)), (10, 11)), 6)
    assert cut and kept.context == (5, 6, 7, 8, 9) and kept.continuation == (10, 11)
    assert truncated(Request((1, 2), (3, 4)), 3) == (Request((1, 2), (3, 4)), False)
    kept, cut = truncated(Request((1, 2), tuple(range(10, 20))), 6)
    assert cut and kept == Request((13,), tuple(range(14, 20)))


def test_a_token_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(InputError, match="not this model's tokenizer"):
        log_likelihoods(model, [Request((1, 2), (97,))])
