"""Metrics of generated text against hand-counted values, the packages that papers report, and enumeration; their
standard errors against closed forms and simulation."""

import itertools
import json
import math
import random
import sys
import time

import numpy as np
import pytest

from gptjax.errors import InputError
from gptjax.evals import standard_errors as se
from gptjax.tasks import metrics as m
from gptjax.tasks import stop_strings as stops
from gptjax.tasks.code_execution import humaneval_program, run_program, run_programs

# --- exact match and F1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, squad, trivia",
    [
        ("The  Eiffel-Tower, a tower!", "eiffeltower tower", "eiffel tower tower"),
        ("An apple", "apple", "apple"),
        ("Theatre another", "theatre another", "theatre another"),
        ("rock_n_roll ‘n’", "rocknroll ‘n’", "rock n roll n"),
        ("the", "", ""),
        ("Zoë’s", "zoë’s", "zoë s"),
    ],
)
def test_normalization(text, squad, trivia):
    assert m.squad_normalize(text) == squad
    assert m.trivia_normalize(text) == trivia


@pytest.mark.parametrize(
    "prediction, gold, em, f1",
    [
        ("The cat sat.", "cat sat", 1, 1),
        ("cat cat sat", "cat sat sat mat", 0, 4 / 7),  # one cat and one sat in common: P 2/3, R 2/4
        ("cat cat sat", "cat cat", 0, 4 / 5),
        ("dog", "cat", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),  # nothing is left of it
        ("cat", "the", 0, 0),
        ("Paris", "Paris, France", 0, 2 / 3),
    ],
)
def test_exact_match_and_f1(prediction, gold, em, f1):
    assert m.exact_match(prediction, gold) == em
    assert m.token_f1(prediction, gold) == pytest.approx(f1, abs=1e-12)
    assert m.token_f1(gold, prediction) == pytest.approx(f1, abs=1e-12)


def test_the_best_of_several_golds():
    golds = ["Paris, France", "paris", "City of Light"]
    assert m.best_of(m.exact_match, "The Paris", golds) == 1
    assert m.best_of(m.token_f1, "city", golds) == pytest.approx(1 / 2)
    assert m.best_of(m.trivia_match, "Onion-skins.", ["Onion", "Onion skins"]) == 1
    assert m.best_of(m.trivia_match, "Onionskins", ["Onion", "Onion skins"]) == 0
    for bad in ([], "Paris"):
        with pytest.raises(InputError, match="give a list"):
            m.best_of(m.exact_match, "Paris", bad)


# --- BLEU and ROUGE -----------------------------------------------------------------------------------------------

PREDICTIONS = ["the cat sat on the mat today", "there is a small dog in the park", "hello there general kenobi , sir"]
REFERENCES = [["the cat sat on a mat today"], ["there is a dog in the park", "a small dog is in the park"],
              ["hello there general kenobi , sir"]]  # fmt: skip


