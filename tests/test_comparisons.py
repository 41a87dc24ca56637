"""Comparisons: both forms of a row, ties, the batch of each step and hosts, and every error."""

import numpy as np
import pytest
from rows_files import template, write

from gptjax.data import lm
from gptjax.data.comparisons import (
    Comparison,
    ComparisonBatches,
    ComparisonConfig,
    load_comparisons,
    validation_batches,
)
from gptjax.errors import InputError

LENGTH, PAD = 12, 99


def load(source, length=LENGTH, kind="chat", seed=0, **options):
    return load_comparisons(ComparisonConfig(source=source, **options), template(kind), length, seed)


def ranked(prompt, *ranks):
    return {"prompt": prompt, "completions": [f"c{i}" for i in range(len(ranks))], "ranks": list(ranks)}


def prompts(part):
    return [template().decode(e.prompt) for e in part]


# --- loading ----------------------------------------------------------------------------------------------


def test_both_forms(tmp_path):
    rows = [ranked("a", 2, 1, 1.5, 1), {"prompt": "b", "chosen": "good", "rejected": "bad"}, ranked("c", 0, 1)]
    loaded = load(write(tmp_path / "x.jsonl", rows))
    by_prompt = {template().decode(e.prompt): e for e in loaded.train + loaded.validation}
    t = template()
    assert by_prompt == {
        "a": Comparison(t.prompt("a"), [t.response(f"c{i}") for i in range(4)], [2, 1, 1.5, 1], (2,) * 4),
        "b": Comparison(t.prompt("b"), [t.response("good"), t.response("bad")], [0, 1], (4, 3)),
        "c": Comparison(t.prompt("c"), [t.response("c0"), t.response("c1")], [0, 1], (2, 2)),
    }
    assert (loaded.k, len(loaded.left_out)) == (4, 0)


