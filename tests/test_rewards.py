"""Rewards that a Python function gives: what it gets, and what is refused of what it returns."""

import types

import numpy as np
import pytest
from test_rollout import PAD

from gptjax.errors import InputError
from gptjax.rlhf import rewards

TEMPLATE = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))  # of a Template only decode is used
PROMPTS, RESPONSES = [[1, 2], [3]], [[4, 5], [6]]


def rule(result, on="tokens"):
    return rewards.call(lambda *_: result, on, TEMPLATE, PROMPTS, ["one", "two"], RESPONSES)


def test_a_reward_function_gets_texts_or_tokens():
    seen = []
    function = lambda *a: seen.append(a) or [0.5, -1]
    for on in ("text", "tokens"):
        found = rewards.call(function, on, TEMPLATE, np.array(PROMPTS, object), ("one", "two"), RESPONSES)
        assert found.dtype == np.float32 and found.tolist() == [0.5, -1]
    assert seen == [(["one", "two"], ["4 5", "6"]), (PROMPTS, RESPONSES)]


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0], r"shape \(1,\) for 2 responses"), ([[1.0], [2.0]], r"shape \(2, 1\)"), (3.0, r"shape \(\)"),
        ([1.0, float("nan")], "nan for response 1 .*'6'"), ([float("inf"), 1.0], "inf for response 0"),
        (["good", "bad"], "no numbers"), (None, "must"), ([[1], [2, 3]], "no numbers"), ([None, 1.0], "must"),
    ],
)  # fmt: skip
def test_what_is_no_reward_is_refused(result, message):
    with pytest.raises(InputError, match=message):
        rule(result)


def test_rewards_that_are_whole_numbers_become_floats():
    assert rule([1, 0]).dtype == np.float32 and rule([True, False]).tolist() == [1.0, 0.0]


def test_load_callable():
    assert rewards.load_callable("math:hypot")(3, 4) == 5
    for name, message in (
        ("math", "module:function"), (":sqrt", "module:function"), ("math:", "module:function"),
        ("no_such_module_here:f", "cannot be imported"), ("math:no_such", "cannot be imported"),
        ("math:pi", "float, not a function"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            rewards.load_callable(name)


def test_split_rows():
    tokens = np.array([[PAD, 1, 2, 4, 5], [PAD, PAD, 3, 6, PAD]])
    prompts, responses = rewards.split_rows(tokens, np.array([2, 1]), np.array([[1.0, 1], [1, 0]]))
    assert (prompts, responses) == (PROMPTS, RESPONSES)
