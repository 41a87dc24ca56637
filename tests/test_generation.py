"""Sampling against exact distributions, and cached decoding against the full forward, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, model_terms
from test_gpt import random_params

from gptjax.errors import InputError
from gptjax.generation import plain
from gptjax.generation.decode import Decoder, Stop, decode, generate
from gptjax.generation.sampling import Sampling, filtered_logits, sample
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig

GREEDY = Sampling(temperature=0.0)
CONTEXT = 40
TINY = GPTConfig(vocab_size=53, n_layer=2, n_head=2, d_model=16, context_length=CONTEXT, attention="cpu")
VARIANTS = {
    "pre": TINY,
    "post": dataclasses.replace(TINY, norm="post", local_window=3),
    "untied": dataclasses.replace(TINY, tied_head=False, local_window=3, attention="reference", unroll=2,
                                  mup_base_width=4, mup_base_heads=2),
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9], [7, 9, 3, 2, 3]]


@functools.partial(jax.jit, static_argnums=1)
def full_logits(params, config, tokens):
    return gpt.logits(params, config, gpt.hidden(params, config, tokens))


def greedy_without_cache(params, config, prompts, n):
    """One token at a time through the whole forward, and how sure the least sure choice was."""
    tokens, margins = np.zeros((len(prompts), CONTEXT), np.int32), []  # right of a text is the future, not seen
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    for i in range(n):
        logits = np.asarray(full_logits(params, config, tokens))[rows, lengths + i - 1]
        second, first = np.sort(logits)[:, -2:].T
        margins.append((first - second).min())
        tokens[rows, lengths + i] = logits.argmax(-1)
    return [row[m : m + n].tolist() for row, m in zip(tokens, lengths, strict=True)], min(margins)


# --- the cache --------------------------------------------------------------------------------------------


def test_greedy_decoding_equals_the_full_forward():
    """Prompts of unequal length in one batch."""
    c = VARIANTS["untied"]
    params = random_params(c)
    expected, margin = greedy_without_cache(params, c, PROMPTS, 12)
    assert margin > 1e-4  # no toss-ups, so equal tokens say something
    assert generate(params, Decoder(c), PROMPTS, Stop(12), GREEDY) == expected


@pytest.mark.parametrize(
    "name, sampling", [("pre", Sampling(2.0, top_k=9, top_p=0.9)), ("post", Sampling(3.0))], ids=["filtered", "sampled"]
)
def test_decoding_equals_the_plain_decoder(name, sampling):
    """The same keys, the same tokens: prompts of unequal length in one batch, beside each without a cache or padding.
    The end-of-text is the second row's third token."""
    c = VARIANTS[name]
    params, prompts, limits = random_params(c), [[3, 1, 4, 1, 5, 9], [5, 8]], [5, 9]
    keys = jax.random.split(jax.random.key(4), 2)
    alone = lambda i, eot_id: plain.decode(
        params, c, prompts[i], keys[i], new_tokens=limits[i], sampling=sampling, eot_id=eot_id
    )
    eot_id = alone(1, None)[2]
    rows = np.array([prompts[0], [0] * 4 + prompts[1]])
    out, counts, _ = decode(
        params, Decoder(c), rows, np.array([6, 2]), np.array(limits), keys, Stop(9, eot_id), sampling
    )
    for i in range(2):
        assert out[i, : counts[i]].tolist() == alone(i, eot_id)
    assert counts[1] <= 3


prefill = jax.jit(gpt.prefill, static_argnums=1)


