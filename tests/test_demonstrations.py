"""Demonstrations: loading, holding out, packing, the batch of each step and hosts, and every error."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_files import template, write

from gptjax.data import lm
from gptjax.data.demonstrations import (
    Demonstration,
    DemonstrationBatches,
    DemonstrationConfig,
    PackedRows,
    load_demonstrations,
    validation_batches,
)
from gptjax.errors import InputError

LENGTH = 24
PAD = 999
BYTES = np.arange(1000, dtype=np.int32) % 7  # UTF-8 bytes of each token, so that sums tell tokens apart


def load(source, length=LENGTH, kind="chat", seed=0, **options):
    return load_demonstrations(DemonstrationConfig(source=source, **options), template(kind), length, seed)


def said(demonstration):
    """(what comes before the response, the response)."""
    ids, _, prompt = demonstration
    return template().decode(ids[:prompt]), template().decode(ids[prompt:])


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(60)])


# --- loading ----------------------------------------------------------------------------------------------


def test_an_example(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"prompt": "ab", "response": "cde"}] * 3 + [{"prompt": "x", "response": "y"}])
    for kind, before in (("chat", 4), ("plain", 2)):
        loaded = load(source, kind=kind)
        example = min(loaded.train + loaded.validation, key=lambda e: -len(e.ids))
        assert example.ids.dtype == np.int32 and example.response.dtype == bool
        t = template(kind)
        assert example.ids.tolist() == t.prompt("ab") + t.response("cde")
        assert example.response.tolist() == [False] * before + [True] * 4
        assert example.prompt == before


def test_bytes_are_the_responses_own_where_the_tokenizer_normalizes(tmp_path):
    """As GPT-1's vocabulary does: tokens that stand for twice the bytes of the text count half of them."""
    talk = [{"role": role, "content": text} for text in "cd" for role in ("user", "assistant")]
    rows = [{"prompt": f"p{i}", "response": "abc"} for i in range(9)] + [{"messages": talk}]
    c, t = DemonstrationConfig(source=write(tmp_path / "x.jsonl", rows)), template()
    loaded = load_demonstrations(c, t, LENGTH, 0)
    own = sum(int(t.byte_lengths[e.ids[e.response]].sum()) for e in loaded.train + loaded.validation)
    assert (own, loaded.byte_ratio) == (9 * 4 + 2 * 2, 1.0)
    t.lossless, t.byte_lengths = False, t.byte_lengths * 2
    loaded = load_demonstrations(c, t, LENGTH, 0)
    assert loaded.byte_ratio == 0.5
    packed = PackedRows(loaded.validation, LENGTH, False, PAD)
    for batch in validation_batches(packed, 1, byte_lengths=np.full(1000, 2.0) * loaded.byte_ratio, loss_on="response"):
        assert batch["target_bytes"].dtype == np.int32 and batch["target_bytes"].sum() == batch["weights"].sum()


