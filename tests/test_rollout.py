"""Sampling, scoring and credit: the sampler against exact distributions, the four models' views, rewards."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import approx, assert_close, model_terms, tolerance
from scipy.stats import chi2
from test_gpt import random_params

from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.chunked import token_log_probs, token_log_probs_and_entropy
from gptjax.rlhf import networks, rollout
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import phase_keys
from gptjax.training.precision import frozen

# The model has an id that is never sampled (VOCAB) besides the padding's.
VOCAB, EOS, PAD = 6, 5, 7
Q, R = 5, 4  # slots of prompts and responses
MODEL = GPTConfig(vocab_size=8, n_layer=2, n_head=2, d_model=16, context_length=16, attention="reference")
N = RLSpec(policy=MODEL, value=MODEL, reward=MODEL, response=R, eos_id=EOS, pad_id=PAD, vocab=VOCAB)
ROWS = 40
LENGTHS = np.arange(ROWS, dtype=np.int32) % Q + 1  # every left padding, eight times
TERMS = model_terms(MODEL, ROWS)


def at(temperature, model=dataclasses.replace(MODEL, dropout=0.5), **changes):
    """Dropout is for training: what is sampled and scored with it here agrees with definitions that have none."""
    models = {"policy": model, "value": model, "reward": model}
    return dataclasses.replace(N, **{**models, "temperature": temperature, **changes})


def left_padded(lengths, slots=Q, seed=0):
    rng = np.random.default_rng(seed)
    prompts = np.full((len(lengths), slots), PAD, np.int32)
    for row, length in zip(prompts, lengths, strict=True):
        row[slots - length :] = rng.integers(0, VOCAB, length)
    return prompts


def scalar_params(seed):
    trunk = heads.trunk(random_params(MODEL, seed))
    return {"trunk": trunk, "head": {"kernel": np.linspace(-1, 1, 16, dtype=np.float32), "bias": np.float32(0.3)}}


@functools.cache
def policy(seed=0):
    """Sure enough of itself that a wrong distribution shows, with end-of-sequence about one time in four."""
    params = random_params(MODEL, seed)
    return {**params, "wte": 1.5 * params["wte"]}


@functools.cache
def sampled():
    """(tokens, mask, the sampler's log-probabilities) of ROWS prompts."""
    return rollout.sample(policy(), left_padded(LENGTHS), LENGTHS, jax.random.key(3), at(1.0))


@functools.cache
def scored():
    tokens, mask, _ = sampled()
    models = policy(), scalar_params(5), policy(1), scalar_params(6)
    return rollout.score(*models, tokens, LENGTHS, mask, at(1.0))


@functools.partial(jax.jit, static_argnames="config")
def hidden(params, tokens, config=MODEL):
    return gpt.hidden(params, config, tokens)


@jax.jit
def logits(params, tokens):
    return gpt.logits(params, MODEL, gpt.hidden(params, MODEL, tokens))


def without_padding(tokens, lengths):
    """Rows with the prompt's first token at position 0, as a model without any padding would see them."""
    rows = np.zeros((len(tokens), Q + R), np.int32)
    for row, t, n in zip(rows, np.asarray(tokens), lengths, strict=True):
        row[: n + R] = np.minimum(t[Q - n :], MODEL.vocab_size - 1)
    return rows


def plain_log_probs(params, tokens, lengths, temperature):
    """log softmax(logits / T) over the sampled ids at each response token: the definition, nothing shared but the
    model itself."""
    rows = without_padding(tokens, lengths)
    x = np.asarray(logits(params, rows), np.float64)[..., :VOCAB] / temperature
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    out = np.zeros((len(rows), R))
    for b, n in enumerate(lengths):
        for t in range(R):
            out[b, t] = log_p[b, n + t - 1, min(rows[b, n + t], VOCAB - 1)]
    return out


def plain_scalars(params, tokens, lengths):
    """The scalar at each response token [B, R + 1], the first one at the prompt's last."""
    x = np.asarray(hidden(params["trunk"], without_padding(tokens, lengths)))
    scalars = x @ params["head"]["kernel"] + params["head"]["bias"]
    return np.stack([row[n - 1 : n + R] for row, n in zip(scalars, lengths, strict=True)])


def close(a, b):
    assert_close(np.asarray(a), np.asarray(b), terms=TERMS)


# --- sampling ---------------------------------------------------------------------------------------------


def test_sampler_and_scorer_agree_with_the_definition():
    """At every left padding: token by token over a cache, in one forward pass, and written out without padding."""
    tokens, mask, of_sampler = sampled()
    expected = plain_log_probs(policy(), tokens, LENGTHS, 1.0) * mask
    close(scored()["log_prob"], expected)
    close(of_sampler * mask, expected)
    close(scored()["ref_log_prob"], plain_log_probs(policy(1), tokens, LENGTHS, 1.0) * mask)


def test_the_difference_of_sampler_and_scorer_is_measured():
    _, mask, of_sampler = sampled()
    log_prob = scored()["log_prob"]
    rounding = tolerance(TERMS) * float(jnp.abs(log_prob).max())
    assert float(rollout.sampler_difference(of_sampler, log_prob, mask)) < rounding
    off = jnp.where(mask > 0, log_prob, jnp.nan).at[2, 0].add(-0.25)
    assert float(rollout.sampler_difference(of_sampler, off, mask)) == pytest.approx(0.25, abs=rounding)


def test_after_end_of_sequence_there_is_padding_alone():
    tokens, mask, of_sampler = map(np.asarray, sampled())
    response = tokens[:, Q:]
    assert (tokens[:, :Q] == left_padded(LENGTHS)).all()
    ended = 0
    for y, m, log_prob in zip(response, mask, of_sampler, strict=True):
        n = int(m.sum())
        assert m.tolist() == [1.0] * n + [0.0] * (R - n) and n >= 1
        assert EOS not in y[: n - 1] and (y[:n] < VOCAB).all()
        assert n == R or y[n - 1] == EOS  # the end-of-sequence token is an action
        assert (y[n:] == PAD).all() and (log_prob[n:] == 0).all()
        ended += y[n - 1] == EOS
    assert 5 < ended < ROWS - 5


def test_a_row_does_not_depend_on_its_neighbors_nor_on_more_left_padding():
    """The same noise and text among other prompts and, alone, three slots further to the right."""
    prompts = left_padded(LENGTHS)
    among = prompts.copy()
    among[1:] = left_padded(LENGTHS, seed=9)[1:]
    tokens, mask, log_prob = rollout.sample(policy(), among, LENGTHS, jax.random.key(3), at(1.0))
    wider = np.pad(prompts[:1], ((0, 0), (3, 0)), constant_values=PAD)
    alone = rollout.sample(policy(), wider, LENGTHS[:1], jax.random.key(3), at(1.0))
    alone = alone[0][:, 3:], *alone[1:]
    for a, b, c in zip((tokens, mask, log_prob), alone, sampled(), strict=True):
        close(a[0], c[0])
        close(b[0], c[0])


def test_noise_differs_between_rows_keys_and_iterations():
    """All of the same prompt; phase_keys gives each iteration and phase a key of its own."""
    prompts, lengths = np.tile(left_padded([3]), (ROWS, 1)), np.full(ROWS, 3, np.int32)
    state, texts, seen = _Keys(jax.random.key_data(jax.random.key(0))), [], []
    for _ in range(3):
        following, sampling, minibatches = phase_keys(state)
        seen += [tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in (following, sampling, minibatches)]
        texts.append(np.asarray(rollout.sample(policy(), prompts, lengths, sampling, at(1.0))[0]))
        state = _Keys(jax.random.key_data(following))
    assert len(set(seen)) == 9
    assert all(len({tuple(t) for t in text}) > ROWS // 3 for text in texts)
    for a, b in itertools.combinations(texts, 2):
        assert (a != b).any(1).mean() > 0.5


@dataclasses.dataclass
class _Keys:
    key: jax.Array


# --- against the enumerated distribution ------------------------------------------------------------------


WORDS = [(*w, EOS) for n in range(R) for w in itertools.product(range(EOS), repeat=n)]
WORDS += list(itertools.product(range(EOS), repeat=R))  # all 781 responses
RESPONSES = np.array([[*w, *[PAD] * (R - len(w))] for w in WORDS], np.int32)
RESPONSE_MASK = np.array([[1.0] * len(w) + [0.0] * (R - len(w)) for w in WORDS], np.float32)
PROMPT = left_padded([3], seed=4)
ENUMERATED = np.concatenate([np.tile(PROMPT, (len(WORDS), 1)), RESPONSES], 1)


@functools.cache
def log_probabilities(temperature):
    """log pi(y) of every response to PROMPT, as the scorer has it: float64 [781]."""

    @jax.jit
    def log_pi(params, tokens, mask):
        n = at(temperature)
        real = networks.real_tokens(jnp.full(len(WORDS), 3), mask, Q)
        states = networks.policy_states(params, tokens, real, mask, n)
        return (networks.log_probs(params, states, tokens, n) * mask).sum(1)

    return np.asarray(log_pi(policy(), ENUMERATED, RESPONSE_MASK), np.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_probabilities_of_all_responses_sum_to_1(temperature):
    """And each is the definition's."""
    assert len(WORDS) == 781
    assert np.exp(log_probabilities(temperature)).sum() == approx(1, terms=TERMS)
    expected = plain_log_probs(policy(), ENUMERATED, np.full(len(WORDS), 3), temperature)
    close(log_probabilities(temperature), (expected * RESPONSE_MASK).sum(1))


def test_samples_have_the_enumerated_probabilities():
    """Chi-squared over all responses, those expected fewer than 8 times as one; and the sampler says how probable each
    was."""
    rows = 8192
    arguments = np.tile(PROMPT, (rows, 1)), np.full(rows, 3, np.int32), jax.random.key(1)
    tokens, _, log_prob = map(np.asarray, rollout.sample(policy(), *arguments, at(0.7)))
    number = {tuple(y): i for i, y in enumerate(RESPONSES.tolist())}
    drawn = [number[tuple(y)] for y in tokens[:, Q:].tolist()]
    close(log_prob.sum(1), log_probabilities(0.7)[drawn])
    observed = np.bincount(drawn, minlength=len(WORDS))

    def p_value(p):
        expected = rows * p
        often = expected >= 8
        e, o = (np.append(x[often], x[~often].sum()) for x in (expected, observed))
        assert len(e) > 20
        return chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1)

    assert p_value(np.exp(log_probabilities(0.7))) > 1e-3
    assert p_value(np.exp(log_probabilities(1.0))) < 1e-9  # of the other temperature: the test can fail


# --- judging ----------------------------------------------------------------------------------------------


def credit(j, score, beta=0.1, **changes):
    options = {"eos_id": EOS, "missing_eos": None, "gamma": 1.0, "lam": 0.95} | changes
    return rollout.compute_advantages(j, jnp.asarray(score), jnp.float32(beta), **options)


def test_the_first_kl_is_exactly_0():
    """In bfloat16, the frozen copy's matrices held at 16 bits, too."""
    tokens, mask, _ = sampled()
    reference = frozen(jax.tree.map(jnp.asarray, policy()), jnp.bfloat16)
    assert reference["blocks"]["mlp"]["c_fc"]["kernel"].dtype == jnp.bfloat16
    assert reference["wte"].dtype == jnp.float32
    arguments = tokens, LENGTHS, mask, at(1.0, dtype=jnp.bfloat16)
    same = rollout.score(policy(), scalar_params(5), reference, None, *arguments)
    np.testing.assert_array_equal(same["log_prob"], same["ref_log_prob"])
    assert "score" not in same
    _, metrics = credit({**scored(), "ref_log_prob": scored()["log_prob"]}, np.zeros(ROWS, np.float32))
    assert float(metrics["objective/kl"]) == 0.0 and float(metrics["objective/kl_k3"]) == 0.0


def test_values_and_scores_are_the_scalar_models_at_each_token():
    """V_t before response token t, the score at the last action; without padding and written out."""
    tokens, mask, _ = sampled()
    mask = np.asarray(mask)
    close(scored()["value"], plain_scalars(scalar_params(5), tokens, LENGTHS)[:, :R] * mask)
    of_reward = plain_scalars(scalar_params(6), tokens, LENGTHS)
    close(scored()["score"], of_reward[np.arange(ROWS), mask.sum(1).astype(int)])


def test_a_value_network_that_is_the_reward_model_sees_what_it_sees():
    """V before token t + 1 = the score of the response cut after token t."""
    tokens, mask, _ = sampled()
    shared = scalar_params(6)
    value = np.asarray(rollout.score(policy(), shared, policy(), shared, tokens, LENGTHS, mask, at(1.0))["value"])
    for t in range(R - 1):
        cut = mask * (jnp.arange(R) <= t)
        score = rollout.score(policy(), shared, policy(), shared, tokens, LENGTHS, cut, at(1.0))["score"]
        longer = np.asarray(mask)[:, t + 1] > 0
        assert longer.any()
        close(value[longer, t + 1], np.asarray(score)[longer])


def test_what_is_scored_is_0_after_the_last_action():
    gone = np.asarray(sampled()[1]) == 0
    for name in ("log_prob", "ref_log_prob", "entropy", "value"):
        assert (np.asarray(scored()[name])[gone] == 0).all()
    real = np.asarray(scored()["real"])
    assert (real[:, Q:] == ~gone).all()
    assert (real[:, :Q] == (np.arange(Q)[None] >= Q - LENGTHS[:, None])).all()


def test_more_padding_and_fewer_rows_at_a_time_change_nothing():
    tokens, mask, _ = map(np.asarray, sampled())
    wider = np.pad(tokens, ((0, 0), (3, 2)), constant_values=PAD)
    mask = np.pad(mask, ((0, 0), (0, 2)))
    models = policy(), scalar_params(5), policy(1), scalar_params(6)
    found = rollout.score(*models, wider, LENGTHS, mask, at(1.0, response=R + 2), rows=8)
    close(found["score"], scored()["score"])
    for name in ("log_prob", "ref_log_prob", "entropy", "value"):
        close(found[name][:, :R], scored()[name])
        assert (np.asarray(found[name])[:, R:] == 0).all()


def test_what_stands_in_pads_changes_nothing():
    """Any id, those outside the vocabulary too: bit for bit."""
    tokens, mask, _ = sampled()
    pads = np.asarray(scored()["real"]) == 0
    for garbage in (0, 3, EOS, 10_000):
        dirty = np.where(pads, garbage, np.asarray(tokens)).astype(np.int32)
        found = rollout.score(policy(), scalar_params(5), policy(1), scalar_params(6), dirty, LENGTHS, mask, at(1.0))
        for name in ("log_prob", "ref_log_prob", "entropy", "value", "score"):
            np.testing.assert_array_equal(found[name], scored()[name])


def test_the_score_depends_on_every_token_up_to_the_last():
    tokens, mask, _ = map(np.asarray, sampled())
    for t in range(Q - 1, Q + R):  # the prompt's last token, then the response's
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % VOCAB
        found = rollout.score(policy(), scalar_params(5), policy(1), scalar_params(6), other, LENGTHS, mask, at(1.0))
        moved = np.asarray(found["score"]) != np.asarray(scored()["score"])
        inside = mask[:, t - Q] > 0 if t >= Q else np.ones(ROWS, bool)
        np.testing.assert_array_equal(moved, inside)


def test_a_value_head_on_the_policys_trunk():
    tokens, mask, _ = sampled()
    head = scalar_params(5)["head"]
    shared = rollout.score(policy(), {"head": head}, policy(1), None, tokens, LENGTHS, mask, at(1.0, value=None))
    own = {"trunk": heads.trunk(policy()), "head": head}
    apart = rollout.score(policy(), own, policy(1), scalar_params(6), tokens, LENGTHS, mask, at(1.0))
    close(shared["value"], apart["value"])


# --- the log-probabilities themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature, chunk", [(0.7, 3), (1.0, 100)])
def test_token_log_probs_and_entropy(temperature, chunk):
    """Value and gradient against log_softmax; 3 does not divide 7."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 7, 8)).astype(np.float32), rng.standard_normal((11, 8)).astype(np.float32)
    targets, weights = rng.integers(0, 11, (3, 7)), rng.standard_normal((3, 7)).astype(np.float32)
    every = lambda x, w: jax.nn.log_softmax(x @ w.T / temperature)
    entropy_of = jax.jit(lambda x, w: -(jnp.exp(every(x, w)) * every(x, w)).sum(-1))
    plain = lambda x, w: jnp.take_along_axis(every(x, w), targets[..., None], -1)[..., 0]
    log_prob, entropy = jax.jit(token_log_probs_and_entropy, static_argnums=(3, 4))(x, w, targets, temperature, chunk)
    close(log_prob, jax.jit(plain)(x, w))
    close(entropy, entropy_of(x, w))
    loss = lambda x, w: (weights * token_log_probs(x, w, targets, temperature, chunk)).sum()
    total, found = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    value, expected = jax.jit(jax.value_and_grad(lambda x, w: (weights * plain(x, w)).sum(), (0, 1)))(x, w)
    assert float(total) == approx(float(value), terms=TERMS)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


# --- rewards and metrics ----------------------------------------------------------------------------------


def test_rewards_of_a_row_sum_to_the_score_less_the_penalty():
    j, score = scored(), np.linspace(-1.9, 0.7, ROWS, dtype=np.float32)
    experience, _ = credit(j, score)
    kl = (np.asarray(j["log_prob"]) - np.asarray(j["ref_log_prob"])).sum(1)
    close(experience.reward.sum(1), score - 0.1 * kl)


def test_only_a_response_without_end_of_sequence_gets_its_penalty():
    """In place of its score, at its last action."""
    j = scored()
    mask, score = np.asarray(j["mask"]), np.linspace(-1.9, 0.7, ROWS, dtype=np.float32)
    ended = (np.asarray(j["tokens"])[:, Q:] == EOS).any(1)
    assert 0 < ended.sum() < ROWS
    experience, metrics = credit(j, score, beta=0.0, missing_eos=-1.0)
    expected = np.zeros((ROWS, R), np.float32)
    expected[np.arange(ROWS), mask.sum(1).astype(int) - 1] = np.where(ended, score, -1.0)
    np.testing.assert_array_equal(experience.reward, expected)
    assert float(metrics["response/eos_rate"]) == pytest.approx(ended.mean())
    assert float(metrics["objective/score"]) == approx(np.where(ended, score, -1.0).mean(), terms=ROWS, scale=1)
    free, _ = credit(j, score, beta=0.0, missing_eos=None)
    np.testing.assert_array_equal(free.reward.sum(1), score)


def test_end_of_sequence_in_a_prompt_or_a_pad_is_not_the_responses():
    tokens = np.array([[EOS, 1, 2, EOS, EOS], [EOS, 1, EOS, PAD, PAD]], np.int32)
    mask = np.array([[1, 0, 0], [1, 0, 0]], np.float32)
    assert rollout.has_eos(tokens, mask, EOS).tolist() == [False, True]
    assert rollout.has_eos(tokens, mask, None).tolist() == [True, True]


def test_metrics_are_those_of_the_arrays():
    j, score = {k: np.asarray(v, np.float64) for k, v in scored().items()}, np.linspace(-2, 3, ROWS)
    experience, found = credit(scored(), score.astype(np.float32), gamma=0.9, lam=0.8, whiten_advantages=False)
    inside, d = j["mask"] > 0, j["log_prob"] - j["ref_log_prob"]
    kl = (d * j["mask"]).sum(1)
    returns = np.asarray(experience.returns, np.float64)
    expected = {
        "objective/kl": kl.mean(),
        "objective/kl_se": kl.std() / np.sqrt(ROWS),
        "objective/kl_k3": ((np.exp(-d) - 1 + d) * j["mask"]).sum(1).mean(),
        "objective/score": score.mean(),
        "objective/score_std": score.std(),
        "objective/non_score_reward": -0.1 * kl.mean(),
        "objective/rlhf_reward": (score - 0.1 * kl).mean(),
        "objective/entropy": j["entropy"][inside].mean(),
        "value/explained_var": 1 - ((returns - j["value"])[inside] ** 2).mean() / returns[inside].var(),
        "value/mean": j["value"][inside].mean(),
        "response/length": j["mask"].sum(1).mean(),
        "response/eos_rate": (j["tokens"][:, Q:] == EOS).any(1).mean(),
        "kl_coef": 0.1,
    }
    assert set(found) == set(expected)
    largest = np.abs(j["log_prob"]).max()  # its differences are averaged
    for name, value in expected.items():
        assert float(found[name]) == approx(value, terms=ROWS * R, scale=largest), name


def test_advantages_are_gae_of_the_rewards_then_whitened():
    score = np.linspace(-2, 3, ROWS).astype(np.float32)
    raw, _ = credit(scored(), score, gamma=0.9, lam=0.8, whiten_advantages=False)
    white, _ = credit(scored(), score, gamma=0.9, lam=0.8)
    r, v, mask = np.asarray(raw.reward), np.asarray(scored()["value"]), np.asarray(raw.mask)
    expected, running = np.zeros((ROWS, R)), np.zeros(ROWS)
    for t in reversed(range(R)):
        after = v[:, t + 1] if t + 1 < R else 0
        running = mask[:, t] * (r[:, t] + 0.9 * after - v[:, t] + 0.72 * running)
        expected[:, t] = running
    close(raw.advantage, expected)
    close(raw.returns, (expected + v) * mask)
    np.testing.assert_array_equal(white.returns, raw.returns)
    inside = expected[mask > 0]
    close(np.asarray(white.advantage)[mask > 0], (inside - inside.mean()) / inside.std())


def test_whitened_rewards_enter_the_returns_and_not_the_record():
    score = np.linspace(-2, 3, ROWS).astype(np.float32)
    plain, _ = credit(scored(), score)
    white, _ = credit(scored(), score, lam=1.0, whiten_rewards=True)
    np.testing.assert_array_equal(white.reward, plain.reward)
    mask, r = np.asarray(plain.mask), np.asarray(plain.reward)
    inside = r[mask > 0]
    used = np.where(mask > 0, (r - inside.mean()) / np.sqrt(inside.var() + 1e-8) + inside.mean(), 0)
    close(white.returns, mask * np.cumsum(used[:, ::-1], 1)[:, ::-1])


# --- heads ------------------------------------------------------------------------------------------------


def test_new_rows_of_a_grown_vocabulary_are_the_mean_and_old_ones_stay():
    params = {"wte": jax.random.normal(jax.random.key(0), (6, 4)), "wpe": jnp.ones((3, 4))}
    grown = heads.grow_vocabulary(params, 8)
    np.testing.assert_array_equal(grown["wte"][:6], params["wte"])
    close(grown["wte"][6:], np.tile(params["wte"].mean(0), (2, 1)))
    assert grown["wpe"].shape == (3, 4)


def test_a_new_head():
    head = heads.new_head(4095, jax.random.key(0))
    assert float(head["bias"]) == 0
    assert float(head["kernel"].std()) == pytest.approx(1 / 64, rel=0.05)
    assert (heads.new_head(7, None)["kernel"] == 0).all()
