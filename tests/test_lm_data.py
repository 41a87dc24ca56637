"""Language-modeling batches: the permutation, windows, mixtures, hosts, resume and isolated documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.lm import (
    LmBatches,
    Mixture,
    Windows,
    iterate,
    permute,
    shuffled,
    with_segments,
)
from gptjax.data.validation import Scored, validation_batches
from gptjax.errors import InputError

EOT = 9
PINNED_ORDER = [2, 6, 7, 5, 4, 9, 1, 3, 8, 0]
PINNED_STARTS = {1: [970, 746, 201, 649, 463], 2: [26, 938, 665, 377, 895]}  # of each version of the shuffle


class Array:
    """Stands for TokenShards: token i of the split is values[i]."""

    def __init__(self, values, eot_id=EOT):
        self.values, self.eot_id = np.asarray(values, np.int32), eot_id

    def __len__(self):
        return len(self.values)

    def read(self, starts, length):
        assert starts.size == 0 or (starts.min() >= 0 and starts.max() + length <= len(self))
        return self.values[np.asarray(starts)[:, None] + np.arange(length)]


def count(n):
    return Array(np.arange(n))


def batches_of(examples, size=4, **options):
    options = {"byte_lengths": np.ones(100_000, np.int32), "eot_id": EOT, **options}
    return LmBatches(examples, lambda step: (step * size, size), **options)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**64))
def test_permute_is_a_bijection(length, key):
    out = permute(np.arange(length), length, key)
    assert out.dtype == np.int64
    assert sorted(out.tolist()) == list(range(length))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**33, 2**45), st.integers(0, 2**64 - 1))
def test_permute_of_long_ranges(length, key):
    index = np.arange(length - 500, length)
    out = permute(index, length, key)
    assert len(set(out.tolist())) == 500 and 0 <= out.min() and out.max() < length
    assert abs(out.mean() / length - 0.5) < 0.1
    np.testing.assert_array_equal(permute(index[7:9], length, key), out[7:9])  # each index by itself


def test_permute_is_uniform():
    n, keys = 30, 3000
    counts = np.zeros((n, n))
    follows = np.zeros(n)
    for key in range(keys):
        out = permute(np.arange(n), n, key)
        counts[np.arange(n), out] += 1
        follows[(out[1:] - out[:-1]) % n] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom)
    assert abs(follows[1:] / follows[1:].mean() - 1).max() < 0.1  # neighbors don't stay neighbors


def test_permute_keys():
    keys = np.array([1, 2**64 - 1, 1, 7], np.uint64)
    out = permute(np.array([5, 5, 6, 7]), 1000, keys)
    for i, (index, key) in enumerate(zip((5, 5, 6, 7), keys.tolist(), strict=True)):
        assert out[i] == permute(np.array([index]), 1000, key)[0]
    assert len({tuple(permute(np.arange(50), 50, k).tolist()) for k in range(200)}) == 200
    for bad in ([-1], [10]):
        with pytest.raises(ValueError):
            permute(np.array(bad), 10, 0)


def test_values_are_pinned():
    """A change of these changes the data order of every run that is resumed."""
    assert permute(np.arange(10), 10, 42).tolist() == PINNED_ORDER
    index = np.array([0, 1, 61, 62, 10**12])
    for version, starts in PINNED_STARTS.items():
        assert Windows(count(1000), 16, seed=3, shuffle=version).starts(index).tolist() == starts
    assert Windows(count(1000), 16, seed=3).starts(index).tolist() == PINNED_STARTS[2]


@pytest.mark.parametrize("n", [4, 8])
def test_short_ranges_are_shuffled_uniformly(n):
    """Chi-square over seeds and epochs: each item at each place, and of 4 items all 24 orders."""
    draws = np.concatenate([shuffled(np.arange(n * 300), n, seed).reshape(300, n) for seed in range(30)])
    assert (np.sort(draws, axis=1) == np.arange(n)).all()
    expected = len(draws) / n
    places = np.stack([np.bincount(draws[:, i], minlength=n) for i in range(n)])
    freedom = (n - 1) ** 2
    assert abs(((places - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)
    if n == 4:
        _, orders = np.unique(draws, axis=0, return_counts=True)
        assert len(orders) == 24
        expected = len(draws) / 24
        assert abs(((orders - expected) ** 2 / expected).sum() - 23) < 5 * np.sqrt(2 * 23)


def test_shuffles_are_by_the_place_alone():
    """In any order and any number at a time, over the limit between the two ways of shuffling too."""
    for n in (1, 7, 4096, 4097):
        index = np.array([0, 5 * n, 1, 3 * n - 1, 10**15])
        together = shuffled(index, n, 5)
        assert [int(shuffled(np.array([i]), n, 5)[0]) for i in index] == together.tolist()
        epoch = shuffled(np.arange(n, 2 * n), n, 5)
        assert sorted(epoch.tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(0, 400), st.integers(0, 5))
def test_windows_cover_each_epoch_once(context, extra, seed):
    tokens = count(context + 1 + extra)
    windows = Windows(tokens, context, seed)
    n = len(windows)
    assert n == max(1, len(tokens) // context - 1)
    for epoch in range(4):
        starts = np.sort(windows.starts(np.arange(epoch * n, (epoch + 1) * n)))
        assert (np.diff(starts) == context).all()  # no token is twice a target
        assert 0 <= starts[0] and starts[-1] + context + 1 <= len(tokens)
        assert starts[0] < context


def test_windows_change_order_and_cuts():
    windows = Windows(count(50_000), 64, seed=0)
    n = len(windows)
    epochs = [windows.starts(np.arange(e * n, (e + 1) * n)) for e in range(50)]
    assert len({int(e.min()) for e in epochs}) > 25  # of 64 phases
    assert len({tuple((e // 64).tolist()) for e in epochs}) == 50
    other = Windows(count(50_000), 64, seed=1)
    assert (other.starts(np.arange(n)) // 64 != epochs[0] // 64).mean() > 0.9
    np.testing.assert_array_equal(windows.read(np.array([5]))[0], epochs[0][5] + np.arange(65))


def test_too_short_a_split():
    with pytest.raises(InputError, match="16 tokens, fewer than one context of 16 .*: give more text"):
        Windows(count(16), 16, 0)
    assert len(validation_batches(count(16), 16, 2, byte_lengths=np.ones(20))) == 1
    with pytest.raises(InputError, match="A split of 1 tokens has nothing to score .*: give more text"):
        validation_batches(Array([3], eot_id=None), 16, 2, byte_lengths=np.ones(20))
    assert len(Windows(count(17), 16, 0)) == 1


WEIGHTS = [60, 22, 8, 8, 3]  # GPT-3 Table 2.2; they sum to 101


def test_mixture_counts_are_exact_in_every_block():
    sources = [Windows(count(2000 + 100 * k), 8, seed=k) for k in range(5)]
    mixture = Mixture(sources, WEIGHTS, seed=0)
    source, within = mixture.assign(np.arange(30_000))
    for block in range(3):
        counts = np.bincount(source[block * 10_000 : (block + 1) * 10_000])
        assert counts.tolist() == [5941, 2178, 792, 792, 297]  # 10,000·w/101, largest remainders
    for k in range(5):  # used in order, none left out, over epochs
        np.testing.assert_array_equal(within[source == k], np.arange((source == k).sum()))
    assert abs(np.bincount(source[:1000]) / 1000 - np.array(WEIGHTS) / 101).max() < 0.06
    assert (source[:10_000] != source[10_000:20_000]).any()
    np.testing.assert_array_equal(mixture.assign(np.array([9_999, 10_000]))[0], source[9_999:10_001])


def test_mixture_reads_its_sources():
    sources = [Windows(Array(np.arange(500) + 1000 * k), 8, seed=k) for k in range(3)]
    mixture = Mixture(sources, [1, 2, 1], seed=5)
    index = np.array([0, 12_345, 3, 9_999, 777])
    source, within = mixture.assign(index)
    out = mixture.read(index)
    for row, s, w in zip(out, source, within, strict=True):
        np.testing.assert_array_equal(row, sources[s].read(np.array([w]))[0])
    assert mixture.context_length == 8


def test_bad_mixtures():
    windows = Windows(count(100), 8, 0)
    with pytest.raises(InputError, match="2 sources has 1 weights: give one for each"):
        Mixture([windows, windows], [1], 0)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="is not positive: remove that source"):
            Mixture([windows, windows], [1, weight], 0)
    with pytest.raises(InputError, match="1e-06 is less than one example in 10000: raise it"):
        Mixture([windows, windows], [1, 1e-6], 0)
    with pytest.raises(InputError, match="different context lengths: make them equal"):
        Mixture([windows, Windows(count(100), 9, 0)], [1, 1], 0)


def ramp(step):
    """Four steps of 3 sequences, then 8: an uneven ramp."""
    return (step * 3, 3) if step < 4 else (12 + (step - 4) * 8, 8)


def here_of(host, hosts):
    """Rows of a batch -> every hosts-th of them: a host need not hold neighbors."""
    return lambda rows: np.arange(host, rows, hosts)


def join(parts):
    """The batch of which here_of gave the parts."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("isolate", [False, True])
