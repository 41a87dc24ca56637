"""Rules of quality at their limits, the classifier, the Pareto rule, decontamination by hand."""

import json
import random

import numpy as np
import pytest
from conftest import SHARED_DATA
from curation_runs import curated
from scipy import sparse
from scipy.stats import binom

from gptjax.curation import classifier
from gptjax.curation.classifier import Quality, keep_probability
from gptjax.curation.decontaminate import Decontaminate
from gptjax.curation.documents import Document, Drop
from gptjax.curation.gopher import GopherQuality, GopherRepetition
from gptjax.curation.tokens import count_sentences, split_words
from gptjax.curation.web_rules import C4, FineWeb, MC4Paragraphs
from gptjax.errors import InputError

PLAIN = "the cat of old sat with that mouse and "  # eight words, stop words among them


def reason(step, text):
    found = step(Document("x", text))
    return found.reason if isinstance(found, Drop) else None


def distinct(count, length=5):
    """So many different words of letters."""
    letters = "bcdfghjklmnpqrstvwxyz"
    return [letters[i % 21] + letters[i // 21 % 21] + letters[i // 441 % 21] + "a" * (length - 3) for i in range(count)]


# --- rules ----------------------------------------------------------------------------------------------------


def test_words_and_sentences():
    assert split_words("I don't know: U.S. well-known $3.50 (a/b)...") == [
        "I", "do", "n't", "know", ":", "U.S", ".", "well", "-", "known", "$", "3.50", "(", "a", "/", "b", ")", "..."
    ]  # fmt: skip
    texts = ("One. Two! Three?", 'He said "yes." Then no', "3.14 is pi", "")
    assert [count_sentences(text) for text in texts] == [3, 2, 1, 0]


@pytest.mark.parametrize("at_limit, beyond, expected", [
    (distinct(48) + ["the", "and"], distinct(47) + ["the", "and"], "few_words"),
    (["the", "and"] + distinct(98, 3), ["the", "and"] + distinct(97, 3) + ["ab"], "short_words"),
    (distinct(98, 10) + ["the" + 7 * "x", "and" + 7 * "x"], distinct(99, 10) + ["the" + 8 * "x"], "long_words"),
    (["the", "and", "bcdfg"] * 30 + ["#"] * 10, ["the", "and", "bcdfg"] * 30 + ["#"] * 11, "hashes"),
    (["…"] * 10 + ["the", "and", "bcdfg"] * 30, ["…"] * 11 + ["the", "and", "bcdfg"] * 30, "ellipses"),
    (["the", "and"] * 40 + ["1234"] * 20, ["the", "and"] * 40 + ["1234"] * 21, "alphabetic"),
    (["the", "and"] * 40, ["the", "thy"] * 40, "stop_words"),
])  # fmt: skip
def test_gopher_quality_at_its_limits(at_limit, beyond, expected):
    assert reason(GopherQuality(), " ".join(beyond)) == expected
    assert reason(GopherQuality(), " ".join(at_limit)) in (None, "stop_words" if expected == "long_words" else None)


@pytest.mark.parametrize("mark, most, expected", [("- {}", 9, "bullets"), ("{}...", 3, "unfinished_lines")])
def test_gopher_lines_at_their_limits(mark, most, expected):
    for marked in (most, most + 1):
        lines = [mark.format(PLAIN.strip()) if i < marked else PLAIN * 3 for i in range(10)]
        assert reason(GopherQuality(most_symbols=1.0), "\n".join(lines)) == (expected if marked > most else None)


def test_gopher_repetition():
    lines = [" ".join(distinct(400)[i * 8 : i * 8 + 8]) for i in range(40)]
    assert reason(GopherRepetition(), "\n".join(lines)) is None
    assert reason(GopherRepetition(), "\n".join(lines + lines[:17])) in ("line_characters", "lines")
    assert reason(GopherRepetition(line_characters=1), "\n".join(lines[:7] + lines[:3])) != "lines"  # 3 of 10
    assert reason(GopherRepetition(line_characters=1), "\n".join(lines[:6] + lines[:3])) == "lines"  # 3 of 9
    assert reason(GopherRepetition(), "\n\n".join(lines[:6] + lines[:3])) == "paragraphs"
    assert reason(GopherRepetition(), " ".join(distinct(60) + ["spam", "egg"] * 20)) == "top_2_gram"
    again = distinct(100) + distinct(100)[:30]  # a passage that comes back once, no n-gram often
    assert reason(GopherRepetition(), " ".join(again)) == "repeated_5_grams"


def test_c4_drops_lines_and_documents():
    good = [f"This is sentence number {n} here." for n in "abcdefg"]
    bad = ["No end here at all", "Two words.", "Enable Javascript to read this.", "See our privacy policy for more.",
           "A " + "x" * 1001 + " word.", "It goes on and on..."]  # fmt: skip
    document = C4()(Document("x", "\n".join(good + bad + ["  It was so.[12]  "])))
    assert document.text == "\n".join([*good, "It was so."]) and document.edits == {"c4_lines": 6}
    assert reason(C4(), "\n".join(good[:4])) == "few_sentences" and reason(C4(), "\n".join(good[:5])) is None
    assert reason(C4(), "\n".join([*good, "Lorem ipsum dolor sit amet."])) == "lorem_ipsum"
    assert reason(C4(), "\n".join([*good, "if (x) { return it."])) == "curly_bracket"
    assert "No end here" in C4(terminal=False)(Document("x", "\n".join(good + bad))).text


def test_fineweb_and_mc4_at_their_limits():
    lines = [f"{PLAIN * 4}{word}" for word in distinct(100)]
    ended = lambda count: "\n".join(line + "." if i < count else line for i, line in enumerate(lines))
    assert reason(FineWeb(), ended(12)) is None and reason(FineWeb(), ended(11)) == "lines_without_end"
    short = lambda count: "\n".join(f"{word}." if i < count else f"{lines[i]}." for i, word in enumerate(distinct(100)))
    assert reason(FineWeb(), short(67)) is None and reason(FineWeb(), short(68)) == "short_lines"
    again = lambda count: "\n".join([ended(100), *(f"{line}." for line in lines[:count])])
    assert reason(FineWeb(), again(1)) is None and reason(FineWeb(), again(2)) == "repeated_lines"  # .99 and 1.96 %
    breaks = lambda count: ("abcdefghijklmn opqrstuvwxyz\n" * 100)[:-1].replace("\n", "\n" * count)
    assert reason(FineWeb(most_repeated=1, fewest_ended=0, most_short=1), breaks(1)) == "line_breaks"
    assert reason(MC4Paragraphs(), "\n".join(["x" * 200] * 3)) is None
    assert reason(MC4Paragraphs(), "\n".join(["x" * 200] * 2 + ["x" * 199])) == "few_long_lines"


# --- the classifier -------------------------------------------------------------------------------------------


def test_pareto():
    """reference: papers' closed form (2 - s)^-9, and its mean over uniform scores, (1 - 2^-8) / 8."""
    table = {0: 0.00195, 0.25: 0.00650, 0.5: 0.02601, 0.75: 0.13422, 0.9: 0.42410, 0.95: 0.64461, 1: 1}
    np.testing.assert_allclose(keep_probability(list(table)), list(table.values()), atol=5e-6)
    step, draws, level = Quality("good", "bad", seed=3), 4000, 0.99 ** (1 / 4)
    for s in (0.5, 0.75, 0.9, 0.95):
        low, high = binom.interval(level, draws, keep_probability(s))
        assert low <= sum(step.keeps(s, f"doc:{i}") for i in range(draws)) <= high
    grid = (np.arange(100_000) + 0.5) / 100_000
    np.testing.assert_allclose(keep_probability(grid).mean(), (1 - 2**-8) / 8, rtol=1e-6)
    assert step.keeps(1.0, "any") and Quality("g", "b", least=0.5).keeps(0.5, "x")


def test_fit_is_at_the_minimum_and_weighs_both_corpora_alike():
    rng = np.random.default_rng(0)
    hashes = lambda low: rng.integers(low, low + 40, 30).astype(np.uint64) << np.uint64(56)
    rows = lambda count, low: [classifier.features(hashes(low), 8) for _ in range(count)]
    good, bad = rows(60, 10), rows(20, 30)
    weights, bias = classifier.fit(good, bad, 256, 1e-3)
    dense = sparse.lil_matrix((80, 256))
    for i, (columns, values) in enumerate(good + bad):
        dense[i, columns] = values
    x, signs = dense.toarray(), np.r_[np.ones(60), -np.ones(20)]
    slope = -np.r_[np.full(60, 0.5 / 60), np.full(20, 0.5 / 20)] * signs / (1 + np.exp(signs * (x @ weights + bias)))
    gradient = x.T @ slope + 1e-3 * weights
    assert abs(gradient).max() < 2e-4 and abs(slope.sum()) < 2e-4
    assert abs(np.mean([classifier.score(weights, bias, r) for r in good]) - 0.5) > 0.3


def test_auc():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 50) + 1, rng.integers(0, 9, 70)
    expected = np.mean([(x > y) + (x == y) / 2 for x in a for y in b])
    np.testing.assert_allclose(classifier.auc(a, b), expected, rtol=1e-12)


def corpus(folder, name, vocabulary, count, rng):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(vocabulary, k=60))}) + "\n" for _ in range(count)))
    return str(path)