def test_messages_and_a_map_of_fields(tmp_path):
    talk = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "ab"), ("assistant", "c"))]
    longer = [*talk, {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]
    source = write(tmp_path / "x.jsonl", [{"m": talk}, {"m": longer}, {"q": "f", "a": "g", "m": None}])
    loaded = load(source, fields={"messages": "m", "prompt": "q", "response": "a"}, validation="0.4")
    every = loaded.train + loaded.validation
    assert sorted(map(said, every)) == [("f", "g"), ("sab", "c"), ("sab", "c")]
    ids, response = template().conversation(longer)
    assert any(e.ids.tolist() == ids and e.response.tolist() == response and e.prompt == 6 for e in every)


def test_other_files(tmp_path, source):
    rows = [json.loads(line) for line in open(source)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(open(source, "rb").read()))
    prints = {load(str(tmp_path / name)).fingerprint for name in ("x.jsonl", "x.json", "x.jsonl.gz")}
    assert len(prints) == 1


def test_fingerprint_is_of_the_training_examples(tmp_path, source):
    first = load(source)
    assert first.fingerprint == load(source).fingerprint != load(source, seed=1).fingerprint
    rows = [json.loads(line) for line in open(source)]
    (held_out,) = [i for i, row in enumerate(rows) if (row["prompt"], row["response"]) == said(first.validation[0])]
    (kept,) = [i for i, row in enumerate(rows) if (row["prompt"], row["response"]) == said(first.train[0])]
    for i, same in ((held_out, True), (kept, False)):
        changed = [row | {"response": "other"} if j == i else row for j, row in enumerate(rows)]
        assert (load(write(tmp_path / "y.jsonl", changed)).fingerprint == first.fingerprint) is same


# --- holding out ------------------------------------------------------------------------------------------


def test_rows_of_one_prompt_stay_together(tmp_path):
    rows = [{"prompt": f"p{i % 150}", "response": f"r{i}"} for i in range(450)]
    loaded = load(write(tmp_path / "x.jsonl", rows), validation="0.2")
    train, validation = ([said(e) for e in part] for part in (loaded.train, loaded.validation))
    assert not {p for p, _ in train} & {p for p, _ in validation}
    assert sorted(train + validation) == sorted((r["prompt"], r["response"]) for r in rows)
    assert 0.1 < len(validation) / 450 < 0.3
    # In the source's order, and a row more doesn't move the others.
    order = [(r["prompt"], r["response"]) for r in rows]
    assert train == [r for r in order if r in set(train)]
    more = load(write(tmp_path / "y.jsonl", [{"prompt": "new", "response": "row"}, *rows]), validation="0.2")
    assert {said(e) for e in more.validation} - {("new", "row")} == set(validation)
    assert {said(e) for e in load(str(tmp_path / "x.jsonl"), validation="0.2", seed=1).validation} != set(validation)


@pytest.mark.parametrize("share", ["0.000001", "0.999999"])
def test_each_side_has_a_row(source, share):
    loaded = load(source, validation=share)
    assert min(len(loaded.train), len(loaded.validation)) == 1
    assert len(loaded.train) + len(loaded.validation) == 60


def test_validation_from_another_source(tmp_path, source):
    other = write(tmp_path / "v.jsonl", [{"prompt": "p1", "response": "v"}, {"prompt": "l" * 30, "response": "v"}])
    loaded = load(source, validation=other, drop_long=True)
    assert [said(e) for e in loaded.validation] == [("p1", "v")]
    assert len(loaded.train) == 60 and len(loaded.left_out) == 1


# --- refusals ---------------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    "row, error",
    [
        (
            {"question": "a", "answer": "b"},
            "There is no field 'prompt', only 'question', 'answer'.*data.fields.prompt=NAME",
        ),
        ({"prompt": "a", "output": "b"}, "There is no field 'response', only 'prompt', 'output'.*fields.response=NAME"),
        ({"prompt": "a", "response": None}, "There is no field 'response', only 'prompt'. Name"),
        ({}, "There is no field 'prompt', only empty ones. Name"),
        ({"prompt": "", "response": "b"}, "The prompt is empty: give it some text"),
        ({"prompt": "a", "response": ""}, "The response is empty"),
        ({"prompt": 3, "response": "b"}, "The prompt is int, not text"),
        ({"prompt": "a", "response": ["b"]}, "The response is list, not text"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "Turn 1 is the user's, but the last turn must be the assistant's",
        ),
        ({"prompt": "a", "response": "Ü"}, "The character 'Ü'"),
        (
            {"prompt": "a" * 10, "response": "b" * 12},
            "The prompt has 12 tokens and the response 13 .*more than 24. Raise",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 9}, {"role": "assistant", "content": "b" * 15}]},
            "The prompt has 11 tokens and the turns after it 16 .*--config.data.drop_long=True",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, error):
    source = write(tmp_path / "x.jsonl", [GOOD, row])
    with pytest.raises(InputError, match=f"x.jsonl:2: {error}"):
        load(source)


def test_long_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "b" * n} for i, n in enumerate((19, 20, 500, 2))]
    source = write(tmp_path / "x.jsonl", rows)
    loaded = load(source, drop_long=True)  # <|user|> p0 <|assistant|>, 19 letters and end-of-text are 24
    assert len(loaded.left_out) == 2
    assert {p for p, _ in map(said, loaded.train + loaded.validation)} == {"p0", "p3"}
    with pytest.raises(InputError, match="x.jsonl:1: The prompt has 4 tokens and the response 20 .*more than 23"):
        load(source, max_length=23)
    with pytest.raises(InputError, match="max_length=25 is more than the 24 tokens.*: lower it"):
        load(source, max_length=25)
    with pytest.raises(InputError, match="All 4 rows of the source .* were dropped"):
        load(source, max_length=3, drop_long=True)
    with pytest.raises(InputError, match="x.jsonl:3: There is no field 'nothing'"):  # drop_long drops no others
        load(write(tmp_path / "x.jsonl", [{"nothing": "a", "response": "b"}] * 2 + [GOOD]), drop_long=True,
             fields={"prompt": "nothing"})  # fmt: skip


