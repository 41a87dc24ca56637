"""Labeled rows: every format and published form, targets, splits, and what is refused."""

import json

import numpy as np
import pytest

from gptjax.data import sources
from gptjax.data.bpe import character_tokenizer
from gptjax.data.labeled import LabeledBatches, LabeledConfig, in_order, load_labeled, padded_length
from gptjax.data.tables import Table
from gptjax.data.transforms import Marks
from gptjax.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\"\n"


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer([LETTERS])


def load(tokenizer, path, rows=None, context=64, **config):
    if rows is not None:
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    config = {"train": str(path), "valid": "0.3"} | config
    return load_labeled(LabeledConfig(**config), tokenizer, Marks.after(tokenizer.vocab_size), context, seed=0)


def text_of(tokenizer, ids):
    marks = Marks.after(tokenizer.vocab_size)
    names = {marks.start: "<", marks.delimiter: "|", marks.extract: ">"}
    return "".join(names[i] if i in names else tokenizer.decode([i]) for i in ids)


def texts(tokenizer, examples):
    return sorted(text_of(tokenizer, ids) for e in examples for ids in e.sequences)


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, table",
    [
        ("x.csv", 'label,text\n1,"a, b ""c"""\n0,"two\nlines"\n', Table()),
        ("x.tsv", 'label\ttext\n1\ta, b "c"\n', Table()),
        ("x.txt", 'label\ttext\n1\ta, b "c"\n', Table("tsv")),
        ("x.csv", '1,"a, b ""c"""\n', Table(None, ("label", "text"))),
    ],
)
def test_tables(tmp_path, name, content, table):
    (tmp_path / name).write_text(content)
    rows = list(sources.rows(str(tmp_path / name), table=table))
    assert rows[0].value == {"label": "1", "text": 'a, b "c"'}
    if "lines" in content:
        assert rows[1].value["text"] == "two\nlines" and rows[1].where.endswith("x.csv:3")


def test_a_table_with_a_byte_order_mark_and_compressed(tmp_path):
    import gzip

    (tmp_path / "x.csv.gz").write_bytes(gzip.compress("\ufefflabel,text\n1,a\n".encode()))
    assert [r.value for r in sources.rows(str(tmp_path / "x.csv.gz"))] == [{"label": "1", "text": "a"}]


def test_bad_rows_of_a_table_are_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"label,text\n1,a,b\n1,\xff\n0,ok\n")
    bad = {}
    rows = list(sources.rows(str(tmp_path / "x.csv"), lambda where, error: bad.update({where[-1]: str(error)})))
    assert [r.value["text"] for r in rows] == ["ok"]
    assert "3 cells for the 2 columns" in bad["2"] and "not UTF-8" in bad["3"]


def test_a_table_without_a_header(tmp_path):
    (tmp_path / "x.csv").write_text("a,a\n1,b\n")
    with pytest.raises(InputError, match="not with a line of column names.*data.columns=NAME,NAME"):
        list(sources.rows(str(tmp_path / "x.csv")))


# --- rows ---------------------------------------------------------------------------------------------------


def test_classification(tokenizer, tmp_path):
    rows = "".join(f"{i % 2},{'ab' * (i + 1)}\n" for i in range(10))
    labeled = load(tokenizer, tmp_path / "x.csv", "label,sentence\n" + rows, fields={"text": "sentence"})
    assert labeled.labels == ("0", "1") and labeled.most == 1
    assert len(labeled.train) + len(labeled.validation) == 10 and labeled.validation
    made = texts(tokenizer, labeled.train + labeled.validation)
    assert made == sorted(f"<{'ab' * (i + 1)}>" for i in range(10))
    for e in labeled.train:
        assert e.target.tolist() == [float(e.value == 0), float(e.value == 1)]


