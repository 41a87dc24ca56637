"""Batch-size ramp and learning rate: the papers' figures, and offsets that neither lose nor double a sequence."""

import bisect
import importlib.util
import math

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import build
from gptjax.describe import describe
from gptjax.errors import InputError
from gptjax.pretrain import PretrainConfig
from gptjax.rlhf.config import RateConfig
from gptjax.training.schedule import Schedule, ScheduleConfig


def config_file(name, *argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def of_config(config, **length):
    """The Schedule of a config file, as pretrain.py makes it."""
    if config.model.vocab_size is None:
        config.model.vocab_size = 1
    c = build(PretrainConfig, config)
    length = length or {"steps": c.steps, "tokens": c.tokens}
    return Schedule(
        c.schedule, batch_size=c.batch_size, context_length=c.model.context_length,
        learning_rate=c.optimizer.learning_rate, **length,
    )  # fmt: skip


def ramp(*, start, full, tokens, batch_size, context_length, total):
    config = ScheduleConfig(ramp_tokens=tokens, ramp_start_batch_tokens=start, ramp_full_batch_tokens=full)
    return Schedule(config, batch_size=batch_size, context_length=context_length, learning_rate=1.0, tokens=total)


def batch_after(schedule, tokens, span=50):
    """Tokens of a batch once `tokens` have been seen, over 2 span steps so that whole sequences do not show."""
    step = bisect.bisect_left(range(schedule.steps), tokens, key=schedule.tokens_before)
    return (schedule.tokens_before(step + span) - schedule.tokens_before(step - span)) / (2 * span)


# --- GPT-3's ramp -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, ramp_steps, steps, half, batch_tokens",
    [("175b", 17_444, 107_444, 1.616e6, 3.2e6), ("125m", 23_495, 615_495, 266e3, 0.5e6)],
)
def test_gpt3_ramp_has_the_papers_figures(size, ramp_steps, steps, half, batch_tokens):
    s = of_config(config_file("gpt3", size))
    assert (math.ceil(s.ramp_steps - 1e-9), s.steps) == (ramp_steps, steps)
    assert s.start == 32_000 and s.full == batch_tokens
    assert batch_after(s, s.config.ramp_tokens / 2) == pytest.approx(half, rel=1e-3)
    assert batch_after(s, 200e9) == pytest.approx(batch_tokens, rel=1e-3)
    assert s.sequences(0) == 16  # 32k tokens, rounded to sequences of 2,048
    assert abs(s.total_tokens - 300e9) <= batch_tokens + 2048
    assert s.tokens_before(ramp_steps) == pytest.approx(s.config.ramp_tokens, rel=1e-3)


def test_describe_tells_the_same_ramp():
    d = describe(config_file("gpt3", "175b").to_dict())
    assert (d["steps"], d["ramp_steps"], d["batch_tokens"], d["tokens"]) == (107_444, 17_444, 3_200_000, 300e9)


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b"])
def test_every_gpt3_batch_fits_its_rows(size):
    s = of_config(config_file("gpt3", size))
    last = math.ceil(s.ramp_steps)
    for step in [0, 1, last // 2, *range(last - 20, last + 200), s.steps - 1]:
        assert 1 <= s.sequences(step) <= s.batch_size


def test_ramp_is_the_solution_of_its_differential_equation():
    """Against a simulation in small steps of dn = B(n) dt with B linear in n (Brown et al. appendix B)."""
    start, full, length, context = 2_000.0, 13_000.0, 300_000.0, 10
    s = ramp(start=start, full=full, tokens=length, batch_size=1300, context_length=context, total=1e6)
    size = lambda n: start + (full - start) * min(n / length, 1.0)
    n, pieces = 0.0, 400
    for step in range(s.steps):
        assert abs(s.tokens_before(step) - n) <= context / 2 + 1e-4 * n
        for _ in range(pieces):  # midpoint rule
            n += size(n + size(n) / (2 * pieces)) / pieces


def test_ramp_is_close_to_batches_sized_one_after_the_other():
    """Batch t of exactly B(tokens seen before it), as a plain implementation has it."""
    s = of_config(config_file("gpt3", "175b"))
    n = 0.0
    for step in range(17_444):
        if step % 1000 == 0:
            assert s.tokens_before(step) == pytest.approx(n, rel=3e-3, abs=2048)
        n += 32e3 + (3.2e6 - 32e3) * n / 12e9


@settings(max_examples=150, deadline=None)
@given(
    context=st.integers(1, 300), batch=st.integers(1, 400), start=st.floats(0, 1), full=st.floats(0, 1),
    length=st.floats(1, 1e6), step=st.integers(0, 10**6),
)  # fmt: skip
def test_offsets_are_whole_and_sequences_follow_each_other(context, batch, start, full, length, step):
    capacity = batch * context
    full = context + (capacity - context) * full
    start = context + (full - context) * start
    s = Schedule(
        ScheduleConfig(ramp_tokens=length, ramp_start_batch_tokens=start, ramp_full_batch_tokens=full),
        batch_size=batch, context_length=context, learning_rate=1.0, steps=step + 60,
    )  # fmt: skip
    assert s.sequences_before(0) == 0
    for t in (*range(40), *range(step, step + 40)):
        here, after = s.sequences_before(t), s.sequences_before(t + 1)
        assert isinstance(here, int) and s.tokens_before(t) == here * context
        assert s.sequences(t) == after - here  # so the next batch begins where this one ends
        assert 1 <= s.sequences(t) <= batch


def test_a_ramp_between_nearly_equal_batches_has_no_empty_one():
    """B1 / B0 rounds to a neighbor of 1, whose logarithm is nothing like (B1 - B0) / B0."""
    s = ramp(start=8524.999999999998, full=8525.0, tokens=209_044.0, batch_size=155, context_length=55, total=1e6)
    assert s.ramp_steps == pytest.approx(209_044 / 8525, rel=1e-6)
    assert {s.sequences(t) for t in range(s.steps)} == {155}


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 1000), context=st.integers(1, 4096), step=st.integers(0, 10**8))
def test_without_a_ramp_every_batch_is_full(batch, context, step):
    s = Schedule(ScheduleConfig(), batch_size=batch, context_length=context, learning_rate=1.0, steps=10)
    assert s.sequences_before(step) == step * batch and s.sequences(step) == batch
    assert not s.ramping and s.ramp_steps == 0 and s.total_tokens == 10 * batch * context


