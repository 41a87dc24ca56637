"""Deduplication: the probability of a candidate, what goes and what stays by kind of document, in any order."""

import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from curation_runs import curated
from scipy.stats import binom, norm

from gptjax.curation import minhash
from gptjax.curation.exact import Exact
from gptjax.curation.fuzzy import Fuzzy, contained, document_ngrams
from gptjax.curation.minhash import FINEWEB, GPT3, MARIN, Bands
from gptjax.curation.repeats import Repeats
from gptjax.curation.words import batches, words
from gptjax.data import ngrams

WORDS = [a + b + c for a in "bdfglmnprst" for b in "a e ir ou un".split() for c in "ba cel dor mi x".split()]


def prose(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + "."


# --- words and signatures -------------------------------------------------------------------------------------


def test_words_are_those_of_contamination_wherever_a_text_is_cut(monkeypatch):
    texts = ["It's 3 o'clock, ÉCOLE_x2!", "", "  ", "Ünïcode \U0001d7d8 ٣ 日本語 " * 9, "ΣΑΣ end"]
    for batch in (batches(texts), batches(texts, size=10)):
        for text, found in zip(texts, [w for part in batch for w in part], strict=True):
            lowered = [c.lower() for c in text]
            spelled = ["".join(lowered[s:e]) for s, e in zip(found.starts, found.ends, strict=True)]
            assert spelled == ngrams._WORD.findall("".join(lowered))
            np.testing.assert_array_equal(found.hashes, ngrams.word_hashes("".join(lowered)))
            assert found.digits.tolist() == [any(c.isdigit() for c in word) for word in spelled]
    whole = words(texts[3])
    monkeypatch.setattr("gptjax.curation.words._PIECE", 20)
    for a, b in zip(whole, words(texts[3]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how, similarities", [(FINEWEB, (0.5, 0.7, 0.85)), (MARIN, (0.7, 0.8)), (GPT3, (0.1, 0.3))])
def test_candidates_follow_the_s_curve(how, similarities):
    """Of pairs of sets of known Jaccard similarity, within intervals that hold 99 % of the time for all seven rates."""
    rng, pairs, size, level = np.random.default_rng(7), 400, 240, 0.99 ** (1 / 7)
    for s in similarities:
        shared = round(2 * size * s / (1 + s))
        keys, agreement = [], []
        for _ in range(pairs):
            elements = rng.integers(0, 2**32, 2 * size - shared, dtype=np.uint32)
            a, b = elements[:size], np.concatenate([elements[:shared], elements[size:]])
            both = np.stack([minhash.signature(a, how.hashes), minhash.signature(b, how.hashes)])
            keys.append(minhash.band_keys(both, how))
            agreement.append((both[0] == both[1]).mean())
        s = shared / (2 * size - shared)
        low, high = binom.interval(level, pairs, how.probability(s))
        assert low <= sum((a == b).any() for a, b in keys) <= high
        # the share of equal hashes estimates s, with the binomial's spread
        assert abs(np.mean(agreement) - s) <= norm.interval(level)[1] * np.sqrt(s * (1 - s) / how.hashes / pairs)


def test_published_rates():
    """reference: probability of FineWeb's 14 x 8 (Penedo et al. 2024), GPT-3's 10 at .3."""
    np.testing.assert_allclose(FINEWEB.probability([0.5, 0.75, 0.8, 0.85]), [0.0533, 0.7716, 0.9235, 0.9884], atol=6e-5)
    assert round(float(GPT3.probability(0.3)), 4) == 0.9718 and FINEWEB.hashes == 112 and MARIN.hashes == 286


def test_a_signature_is_the_least_of_each_function():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    a, b = minhash._functions(7)
    expected = ((x[:, None].astype(np.uint64) * a + b) % 2**32).min(0)
    np.testing.assert_array_equal(minhash.signature(x, 7), expected.astype(np.uint32))


# --- what is contained ----------------------------------------------------------------------------------------


def test_containment_and_numbers():
    grams = lambda text: document_ngrams(words(text), 3)
    long = grams("a b c d e f g h 12 i j k l m n o p q r s t u")
    assert contained(grams("B, c D; e f"), long) == (1.0, 0)
    share, missing = contained(grams("a b c d e x"), long)
    assert share == 3 / 4 and missing == 0
    share, missing = contained(grams("a b c d e f g h 13 i"), long)  # g h 13 and h 13 i are not there
    assert share == 6 / 8 and missing == 2
    assert contained(grams(""), long) == (0.0, 0) == contained(long, grams(""))
    assert contained(grams("b c"), grams("c b")) == (0.0, 0)  # a text of fewer words is one n-gram


# --- kinds of documents ---------------------------------------------------------------------------------------


def edited(rng, text, share):
    parts = text.split()
    for i in rng.sample(range(len(parts)), max(1, round(share * len(parts)))):
        parts[i] = rng.choice(WORDS)
    return " ".join(parts)


def table(rng, rows=40):
    amount = lambda: rng.randrange(10**6)
    return "\n".join(f"{year} revenue {amount()} costs {amount()}" for year in range(1980, 1980 + rows))


def one_cell_changed(rng, text):
    parts = text.split(" ")
    at = rng.choice([i for i, part in enumerate(parts) if part.isdigit()])
    return " ".join([*parts[:at], str(int(parts[at]) + 1), *parts[at + 1 :]])


@pytest.fixture(scope="module")
def corpus():
    """(texts of each kind by id, {removed id: what must be kept in its place}): shuffled, in three files."""
    rng = random.Random(3)
    originals = [prose(rng, rng.randrange(120, 400)) for _ in range(150)]
    template = prose(rng, 150)
    documents = [(text, "original", None) for text in originals]
    for i, text in enumerate(originals[:100]):
        kind, change = [
            ("case", lambda t: t.upper().replace(" ", " - ")), ("near", lambda t: edited(rng, t, 0.01)),
            ("contained", lambda t: " ".join(t.split()[: int(0.93 * len(t.split()))])),
            ("half", lambda t: edited(rng, t, 0.5)),
        ][i % 4]  # fmt: skip
        documents.append((change(text), kind, i))
    documents += [(template + " " + prose(rng, 30), "template", None) for _ in range(60)]  # 83 % is the same
    tables = [table(rng) for _ in range(20)]
    documents += [(t, "table", None) for t in tables] + [(one_cell_changed(rng, t), "table", None) for t in tables]
    rng.shuffle(documents)
    return documents


@pytest.fixture(scope="module")
def deduplicated(corpus, tmp_path_factory):
    third = len(corpus) // 3
    files = {name: [text for text, *_ in corpus[i * third : (i + 1) * third if i < 2 else None]]
             for i, name in enumerate("abc")}  # fmt: skip
    folder = tmp_path_factory.mktemp("fuzzy")
    summary, records, _ = curated(folder, files, [Fuzzy(Bands(20, 5))])
    ids = [f"{name}.jsonl:{i + 1}" for name, rows in files.items() for i in range(len(rows))]
    return summary, {id: (*about, records[id]) for id, about in zip(ids, corpus, strict=True)}, folder


def test_precision_and_recall_by_kind(deduplicated):
    _, documents, _ = deduplicated
    removed = {id: d for id, d in documents.items() if d[3]["status"] == "removed"}
    wrong = [d[1] for d in removed.values() if d[1] in ("half", "template", "table")]
    assert not wrong  # precision 1: nothing that says something else goes
    replaced = {d[3]["twin"] for d in removed.values()}
    for kind in ("case", "near", "contained"):  # of each pair one is gone, and the other is its twin: recall 1
        members = [id for id, d in documents.items() if d[1] == kind]
        assert len(members) == 25 and all((id in removed) or (id in replaced) for id in members)
    assert len(removed) == 75


def test_what_is_kept_is_no_shorter_and_is_kept(deduplicated):
    summary, documents, folder = deduplicated
    for text, _, _, record in documents.values():
        if record["status"] == "removed":
            kept = documents[record["twin"]]
            assert kept[3]["status"] == "kept" and len(words(kept[0]).hashes) >= len(words(text).hashes)
            grams = [document_ngrams(words(t), 3) for t in (text, kept[0])]
            assert contained(*grams) == (record["score"], 0) and record["score"] >= 0.95
    figures = summary["steps"]["fuzzy"]["figures"]
    assert figures["left_out"] == 0 and figures["compared"] >= 75
    compared = pq.read_table(next((folder / "out/work").glob("step-*-fuzzy/compared.parquet"))).to_pylist()
    refused = [row for row in compared if not row["removed"]]
    assert {documents[row["id"]][1] for row in refused} >= {"table", "template"}
    assert all(row["numbers_missing"] for row in refused if documents[row["id"]][1] == "table")


def test_all_words_alike_but_numbers_are_not_duplicates(tmp_path):
    """200 texts of numbered words: a form that maps digits to one symbol leaves 2 of them."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(500)}" for _ in range(300)) for _ in range(200)]
    summary, _, _ = curated(tmp_path, {"a": texts, "b": [texts[5]]}, [Fuzzy(FINEWEB)])
    assert summary["kept"] == 200


def test_short_and_empty_of_words(tmp_path):
    texts = ["...", "---", "one", "One!", "two words", "Two, words", "words two"]
    _, records, _ = curated(tmp_path, {"a": texts}, [Fuzzy(FINEWEB)])
    assert [r["twin"] for r in records.values()] == [None, None, None, "a.jsonl:3", None, "a.jsonl:5", None]


@pytest.mark.parametrize("texts", [[], ["one of a kind", "and another"]])
def test_nothing_to_compare(tmp_path, texts):
    summary, _, _ = curated(tmp_path, {"a": texts, "b": []}, [Exact(), Fuzzy(FINEWEB)])
    assert summary["kept"] == len(texts) and summary["steps"]["fuzzy"]["figures"]["compared"] == 0


def test_a_chain_of_neighbors_is_not_removed_through_it(tmp_path):
    """Each text is the one before with its first tenth gone and a new one at its end: neighbors are alike, ends are
    not, and none contains another."""
    rng = random.Random(2)
    stream = prose(rng, 1200).split()
    texts = [" ".join(stream[i : i + 200]) for i in range(0, 800, 20)]
    summary, _, _ = curated(tmp_path, {"a": texts}, [Fuzzy(Bands(20, 5))])
    assert summary["kept"] == len(texts) and summary["steps"]["fuzzy"]["figures"]["compared"] > 20


# --- exact substrings -----------------------------------------------------------------------------------------


def test_passages_that_occurred_before_are_cut_out(tmp_path):
    rng = random.Random(4)
    passage, short = prose(rng, 60), prose(rng, 49)
    own = [prose(rng, 30) for _ in range(9)]
    texts = {
        "a": [f"{own[0]} {passage} {own[1]}", f"{own[2]} {short} {own[3]}"],
        "b": [f"{own[4]} {passage.upper()} {own[5]} {short}", passage, f"{own[6]} {own[7]}", f"{own[8]} {passage[2:]}"],
    }
    step = Repeats(parts=3)
    summary, records, documents = curated(tmp_path, texts, [step])
    assert [d["text"] for d in documents] == [
        texts["a"][0], texts["a"][1], f"{own[4]} {own[5]} {short}", texts["b"][2], f"{own[8]} {passage[2:].split()[0]} "
    ]  # fmt: skip
    assert records["b.jsonl:2"]["reason"] == "repeated" and records["b.jsonl:2"]["score"] == 60
    assert summary["steps"]["repeats"]["figures"]["repeated"] == 11 + 11 + 10
    again, _, _ = curated(tmp_path / "again", {"a": [d["text"] for d in documents]}, [step])
    assert again["kept_characters"] == again["read_characters"]


def test_a_word_again_and_again_keeps_one_run_of_it(tmp_path):
    _, _, documents = curated(tmp_path, {"a": ["ha " * 200 + "end", "ha " * 60]}, [Repeats()])
    assert [d["text"] for d in documents] == ["ha " * 50 + "end"]