@pytest.mark.parametrize(  # "pre" and other variants unstacked: test_decoding_equals_the_plain_decoder
    "name, unstacked", [("post", False), ("untied", False), ("untied", True)]
)
def test_cached_logits_equal_the_full_forward(name, unstacked):
    """Prefill of unequal prompts padded on the left, then steps of one and of several tokens."""
    c = VARIANTS[name]
    params = random_params(c)
    rng = np.random.default_rng(2)
    lengths, width, new = np.array([8, 1, 5]), 8, 6
    rows = rng.integers(0, c.vocab_size, (4, CONTEXT))  # row i: its prompt, then what follows
    full = np.asarray(full_logits(params, c, rows))[:3]
    rows = rows[:3]
    pad = width - lengths
    tokens = np.stack([np.concatenate([np.zeros(p, int), row[: width - p]]) for p, row in zip(pad, rows, strict=True)])
    real = np.arange(width)[None] >= pad[:, None]
    positions = np.maximum(np.arange(width)[None] - pad[:, None], 0)
    x, kv = prefill(params, c, tokens, positions, real.astype(np.int32))
    assert kv.k.shape == (2, 3, 2, width, 8)
    head = np.asarray(gpt.unembedding(params, c)).T
    prefilled = np.asarray(x) @ head
    for i, n in enumerate(lengths):
        assert_close(prefilled[i, width - n :], full[i, :n], terms=model_terms(c))

    cache = jax.tree.map(lambda a: np.pad(a, ((0, 0), (0, 0), (0, 0), (0, new), (0, 0))), kv)
    filled = np.concatenate([real, np.ones((3, new), bool)], 1)
    stepped, cache = gpt.unstack_layers(params, cache, c) if unstacked else (params, cache)
    step = jax.jit(lambda p, tokens, at, cache, slot: gpt.decode_step(p, c, tokens, at, cache, slot, filled))
    done = 0
    for n in (1, 1, 3, 1):
        at = lengths[:, None] + done + np.arange(n)
        x, cache = step(stepped, np.take_along_axis(rows, at, 1), at, cache, width + done)
        expected = np.take_along_axis(full, at[..., None], 1)
        assert_close(np.asarray(x) @ head, expected, terms=model_terms(c))
        done += n


def test_bfloat16_generates():
    c = VARIANTS["post"]
    out = generate(random_params(c), Decoder(c, dtype=jnp.bfloat16), PROMPTS, Stop(5), GREEDY)
    assert [len(row) for row in out] == [5] * 4 and all(0 <= t < 53 for row in out for t in row)


# --- rows, seeds ------------------------------------------------------------------------------------------

WARM = Sampling(temperature=3.0)
SHALLOW = dataclasses.replace(TINY, n_layer=1)


def run(prompts, max_new_tokens=10, seed=0):
    return generate(random_params(SHALLOW), Decoder(SHALLOW), prompts, Stop(max_new_tokens), WARM, seed=seed)


def test_a_row_does_not_depend_on_its_neighbors_nor_on_how_far_it_is_padded():
    alone = run([[5, 6, 7]])
    for others in ([[1]], [[9] * 12], [[9] * 39, [2]]):  # buckets of 16, 16 and the whole context
        assert run([[5, 6, 7], *others])[0] == alone[0]
    second = run([[1], [5, 6, 7]])[1]
    assert run([[8] * 34, [5, 6, 7], [4]])[1] == second
    assert second != alone[0]  # the same prompt twice in a batch is not the same text twice


def test_how_many_are_asked_for_changes_only_the_length():
    long = run([[5, 6, 7]], max_new_tokens=30)[0]
    for n in (1, 2, 10, 16, 17):
        assert run([[5, 6, 7]], max_new_tokens=n)[0] == long[:n]


def test_seeds():
    assert run([[5, 6, 7]], seed=3) == run([[5, 6, 7]], seed=3)
    texts = {str(run([[5, 6, 7]], seed=seed)) for seed in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**32, 2**40, -1])
def test_any_whole_number_is_a_seed_or_is_refused_as_bad_input(seed):
    try:
        assert run([[5]], seed=seed) == run([[5]], seed=seed)
    except InputError:
        pass


# --- where a row ends -------------------------------------------------------------------------------------

COUNTER = GPTConfig(vocab_size=12, n_layer=1, n_head=1, d_model=12, context_length=20, tied_head=False, attention="cpu")