def test_hosts_parts_join_to_the_one_host_batch(hosts, isolate):
    rng = np.random.default_rng(0)
    tokens = Array(rng.integers(0, 12, 3000))
    lengths = rng.integers(1, 9, 12)
    mixture = Mixture([Windows(tokens, 16, 0), Windows(tokens, 16, 1)], [3, 1], 0)

    def make(index, total):
        return LmBatches(
            mixture,
            ramp,
            lambda step: 4 if step < 4 else 8,
            byte_lengths=lengths,
            eot_id=EOT,
            isolate_documents=isolate,
            here=here_of(index, total),
        )

    for step in (0, 3, 4, 1000):
        one = make(0, 1)[step]
        parts = [make(h, hosts)[step] for h in range(hosts)]
        for name in ("tokens", "weights", "target_bytes") + (("segment_ids", "positions") if isolate else ()):
            np.testing.assert_array_equal(join([p[name] for p in parts]), one[name])
        assert ("segment_ids" in one) == isolate
        first, sequences = ramp(step)
        assert {p["sequences"] for p in parts} == {sequences}
        real = mixture.read(np.arange(first, first + sequences))
        np.testing.assert_array_equal(one["target_bytes"][:sequences], lengths[real[:, 1:]].sum(1))
        assert not one["target_bytes"][sequences:].any()
        np.testing.assert_array_equal(one["tokens"][:sequences], real)
        assert (one["tokens"].dtype, one["weights"].dtype) == (np.int32, np.float32)
        assert (one["weights"][:sequences] == 1).all() and (one["weights"][sequences:] == 0).all()
        assert one["weights"].shape == (4 if step < 4 else 8, 16)


