"""GPT-1's input transformations: exact id layouts (Radford et al. 2018 Figure 1), and what is cut where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.transforms import Marks, cut, pair, sequences

MARKS = Marks.after(40478)  # GPT-1's vocabulary
S, D, X = 40478, 40479, 40480  # _start_, _delimiter_, _classify_ of the released code


@pytest.mark.parametrize(
    "task, segments, expected",
    [
        ("classification", [[5, 6, 7]], [[S, 5, 6, 7, X]]),
        ("entailment", [[5, 6], [7]], [[S, 5, 6, D, 7, X]]),
        ("similarity", [[5, 6], [7]], [[S, 5, 6, D, 7, X], [S, 7, D, 5, 6, X]]),
        ("choice", [[5, 6], [7], [8, 9]], [[S, 5, 6, D, 7, X], [S, 5, 6, D, 8, 9, X]]),
    ],
)
def test_layout(task, segments, expected):
    assert sequences(task, segments, MARKS, 512) == (expected, False)


def test_similarity_is_the_same_set_of_sequences_in_either_order():
    one, _ = sequences("similarity", [[1, 2], [3]], MARKS, 512)
    other, _ = sequences("similarity", [[3], [1, 2]], MARKS, 512)
    assert one == other[::-1]


def test_two_long_segments_are_cut_as_in_the_released_code():
    """max_len = n_ctx // 2 - 2 tokens of each: 254 of a context of 512."""
    ids, was_cut = pair([1] * 400, [2] * 400, MARKS, 512)
    assert was_cut and len(ids) == 512 and ids.count(2) == 254
    assert ids.count(1) == 255  # the one token that 254 + 254 + 3 leaves free


def test_a_long_story_before_a_short_answer_keeps_what_is_free():
    ids, was_cut = pair([1] * 600, [2] * 9, MARKS, 512)
    assert was_cut and ids.count(1) == 500 and ids.count(2) == 9 and len(ids) == 512
    ids, was_cut = pair([1] * 9, [2] * 600, MARKS, 512)
    assert was_cut and ids.count(1) == 9 and ids.count(2) == 500 and ids[-1] == X


@given(st.integers(0, 50), st.integers(0, 50), st.integers(2, 40))
def test_the_cut_fits_and_wastes_nothing(a, b, room):
    kept_a, kept_b = cut(a, b, room)
    assert 0 <= kept_a <= a and 0 <= kept_b <= b
    assert kept_a + kept_b == min(a + b, room)
    assert kept_a >= min(a, room // 2) and kept_b >= min(b, room // 2)


def test_a_single_text_keeps_the_context_but_two():
    (ids,), was_cut = sequences("classification", [[1] * 600], MARKS, 512)
    assert was_cut and len(ids) == 512 and ids[0] == S and ids[-1] == X
    (ids,), was_cut = sequences("classification", [[1] * 510], MARKS, 512)
    assert not was_cut and len(ids) == 512