@functools.cache
def counter():
    """A planted model: after token n comes n + 1, after 11 comes 0."""
    shapes = jax.eval_shape(lambda key: gpt.init(COUNTER, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["wte"] = np.eye(12, dtype=np.float32)
    params["lm_head"] = 10 * np.roll(np.eye(12, dtype=np.float32), 1, axis=0)
    params["ln_f"]["scale"][:] = 1
    return params


def count_on(prompts, max_new_tokens=8, eot_id=None):
    return generate(counter(), Decoder(COUNTER), prompts, Stop(max_new_tokens, eot_id), GREEDY)


def test_each_row_stops_at_its_own_end_of_text():
    assert count_on([[2], [4], [0, 1], [9]], eot_id=5) == [[3, 4], [], [2, 3, 4], [10, 11, 0, 1, 2, 3, 4]]
    # in a prompt it ends nothing
    assert count_on([[2], [4], [5], [5, 3, 5]], 3, eot_id=5) == [[3, 4], [], [6, 7, 8], [6, 7, 8]]
    # ends by its limit just before the end of text
    assert count_on([[2], [5], [2], [5]], 2, eot_id=5) == [[3, 4], [6, 7]] * 2
    assert count_on([[10]], 4, eot_id=0) == [[11]]  # id 0 is an end like any other


def test_a_row_stops_when_the_context_is_full():
    """The last position still predicts: a prompt of n tokens gets at most context - n + 1 new ones. No token is an
    end of text unless one is given."""
    out = count_on([[0] * 20, [0] * 19, [0], [3] * 12], 100)
    assert [len(row) for row in out] == [1, 2, 20, 9]
    assert out[0] == [1] and out[1] == [1, 2] and out[3] == [4, 5, 6, 7, 8, 9, 10, 11, 0]


def test_decode_counts_the_end_of_text_and_fills_what_follows():
    prompts, lengths = jnp.array([[0, 2], [7, 9], [0, 4]]), jnp.array([1, 2, 1])
    keys = jax.random.split(jax.random.key(0), 3)
    out, counts, log_probs = decode(
        counter(), Decoder(COUNTER), prompts, lengths, jnp.array([6, 4, 0]), keys, Stop(6, 5), GREEDY
    )
    assert out.dtype == jnp.int32
    assert counts.tolist() == [3, 4, 0]
    assert out.tolist() == [[3, 4, 5, 5, 5, 5], [10, 11, 0, 1, 5, 5], [5] * 6]


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "Prompt 1 has no tokens"),
        ([[1], [2] * 21], {}, "Prompt 1 has 21 tokens and the model's context is 20"),
        ([[1, 12]], {}, "has token 12"),
        ([[3], [1, -1]], {}, "-1"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_bad_prompts(prompts, options, message):
    with pytest.raises(InputError, match=message):
        count_on(prompts, **options)


def test_no_prompts_give_no_texts_or_are_refused():
    try:
        assert count_on([]) == []
    except InputError:
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_bad_sampling(options):
    with pytest.raises(InputError, match=f"sampling: {next(iter(options))}={next(iter(options.values()))}"):
        Sampling(**options)


# --- sampling ---------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.02, 0.3, 0.08, 0.25, 0.05, 0.15, 0.1, 0.05], np.float32)) + 3


def exact(s: Sampling):
    """The truncated distribution in float64: temperature, then the k likeliest, then the mass p."""
    p = np.exp(LOGITS.astype(np.float64) / s.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if s.top_k:
        p[order[s.top_k :]] = 0
        p /= p.sum()
    mass = np.cumsum(p[order])
    keep = mass - p[order] < s.top_p
    p[order[~keep]] = 0
    return p / p.sum()


filtered = jax.jit(filtered_logits, static_argnums=1)


@pytest.mark.parametrize(
    "s, kept",
    [
        (Sampling(), 8),
        (Sampling(temperature=2.0), 8),
        (Sampling(top_k=3), 3),
        (Sampling(top_k=1), 1),
        (Sampling(top_k=100), 8),
        (Sampling(top_p=0.6), 3),
        (Sampling(top_p=0.01), 1),
        (Sampling(top_p=0.999), 8),
        (Sampling(temperature=0.7, top_k=5, top_p=0.9), 4),
        # the k first: of (.3, .25) / .55 the first alone reaches .5; of all eight it would not
        (Sampling(top_k=2, top_p=0.5), 1),
    ],
    ids=str,
)
def test_samples_follow_the_exact_truncated_distribution(s, kept):
    expected = exact(s)
    assert (expected > 0).sum() == kept
    n = 20_000
    keys = jax.random.split(jax.random.key(7), n)
    draw = lambda x, keys: (jax.nn.softmax(filtered_logits(x, s)), jax.vmap(lambda key: sample(x, key, s))(keys))
    probabilities, tokens = jax.device_get(jax.jit(draw)(LOGITS, keys))
    assert_close(probabilities, np.array(expected), terms=2 * len(LOGITS))
    assert tokens.dtype == np.int32
    counts = np.bincount(tokens, minlength=8)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi2 = ((counts[likely] - n * expected[likely]) ** 2 / (n * expected[likely])).sum()
    assert chi2 < [0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3][kept - 1] + 1e-9  # p = .001 at kept - 1 degrees


def test_the_likeliest_token_is_always_kept():
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((50, 100))).astype(np.float32)
    for top_p in (1e-6, 1e-40, 5e-324):  # the last two are 0 to XLA
        found = np.asarray(filtered(logits, Sampling(top_p=top_p)))
        assert (np.isfinite(found).sum(-1) == 1).all()
        assert (found.argmax(-1) == logits.argmax(-1)).all()
    flat = np.asarray(filtered(np.zeros((2, 100), np.float32), Sampling(top_p=0.5)))
    assert (np.abs(np.isfinite(flat).sum(-1) - 50) <= 1).all()  # ties: half of them, not all and not one


def test_rows_are_filtered_by_themselves():
    s = Sampling(top_k=4, top_p=0.8, temperature=0.9)
    logits = np.random.default_rng(1).standard_normal((3, 5, 30)).astype(np.float32)
    together = filtered(logits, s)
    for i in np.ndindex(3, 5):
        np.testing.assert_array_equal(together[i], filtered(logits[i], s))


def test_greedy_is_the_limit_of_cold():
    logits = np.random.default_rng(2).standard_normal((64, 40)).astype(np.float32)
    draw = jax.jit(sample, static_argnums=2)
    for seed in (0, 1):
        np.testing.assert_array_equal(draw(logits, jax.random.key(seed), GREEDY), logits.argmax(-1))
        cold = draw(logits, jax.random.key(seed), Sampling(temperature=1e-4))
        np.testing.assert_array_equal(cold, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1.1e-5, 1e-12, 1e-40], ids=str)
def test_the_coldest_temperatures_are_greedy(temperature):
    """Down to 1e-40, which XLA takes for 0; at 1e-12 a fused multiply-add made the log-probabilities infinite."""
    logits = (100 * np.random.default_rng(3).standard_normal((16, 40))).astype(np.float32)
    for s in (Sampling(temperature), Sampling(temperature, top_k=5), Sampling(temperature, top_p=0.9)):
        tokens = jax.jit(lambda x, s=s: sample(x, jax.random.key(0), s))(logits)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
    row = np.array([[3, 4]], np.int32)
    _, count, log_probs = decode(
        random_params(SHALLOW), Decoder(SHALLOW), row, np.array([2]), np.array([3]),
        jax.random.split(jax.random.key(0), 1), Stop(3), Sampling(temperature),
    )  # fmt: skip
    assert count.tolist() == [3] and np.isfinite(log_probs).all()


def test_generated_tokens_follow_the_models_distribution():
    """End to end: the first and the second new token of 512 rows, against the probabilities the model gives."""
    c, params, n = TINY, random_params(TINY), 512
    s = Sampling(temperature=2.0, top_k=4)
    out = np.array(generate(params, Decoder(c), [[5, 6, 7]] * n, Stop(2), s))

    def probabilities(texts):
        rows = np.zeros((4, CONTEXT), np.int32)
        rows[:, : len(texts[0])] = texts
        logits = np.asarray(full_logits(params, c, rows))[:, len(texts[0]) - 1]
        return np.asarray(jax.nn.softmax(filtered(logits, s)), np.float64)

    p = probabilities([[5, 6, 7]] * 4)[0]
    firsts = np.flatnonzero(p)
    seconds = probabilities([[5, 6, 7, a] for a in firsts])
    joint = {(a, b): p[a] * q[b] for a, q in zip(firsts, seconds, strict=True) for b in np.flatnonzero(q)}
    assert set(map(tuple, out)) <= joint.keys()
    expected = np.array(list(joint.values())) * n
    counts = np.array([(out == pair).all(1).sum() for pair in joint])
    assert len(joint) == 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # p = .001 at 15 degrees