@settings(max_examples=50, deadline=None)
@given(tokens=st.floats(1, 1e9), ramp_tokens=st.sampled_from([0.0, 1e4, 1e6]))
def test_a_length_in_tokens_is_reached_and_passed_by_less_than_a_batch(tokens, ramp_tokens):
    config = ScheduleConfig(ramp_tokens=ramp_tokens, ramp_start_batch_tokens=100.0)
    s = Schedule(config, batch_size=64, context_length=32, learning_rate=1.0, tokens=tokens)
    assert s.total_tokens >= tokens - 16 - 1e-6 * tokens  # offsets are rounded to sequences
    assert s.tokens_before(s.steps - 1) < tokens + 16


def test_a_ramp_that_starts_at_the_full_batch_is_none():
    s = ramp(start=1e6, full=None, tokens=1e5, batch_size=4, context_length=8, total=3200)
    assert not s.ramping and s.steps == 100 and s.sequences(0) == 4


def test_steps_come_before_tokens():
    s = Schedule(ScheduleConfig(), batch_size=1, context_length=1, learning_rate=1.0, steps=3, tokens=1000)
    assert s.steps == 3


# --- learning rate ----------------------------------------------------------------------------------------


def test_gpt3_learning_rate():
    s = of_config(config_file("gpt3", "175b"))
    got = [s.fraction(t) for t in (0, 187.5e6, 375e6, 130e9, 260e9, 300e9)]
    assert got == pytest.approx([0, 0.5, 1, 0.5510, 0.1, 0.1], abs=5e-5)
    assert s.learning_rate(s.steps - 1) == pytest.approx(0.6e-5)
    assert 0 < s.learning_rate(0) < 1e-3 * s.peak


def test_gpt1_learning_rate():
    s = of_config(config_file("gpt1"), steps=30_000)
    assert s.learning_rate(999) == pytest.approx(1.25e-4)  # the 1,000th update
    assert s.learning_rate(1999) == pytest.approx(2.5e-4)
    assert s.learning_rate(2999) < 2.5e-4
    assert s.learning_rate(2000 + 14_000) == pytest.approx(1.25e-4)  # half of a cosine is behind this update
    last = 2.5e-4 * math.sin(math.pi / 2 / 28_000) ** 2  # one update short of its end: (1 + cos(pi - x)) / 2
    assert s.learning_rate(29_999) == pytest.approx(last, rel=1e-4) and s.fraction(s.total_tokens) == 0


@pytest.mark.parametrize("kind, half", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_kinds(kind, half):
    config = ScheduleConfig(kind, warmup_tokens=100, decay_tokens=1100, final_fraction=0.1)
    s = Schedule(config, batch_size=1, context_length=1, learning_rate=2.0, steps=2000)
    assert s.fraction(50) == 0.5 and s.fraction(100) == 1.0
    assert s.fraction(600) == pytest.approx(half)
    assert s.fraction(1500) == pytest.approx(1.0 if kind == "constant" else 0.1)
    quarter = {"cosine": 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), "linear": 0.775, "constant": 1.0}[kind]
    assert s.fraction(350) == pytest.approx(quarter)
    assert s.learning_rate(600) == pytest.approx(2 * half)