def bleu_by_hand(predictions, references):
    """Papineni et al. 2002, of the closest reference lengths the shortest; for texts that are split at spaces."""
    grams = lambda words, n: [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    length, closest, logs = 0, 0, 0.0
    for n in range(1, 5):
        correct = total = 0
        for text, golds in zip(predictions, references, strict=True):
            found = grams(text.split(), n)
            total += len(found)
            for gram in set(found):
                correct += min(found.count(gram), max(grams(gold.split(), n).count(gram) for gold in golds))
        logs += math.log(correct / total) / 4
    for text, golds in zip(predictions, references, strict=True):
        length += len(text.split())
        closest += min((abs(len(g.split()) - len(text.split())), len(g.split())) for g in golds)[1]
    return 100 * math.exp(logs) * min(1.0, math.exp(1 - closest / length))


def test_bleu():
    pytest.importorskip("sacrebleu", reason="needs the extra eval")
    found = m.bleu(PREDICTIONS, REFERENCES, resamples=200)
    assert found.score == pytest.approx(bleu_by_hand(PREDICTIONS, REFERENCES), abs=1e-9)
    assert 10 < found.score < 100 and "tok:13a" in found.signature
    assert found == m.bleu(PREDICTIONS, REFERENCES, resamples=200)
    assert found.stderr != m.bleu(PREDICTIONS, REFERENCES, resamples=200, seed=1).stderr
    # all corpora of three from these three, exactly
    draws = list(itertools.product(range(3), repeat=3))
    scores = [bleu_by_hand([PREDICTIONS[i] for i in d], [REFERENCES[i] for i in d]) for d in draws]
    many = m.bleu(PREDICTIONS, REFERENCES, resamples=4000).stderr
    assert many == pytest.approx(np.std(scores), rel=0.05)
    assert m.bleu(PREDICTIONS[2:], REFERENCES[2:]).score == pytest.approx(100)
    assert m.bleu([p.upper() for p in PREDICTIONS], REFERENCES, lowercase=True, resamples=2).score == found.score


def test_rouge():
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    found = m.rouge("the dogs sat on mats", ["the dog sat on a mat"])
    # stems are equal: 5 of 5 and of 6 words; bigrams the-dog, dog-sat, sat-on of 4 and of 5; the longest is all 5
    assert found["rouge1"] == pytest.approx(2 * 5 / 11) and found["rouge2"] == pytest.approx(2 * 3 / 9)
    assert found["rougeL"] == pytest.approx(2 * 5 / 11)
    assert m.rouge("a b c", ["x", "a b c"])["rouge2"] == 1
    lines = m.rouge("c d\na b", ["a b\nc d"])
    assert lines["rougeLsum"] == 1 and lines["rougeL"] == 0.5
    assert m.rougeLsum("C d. A b.", "A b. C d.") == 1  # sentences of a single line


def test_sentences_as_lines():
    assert m.sentence_lines(' One. "Two!" Three\n\n4.5 is it? ') == 'One.\n"Two!"\nThree\n4.5 is it?'
    assert m.sentence_lines("no end") == "no end" and m.sentence_lines(" ") == ""


@pytest.mark.parametrize("call", [lambda: m.bleu(["a"], [["a"]]), lambda: m.rouge("a", ["a"])])
def test_without_the_packages_the_extra_is_named(monkeypatch, call):
    m._rouge_scorer.cache_clear()
    for name in ("sacrebleu", "sacrebleu.metrics", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'gptjax\[eval\]'"):
        call()


def test_bad_references():
    pytest.importorskip("sacrebleu", reason="needs the extra eval")
    for predictions, references in ((["a"], []), ([], []), (["a"], [[]])):
        with pytest.raises(InputError, match="BLEU of"):
            m.bleu(predictions, references)
    with pytest.raises(InputError, match="give a list"):
        m.rouge("a", "a")


# --- chains of thought --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("48/2 = <<48/2=24>>24 in May.\n48+24 = 72 altogether.\n#### 72", "72"),
        ("She pays $1,234.50 for 3. The answer is $1,234.50.", "1234.5"),
        ("The answer is 72. So 3 more", "72"),
        ("the answer is 5. No: the answer is: **7**", "7"),
        ("#### -1,000,000\n\nQ: next\n#### 8", "-1000000"),
        ("5-3=2", "2"),
        ("10-3", "3"),
        ("it fell to -3", "-3"),
        ("it fell to −$3.00", "-3"),
        ("a loss of $-5", "-5"),
        ("x = .5", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("The answer is that 12 are left", "12"),
        ("#### none, but 4", "4"),
        ("none", None),
        ("", None),
        ("3.", "3"),
        ("100 is 1e", "1"),
    ],
)
def test_final_answer(text, answer):
    assert m.final_answer(text) == answer


def test_gsm8ks_own_answers(shared_data):
    lines = (shared_data / "sft/gsm8k/train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    for answer in answers:
        reasoning, marked = answer.split("#### ")
        assert float(m.final_answer(answer)) == float(marked.replace(",", ""))
        assert m.final_answer(reasoning + f"The answer is {marked}.") == m.final_answer(answer)


def test_majority_vote():
    assert m.majority_vote(["3", "4", "4", None, None, None]) == "4"
    assert m.majority_vote(["5", "4", "4", "5"]) == "5"
    assert m.majority_vote([None, None]) is None and m.majority_vote([]) is None


# --- parts of a text, stop strings ----------------------------------------------------------------------------------


def test_first_sentences():
    text = ' It is 3.5 m. "Really?" he said. Yes! No. More'
    assert m.first_sentences(text) == "It is 3.5 m."
    assert m.first_sentences(text, 2) == 'It is 3.5 m. "Really?" he said.'
    assert m.first_sentences(text, 3).endswith("said. Yes!")
    assert m.first_sentences(text, 9) == text.strip()
    assert m.first_sentences("Line one\nLine two", 1) == "Line one"
    assert m.first_sentences("A.\n\nB. C", 2) == "A.\n\nB."
    assert m.first_sentences("") == ""


def test_stop_strings():
    assert stops.cut_at_stop("a\n\nQ: b", ["Q:", "\n\n"]) == "a"
    assert stops.cut_at_stop("abc", ["x"]) == "abc" and stops.cut_at_stop("abc", []) == "abc"
    assert stops.find_stop("abcab", ["b", "bc"]) == 1
    for bad in ([""], "Q:"):
        with pytest.raises(InputError, match="Stop strings"):
            stops.find_stop("a", bad)


# --- standard errors ------------------------------------------------------------------------------------------------


def test_of_a_mean():
    values = [1.0, 2.0, 4.0, 9.0]
    assert se.mean(values) == (4.0, pytest.approx(np.std(values, ddof=1) / 2))
    share, error = se.mean([1, 0, 0, 0, 1])
    assert (share, error) == (0.4, pytest.approx(math.sqrt(0.4 * 0.6 / 4)))
    assert se.mean([3.0])[0] == 3 and math.isnan(se.mean([3.0])[1])


def test_of_clusters():
    """k copies of every item: the error of the items by themselves, not 1 / sqrt(k) of it."""
    values = random.Random(0).choices([0.0, 1.0, 0.5], k=40)
    copies, clusters = np.repeat(values, 5), np.repeat(np.arange(40), 5)
    assert se.clustered_mean(copies, [f"passage {c}" for c in clusters]) == pytest.approx(se.mean(values))
    assert se.mean(copies)[1] == pytest.approx(se.mean(values)[1] * math.sqrt(39 / 199))


def test_of_a_ratio_and_a_perplexity():
    rng = np.random.default_rng(0)
    documents, n, runs = 80, 5, 2000
    units = rng.integers(20, 200, (runs, documents))
    nats = units * rng.normal(3, 0.4, (runs, documents))
    found = [se.perplexity(x, u) for x, u in zip(nats, units, strict=True)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=5 / math.sqrt(2 * runs))  # as far as it is known
    x, u = nats[0, :n], units[0, :n]
    assert se.perplexity(x, u)[0] == pytest.approx(math.exp(x.sum() / u.sum()))
    assert se.bits_per_unit(x, u) == pytest.approx(tuple(v / math.log(2) for v in se.ratio(x, u)))
    assert se.ratio(x, np.ones(n)) == pytest.approx(se.mean(x))  # the same denominators: a mean
    assert se.ratio(2.5 * u, u) == (2.5, pytest.approx(0, abs=1e-12))
    assert se.perplexity([1e6, 1e6], [1, 1])[0] == math.inf  # e^1e6 is more than a float holds
    jackknife = [np.delete(x, i).sum() / np.delete(u, i).sum() for i in range(n)]
    assert se.ratio(x, u)[1] == pytest.approx(math.sqrt((n - 1) * np.var(jackknife)), rel=0.3)


def test_bootstrap_of_a_mean_is_its_error():
    values = np.random.default_rng(1).normal(size=200)
    found = se.bootstrap(lambda chosen: values[chosen].mean(), 200, seed=3, resamples=2000)
    assert found == pytest.approx(se.mean(values)[1], rel=0.08)  # 5 of 1 / sqrt(2 x 2000)
    assert found == se.bootstrap(lambda chosen: values[chosen].mean(), 200, seed=3, resamples=2000)
    assert math.isnan(se.bootstrap(lambda chosen: 0.0, 1))


# --- programs -------------------------------------------------------------------------------------------------------

PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n"


def test_programs():
    row = lambda body: humaneval_program(PROMPT, body, TEST, "double")
    programs = {
        row("    return 2 * x\n"): "passed",
        row("    return x\n"): "failed: AssertionError: ",
        row("    return 2 *\n"): "failed: SyntaxError",
        "import sys; sys.exit(0)": "failed: SystemExit: 0",  # before its tests
        "import os; os._exit(0)": "ended early",
        "print('passed' * 10**5); input()": "failed: EOFError",
        "x = bytearray(2**31)": "failed: MemoryError",
        "open('here', 'w').write('x'); import os; assert 'HOME' not in os.environ": "passed",
        "assert __name__ == '__main__'; é = 'ü'": "passed",
    }
    outcomes = run_programs(list(programs), allow_code_execution=True, seconds=20, workers=2)
    for outcome, expected in zip(outcomes, programs.values(), strict=True):
        assert outcome.startswith(expected) and (outcome == "passed") == (expected == "passed")


def test_a_program_that_does_not_end_is_ended_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    assert run_program(program, allow_code_execution=True, seconds=1) == "timed out"
    time.sleep(2)
    assert not mark.exists()


def test_code_is_run_only_where_the_caller_allows_it(tmp_path):
    with pytest.raises(InputError, match="allow_code_execution"):
        run_program(f"open({str(tmp_path / 'x')!r}, 'w')", allow_code_execution=False)
    assert not list(tmp_path.iterdir())
