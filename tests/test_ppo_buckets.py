"""PPO over prompts of two lengths: each batch at the width it needs, the same run as at one width."""

import numpy as np
import pytest
from alignment_runs import on_one_device, ppo_config, write
from runs import arrays, lines, without_times

from gptjax import ppo as stage
from gptjax.parallel.sharding import forget
from gptjax.ppo import ppo
from gptjax.rlhf import program

ROWS = [{"prompt": "ba" if i % 7 else "ko mi ru te ko mi ru"} for i in range(24)]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """`run` counts how often a program is traced: these runs share one, and share it with no other file."""
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def config(tuned, reward_dir, tmp_path_factory):
    source = write(tmp_path_factory.mktemp("prompts") / "rows.jsonl", ROWS)
    held_out = write(source.parent / "held_out.jsonl", ROWS[1:5])
    options = {"steps": STEPS, "batch_size": 4, "eval__source": str(held_out), "eval__lm_batches": 0,
               "eval__every": 1, "checkpoint__every": 2, "ppo__epochs": 1, "seed": 6}  # fmt: skip
    return lambda **more: ppo_config(tuned, reward_dir, source, **options | more)


def run(c, workdir):
    """Runs it. Returns the widths that the update was traced at (of the first run: later ones share its program), and
    the responses of each iteration."""
    traced, responses, make, sample = [], [], program.make_update, stage.rollout.sample

    def counted(*args):
        update = make(*args)

        def count(state, rollout, *rest):
            traced.append(rollout.tokens.shape[1] - rollout.mask.shape[1])
            return update(state, rollout, *rest)

        return count

    def sampling(policy, prompts, *rest):
        tokens, mask, log_prob = sample(policy, prompts, *rest)
        responses.append(np.asarray(tokens)[:, prompts.shape[1] :])
        return tokens, mask, log_prob

    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_update", counted)
        patch.setattr(stage.rollout, "sample", sampling)
        assert ppo(c, str(workdir)).finished
    return traced, responses


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ppo") / "run"
    return workdir, *run(config(), workdir)


def widths(workdir):
    return [int(line["prompt/width"]) for line in lines(workdir)]


@pytest.mark.slow
def test_each_width_is_compiled_once_and_said(straight, config, tmp_path, capfd, monkeypatch):
    workdir, traced, _ = straight
    assert sorted(traced) == sorted(set(widths(workdir))) == [8, 16]
    planned, plan = [], stage.memory_plan
    monkeypatch.setattr(stage, "memory_plan", lambda *args: planned.append(args[5]) or plan(*args))
    for steps in (1, STEPS):
        run(config(steps=steps), tmp_path / "parts")
    assert planned == [16, 16]  # the widest, though the first run needs but 8
    # A run taken up again compiles what it needs, in its own order,
    there = widths(workdir)
    said = [line for line in capfd.readouterr().out.splitlines() if "compiling for" in line]
    expected = [(1, 8)] + [(there.index(w, 1) + 1, w) for w in dict.fromkeys(there[1:])]
    assert there[0] == 8 and len(expected) == 3
    assert said == [f"iteration {i}: compiling for prompts padded to {w} of 16" for i, w in expected]
    # and is the same run, bit for bit.
    a, b = arrays(workdir, STEPS), arrays(tmp_path / "parts", STEPS)
    assert a.keys() == b.keys() and [k for k in a if a[k].tobytes() != b[k].tobytes()] == []
    for name in ("metrics", "evaluations", "samples"):
        assert without_times(lines(workdir, name)) == without_times(lines(tmp_path / "parts", name)), name


@pytest.mark.slow
def test_the_same_run_at_one_width(straight, config, tmp_path):
    """Left padding is nothing: the same responses, and figures that agree to rounding."""
    workdir, _, responses = straight
    _, at_one = run(config(data__buckets=1), tmp_path / "one")
    assert set(widths(tmp_path / "one")) == {16}
    assert len(responses) == len(at_one) == 2 * STEPS + 1  # iterations and evaluations
    for a, b in zip(responses, at_one, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("metrics", "evaluations"):
        for a, b in zip(lines(workdir, name), lines(tmp_path / "one", name), strict=True):
            for k in without_times([a])[0].keys() - {"prompt/width"}:
                assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-4), (name, a["step"], k)
