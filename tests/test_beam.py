"""Beam search against all sequences there are, against the rule written out for lists, and against greedy decoding."""


import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import approx, model_terms
from test_generation import CONTEXT, COUNTER, GREEDY, PROMPTS, TINY, counter, full_logits
from test_gpt import random_params

from gptjax.errors import InputError
from gptjax.generation.beam import Hypothesis, beam_search, gnmt_penalty
from gptjax.generation.decode import generate
from gptjax.model import gpt
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import Rules, parameter_shardings, use_rules

MODEL = dataclasses.replace(TINY, tied_head=False)
PENALTIES = {"gnmt": gnmt_penalty, "none": lambda n: 1.0, "long": lambda n: n**2.0, "short": lambda n: n**-1.0}
penalties = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


@functools.cache
def params():
    """Sharp enough for texts of all lengths to be the best of some penalty."""
    found = random_params(MODEL, seed=1)
    return {**found, "lm_head": 2 * found["lm_head"]}


def next_log_probs(texts, vocab):
    """Of every text by the whole forward, four at a time: [texts, vocab]."""
    out = []
    for some in (texts[i : i + 4] for i in range(0, len(texts), 4)):
        rows = np.zeros((4, CONTEXT), np.int32)
        for row, text in zip(rows, some, strict=False):
            row[: len(text)] = text
        logits = np.asarray(full_logits(params(), MODEL, rows), np.float64)
        out += [logits[i, len(text) - 1, :vocab] for i, text in enumerate(some)]
    return np.array([row - np.logaddexp.reduce(row) for row in out])


# --- all sequences ------------------------------------------------------------------------------------------------

VOCAB, END, LENGTH = 4, 3, 3


def all_sequences(prompt) -> dict[tuple, float]:
    """Log-probability of every sequence that ends in END or has LENGTH tokens."""
    open_, ended = {(): 0.0}, {}
    for _ in range(LENGTH):
        rows = next_log_probs([[*prompt, *text] for text in open_], VOCAB)
        pairs = zip(open_.items(), rows, strict=True)
        longer = {(*text, t): p + row[t] for (text, p), row in pairs for t in range(VOCAB)}
        ended |= {text: p for text, p in longer.items() if text[-1] == END}
        open_ = {text: p for text, p in longer.items() if text[-1] != END}
    return ended | open_


@pytest.fixture(scope="module")
def sequences():
    return [all_sequences(prompt) for prompt in PROMPTS]


@penalties
def test_a_beam_as_wide_as_all_sequences_finds_the_best_of_them(sequences, penalty):
    options = dict(max_new_tokens=LENGTH, penalty=penalty, eot_id=END, vocab=VOCAB)
    found = beam_search(params(), MODEL, PROMPTS, width=64, **options)
    for table, hypothesis in zip(sequences, found, strict=True):
        assert len(table) == 1 + 3 + 9 * 4
        assert np.logaddexp.reduce(list(table.values())) == pytest.approx(0, abs=1e-12)
        best = max(table, key=lambda text: table[text] / penalty(len(text)))
        assert hypothesis.tokens == [t for t in best if t != END]
        assert hypothesis.score == approx(table[best] / penalty(len(best)), terms=LENGTH * model_terms(MODEL))


def test_the_penalty_decides(sequences):
    """What the penalties prefer differs, or the test above would say little."""
    best = lambda penalty: [max(t, key=lambda text: t[text] / penalty(len(text))) for t in sequences]
    assert len({str(best(penalty)) for penalty in PENALTIES.values()}) >= 3
    assert gnmt_penalty(1) == 1 and gnmt_penalty(7, 1.0) == 2 and gnmt_penalty(25) == pytest.approx(5**0.6)


# --- the rule, for lists --------------------------------------------------------------------------------------------


def plain_search(prompt, n, width, penalty, ends, vocab):
    """Without a cache, a batch, or an early end; (text, score) of the best."""
    beams, finished = [((), 0.0)], []
    for length in range(1, n + 1):
        rows = next_log_probs([[*prompt, *text] for text, _ in beams], vocab)
        longer = [((*text, t), p + row[t]) for (text, p), row in zip(beams, rows, strict=True) for t in range(vocab)]
        longer.sort(key=lambda pair: -pair[1])
        over = [(text, p / penalty(length)) for text, p in longer[:width] if text[-1] in ends or length == n]
        finished += over
        beams = [(text, p) for text, p in longer if text[-1] not in ends][:width]
        if len(finished) >= width:
            break
    return max(finished, key=lambda pair: pair[1])