def test_nothing_to_load(tmp_path):
    with pytest.raises(InputError, match="There is no data to read: give --config.data.source=PATH"):
        load(None)
    with pytest.raises(InputError, match="contains no rows: give one"):
        load(write(tmp_path / "x.jsonl", []))
    with pytest.raises(InputError, match="has only one prompt.*--config.data.validation=PATH"):
        load(write(tmp_path / "x.jsonl", [GOOD, GOOD | {"response": "c"}]))


def test_an_empty_prompt_is_allowed_without_a_template(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"prompt": "", "response": "b"}, GOOD])
    loaded = load(source, kind="plain")
    assert sorted(e.prompt for e in loaded.train + loaded.validation) == [0, 1]


@pytest.mark.parametrize(
    "options, error",
    [
        ({"fields": {"promt": "q"}}, "unknown name 'promt': did you mean 'prompt'"),
        ({"fields": {"prompt": 3}}, "data.fields.prompt=3 is not the name of a field: give text"),
        ({"max_length": 0}, "max_length=0"),
        ({"validation": "0"}, "validation=0 is out of range: give a fraction"),
        ({"validation": "nan"}, "validation=nan is out of range: give a fraction"),
        ({"template": "llama"}, "template='llama' is unknown"),
        ({"loss_on": "prompt"}, "loss_on='prompt' is unknown: use 'response' or 'all'"),
    ],
)
def test_bad_configs(options, error):
    with pytest.raises(InputError, match=error):
        DemonstrationConfig(**options)


def test_the_defaults_name_every_field():  # else no flag could set one
    assert dict(DemonstrationConfig().fields) == {n: n for n in ("prompt", "response", "messages")}
    assert [f.name for f in dataclasses.fields(DemonstrationConfig)][:3] == ["source", "fields", "validation"]


# --- packing ----------------------------------------------------------------------------------------------


def examples(sizes, first=0):
    """Examples of those sizes, all of whose tokens are different; about half of them are response."""
    made = []
    for n in sizes:
        prompt = n // 2
        made.append(Demonstration(np.arange(first, first + n, dtype=np.int32), np.arange(n) >= prompt, prompt))
        first += n
    return made