def test_pairs_and_choices(tokenizer, tmp_path):
    rows = [{"premise": "ab", "hypothesis": f"c{'d' * i}", "label": "yes" if i % 2 else "no"} for i in range(6)]
    labeled = load(tokenizer, tmp_path / "e.jsonl", rows, task="entailment", labels="yes,no")
    assert "<ab|cdd>" in texts(tokenizer, labeled.train + labeled.validation)
    rows = [{"first": "ab", "second": "c" * i, "label": i % 2} for i in range(1, 6)]
    labeled = load(tokenizer, tmp_path / "s.jsonl", rows, task="similarity")
    assert {"<ab|cc>", "<cc|ab>"} <= set(texts(tokenizer, labeled.train + labeled.validation)) and labeled.most == 2
    rows = [{"context": f"ab{'a' * i}", "question": "why", "choices": ["c", "d", "e"][: 2 + i % 2], "label": i % 2}
            for i in range(6)]  # fmt: skip
    labeled = load(tokenizer, tmp_path / "c.jsonl", rows, task="choice")
    assert labeled.most == 3 and labeled.labels == ("0", "1", "2")
    assert "<ab why|c>" in texts(tokenizer, labeled.train + labeled.validation)


def test_choices_in_columns(tokenizer, tmp_path):
    """StoryCloze's: sentences in columns, joined by spaces; an empty cell at the end is no choice."""
    rows = "s,t,x,y,right\n" + "".join(f"a{'b' * i}.,c.,d,{'e' if i else ''},1\n" for i in range(1, 6))
    labeled = load(
        tokenizer, tmp_path / "x.csv", rows, task="choice", labels="1,2",
        fields={"context": "s,t", "choices": "x,y", "label": "right"},
    )  # fmt: skip
    assert "<ab. c.|d>" in texts(tokenizer, labeled.train + labeled.validation)
    assert all(e.value == 0 for e in labeled.train)


@pytest.mark.parametrize("score, target", [(0, [1, 0, 0, 0]), (1.25, [0, 0.75, 0.25, 0]), (3, [0, 0, 0, 1])])
def test_a_score_is_a_distribution_whose_mean_it_is(tokenizer, tmp_path, score, target):
    rows = [{"first": f"a{'b' * i}", "second": "c", "label": score} for i in range(4)]
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, task="similarity", scores="0,3")
    e = labeled.train[0]
    np.testing.assert_allclose(e.target, target, atol=1e-6)
    assert e.target @ np.arange(4) == pytest.approx(score) and e.value == score


def test_race(tokenizer, tmp_path):
    rows = [
        {"article": f"story {'a' * i}", "questions": ["why", "who"], "answers": ["B", "D"],
         "options": [["a", "b", "c", "d"], ["e", "f", "g", "h"]]} for i in range(4)
    ]  # fmt: skip
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, task="choice", form="race")
    assert labeled.labels == tuple("ABCD") and len(labeled.train) + len(labeled.validation) == 8
    assert "<story aa who|g>" in texts(tokenizer, labeled.train + labeled.validation)
    assert len(labeled.validation) % 2 == 0  # the questions of a story stay together
    assert sorted({e.value for e in labeled.train}) == [1, 3]


def test_mctest(tokenizer, tmp_path):
    question = "one: who ran\ta\tb\tc\td"
    rows = [f"mc160.train.{i}\tauthor\ta story{'x' * i}\t" + "\t".join([question] * 4) for i in range(4)]
    (tmp_path / "m.ans").write_text("A\tB\tC\tD\n" * 4)
    labeled = load(tokenizer, tmp_path / "m.tsv", "\n".join(rows) + "\n", task="choice", form="mctest")
    assert len(labeled.train) + len(labeled.validation) == 16
    assert "<a storyx who ran|c>" in texts(tokenizer, labeled.train + labeled.validation)
    assert sorted(e.value for e in labeled.train[:4]) == [0, 1, 2, 3]


def test_test_rows_need_no_label(tokenizer, tmp_path):
    rows = [{"text": "a" * (i + 1), "label": i % 2} for i in range(6)]
    (tmp_path / "t.jsonl").write_text('{"text": "zz"}\n')
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, test=str(tmp_path / "t.jsonl"))
    assert texts(tokenizer, labeled.test) == ["<zz>"] and not labeled.test[0].target.any()


