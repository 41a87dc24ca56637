"""Overlap with a corpus: planted overlaps are found exactly, by each paper's rule."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import main_of

from gptjax import contamination as command
from gptjax.data import ngrams
from gptjax.errors import InputError
from gptjax.evals import contamination


def sentence(seed, n=40):
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list("abcdefghij"), 6)) for _ in range(n))


# --- n-grams and windows --------------------------------------------------------------------------------------


def test_words_are_lower_cased_alphanumerics():
    assert ngrams.words("The  cat's\n2nd—HAT_trick, é!") == ["the", "cat", "s", "2nd", "hat", "trick", "é"]
    assert ngrams.characters("a b-c 1.\n2é") == "abc12é"


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
@settings(deadline=None)  # the first example also makes the table of letters
def test_equal_ngrams_have_equal_hashes_and_others_do_not(chosen, n):
    hashes = ngrams.ngram_hashes(ngrams.word_hashes(" ".join(chosen)), n)
    grams = [tuple(chosen[i : i + n]) for i in range(len(chosen) - n + 1)]
    assert len(hashes) == len(grams)
    assert [[a == b for b in grams] for a in grams] == [[a == b for b in hashes] for a in hashes]


@given(st.text(st.sampled_from("ab🙂"), max_size=20), st.text(st.sampled_from("ab🙂"), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_window_has_the_hash_of_its_text_wherever_it_stands(text, probe):
    value = ngrams.Windows(probe).hashes(len(probe))
    places = np.flatnonzero(ngrams.Windows(text).hashes(len(probe)) == value)
    assert places.tolist() == [i for i in range(len(text) - len(probe) + 1) if text.startswith(probe, i)]


# --- a corpus as a stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 40, 10**6])
def test_batches_have_every_ngram_of_a_document_and_no_other(size, monkeypatch):
    """Long documents are cut and short ones joined, of any size."""
    monkeypatch.setattr(ngrams, "_BATCH", size)
    documents = [sentence(0), "", "One two, thrée", "four", sentence(1).replace(" ", "\n"), "İ Ab_c", " ", sentence(2)]
    expected = [h for text in documents for h in ngrams.ngram_hashes(ngrams.word_hashes(text), 3).tolist()]
    found = []
    for batch in ngrams.word_batches(documents, 2):
        hashes = ngrams.ngram_hashes(batch.units, 3)
        found += hashes[batch.within(np.arange(len(hashes)), 3)].tolist()
    assert found == expected
    windows = []
    for batch in ngrams.character_batches(documents, 4):
        starts = np.arange(max(len(batch.units) - 4, 0))
        text = batch.units.tobytes().decode("utf-32-le")
        windows += [text[i : i + 5] for i in starts[batch.within(starts, 5)]]
    kept = [ngrams.characters(text) for text in documents]
    assert windows == [text[i : i + 5] for text in kept for i in range(len(text) - 4)]


@pytest.mark.parametrize("size", [7, 10**6])
def test_overlaps_are_found_across_batches_and_not_across_documents(size, monkeypatch):
    monkeypatch.setattr(ngrams, "_BATCH", size)
    item, other = sentence(0), sentence(1)
    apart = [" ".join(other.split()[:6]), " ".join(other.split()[6:])]
    corpus = [sentence(2) + " " + item + " " + sentence(3), *apart[:1], " ".join(other.split()[6:12])]
    sets = {"s": [item, " ".join(other.split()[:12])]}
    for found in (contamination.by_ngrams(sets, corpus), contamination.by_filter(sets, lambda: corpus),
                  contamination.by_probes(sets, corpus)):  # fmt: skip
        assert found["s"].dirty.tolist() == [True, False]


def test_short_probes_of_every_length_are_found():
    """Those of 8 and more characters by their beginnings; what only begins alike is not."""
    text = "".join(sentence(0).split())
    probes = [text[5 : 5 + n] for n in (1, 2, 7, 8, 9, 15, 16, 31, 32, 33, 49, 50)]
    found = contamination.by_probes({"s": probes}, [text])["s"]
    assert found.dirty.all() and found.evidence == probes
    others = [probe + "Z" for probe in probes[3:-1]]
    assert not contamination.by_probes({"s": others}, [text] * 2)["s"].dirty.any()


# --- the Bloom filter -----------------------------------------------------------------------------------------


def test_the_filter_has_gpt_2s_size_and_no_false_positive_in_a_million():
    """GPT-2 §4: 1 in 10^8, checked with 1M strings that are not in it. 38.34 bits an element, 27 hashes."""
    bloom = ngrams.Bloom(100_000)
    assert bloom.bits == pytest.approx(38.34 * 100_000, rel=1e-3) and bloom.hashes == 27
    values = np.random.default_rng(0).integers(0, 2**63, 1_100_000, dtype=np.uint64)
    bloom.add(values[:100_000])
    assert bloom.contains(values[:100_000]).all()
    assert not bloom.contains(values[100_000:]).any()


def test_a_small_filter_has_no_false_positive_in_a_million_either():
    """Places h1 + i h2 modulo the bits of this filter are wrong 90 times: one in 7,669 has h2 = 0, a single bit."""
    bloom = ngrams.Bloom(200)
    values = np.random.default_rng(0).integers(0, 2**63, 1_000_200, dtype=np.uint64)
    bloom.add(values[:200])
    assert bloom.contains(values[:200]).all() and not bloom.contains(values[200:]).any()


def test_the_rate_of_false_positives_is_the_one_asked_for():
    bloom = ngrams.Bloom(20_000, 0.01)
    values = np.random.default_rng(1).integers(0, 2**63, 220_000, dtype=np.uint64)
    bloom.add(values[:20_000])
    rate = bloom.contains(values[20_000:]).mean()
    assert 0.5 * 0.01 < rate < 1.3 * 0.01  # 7 hashes instead of 6.6; s.e. .0002


# --- the methods ----------------------------------------------------------------------------------------------


def test_gpt_2_finds_the_planted_share():
    """Of an item's 33 8-grams those within the 20 copied words: 13."""
    item = sentence(0)
    corpus = [sentence(1), "x " + " ".join(item.split()[5:25]).upper() + "!", sentence(2)]
    found = contamination.by_filter({"one": [item], "none": [sentence(3)]}, lambda: iter(corpus))
    assert (found["one"].ngrams, found["one"].found) == (33, 13)
    assert found["one"].figures()["overlap_percent"] == 1300 / 33
    assert found["none"].found == 0 and not found["none"].dirty.any()
    assert found["one"].evidence == [" ".join(item.split()[5:13])]