def test_the_classifier_in_a_run(tmp_path):
    rng, vocabulary = random.Random(0), distinct(300)
    good, bad = corpus(tmp_path, "good", vocabulary[:200], 60, rng), corpus(tmp_path, "bad", vocabulary[100:], 60, rng)
    texts = [" ".join(rng.choices(vocabulary[:200], k=60)) for _ in range(30)]
    texts += [" ".join(rng.choices(vocabulary[100:], k=60)) for _ in range(30)]
    summary, records, documents = curated(tmp_path, {"a": texts}, [Quality(good, bad, l2=1e-4, features=12)])
    figures = summary["steps"]["quality"]["figures"]
    assert figures["auc"] == 1.0 and figures["held_out"] == [6, 6]
    assert figures["good_mean"] > 0.7 > 0.3 > figures["bad_mean"]
    kept = [int(d["id"].split(":")[1]) <= 30 for d in documents]
    assert sum(kept) > 0.9 * len(kept) > 0
    scores = [json.loads(record["scores"])["quality"] for record in records.values()]
    assert min(scores[:30]) > max(scores[30:])
    removed = [record for record in records.values() if record["status"] == "removed"]
    assert all(record["reason"] == "quality" and 0 < record["score"] < 1 for record in removed) and removed
    with pytest.raises(InputError, match="6 parts of 500 words, too few to learn from"):
        Quality(corpus(tmp_path, "few", vocabulary, 6, rng), bad).prepare(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data, real data beside the checkout")
def test_it_separates_books_from_the_standard_library(tmp_path):
    step = Quality(str(SHARED_DATA / "lm/books_small/train"), "stdlib", most=600)
    figures = step.prepare(tmp_path)
    assert figures["auc"] > 0.99


# --- decontamination ------------------------------------------------------------------------------------------


def evaluation(folder, items):
    folder.mkdir()
    (folder / "quiz.jsonl").write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    return str(folder)


def filler(rng, count):
    return " ".join(rng.choices(distinct(3000), k=count))


def test_windows_pieces_and_common_phrases(tmp_path):
    rng = random.Random(0)
    items = [filler(rng, 15).capitalize() + "?" for _ in range(14)] + ["too short an item to find"]
    phrase = filler(rng, 13)
    sets = evaluation(tmp_path / "eval", [*items, f"{phrase} end"])
    around = [filler(rng, 150) + " " for _ in range(40)]
    leak = items[0].upper().replace(" ", " - ")
    inside = around[0] + leak + around[1]
    texts = [
        inside, around[2], around[3][:300] + items[1] + around[4], "".join(map(str.__add__, around, items[2:13])),
        *(f"{filler(rng, 40)} {phrase} {filler(rng, 40)}" for _ in range(11)),
    ]  # fmt: skip
    summary, records, documents = curated(tmp_path, {"a": texts}, [Decontaminate(sets)])
    figures = summary["steps"]["decontaminate"]["figures"]
    assert (figures["items"], figures["short_items"], figures["ngrams"]) == (16, 1, 14 * 3 + 2)
    assert figures["ignored"] == 1 and figures["documents"] == 3
    kept = {d["id"]: d["text"] for d in documents}
    at, stop = inside.index(leak), inside.index(leak) + len(leak.rstrip("?"))
    assert kept["a.jsonl:1#1"] == inside[: at - 200] and kept["a.jsonl:1#2"] == inside[stop + 200 :]
    assert kept["a.jsonl:2"] == around[2]
    assert records["a.jsonl:3"]["reason"] == "short_piece" and records["a.jsonl:3"]["score"] == 100
    assert kept["a.jsonl:3#2"] and json.loads(records["a.jsonl:3#2"]["edits"]) == {"decontaminated": 1}
    assert records["a.jsonl:4"]["reason"] == "many_pieces" and records["a.jsonl:4"]["score"] == 11
    assert sum(phrase in text for text in kept.values()) == 11  # in more than 10 documents: a phrase


def test_what_is_left_has_no_item(tmp_path):
    rng = random.Random(1)
    items = [filler(rng, 20) for _ in range(6)]
    sets = evaluation(tmp_path / "eval", items)
    texts = [filler(rng, 200) + " " + rng.choice(items) + " " + filler(rng, 200) for _ in range(30)]
    step = Decontaminate(sets, most_documents=100)
    _, _, documents = curated(tmp_path, {"a": texts[:15], "b": texts[15:]}, [step])
    assert len(documents) == 60
    left = " ".join(d["text"] for d in documents)
    grams = {" ".join(item.split()[i : i + 13]) for item in items for i in range(8)}
    assert not any(gram in left for gram in grams)
    _, _, again = curated(tmp_path / "again", {"a": [d["text"] for d in documents]}, [step])
    assert [d["text"] for d in again] == [d["text"] for d in documents]


def test_languages(tmp_path):
    pytest.importorskip("py3langid", reason="needs the extra `curate`")
    from gptjax.curation.language import Language

    texts = ["The committee will meet again in the spring to discuss the budget for the coming year.",
             "Der Ausschuss wird im Frühjahr erneut zusammentreten, um den Haushalt zu beraten.",
             "Le comité se réunira de nouveau au printemps pour discuter du budget de l'année."]  # fmt: skip
    _, records, documents = curated(tmp_path, {"a": texts}, [Language()])
    about = [(record["reason"], record["detail"]) for record in records.values()]
    assert about == [(None, None), ("language", "de"), ("language", "fr")]
    assert json.loads(documents[0]["fields"]) == {"language": "en"}
    assert reason(Language(("de", "en")), texts[1]) is None
    assert reason(Language(least=1.1), texts[0]) == "uncertain"
