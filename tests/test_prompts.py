"""Prompts: loading, left padding, the endless stream, and every error."""

import numpy as np
import pytest
from rows_files import template, write

from gptjax.data.prompts import PromptBatches, PromptConfig, Prompts, bucket_widths, load_prompts
from gptjax.data.rows import LeftOut
from gptjax.errors import InputError

LENGTH, PAD = 10, 99


def load(source, length=LENGTH, kind="chat", **options):
    return load_prompts(PromptConfig(source=source, **options), template(kind), length)


def test_loading(tmp_path):
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "cd"))]
    source = write(tmp_path / "x.jsonl", [{"prompt": p} for p in ("ab", talk, "ab")])
    loaded = load(source)
    assert loaded.ids == [template().prompt(p) for p in ("ab", talk, "ab")]  # the same prompt twice is two prompts
    assert loaded.texts == ["ab", "cd", "ab"]
    assert len(loaded.left_out) == 0
    mapped = load(write(tmp_path / "y.jsonl", [{"q": "ab"}, {"q": "c"}]), fields={"prompt": "q"}, kind="plain")
    assert mapped.ids == [template("plain").prompt(p) for p in ("ab", "c")]
    assert loaded.fingerprint == load(source).fingerprint != mapped.fingerprint


@pytest.mark.parametrize(
    "row, kind, error",
    [
        ({"text": "a"}, "chat", "There is no field 'prompt', only 'text'. .*--config.data.fields.prompt=NAME"),
        ({"prompt": ""}, "chat", "The prompt is empty"),
        ({"prompt": ""}, "plain", "The prompt is empty"),
        ({"prompt": 7}, "chat", "The prompt is int, not text"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "plain", "The template 'plain' does not accept messages"),
        ({"prompt": [{"role": "bot", "content": "a"}]}, "chat", "Turn 1 has the unknown role 'bot'"),
        ({"prompt": "a" * 9}, "chat", "The prompt has 11 tokens, more than the 10 of .*drop_long=True"),
        ({"prompt": "a" * 11}, "plain", "The prompt has 11 tokens, more than the 10 of the context less the response"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, kind, error):
    source = write(tmp_path / "x.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(InputError, match=f"x.jsonl:2: {error}"):
        load(source, kind=kind)


def test_long_prompts(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"prompt": "a" * n} for n in (8, 9, 1)])
    loaded = load(source, drop_long=True)
    assert loaded.texts == ["a" * 8, "a"] and len(loaded.left_out) == 1
    assert load(source, drop_long=True, max_length=3).texts == ["a"]
    with pytest.raises(InputError, match="max_length=11 is more than the 10 tokens.*: lower it"):
        load(source, max_length=11)
    with pytest.raises(InputError, match="There is no data to read: give --config.data.source=PATH"):
        load(None)
    with pytest.raises(InputError, match="unknown name 'messages': there are prompt"):
        PromptConfig(fields={"messages": "m"})


@pytest.fixture
def prompts(tmp_path):
    return load(write(tmp_path / "x.jsonl", [{"prompt": "abcdefgh"[: 1 + i % 8]} for i in range(11)]))


def test_left_padding(prompts):
    batch = PromptBatches(prompts, 6, (LENGTH,), 3, PAD).at(8)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "tokens": ((6, LENGTH), np.int32),
        "lengths": ((6,), np.int32),
        "index": ((6,), np.int64),
    }
    for tokens, length, index in zip(batch["tokens"], batch["lengths"], batch["index"], strict=True):
        ids = prompts.ids[index]
        assert length == len(ids)
        assert tokens.tolist() == [PAD] * (LENGTH - len(ids)) + ids


def test_the_stream(prompts):
    def stream(batch, seed, places=66):
        batches = PromptBatches(prompts, batch, (LENGTH,), seed, PAD)
        return np.concatenate([batches.at(p)["index"] for p in range(0, places, batch)])

    epochs = stream(1, 3).reshape(6, 11).tolist()
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    for batch in (2, 6, 33):  # a batch may be longer than an epoch, and lie across two
        np.testing.assert_array_equal(stream(batch, 3), stream(1, 3))
    np.testing.assert_array_equal(PromptBatches(prompts, 5, (LENGTH,), 3, PAD).at(9)["index"], stream(1, 3)[9:14])
    assert (stream(1, 4) != stream(1, 3)).any()


def test_prompts_that_do_not_fit(prompts):
    with pytest.raises(InputError, match="A prompt of 10 tokens does not fit into 9: load"):
        PromptBatches(prompts, 2, (4, 9), 0, PAD)


def of_lengths(*lengths):
    return Prompts([list(range(n)) for n in lengths], ["a"] * len(lengths), LeftOut(), "")


@pytest.mark.parametrize(
    "longest, buckets, length, widths",
    [
        (1000, 4, 1048, (256, 512, 768, 1000)),
        (100, 4, 200, (32, 64, 96, 104)),
        (30, 4, 200, (8, 16, 24, 32)),
        (30, 1, 200, (32,)),
        (9, 4, 200, (8, 16)),  # no width less than another by under 8
        (3, 4, 200, (8,)),
        (30, 4, 31, (8, 16, 24, 31)),  # 32 would not fit beside a response
        (30, 3, 200, (16, 32)),
    ],
)
def test_bucket_widths(longest, buckets, length, widths):
    assert bucket_widths(longest, buckets, length) == widths
    assert len(widths) <= buckets and widths[-1] <= length


def test_a_batch_is_as_wide_as_its_longest_prompt_needs():
    """By what is in it alone, from any place on; the rows are what they are at the widest, less padding."""
    prompts = of_lengths(2, 3, 2, 4, 9, 3, 2, 20, 3, 8)
    widths = bucket_widths(20, 3, 100)
    of_one, of_many = (PromptBatches(prompts, 2, w, 3, PAD) for w in (widths[-1:], widths))
    seen = []
    for place in range(0, 40, 2):
        batch, widest = PromptBatches(prompts, 2, widths, 3, PAD).at(place), of_one.at(place)
        width, longest = batch["tokens"].shape[1], batch["lengths"].max()
        assert width == min(w for w in widths if w >= longest)
        np.testing.assert_array_equal(batch["tokens"], widest["tokens"][:, -width:])
        assert (widest["tokens"][:, :-width] == PAD).all()
        np.testing.assert_array_equal(batch["lengths"], widest["lengths"])
        np.testing.assert_array_equal(batch["index"], widest["index"])
        np.testing.assert_array_equal(batch["tokens"], of_many.at(place)["tokens"])  # whatever came before
        seen.append(width)
    assert set(seen) == set(widths) == {8, 16, 24}


def test_no_width_at_all():
    with pytest.raises(InputError, match="data.buckets=0: batches need at least 1 padded width"):
        PromptConfig(buckets=0)