def test_gpt_3s_n_is_the_5th_percentile_between_8_and_13():
    of = lambda *lengths: contamination.ngram_length([sentence(i, n) for i, n in enumerate(lengths)])
    assert of(*[4] * 20) == 8 and of(*[40] * 20) == 13 and of(*[10] * 20) == 10
    assert of(*[9] * 3, *[40] * 37) == 9 and of(*[9], *[40] * 99) == 13


def test_gpt_3_splits_clean_from_dirty():
    items = [sentence(i) for i in range(4)]
    copied = " ".join(items[1].split()[10:23])  # 13 words: just enough
    nearly = " ".join(items[2].split()[10:22])
    found = contamination.by_ngrams({"s": items}, iter([f"{sentence(9)} {copied}", nearly]))["s"]
    assert found.n == 13 and found.dirty.tolist() == [False, True, False, False]
    assert found.evidence[1] == copied and found.found == 1


def test_an_item_of_fewer_words_is_clean_and_counted():
    found = contamination.by_ngrams({"s": ["one two", *[sentence(i) for i in range(30)]]}, iter(["one two three"]))["s"]
    assert found.short == 1 and not found.dirty.any()


def test_gpt_4_takes_three_probes_of_50_characters():
    item, whole = sentence(0), "short one"
    probes = contamination._probes(item, 0)
    text = ngrams.characters(item)
    assert [len(p) for p in probes] == [50, 50, 50] and all(p in text for p in probes)
    assert probes == contamination._probes(item, 0) != contamination._probes(item, 1)
    sets = {"s": [item, whole, sentence(4)]}
    corpus = [f"... {text[max(text.index(probes[1]) - 3, 0) :]}", "a SHORT... one"]
    found = contamination.by_probes(sets, iter(corpus))["s"]
    assert found.dirty.tolist() == [True, False, False]  # letters count as they are: SHORT is not short
    corpus[1] = "a s.h.o.r.t... one"
    assert contamination.by_probes(sets, iter(corpus))["s"].dirty.tolist() == [True, True, False]