def test_the_fall_ends_with_the_run_unless_told():
    """The rate would be final_fraction in the step after the last: 1 - t/T in a linear decay to 0, as torch has it."""
    of = lambda kind: Schedule(
        ScheduleConfig(kind, final_fraction=0.0), batch_size=2, context_length=5, learning_rate=1.0, steps=10
    )
    assert [of("linear").learning_rate(t) for t in range(10)] == pytest.approx([1 - t / 10 for t in range(10)])
    cosine = [0.5 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert [of("cosine").learning_rate(t) for t in range(10)] == pytest.approx(cosine)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]), steps=st.integers(1, 10_000),
    warmup=st.floats(0, 2), final=st.sampled_from([0.0, 0.1, 1.0]), ramp=st.booleans(),
)  # fmt: skip
def test_no_step_that_is_taken_has_a_rate_of_0(kind, steps, warmup, final, ramp):
    config = ScheduleConfig(
        kind, warmup_tokens=warmup * steps * 64, final_fraction=final, ramp_tokens=640.0 * ramp,
        ramp_start_batch_tokens=16.0,
    )  # fmt: skip
    s = Schedule(config, batch_size=8, context_length=8, learning_rate=3e-6, steps=steps)
    for step in {0, steps // 2, max(steps - 2, 0), steps - 1}:
        assert 0 < np.float32(s.learning_rate(step)) <= np.float32(3e-6)
    assert s.learning_rate(0) == 3e-6 or warmup > 0  # a run of one step is trained


def test_a_run_too_short_to_learn_is_said_to_be():
    make = lambda steps, **fields: Schedule(
        ScheduleConfig(**fields), batch_size=2, context_length=5, learning_rate=1.0, steps=steps
    )
    assert make(1000, warmup_tokens=100.0).warnings() == []
    (short,) = make(1).warnings()
    assert "only 1 optimizer step," in short and "--config.epochs" in short
    assert [("within its warm-up" in w, "10.0% of its peak" in w) for w in make(100, warmup_tokens=1e4).warnings()] == [
        (True, True)
    ]
    (idle,) = make(1000, final_fraction=0.0, decay_tokens=9000.0).warnings()
    assert "is 0 from step 901 of 1,000 on" in idle  # 900 steps of 10 tokens are taken above 0


def test_ppo_takes_no_iteration_at_a_rate_of_0():
    for kind in ("constant", "linear"):
        for warmup in (0, 1, 10):
            rate = RateConfig(kind, warmup=warmup)
            assert all(rate.fraction(i, n) > 0 for n in (1, 2, 10, 11) for i in range(n))
    assert RateConfig("linear").fraction(9, 10) == pytest.approx(0.1)
    with pytest.raises(InputError, match="warmup_start=0: the first iteration would change nothing"):
        RateConfig(warmup=3, warmup_start=0.0)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"kind": "cosin"}, "cosine, linear, constant, wsd or gpt1_linear"),
        ({"warmup_tokens": -1.0}, "warmup_tokens"),
        ({"ramp_tokens": -1.0}, "ramp_tokens"),
        ({"final_fraction": 1.5}, "final_fraction"),
    ],
)
def test_bad_fields(fields, says):
    with pytest.raises(InputError, match=says):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    "length, says", [({}, "--config.steps"), ({"steps": 0}, "0 steps"), ({"tokens": 0.0}, "0 steps")]
)
def test_bad_lengths(length, says):
    with pytest.raises(InputError, match=says):
        Schedule(ScheduleConfig(), batch_size=1, context_length=1, learning_rate=1.0, **length)


def test_a_ramp_from_less_than_a_sequence():
    with pytest.raises(InputError, match="ramp_start_batch_tokens.*one sequence"):
        ramp(start=1000, full=None, tokens=1e6, batch_size=64, context_length=2048, total=1e9)


# --- warm-up, stable, decay -------------------------------------------------------------------------------


def test_wsd_falls_in_a_line_over_the_end_and_is_one_run_before_it():
    """40 and 80 steps of 10 tokens, 4 of warm-up, the last quarter a fall to a fifth."""
    config = ScheduleConfig(kind="wsd", warmup_tokens=40.0, decay_fraction=0.25, final_fraction=0.2)
    short, long = (
        Schedule(config, batch_size=2, context_length=5, learning_rate=2.0, steps=steps) for steps in (40, 80)
    )
    rates = [short.learning_rate(step) for step in range(40)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:30] == [2.0] * 26
    assert rates[30:] == pytest.approx([2 * (0.2 + 0.8 * (1 - i / 10)) for i in range(10)])
    assert [long.learning_rate(step) for step in range(60)] == rates[:30] + [2.0] * 30
    assert long.learning_rate(70) == pytest.approx(2 * 0.6)


def test_wsd_that_decays_all_along_is_linear():
    rates = []
    for kind, share in (("wsd", 1.0), ("linear", 0.5)):
        config = ScheduleConfig(kind=kind, warmup_tokens=40.0, decay_fraction=share)
        schedule = Schedule(config, batch_size=2, context_length=5, learning_rate=2.0, steps=40)
        rates.append([schedule.learning_rate(step) for step in range(40)])
    assert rates[0] == rates[1]
