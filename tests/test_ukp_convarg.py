"""The human-judgment study: its baselines of length, and that the strongest stands beside the model."""

import numpy as np

from experiments.ukp_convarg.__main__ import summary
from experiments.ukp_convarg.baselines import longer_right
from experiments.ukp_convarg.debates import Pair


def test_length_in_characters_is_another_baseline_than_in_tokens():
    pairs = [Pair("t", "title", "aaaa", "bb"), Pair("t", "title", "c", "aaaa"), Pair("t", "title", "dd", "bb")]
    tokens = {"aaaa": 1, "bb": 2, "c": 1, "dd": 3}
    assert longer_right(pairs, tokens).tolist() == [0, 0.5, 1]
    assert longer_right(pairs, {text: len(text) for text in tokens}).tolist() == [1, 0, 0.5]


def test_the_strongest_baseline_is_named():
    right = [
        {"reward_model": np.array([1.0, 0]), "longer_wins": np.array([0.5, 0]), "longer_wins_characters": np.ones(2)},
        {"reward_model": np.ones(1), "longer_wins": np.ones(1), "longer_wins_characters": np.array([0.5])},
    ]
    topics, everything = [np.array(["a", "b"]), np.array(["c"])], [np.ones(2, bool), np.ones(1, bool)]
    found = summary(right, topics, everything)
    assert found["pairs"] == 3 and found["strongest_baseline"] == "longer_wins_characters"
    assert found["longer_wins_characters"]["mean"] == 2.5 / 3
    assert np.isclose(found["reward_model_minus_longer_wins_characters"]["mean"], -0.5 / 3)
    less = summary(right, topics, [np.array([True, False]), np.zeros(1, bool)])
    assert less["pairs"] == 1 and less["strongest_baseline"] == "longer_wins_characters"