def test_what_is_cut_is_counted(tokenizer, tmp_path):
    rows = [{"text": "a" * (i + 1), "label": i % 2} for i in range(12)]
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, context=8)
    assert max(len(ids) for e in labeled.train for ids in e.sequences) == 8
    assert "6 had more tokens than the context and were cut" in str(labeled)  # of 7 to 12 letters


@pytest.mark.parametrize(
    "row, config, message",
    [
        ({"text": "a", "label": "9"}, {"labels": "0,1"}, "x.jsonl:3: The label '9' is not one of 0, 1"),
        ({"text": "", "label": "1"}, {}, "x.jsonl:3: The text is empty"),
        ({"text": 5, "label": "1"}, {}, "x.jsonl:3: The field 'text' is int, not text"),
        ({"label": "1"}, {}, "There is no field 'text'"),
        ({"text": "a"}, {}, "There is no field 'label'"),
    ],
)
def test_bad_rows(tokenizer, tmp_path, row, config, message):
    rows = [{"text": "ab", "label": "0"}, {"text": "abc", "label": "1"}, row, {"text": "b", "label": "0"}]
    with pytest.raises(InputError, match=message):
        load(tokenizer, tmp_path / "x.jsonl", rows, **config)
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, bad_rows="drop", **config)
    assert len(labeled.left_out) == 1 and len(labeled.train) + len(labeled.validation) == 3


def test_more_choices_than_labels(tokenizer, tmp_path):
    rows = [{"context": f"a{'b' * i}", "choices": ["c", "d", "e"], "label": "1"} for i in range(3)]
    with pytest.raises(InputError, match="The row has 3 choices for 2 labels"):
        load(tokenizer, tmp_path / "x.jsonl", rows, task="choice", labels="1,2")


def test_a_score_out_of_range(tokenizer, tmp_path):
    rows = [{"first": "a", "second": "b", "label": "5.5"}]
    with pytest.raises(InputError, match="The score '5.5' is not a number from 0 to 5"):
        load(tokenizer, tmp_path / "x.jsonl", rows, task="similarity", scores="0,5")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"task": "classify"}, "data.task='classify' is unknown.*classification"),
        ({"form": "race"}, "set data.task to choice"),
        ({"scores": "5,0"}, "give the lowest and the highest score"),
        ({"scores": "0,5", "labels": "a,b"}, "leave data.labels out"),
        ({"labels": "a,a"}, "each once"),
        ({"format": "xlsx"}, "choose csv or tsv"),
        ({"fields": {"sentence": "x"}}, "unknown name 'sentence'"),
    ],
)
def test_configs_that_can_not_be(config, message):
    with pytest.raises(InputError, match=message):
        LabeledConfig(**config)


# --- batches ------------------------------------------------------------------------------------------------


def test_batches(tokenizer, tmp_path):
    rows = [{"context": f"a{'b' * i}", "choices": ["c", "dd", "e"][: 2 + i % 2], "label": i % 2} for i in range(7)]
    labeled = load(tokenizer, tmp_path / "x.jsonl", rows, task="choice")
    _, length = padded_length(labeled, 64, 1)
    batches = LabeledBatches(labeled.train, 2, labeled.most, length, 0, pad_id=0)
    assert batches.steps(2) == -(-2 * len(labeled.train) // 2)
    seen = []
    for step in range(len(labeled.train)):  # two epochs
        batch = batches[step]
        assert batch["tokens"].shape == (2, 3, length)
        for row in range(2):
            there = batch["valid"][row] > 0
            ids = [batch["tokens"][row, i, : batch["lengths"][row, i]].tolist() for i in np.flatnonzero(there)]
            match = [e for e in labeled.train if e.sequences == ids]
            assert len(match) == 1 and (match[0].target == batch["target"][row]).all()
            seen.append(match[0].sequences)
        np.testing.assert_array_equal(batch["tokens"], batches[step]["tokens"])  # a pure function of the step
    n = len(labeled.train)
    assert all(seen.count(e.sequences) == 2 for e in labeled.train) and sorted(map(str, seen[:n])) == sorted(
        map(str, seen[n:])
    )
    last = in_order(labeled.train, 3, 3, length, pad_id=0)[-(-n // 3) - 1]
    assert last["weights"].sum() == n - 3 * (-(-n // 3) - 1)
