"""PPO learns a planted rule; what a reward function gets, and what comes of its scores."""

import functools
import itertools
import json

import numpy as np
import pytest
from alignment_runs import RESPONSE, ppo_config, template, write
from conftest import ROOT
from numerics import approx
from ppo_runs import ROUNDING, refused, share
from runs import arrays, lines

from gptjax.data.prompts import PromptBatches, PromptConfig, load_prompts
from gptjax.errors import InputError
from gptjax.ppo import ppo
from gptjax.rlhf.rewards import load_callable
from gptjax.training.checkpoint import Checkpointer

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def ruled(tuned, alignment):
    """A config without a reward model."""
    return lambda **overrides: ppo_config(tuned, None, alignment["prompts"], **overrides)


LEARNS = {"steps": 15, "eval__every": 15, "eval__lm_batches": 0, "checkpoint__every": 15}


@pytest.fixture(scope="module")
def learned(ruled, tuned, tmp_path_factory):
    """learned(what the rule gets, shared_trunk): (workdir, [(prompts, responses) of each call]) of a run by the planted
    rule alone."""
    t = template(tuned)

    @functools.cache
    def run(on, shared_trunk=False):
        workdir, calls = tmp_path_factory.mktemp(on) / "run", []

        def rule(prompts, responses):
            calls.append((prompts, responses))
            return share(prompts, responses if on == "text" else [t.decode(r) for r in responses])

        assert ppo(ruled(shared_trunk=shared_trunk, reward_on=on, **LEARNS), str(workdir), rule).finished
        return workdir, calls

    return run