SIZES = st.lists(st.integers(2, LENGTH), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(SIZES)
def test_packing_keeps_every_example_whole(sizes):
    given_ = examples(sizes)
    packed = PackedRows(given_, LENGTH, True, PAD)
    alone = PackedRows(given_, LENGTH, False, PAD)
    rows, single = packed.arrays(np.arange(len(packed))), alone.arrays(np.arange(len(alone)))
    assert len(alone) == len(sizes)
    shapes = {name: (a.shape, a.dtype) for name, a in rows.items()}
    n = len(packed)
    assert shapes.pop("tokens") == ((n, LENGTH + 1), np.int32)
    assert shapes == {
        "response": ((n, LENGTH), np.float32),
        "real": ((n, LENGTH), np.float32),
        "segment_ids": ((n, LENGTH), np.int32),
        "positions": ((n, LENGTH), np.int32),
    }

    real = rows["tokens"] != PAD
    assert sorted(rows["tokens"][real]) == list(range(sum(sizes)))  # each token once
    owner = np.repeat(np.arange(len(sizes)), sizes)
    seen = []
    for row in range(n):
        segments = rows["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert where.tolist() == list(range(where[0], where[-1] + 1))
            example = owner[rows["tokens"][row, where[0]]]
            m = sizes[example]
            seen.append(example)
            # As if the example were alone in a row; its last token may be a target only.
            here, there = np.s_[row, where[0] : where[0] + m], np.s_[example, :m]
            np.testing.assert_array_equal(rows["tokens"][here], given_[example].ids)
            assert len(where) in (m, m - 1) and (len(where) == m or where[-1] == LENGTH - 1)
            for name in ("response", "real", "positions"):
                inside = slice(where[0], where[0] + m - 1)
                np.testing.assert_array_equal(rows[name][row, inside], single[name][example, : m - 1])
            assert single["tokens"][there].tolist() == given_[example].ids.tolist()
            # Nothing foretells the first token of the next example, nor padding.
            assert rows["real"][row, where[0] + m - 1 : where[0] + m].sum() == 0
            assert rows["response"][row, where[0] + m - 1 : where[0] + m].sum() == 0
    assert sorted(seen) == list(range(len(sizes)))
    assert rows["real"].sum() == sum(m - 1 for m in sizes)
    assert rows["response"].sum() == single["response"].sum() == sum(e.response[1:].sum() for e in given_)
    assert not rows["positions"][rows["segment_ids"] == 0].any()


def test_the_arrays_of_a_row():
    packed = PackedRows(examples([3, 4]), 8, True, PAD)
    (a,) = (packed.arrays(np.array([0])),)
    assert a["tokens"].tolist() == [[3, 4, 5, 6, 0, 1, 2, PAD, PAD]]
    assert a["real"].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert a["response"].tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert a["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert a["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    empty = packed.arrays(np.array([-1]))
    assert (empty.pop("tokens") == PAD).all() and not any(a.any() for a in empty.values())


@settings(max_examples=150, deadline=None)
@given(SIZES)
def test_first_fit_decreasing(sizes):
    rows, free = [], []
    for n in sorted(sizes, reverse=True):
        row = next((i for i, room in enumerate(free) if n <= room), len(free))
        if row == len(free):
            free.append(LENGTH + 1)
            rows.append([])
        free[row] -= n
        rows[row].append(n)
    packed = PackedRows(examples(sizes), LENGTH, True, PAD)
    got = packed.arrays(np.arange(len(packed)))
    owner = np.repeat(sizes, sizes)
    starts = [[owner[t] for t, p in zip(a, q, strict=False) if p == 0 and t != PAD] for a, q in
              zip(got["tokens"], got["positions"], strict=True)]  # fmt: skip
    assert starts == rows


def test_an_example_longer_than_a_row():
    PackedRows(examples([9]), 8, True, PAD)
    with pytest.raises(InputError, match="An example of 10 tokens does not fit into a row of 9: load"):
        PackedRows(examples([9, 10]), 8, True, PAD)


# --- batches ----------------------------------------------------------------------------------------------


class Mix:
    """Example i of the mix is the numbers from 500 + i on."""

    context_length = LENGTH

    def read(self, index):
        return (500 + np.asarray(index)[:, None] + np.arange(LENGTH + 1)).astype(np.int32)


def packed_rows(n=7):
    return PackedRows(examples([LENGTH - i % 3 for i in range(n)]), LENGTH, False, PAD)


def batches(rows=4, n=7, seed=5, **options):
    options = {"byte_lengths": BYTES, "loss_on": "response", **options}
    return DemonstrationBatches(packed_rows(n), rows, seed, **options)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert getattr(a[name], "dtype", int) == getattr(b[name], "dtype", int)


def test_the_keys_of_a_batch():
    for loss_on in ("response", "all"):
        batch = batches(loss_on=loss_on)[3]
        index = lm.shuffled(np.arange(12, 16), 7, 5)
        arrays = packed_rows().arrays(index)
        weights = arrays["response" if loss_on == "response" else "real"]
        expected = {
            "tokens": arrays["tokens"],
            "weights": weights,
            "lm_weights": arrays["real"],
            "segment_ids": arrays["segment_ids"],
            "positions": arrays["positions"],
            "target_bytes": (BYTES[arrays["tokens"][:, 1:]] * (weights == 1)).sum(1).astype(np.int32),
        }
        same(batch, expected)


def test_each_epoch_is_a_permutation():
    stream = np.concatenate([batches(rows=4)[t]["tokens"][:, 0] for t in range(14)])  # 56 rows are 8 epochs of 7
    epochs = stream.reshape(8, 7)
    first_tokens = sorted(packed_rows().arrays(np.arange(7))["tokens"][:, 0])
    assert all(sorted(epoch) == first_tokens for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6
    assert (batches(rows=4, seed=6)[0]["tokens"] != batches(rows=4)[0]["tokens"]).any()


def test_random_access_is_sequential_access():
    some = batches(rows=6, mix=Mix(), mix_fraction=0.3)
    in_order = dict(lm.iterate(some, 0, 9, threads=2))
    for step in (8, 0, 5, 5):
        same(some[step], in_order[step])


@pytest.mark.parametrize("options", [{}, {"mix": Mix(), "mix_fraction": 0.4}])
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_the_hosts_parts_are_the_batch(options, hosts):
    for step in range(5):
        whole = batches(rows=6, **options)[step]
        every = [np.arange(h, 6, hosts) for h in range(hosts)]  # a host need not hold neighbors
        parts = [batches(rows=6, here=lambda rows, part=part: part, **options)[step] for part in every]
        assert all(len(p["tokens"]) == 6 // hosts for p in parts)
        for part, piece in zip(every, parts, strict=True):
            same(piece, {name: array[part] for name, array in whole.items()})


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.05])
def test_the_rows_of_the_mix(fraction):
    rows, mixed = 5, batches(rows=5, mix=Mix(), mix_fraction=fraction)
    plain = batches(rows=1)
    own = more = 0  # rows of either so far
    for step in range(12):
        batch = mixed[step]
        n = int((step + 1) * rows * fraction) - int(step * rows * fraction)
        expected = [plain[own + i]["tokens"][0] for i in range(rows - n)] + list(Mix().read(more + np.arange(n)))
        np.testing.assert_array_equal(batch["tokens"], expected)
        for name in ("weights", "lm_weights", "segment_ids"):
            assert (batch[name][rows - n :] == 1).all()
        np.testing.assert_array_equal(batch["positions"][rows - n :], np.tile(np.arange(LENGTH), (n, 1)))
        assert batch["target_bytes"].sum() == BYTES[batch["tokens"][:, 1:]][batch["weights"] == 1].sum()
        own, more = own + rows - n, more + n
    assert more == int(12 * rows * fraction)


def test_steps_of_an_epoch():
    assert batches(rows=4).steps(1) == 2  # 7 rows
    assert batches(rows=7).steps(1) == 1
    assert batches(rows=7).steps(2.5) == 3
    assert batches(rows=4).steps(0) == 1
    assert batches(rows=7, mix=Mix(), mix_fraction=0.5).steps(1) == 2  # 7 - 3, then 7 - 4
    assert batches(rows=1, n=1, mix=Mix(), mix_fraction=0.9).steps(1) == 1  # ⌊0.9⌋ rows of the mix in the first step
    assert batches(rows=1, n=2, mix=Mix(), mix_fraction=0.9).steps(1) == 11


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.95), st.floats(0.1, 5))
def test_steps_are_the_fewest(rows, n, fraction, epochs):
    steps = batches(rows=rows, n=n, mix=Mix(), mix_fraction=fraction).steps(epochs)
    used = lambda t: t * rows - int(t * rows * fraction)
    assert used(steps) >= epochs * n
    assert steps == 1 or used(steps - 1) < epochs * n


def test_bad_batches():
    with pytest.raises(InputError, match="A mix of 1.0 of the rows is invalid: give a fraction"):
        batches(mix=Mix(), mix_fraction=1.0)
    with pytest.raises(InputError, match="A mix of 0.2 of the rows has no text: give its source"):
        batches(mix_fraction=0.2)
    other = Mix()
    other.context_length = 9
    with pytest.raises(InputError, match="The mix has examples of 9 tokens, the demonstrations of 24: make"):
        batches(mix=other, mix_fraction=0.2)
    with pytest.raises(InputError, match="loss_on='prompt' is unknown: use 'response' or 'all'"):
        batches(loss_on="prompt")
    with pytest.raises(IndexError):
        batches()[-1]


@pytest.mark.parametrize("hosts", [1, 2])
def test_validation_batches(hosts):
    packed = packed_rows(7)
    options = {"byte_lengths": BYTES, "loss_on": "response"}
    part = lambda h: lambda rows: np.array_split(np.arange(rows), hosts)[h]
    parts = [list(validation_batches(packed, 4, here=part(h), **options)) for h in range(hosts)]
    assert [len(p) for p in parts] == [2] * hosts
    joined = [np.concatenate([p[b]["tokens"] for p in parts]) for b in range(2)]
    every = packed.arrays(np.arange(7))
    np.testing.assert_array_equal(np.concatenate(joined)[:7], every["tokens"])
    assert (joined[1][3] == PAD).all()
    last = parts[-1][1]
    assert not any(last[name][-1].any() for name in ("weights", "lm_weights", "segment_ids", "positions"))
    total = sum(p[b]["target_bytes"].sum() for p in parts for b in range(2))
    assert total == BYTES[every["tokens"][:, 1:]][every["response"] == 1].sum()
