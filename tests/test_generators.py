"""GPT-3's synthetic tasks: the layout of OpenAI's files, right answers, no row twice, the same rows from a seed."""

import collections
import gzip
import json
import re

import pytest
from runs import main_of

from gptjax.errors import InputError
from gptjax.tasks import generators
from gptjax.tasks.generators import ARITHMETIC, SCRAMBLE, arithmetic, scramble

WORDS = [a + b + c for a in ("cas", "bro", "lum", "vep") for b in ("in", "ad", "ost") for c in ("os", "er", "ily")]
FIRST = [
    {"context": "\n\nQ: What is 13 plus 43?\n\nA:", "completion": " 56"},
    {"context": "\n\nQ: What is 84 plus 74?\n\nA:", "completion": " 158"},
]
FIRST_WORDS = ["\nvoaswlgken =", "\nunrevlsoed ="]


def answer(question: str) -> int:
    """Read and computed by other means than the generator's."""
    for word, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
        question = question.replace(word, sign)
    assert re.fullmatch(r"[\d+*() -]+", question)
    return eval(question)


@pytest.mark.parametrize("task", ARITHMETIC)
def test_arithmetic(task):
    rows = arithmetic(task, 2000, seed=5)
    assert len({row["context"] for row in rows}) == 2000
    digits, kind = int(task[-3]), task[-1]
    numbers = []
    for row in rows:
        question = re.fullmatch(r"\n\nQ: What is (.+)\?\n\nA:", row["context"])[1]
        assert row["completion"] == f" {answer(question)}"
        shape = r"\(\d [+*-] \d\) [+*-] \d" if kind == "c" else r"\d+ %s \d+"
        assert re.fullmatch(shape % {"a": "plus", "s": "minus", "m": "times"}[kind] if kind != "c" else shape, question)
        numbers += map(int, re.findall(r"\d+", question))
    low, high = (1, 9) if kind == "c" else (0, 10**digits - 1)
    assert low <= min(numbers) and max(numbers) <= high
    assert sum(numbers) / len(numbers) == pytest.approx((low + high) / 2, rel=0.04)  # 4 of .29 / sqrt(4000) / .5
    if kind == "c":
        signs = collections.Counter(re.sub(r"\d", "", row["context"]) for row in rows)
        assert len(signs) == 9 and min(signs.values()) > 160  # of 222


def test_the_same_seed_makes_the_same_rows():
    """In every version: these are the first rows ever made."""
    assert arithmetic("arithmetic_2da", 2, seed=1) == FIRST
    assert [row["context"] for row in scramble("anagrams2", ["volkswagen", "unresolved"], 2, seed=1)] == FIRST_WORDS
    assert arithmetic("arithmetic_2da", 9, seed=1)[:2] == FIRST
    assert arithmetic("arithmetic_2da", 2, seed=2) != FIRST


def test_all_rows_that_there_are():
    rows = arithmetic("arithmetic_2dm", 10_000)
    assert {row["context"] for row in rows} == {
        f"\n\nQ: What is {a} times {b}?\n\nA:" for a in range(100) for b in range(100)
    }
    assert len({row["context"] for row in arithmetic("arithmetic_1dc", 6561)}) == 6561
    with pytest.raises(InputError, match="there are 6561"):
        arithmetic("arithmetic_1dc", 6562)


@pytest.mark.parametrize("task", SCRAMBLE)
def test_scramble(task):
    rows = scramble(task, WORDS + WORDS[:5] + ["two words", "Capital", "x", "level"], len(WORDS), seed=3)
    assert {row["completion"] for row in rows} <= {f" {word}" for word in [*WORDS, "level"]}
    assert len({row["completion"] for row in rows}) == len(WORDS)
    for row in rows:
        word = row["completion"][1:]
        shown = re.fullmatch(r"\n(.+) =", row["context"])[1]
        assert shown != word
        if task == "cycle_letters":
            assert shown in word + word
        elif task == "reversed_words":
            assert shown == word[::-1]
        elif task == "random_insertion":
            assert shown[::2] == word and len(shown) == 2 * len(word) - 1 and set(shown[1::2]) <= set(" ./!")
        else:
            k = int(task[-1])
            assert sorted(shown) == sorted(word) and shown[:k] == word[:k] and shown[-k:] == word[-k:]


@pytest.mark.parametrize(
    "task, word, shown",
    [
        ("cycle_letters", "abcd", {"bcda", "cdab", "dabc"}),
        ("anagrams1", "abcde", {"acbde", "abdce", "acdbe", "adbce", "adcbe"}),
        ("anagrams2", "abcdefg", {"abcedfg", "abdcefg", "abdecfg", "abecdfg", "abedcfg"}),
        ("random_insertion", "abc", {f"a{x}b{y}c" for x in " ./!" for y in " ./!"}),
    ],
)
def test_scrambles_are_uniform(task, word, shown):
    n = 1600
    counts = collections.Counter(scramble(task, [word], 1, seed)[0]["context"][1:-2] for seed in range(n))
    assert counts.keys() == shown
    mean = n / len(shown)
    assert sum((count - mean) ** 2 / mean for count in counts.values()) < 2.5 * len(shown) + 12  # p < .001


def test_bad_requests():
    for call in (lambda: arithmetic("arithmetic_0da", 1), lambda: arithmetic("2da", 1), lambda: scramble("a", [], 0)):
        with pytest.raises(InputError, match="There is no task"):
            call()
    with pytest.raises(InputError, match="there are 0"):
        scramble("anagrams2", ["abccde", "abcde"], 1)  # cc has no other order


def test_the_command(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS))
    code, out, _ = main_of(generators.__name__, "--task=arithmetic", "--n=7", f"--out={tmp_path}/a", "--seed=2")
    assert code == 0 and "7 rows in" in out
    assert sorted(path.stem for path in (tmp_path / "a").iterdir()) == sorted(ARITHMETIC)
    lines = (tmp_path / "a" / "arithmetic_5ds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == arithmetic("arithmetic_5ds", 7, seed=2)
    code, *_ = main_of(generators.__name__, "--task=scramble", f"--words={words}", "--n=5", f"--out={tmp_path}/s")
    assert code == 0 and sorted(path.stem for path in (tmp_path / "s").iterdir()) == sorted(SCRAMBLE)
    code, _, err = main_of(generators.__name__, "--task=anagrams1", "--n=5", f"--out={tmp_path}/s")
    assert code == 2 and "--words=FILE" in err


def test_openais_files_have_this_layout(shared_data):
    folder = shared_data / "fewshot/gpt3"
    for task, name in (("arithmetic_2da", "two_digit_addition"), ("arithmetic_2ds", "two_digit_subtraction")):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        ours = {row["context"]: json.dumps(row) for row in arithmetic(task, 10_000)}
        assert all(ours[json.loads(line)["context"]] == line for line in lines) and len(lines) == 2000
    rows = [json.loads(line) for line in gzip.open(folder / "cycle_letters_in_word.jsonl.gz", "rt")]
    words = [row["completion"][1:] for row in rows]
    made = {row["completion"]: row["context"] for row in scramble("cycle_letters", words, len(words))}
    assert len(made) == len(rows) == 10_000
    for row in rows:
        assert sorted(made[row["completion"]]) == sorted(row["context"])