@pytest.mark.parametrize("shared_trunk", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_planted_rule_is_learned(learned, shared_trunk):
    """By the rule alone: the share of two of ten words goes from a fifth to most. With a value network, and with a
    value head on the policy's own trunk."""
    workdir, _ = learned("text", shared_trunk)
    score = [m["objective/score"] for m in lines(workdir)]
    assert np.mean(score[:2]) < 0.3 and np.mean(score[-3:]) > 0.6
    assert [m["policy/first_ratio_deviation"] < ROUNDING for m in lines(workdir)] == [True] * 15
    there = arrays(workdir, 15)
    values = {k.split("']")[1] for k in there if k.startswith("training['value']")}
    assert (values == {"['head"}) is shared_trunk
    assert not {"loss/ptx", "grad_norm/ptx", "grad_norm/cosine"} & lines(workdir)[0].keys()
    assert there["training['ptx_position']"] == 0


def test_what_a_callable_gets(learned, alignment, tuned):
    """Texts, or ids: of one sampling the same, the prompt as it stands in the file, the response with its end."""
    t = template(tuned)
    known = {json.loads(line)["prompt"] for line in alignment["prompts"].read_text().splitlines()}
    texts, ids = (learned(on)[1][1] for on in ("text", "tokens"))  # of the first iteration, after an evaluation
    assert set(texts[0]) <= known and len(texts[0]) == 16
    assert ids[0] == [t.prompt(p) for p in texts[0]]
    assert all(type(i) is int for row in ids[1] for i in row) and texts[1] == [t.decode(r) for r in ids[1]]
    assert all(0 < len(r) <= RESPONSE and t.eos_id not in r[:-1] and t.pad_id not in r for r in ids[1])
    assert all(r[-1] == t.eos_id or len(r) == RESPONSE for r in ids[1]) and any(r[-1] == t.eos_id for r in ids[1])


def test_prompts_come_in_the_order_of_the_stream(learned, alignment, tuned):
    """Iteration i takes places 16 i to 16 i + 15: no prompt is skipped or doubled, over epochs too."""
    loaded = load_prompts(PromptConfig(str(alignment["prompts"])), template(tuned), 40)
    batches = PromptBatches(loaded, 16, (40,), 0, 0)
    expected = [[loaded.texts[i] for i in batches.at(16 * n)["index"]] for n in range(15)]
    assert [prompts for prompts, _ in learned("text")[1][1:16]] == expected
    assert sorted(itertools.chain(*expected)) == sorted(10 * loaded.texts)


RECORDED = []  # (prompts, responses) of the calls of `recording`


def recording(prompts, responses):
    RECORDED.append((prompts, responses))
    return [1.0] * len(responses)


def gold(prompts, responses):
    return [float(len(r)) for r in responses]


@pytest.fixture(scope="module")
def still(ruled, tmp_path_factory):
    """A run of one prompt, at a rate of next to 0, by a rule and a gold score that its config names: 1, and -7 for a
    response without an end. Not all 24 evaluation prompts go through a forward pass at once."""
    root = tmp_path_factory.mktemp("still")
    source = write(root / "rows.jsonl", 24 * [{"prompt": "ba ko mi ru te"}])  # as wide as `learned`'s
    c = ruled(
        steps=3, data__source=str(source), eval__lm_batches=0, eval__every=3, eval__prompts=24,
        rollout__forward_rows=16, rollout__missing_eos=-7.0, optimizer__learning_rate=1e-12,
        value_optimizer__learning_rate=1e-12, reward_fn="test_ppo_rewards:recording",
        eval__gold_fn="test_ppo_rewards:gold",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests"))
        RECORDED.clear()
        assert ppo(c, str(root / "run")).finished
    return root / "run"


def test_each_iteration_has_noise_of_its_own(still):
    """The responses of 3 iterations of 16 differ, as samples do."""
    responses = [r for _, r in RECORDED]
    assert [len(r) for r in responses] == [24, 16, 16, 16, 24]
    assert len({tuple(r) for r in responses[1:4]}) == 3
    assert all(len(set(r)) > 4 for r in responses[1:4])
    assert all(m["objective/kl"] == pytest.approx(0, abs=1e-5) for m in lines(still))


def test_a_response_without_an_end_gets_the_score_of_one(still):
    """Scores of -7 that no rule gave, as many as responses did not end."""
    assert any(0 < line["response/eos_rate"] < 1 for line in lines(still))
    for line in lines(still):
        expected = line["response/eos_rate"] - 7 * (1 - line["response/eos_rate"])
        assert line["objective/score"] == approx(expected, terms=16, scale=7)


def test_a_named_callable_and_a_gold_score(still):
    last, samples = lines(still, "evaluations")[-1], lines(still, "samples")
    assert last["gold"] > 0 and all(s["gold"] == len(s["text"]) for s in samples)
    for name in ("nowhere:f", "test_ppo_rewards:nothing", "test_ppo_rewards", "test_ppo_rewards:METRICS"):
        with pytest.raises(InputError, match="reward function"):
            load_callable(name)


@pytest.mark.slow
def test_adaptive_kl_moves_towards_the_target(ruled, tmp_path):
    """The rule pulls the policy away; a low target with a short horizon brings it back, where a coefficient fixed at
    the same beginning lets it go. The coefficient falls while the policy is still nearer than the target, then grows
    by at most 1 + .2 x 16 / 10 an iteration: it needs some forty of them."""
    kl = {}
    for target in (None, 0.3):
        options = LEARNS | {"kl__coefficient": 0.05, "kl__horizon": 10.0, "steps": 45, "eval__every": 45}
        if target:
            options["kl__target"] = target
        ppo(ruled(**options), str(tmp_path / str(target)), share)
        kl[target] = np.mean([m["objective/kl"] for m in lines(tmp_path / str(target))[-8:]])
    coefficients = [m["kl_coef"] for m in lines(tmp_path / "0.3")]
    assert abs(kl[0.3] - 0.3) < abs(kl[None] - 0.3) / 4 and min(coefficients) < 0.05 < 1 < max(coefficients)
    assert all(0.67 < after / before < 1.33 for before, after in itertools.pairwise(coefficients))


@pytest.mark.parametrize(
    "rule, says",
    [
        (lambda p, r: [1.0] * (len(r) + 1), r"shape \(17,\) for 16 responses"),
        (lambda p, r: [1.0, float("nan")] + [0.0] * (len(r) - 2), "gave nan for response 1"),
    ],
)
def test_callables_that_can_not_be(ruled, tmp_path, rule, says):
    """The workdir is claimed by then: only a first sampling could tell. (All of them: test_rewards.py.)"""
    refused(ruled(eval__lm_batches=0), tmp_path / "run", says, claimed=True, reward_fn=rule)


def test_a_rule_that_fails_midway_keeps_what_was_done(ruled, tmp_path):
    """The lines of the iterations before it, and the checkpoint that was being written. It fails in the first
    evaluation, is mended, and fails again."""
    calls = itertools.count()

    def rule(prompts, responses):
        if next(calls) in (0, 4):  # the evaluation before the first iteration is a call too
            raise RuntimeError("the rule is out of order")
        return share(prompts, responses)

    c = ruled(eval__lm_batches=0, eval__every=4, steps=4)
    for done in ([], [1, 2]):
        with pytest.raises(RuntimeError, match="the rule is out of order"):
            ppo(c, str(tmp_path / "run"), rule)
        assert [m["step"] for m in lines(tmp_path / "run")] == done
        assert Checkpointer(tmp_path / "run").steps() == done
    assert ppo(c, str(tmp_path / "run"), share).finished
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2, 3, 4]