ENDS = (14, 15)


@penalties
def test_it_is_the_rule_written_out(penalty):
    """Four beams, prompts of unequal length in a batch, two ids that end; also beside other rows."""
    n, vocab = 8, 16
    expected = [plain_search(prompt, n, 4, penalty, ENDS, vocab) for prompt in PROMPTS]
    options = dict(max_new_tokens=n, penalty=penalty, eot_id=ENDS, vocab=vocab)
    found = beam_search(params(), MODEL, PROMPTS, **options)
    for (text, score), hypothesis in zip(expected, found, strict=True):
        assert hypothesis.tokens == list(text[:-1] if text[-1] in ENDS else text)
        assert hypothesis.score == approx(score, terms=n * model_terms(MODEL))
    others = beam_search(params(), MODEL, [[9] * 16, PROMPTS[2], [1], PROMPTS[0]], **options)
    assert [others[3].tokens, others[1].tokens] == [found[0].tokens, found[2].tokens]


def test_the_rows_end_in_different_ways():
    """Of the test above: after 1 to 8 tokens, by an end of text and at the limit, and not as greedy decoding does."""
    some = {plain_search(p, 8, 4, penalty, ENDS, 16)[0] for p in PROMPTS for penalty in PENALTIES.values()}
    assert len({len(text) for text in some}) >= 4 and {text[-1] in ENDS for text in some} == {True, False}
    greedy = {plain_search(p, 8, 1, gnmt_penalty, ENDS, 16)[0] for p in PROMPTS}
    assert len(some - greedy) >= 6


def test_one_beam_is_greedy():
    expected = generate(params(), MODEL, PROMPTS, max_new_tokens=12, sampling=GREEDY, eot_id=ENDS, vocab=16)
    found = beam_search(params(), MODEL, PROMPTS, max_new_tokens=12, width=1, eot_id=ENDS, vocab=16)
    assert [h.tokens for h in found] == expected
    assert len({len(text) for text in expected}) > 1


def test_on_a_mesh():
    options = dict(max_new_tokens=5, eot_id=ENDS, vocab=16)
    mesh = make_mesh(MeshConfig(data=2, seq=2, tensor=2))
    with jax.set_mesh(mesh), use_rules(Rules()):
        placed = jax.device_put(params(), parameter_shardings(gpt.abstract_params(MODEL), mesh))
        found = beam_search(placed, MODEL, PROMPTS[:3], mesh=mesh, **options)  # not divisible by the mesh
    assert [h.tokens for h in found] == [h.tokens for h in beam_search(params(), MODEL, PROMPTS, **options)[:3]]


# --- limits, bad input ------------------------------------------------------------------------------------------------


def count_beams(prompts, n=8, **options):
    return beam_search(counter(), COUNTER, prompts, max_new_tokens=n, **options)


def test_each_row_ends_by_itself():
    """The planted model that counts (test_generation.py): almost all of its probability is on one text."""
    options = dict(eot_id=5, penalty=PENALTIES["none"])
    found = count_beams([[2], [4], [0, 1], [0] * 20, [0] * 19, [6]], 100, **options)
    # the context's last position predicts too
    expected = [[3, 4], [], [2, 3, 4], [1], [1, 2], [7, 8, 9, 10, 11, 0, 1, 2, 3, 4]]
    assert [h.tokens for h in found] == expected
    assert all(isinstance(h, Hypothesis) and -1e-2 < h.score <= 0 for h in found)
    assert count_beams([]) == []


def test_more_beams_than_texts_and_bfloat16():
    (found,) = count_beams([[2]], 2, width=40, vocab=7, dtype=jnp.bfloat16, penalty=PENALTIES["none"])
    assert found.tokens == [3, 4] and -1e-2 < found.score <= 0


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "Prompt 1 has 0 tokens"),
        ([[2] * 21], {}, "Prompt 0 has 21 tokens: give it 1 to 20"),
        ([[1, 12]], {}, "has token 12"),
        ([[1]], {"n": 0}, "at least 1"),
        ([[1]], {"width": 0}, "at least 1"),
        ([[1]], {"penalty": lambda n: 0.0}, "must be positive"),
        ([[1]], {"penalty": lambda n: float("nan")}, "must be positive"),
    ],
)
def test_bad_input(prompts, options, message):
    with pytest.raises(InputError, match=message):
        count_beams(prompts, **options)