def test_sequences_that_do_not_fit():
    with pytest.raises(ValueError, match="4 sequences do not fit into 2 rows"):
        batches_of(Windows(count(100), 8, 0), rows=lambda step: 2)[0]


def test_isolation_without_end_of_text():
    with pytest.raises(InputError, match="Documents cannot be isolated .*no end-of-text: use a bpe tokenizer"):
        batches_of(Windows(count(100), 8, 0), eot_id=None, isolate_documents=True)


def test_segments():
    tokens = np.array([[1, 2, EOT, 3, 4, EOT, EOT, 5], [EOT, 1, 2, 3, 4, 5, 6, EOT]])
    segments, positions = with_segments(tokens, EOT)
    assert segments.tolist() == [[1, 1, 2, 2, 2, 3, 4, 4], [1, 1, 1, 1, 1, 1, 1, 2]]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert segments.dtype == positions.dtype == np.int32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 2, EOT]), min_size=1, max_size=12), min_size=1, max_size=4))
def test_segments_by_definition(rows):
    width = min(map(len, rows))
    tokens = np.array([row[:width] for row in rows])
    segments, positions = with_segments(tokens, EOT)
    for row, segment_row, position_row in zip(tokens, segments, positions, strict=True):
        segment, position = 1, 0
        for t, token in enumerate(row):
            if t and token == EOT:
                segment, position = segment + 1, 0
            assert (segment_row[t], position_row[t]) == (segment, position)
            position += 1