def test_messages_and_a_map_of_fields(tmp_path):
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [{"q": talk, "yes": "d", "no": "e"}, {"q": "f", "yes": "g", "no": "h"}]
    source = write(tmp_path / "x.jsonl", rows)
    loaded = load(source, fields={"prompt": "q", "chosen": "yes", "rejected": "no"})
    got = sorted(e.prompt for e in loaded.train + loaded.validation)
    assert got == sorted([template().prompt(talk), template().prompt("f")])
    plain = write(tmp_path / "y.jsonl", [rows[1], rows[1] | {"q": "i"}])
    loaded = load(plain, kind="plain", fields={"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert sorted(e.prompt for e in loaded.train + loaded.validation) == [template("plain").prompt(p) for p in "fi"]


def test_a_row_of_ties_alone_is_left_out(tmp_path):
    loaded = load(write(tmp_path / "x.jsonl", [ranked("a", 1, 1, 1), ranked("b", 1, 1, 2), ranked("c", 0, 1)]))
    assert len(loaded.left_out) == 1
    assert sorted(prompts(loaded.train + loaded.validation)) == ["b", "c"]
    with pytest.raises(InputError, match="All 1 rows of the source .* were dropped"):
        load(write(tmp_path / "y.jsonl", [ranked("a", 1, 1)]))


def test_rows_of_one_prompt_stay_together(tmp_path):
    rows = [ranked(f"p{i % 50}", 0, 1, i) for i in range(2, 202)]
    loaded = load(write(tmp_path / "x.jsonl", rows), validation="0.3")
    train, validation = prompts(loaded.train), prompts(loaded.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(row["prompt"] for row in rows)
    assert all(part.count(p) == 4 for part in (train, validation) for p in set(part))
    assert 5 <= len(set(validation)) <= 25
    assert set(prompts(load(str(tmp_path / "x.jsonl"), validation="0.3", seed=1).validation)) != set(validation)


def test_k_and_dropped_count_both_sources(tmp_path):
    train = write(tmp_path / "t.jsonl", [ranked("a", 0, 1), ranked("b", 1, 1)])
    validation = write(tmp_path / "v.jsonl", [ranked("a", 0, 1, 2), ranked("b" * 20, 1, 2)])
    loaded = load(train, validation=validation, drop_long=True)
    assert (len(loaded.train), len(loaded.validation), loaded.k, len(loaded.left_out)) == (1, 1, 3, 2)


def test_fingerprint(tmp_path):
    held_out = write(tmp_path / "v.jsonl", [ranked("v", 0, 1)])
    prints = [
        load(write(tmp_path / "x.jsonl", [ranked("a", 0, 1, 2), row]), validation=held_out).fingerprint
        for row in (ranked("b", 0, 1), ranked("b", 0, 1), ranked("b", 1, 0), ranked("c", 0, 1))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


LONG = {"prompt": "abc", "completions": ["a", "abcdefg", "b"], "ranks": [0, 1, 2]}


@pytest.mark.parametrize(
    "row, error",
    [
        (
            {"text": "a"},
            "There is no field 'prompt', only 'text'. Name the one to use with --config.data.fields.prompt",
        ),
        ({"prompt": "a"}, "There is no field 'completions', only 'prompt'"),
        ({"prompt": "a", "completions": ["b", "c"]}, "There is no field 'ranks'"),
        ({"prompt": "a", "chosen": "b"}, "There is no field 'rejected', only .*fields.rejected=NAME"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "Completion 2: The response is list, not text"),
        (ranked("a", 1), "The row has 1 completions: give 2 to 9"),
        (ranked("a", *range(10)), "The row has 10 completions: give 2 to 9"),
        (ranked("a", 1, 2) | {"ranks": [1]}, "The row has 1 ranks for 2 completions: give one for each"),
        (ranked("a", 1, 2) | {"ranks": 1}, "The ranks are int, not a list: fix"),
        (ranked("a", 1, 2) | {"completions": "bc"}, "The completions are str, not a list"),
        (ranked("a", 1, "2"), "The rank '2' is not a finite number"),
        (ranked("a", 1, None), "The rank None is not a finite number"),
        (ranked("a", 1, True), "The rank True is not a finite number"),
        (ranked("a", 1, float("nan")), "The rank nan is not a finite number"),
        (ranked("a", 1, float("-inf")), "The rank -inf is not a finite number"),
        (ranked("a", 1, 10**400), "The rank 10+ is not a finite number"),
        (ranked("a", 1, 2) | {"completions": ["b", ""]}, "Completion 2: The response is empty"),
        (ranked("", 1, 2), "The prompt is empty"),
        (ranked(7, 1, 2), "The prompt is int"),
        (LONG, "The prompt has 5 tokens and the completion 2 8 with end-of-text, together more than 12. Raise"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, error):
    source = write(tmp_path / "x.jsonl", [ranked("a", 0, 1), row])
    with pytest.raises(InputError, match=f"x.jsonl:2: {error}"):
        load(source)


def test_long_rows(tmp_path):
    source = write(tmp_path / "x.jsonl", [LONG, ranked("a", 0, 1), ranked("b", 0, 1)])
    assert len(load(source, drop_long=True).left_out) == 1
    assert len(load(source, length=13).left_out) == 0
    assert len(load(source, length=13, max_length=12, drop_long=True).left_out) == 1
    with pytest.raises(InputError, match="max_length=13 is more than the 12 tokens.*: lower it"):
        load(source, max_length=13)
    with pytest.raises(InputError, match="There is no data to read: give --config.data.source=PATH"):
        load(None)
    with pytest.raises(InputError, match="unknown name 'response'"):
        ComparisonConfig(fields={"response": "a"})


# --- batches ----------------------------------------------------------------------------------------------


def comparisons(n=7):
    """Comparison i has 2 + i % 3 completions and prompts of different tokens."""
    return [
        Comparison([10 + i] * (1 + i % 2), [[30 + c] * (c + 1) for c in range(2 + i % 3)], list(range(2 + i % 3)))
        for i in range(n)
    ]


def batches(rows=3, n=7, seed=5, **options):
    return ComparisonBatches(comparisons(n), rows, 4, 8, seed, pad_id=PAD, **options)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype


def which(batch):
    return (batch["tokens"][:, 0, 0] - 10).tolist()


def test_a_batch():
    batch = batches()[0]
    dtypes = {"tokens": np.int32, "lengths": np.int32, "ranks": np.float32, "valid": np.float32, "weights": np.float32}
    shapes = {"tokens": (3, 4, 8), "lengths": (3, 4), "ranks": (3, 4), "valid": (3, 4), "weights": (3,)}
    assert {name: a.dtype for name, a in batch.items()} == dtypes
    assert {name: a.shape for name, a in batch.items()} == shapes
    assert which(batch) == lm.shuffled(np.arange(3), 7, 5).tolist()
    for row, i in enumerate(which(batch)):
        e = comparisons()[i]
        k = len(e.completions)
        for c in range(4):
            ids = e.prompt + e.completions[c] if c < k else []
            assert batch["tokens"][row, c].tolist() == ids + [PAD] * (8 - len(ids))
            assert batch["lengths"][row, c] == max(len(ids), 1)
        assert batch["ranks"][row].tolist() == e.ranks + [0] * (4 - k)
        assert batch["valid"][row].tolist() == [1] * k + [0] * (4 - k)
    assert batch["weights"].tolist() == [1, 1, 1]


def test_each_epoch_is_a_permutation():
    stream = np.array([which(batches()[t]) for t in range(14)]).reshape(6, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream}) > 4
    assert [which(batches(seed=6)[t]) for t in range(2)] != [which(batches()[t]) for t in range(2)]


def test_random_access_is_sequential_access():
    in_order = dict(lm.iterate(batches(), 0, 6))
    for step in (5, 1, 1):
        same(batches()[step], in_order[step])


def test_the_hosts_parts_are_the_batch():
    for step in range(4):
        for part in (np.arange(h, 6, 3) for h in range(3)):  # a host need not hold neighbors
            whole = batches(rows=6)[step]
            same(batches(rows=6, here=lambda rows, part=part: part)[step], {k: v[part] for k, v in whole.items()})


def test_steps():
    assert [batches(rows=r).steps(e) for r, e in ((3, 1), (7, 1), (7, 1.5), (3, 0))] == [3, 1, 2, 1]


@pytest.mark.parametrize("hosts", [1, 2])
def test_validation_batches(hosts):
    part = lambda h: lambda rows: np.array_split(np.arange(rows), hosts)[h]
    parts = [list(validation_batches(comparisons(), 4, 4, 8, pad_id=PAD, here=part(h))) for h in range(hosts)]
    whole = [{name: np.concatenate([p[b][name] for p in parts]) for name in parts[0][0]} for b in range(2)]
    assert which(whole[0]) + which(whole[1])[:3] == list(range(7))
    assert whole[1]["weights"].tolist() == [1, 1, 1, 0]
    assert (whole[1]["tokens"][3] == PAD).all() and whole[1]["lengths"][3].tolist() == [1] * 4
    assert not whole[1]["valid"][3].any()
    for row, i in enumerate(which(batches()[0])):
        for name in whole[0]:
            np.testing.assert_array_equal(batches()[0][name][row], whole[i // 4][name][i % 4])


def test_bad_batches():
    for k, length in ((3, 8), (4, 5)):
        with pytest.raises(
            InputError, match=f"4 completions and up to [56] tokens, more than k={k} or length={length}: load"
        ):
            validation_batches(comparisons(), 4, k, length, pad_id=PAD)
    with pytest.raises(IndexError):
        batches()[-1]
