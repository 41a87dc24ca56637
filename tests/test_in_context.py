"""The in-context rules: the closed form of the best accuracy, reached by the best answer through the harness."""

import itertools
import json

import numpy as np
import pytest

from experiments.in_context import rules
from gptjax.data.bpe import character_tokenizer
from gptjax.tasks import harness
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.task import load_task

TASK = "experiments/in_context/rule.toml"
ALL_RULES = {
    "shift": [[(x + a) % 10 for x in range(10)] for a in range(10)],
    "line": [[(a * x + b) % 7 for x in range(7)] for a in range(1, 7) for b in range(7)],
}


def posterior(name, query: str) -> np.ndarray:
    """Probability of each answer to a question, given the examples: by counting the rules that agree with them."""
    kind = rules.KINDS[name]
    *shown, question = query.split(";")
    place = kind.symbols.index
    known = {place(e[0]): place(e[2]) for e in shown}
    x = place(question[0])
    if name == "table":  # each answer is drawn by itself
        return np.eye(8)[known[x]] if x in known else np.full(8, 1 / 8)
    agree = [rule for rule in ALL_RULES[name] if all(rule[i] == y for i, y in known.items())]
    return np.bincount([rule[x] for rule in agree], minlength=len(kind.symbols)) / len(agree)


def best_scorer(name, tokenizer) -> Scorer:
    def log_likelihoods(requests):
        out = []
        for r in requests:
            p = posterior(name, tokenizer.decode(r.context))[
                rules.KINDS[name].symbols.index(tokenizer.decode(r.continuation))
            ]
            out.append(Score(float(np.log(max(p, 1e-9))), 1, p > 0.5, p > 0.5, False, False))
        return out

    return Scorer(tokenizer, 128, log_likelihoods, None)


@pytest.mark.parametrize("shots", [0, 1, 2, 5])
@pytest.mark.parametrize("name", rules.KINDS)
def test_the_best_answer_has_the_best_accuracy(name, shots, tmp_path):
    tokenizer = character_tokenizer(["".join(k.symbols for k in rules.KINDS.values()) + ">;"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rules.questions(name, shots, 400, 0)))
    result = harness.evaluate(best_scorer(name, tokenizer), load_task(TASK), str(path))
    best = rules.KINDS[name].best(shots)
    error = (best * (1 - best) / 400) ** 0.5
    assert abs(result.metrics["acc"][0] - best) <= 4 * error + 1e-12


def test_the_closed_form_of_a_line_by_enumeration():
    """Over all rules and all questions of two examples and a third."""
    right = total = 0.0
    for rule in ALL_RULES["line"]:
        for xs in itertools.product(range(7), repeat=3):
            shown = "".join(f"{'ABCDEFG'[x]}>{'ABCDEFG'[rule[x]]};" for x in xs[:2])
            p = posterior("line", f"{shown}{'ABCDEFG'[xs[2]]}>")
            right += (p[rule[xs[2]]] == p.max()) / (p == p.max()).sum()
            total += 1
    assert right / total == pytest.approx(rules.KINDS["line"].best(2))


def test_a_document_follows_one_rule():
    for row in rules.documents(60, 32, seed=3):
        pairs = {tuple(pair.split(">")) for pair in row["text"].split(";") if pair}
        assert len(row["text"]) == 128 and len({x for x, _ in pairs}) == len(pairs)
    kinds = {next(n for n, k in rules.KINDS.items() if row["text"][0] in k.symbols) for row in rules.documents(3, 4, 0)}
    assert kinds == set(rules.KINDS)