def test_isolated_batches_use_the_inputs():
    tokens = Array([1, 2, 3, EOT, 4, 5, 6, EOT, 7])
    batch = validation_batches(tokens, 4, 2, byte_lengths=np.ones(10), isolate_documents=True)[0]
    assert batch["tokens"].tolist() == [[EOT, 1, 2, 3, EOT], [EOT, 4, 5, 6, EOT]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    batch = validation_batches(tokens, 4, 2, byte_lengths=np.ones(10), isolate_documents=True, stride=2)[0]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("threads", [1, 2])
def test_iterate_is_the_batches_in_order_from_any_step(threads):
    batches = batches_of(Windows(count(5000), 16, 0))
    seen = list(iterate(batches, 0, 25, threads=threads, buffer=3))
    assert [step for step, _ in seen] == list(range(25))
    for step, batch in seen:
        np.testing.assert_array_equal(batch["tokens"], batches[step]["tokens"])
    tail = list(iterate(batches, 13, 25, threads=threads))
    for (step, batch), (expected_step, expected) in zip(tail, seen[13:], strict=True):
        assert step == expected_step
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
    assert list(iterate(batches, 5, 5)) == []


def test_iterate_passes_errors_on_and_can_be_left():
    batches = batches_of(Windows(count(100), 8, 0), rows=lambda step: 2)
    with pytest.raises(ValueError, match="do not fit into"):
        next(iterate(batches, 0, 5))
    running = iterate(batches_of(Windows(count(100), 8, 0)), 0, 10**9)
    assert next(running)[0] == 0
    running.close()


def test_steps_are_independent_of_what_was_read_before():
    one, two = (batches_of(Mixture([Windows(count(900), 8, s) for s in (0, 1)], [1, 1], 7)) for _ in "ab")
    backwards = {step: one[step]["tokens"] for step in range(6000, 0, -997)}
    for step in sorted(backwards):
        np.testing.assert_array_equal(two[step]["tokens"], backwards[step])


def test_validation_batches():
    tokens = count(8 * 11 + 5)
    batches = validation_batches(tokens, 8, 4, byte_lengths=np.full(200, 2))
    assert len(batches) == 3
    assert [b["sequences"] for b in batches] == [4, 4, 4]  # iterates like a list, and ends
    targets = np.concatenate([b["tokens"][:, 1:][b["weights"] > 0] for b in batches])
    np.testing.assert_array_equal(targets, np.arange(93))  # each once, in order: the first and the rest too
    assert batches[0]["tokens"][0].tolist() == [EOT, *range(8)]
    assert batches[2]["tokens"][3].tolist()[-4:] == [92, 0, 0, 0]
    assert [b["tokens"].shape for b in batches] == [(4, 9)] * 3
    assert [b["target_bytes"].tolist() for b in batches] == [[16] * 4, [16] * 4, [16] * 3 + [10]]
    assert len(validation_batches(tokens, 8, 4, 2, byte_lengths=np.ones(200))) == 2
    assert len(validation_batches(tokens, 8, 4, 99, byte_lengths=np.ones(200))) == 3
    long = Array(np.arange(8 * 40 + 1), eot_id=None)
    spread = validation_batches(long, 8, 4, 2, byte_lengths=np.ones(400))  # 8 of 40 windows
    assert [int(row[0]) for i in range(2) for row in spread[i]["tokens"]] == [8 * 5 * i for i in range(8)]
    exact = validation_batches(count(8 * 11), 8, 4, byte_lengths=np.ones(200))
    assert [b["sequences"] for b in exact] == [4, 4, 3]
    with pytest.raises(IndexError):
        batches[3]
    halves = [
        validation_batches(tokens, 8, 4, byte_lengths=np.ones(200), here=here_of(h, 2))[2]["tokens"] for h in range(2)
    ]
    np.testing.assert_array_equal(join(halves), batches[2]["tokens"])


ONES = np.ones(10**6)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_token_is_scored_once(data):
    """Any length, context, stride and documents: with context - stride tokens before it where its text has them."""
    eot = data.draw(st.sampled_from([None, 777_777]))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    context = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(1, context))
    ends = np.cumsum(lengths)
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
    if data.draw(st.booleans()):
        spans, documents = np.array([[0, ends[-1]]]), None
    else:
        documents = spans
    tokens = Array(np.arange(ends[-1]), eot)
    expected = [t for start, end in spans for t in range(start + (eot is None), end)]
    if not expected:
        with pytest.raises(InputError, match="has nothing to score"):
            Scored(tokens, context, stride=stride, documents=documents)
        return
    batches = validation_batches(
        tokens, context, 3, byte_lengths=ONES, stride=stride, documents=documents,
    )  # fmt: skip
    start_of = {t: start for start, end in spans for t in range(start, end)}
    seen = []
    for batch in (batches[i] for i in range(len(batches))):
        assert batch["target_bytes"].tolist() == batch["weights"].sum(1).tolist()
        for row, weights in zip(batch["tokens"], batch["weights"], strict=True):
            for place in np.flatnonzero(weights):
                target = int(row[place + 1])
                seen.append(target)
                before = row[: place + 1]
                true = np.concatenate([[] if eot is None else [eot], np.arange(start_of[target], target)])
                assert place + 1 >= min(len(true), context - stride + 1)
                np.testing.assert_array_equal(before, true[len(true) - place - 1 :])
    assert seen == expected


def test_scored_windows_of_a_bad_stride():
    for stride in (-1, 17):
        with pytest.raises(InputError, match="is out of range: give one from 1 to the context, 16"):
            Scored(count(100), 16, stride=stride)