def test_scores_on_both_subsets():
    scores, dirty = np.array([1.0, 0, 1, 1]), np.array([True, False, False, False])
    found = contamination.split_scores(scores, dirty)
    assert found["all"]["score"] == 0.75 and found["clean"]["score"] == pytest.approx(2 / 3)
    assert found["clean"]["stderr"] == pytest.approx(1 / 3)
    assert found["dirty"] == {"score": 1, "stderr": None, "items": 1}
    assert found["clean_minus_all"] == pytest.approx(2 / 3 - 0.75)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "eval").mkdir()
    rows = [{"question": sentence(i), "choices": [sentence(50 + i), "no"], "gold": 1} for i in range(5)]
    (tmp_path / "eval" / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.txt").write_text(sentence(7) + ". " + rows[2]["choices"][0])
    scores = [{"item": i, "score": int(i == 2)} for i in range(5)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return tmp_path


@pytest.mark.parametrize("method", ["gpt2", "gpt3", "gpt4"])
def test_the_command(folder, method):
    code, out, err = main_of(
        "gptjax.contamination", f"--eval={folder}/eval", f"--corpus={folder}/corpus.txt", f"--method={method}",
        "--json", f"--scores={folder}/scores.jsonl", f"--log={folder}/log.jsonl",
    )  # fmt: skip
    assert code == 0, err
    quiz = json.loads(out)["sets"]["quiz"]
    assert (quiz["items"], quiz["dirty"]) == (5, 1) and quiz["scores"]["clean"]["score"] == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["item"] for row in log if row["dirty"]] == [2] and log[2]["found"]


def test_only_the_fields_that_are_named(folder):
    sets = command.evaluation_sets(str(folder / "eval"), ["question"])
    assert sets == {"quiz": [sentence(i) for i in range(5)]}
    found = command.find(sets, str(folder / "corpus.txt"), "gpt3")
    assert not found["quiz"].dirty.any()


def test_two_sets_of_a_name_are_refused(folder):
    (folder / "eval" / "quiz.csv").write_text("question\na b c\n")
    with pytest.raises(InputError, match="two files of the name 'quiz'.*rename one"):
        command.evaluation_sets(str(folder / "eval"), None)


def test_a_pretraining_run_is_a_corpus(pretrained, alignment):
    lines = [line for line in alignment["text"].read_text().splitlines() if len(line.split()) > 8]
    found = command.find({"s": [lines[3], sentence(0)]}, str(pretrained), "gpt2")
    assert found["s"].dirty.tolist() == [True, False]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "gpt5"}, "--method=gpt5 is unknown"),
        ({"fields": ["answer"]}, "There is no field 'answer', only 'question', 'choices', 'gold'"),
        ({"eval": "nothing"}, "nothing"),
        ({"scores": [{"item": 9, "score": 1}]}, "item=9 is not one of the 5 items"),
        ({"scores": [{"item": 0, "score": 1}]}, "no score for item 1 of 'quiz'"),
        ({"scores": [{"item": 0}]}, "bad.jsonl:1: score=None is not a number"),
        ({"scores": [{"set": "x", "item": 0, "score": 1}]}, "no evaluation set 'x'"),
    ],
)
def test_bad_input(folder, change, message):
    def run():
        sets = command.evaluation_sets(str(folder / change.get("eval", "eval")), change.get("fields"))
        if "scores" in change:
            path = folder / "bad.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in change["scores"]))
            command.read_scores(str(path), sets)
        command.find(sets, str(folder / "corpus.txt"), change.get("method", "gpt3"))

    with pytest.raises(InputError, match=message):
        run()
