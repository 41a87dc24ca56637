"""The in-context rules: the closed form of the best accuracy, by enumeration and by the best answer through the
harness. The evaluated questions of arithmetic are in no training document."""

import itertools
import json
import re

import numpy as np
import pytest

from experiments.in_context import __main__ as study
from experiments.in_context import arithmetic, rules
from gptjax.errors import InputError
from gptjax.tasks import generators, harness
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.task import load_task

TASK = "experiments/in_context/rule.toml"
ALL_RULES = {
    "shift": [[(x + a) % 10 for x in range(10)] for a in range(10)],
    "line": [[(a * x + b) % 7 for x in range(7)] for a in range(1, 7) for b in range(7)],
}


def posterior(name, shown: str, asked: str) -> float:
    """Probability that a question has this answer, of a word of both, given the examples: by counting the rules that
    agree with them."""
    kind = rules.KINDS[name]
    places = [tuple(map(kind.symbols.index, word)) for word in shown.split()]
    x, y = map(kind.symbols.index, asked.strip())
    if name == "table":  # each answer is drawn by itself
        return float(dict(places)[x] == y) if x in dict(places) else 1 / 8
    agree = [rule for rule in ALL_RULES[name] if all(rule[i] == of_i for i, of_i in places)]
    return sum(rule[x] == y for rule in agree) / len(agree)


def best_scorer(name, tokenizer) -> Scorer:
    def log_likelihoods(requests):
        out = []
        for r in requests:
            shown = tokenizer.decode(r.context).replace("<|endoftext|>", "")
            p = posterior(name, shown, tokenizer.decode(r.continuation))
            out.append(Score(float(np.log(max(p, 1e-9))), 1, p > 0.5, p > 0.5, False, False))
        return out

    return Scorer(tokenizer, 128, log_likelihoods, None)


@pytest.mark.parametrize("shots", [0, 1, 2, 5])
@pytest.mark.parametrize("name", rules.KINDS)
def test_the_best_answer_has_the_best_accuracy(name, shots, tmp_path):
    tokenizer = rules.make_tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rules.questions(name, shots, 400, 0)))
    result = harness.evaluate(best_scorer(name, tokenizer), load_task(TASK), str(path))
    best = rules.KINDS[name].best(shots)
    error = (best * (1 - best) / 400) ** 0.5
    assert abs(result.metrics["acc"][0] - best) <= 4 * error + 1e-12


def brute_force(rules_RN: np.ndarray, shots: int) -> float:
    """Accuracy of the best answer, over all rules and all sequences of questions: the sum over what the examples can
    show of the largest joint probability with an answer."""
    R, N = rules_RN.shape
    total = 0.0
    for xs in itertools.product(range(N), repeat=shots + 1):
        answers = np.zeros(R, int)
        for x in xs:  # the examples' answers and, in the last place, the question's
            answers = answers * N + rules_RN[:, x]
        total += np.bincount(answers, minlength=N ** (shots + 1)).reshape(-1, N).max(1).sum() / R
    return total / N ** (shots + 1)


@pytest.mark.parametrize("shots", [0, 1, 2])
@pytest.mark.parametrize("name", ALL_RULES)
def test_the_closed_form_by_enumeration(name, shots):
    assert brute_force(np.array(ALL_RULES[name]), shots) == pytest.approx(rules.KINDS[name].best(shots))


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_the_closed_form_of_a_table_by_enumeration(shots):
    """Of 8 letters; what a rule says of letters that are neither shown nor asked cancels out."""
    everything = np.array(list(itertools.product(range(8), repeat=shots + 1)))  # of as many letters
    total = 0.0
    for xs in itertools.product(range(8), repeat=shots + 1):
        place = {x: i for i, x in enumerate(dict.fromkeys(xs))}
        of_rules = everything[:, [place[x] for x in xs]]
        joint = np.bincount(of_rules @ 8 ** np.arange(shots + 1)[::-1], minlength=8 ** (shots + 1))
        total += joint.reshape(-1, 8).max(1).sum() / len(everything)
    assert total / 8 ** (shots + 1) == pytest.approx(rules.KINDS["table"].best(shots))


def test_a_document_follows_one_rule_and_an_example_is_a_token():
    tokenizer, kinds = rules.make_tokenizer(), set()
    for row in rules.documents(60, 17, seed=3):
        words = row["text"].split()
        assert len(words) == len(tokenizer.encode(row["text"])) == 17
        assert len(set(words)) == len({word[0] for word in words})
        kinds |= {name for name, kind in rules.KINDS.items() if words[0][0] in kind.symbols}
    assert kinds == set(rules.KINDS)


# --- arithmetic -------------------------------------------------------------------------------------------------


TWO_DIGITS = {"arithmetic_2da": "two_digit_addition", "arithmetic_2ds": "two_digit_subtraction"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, list[str]]:
    """Evaluated questions, in files by the names of OpenAI's."""
    folder = tmp_path_factory.mktemp("gpt3")
    for task, file in TWO_DIGITS.items():
        rows = generators.arithmetic(task, 2000, seed=5)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {task: arithmetic.contexts(task, str(folder)) for task in TWO_DIGITS}


def test_no_document_has_an_evaluated_question(asked):
    """Nor one with its operands in the other order; and every other question is learned from."""
    taken = {
        (word, *map(int, pair))
        for contexts in asked.values()
        for context in contexts
        for a, word, b in re.findall(r"What is (\d+) (plus|minus) (\d+)\?", context)
        for pair in ((a, b), (b, a))
    }
    assert 7000 < len(taken) < 8000
    rows = [row for task, contexts in asked.items() for row in arithmetic.training_rows(task, contexts)]
    seen = set()
    for document in arithmetic.documents(rows, 20_000, seed=0):
        solved = re.findall(r"\n\nQ: What is (\d+) (plus|minus) (\d+)\?\n\nA: (-?\d+)", document["text"])
        assert 1 <= len(solved) <= arithmetic.MOST
        form = "".join(f"\n\nQ: What is {a} {word} {b}?\n\nA: {answer}" for a, word, b, answer in solved)
        assert form == document["text"]  # nothing else in it
        for a, word, b, answer in solved:
            assert int(answer) == int(a) + (1 if word == "plus" else -1) * int(b)
            seen.add((word, int(a), int(b)))
    assert not seen & taken
    assert len(rows) == 2 * 10**4 - len(taken)
    assert len(seen | taken) > 19_840  # of 12,600 questions 60,000 draws leave out 108 ± 10


def test_a_training_set_that_would_be_empty_is_refused():
    everything = [row["context"] for row in generators.arithmetic("arithmetic_2da", 10**4)]
    with pytest.raises(InputError, match="leave none to learn from: evaluate fewer"):
        arithmetic.training_rows("arithmetic_2da", everything)


def test_digits_are_tokens_and_the_longest_prompt_fits():
    tokenizer = arithmetic.make_tokenizer()
    longest = 0
    for task in TWO_DIGITS:
        for row in generators.arithmetic(task, 500):
            text = row["context"] + row["completion"]
            tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
            assert "".join(tokens) == text and not any(re.search(r"\d\d", token) for token in tokens)
            longest = max(longest, len(tokens))
    assert longest == 19
    assert arithmetic.MOST == max(study.ARITHMETIC_SHOTS) + 1 and arithmetic.MOST * longest < arithmetic.CONTEXT
