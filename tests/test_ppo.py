"""PPO and PPO-ptx end to end: rewards of every kind, what is frozen, resuming, meshes, refusals; and best-of-n."""

import contextlib
import dataclasses
import errno
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from alignment_runs import (
    RESPONSE,
    on_one_device,
    ppo_config,
    template,
    write,
)
from conftest import ROOT
from numerics import approx, assert_close, model_terms, tolerance
from runs import arrays, lines, one_device_environment, without_times

from gptjax import config as configs
from gptjax import ppo as stage
from gptjax.data.bpe import train_bpe
from gptjax.data.chat import chat_tokenizer
from gptjax.data.corpus import load_text
from gptjax.data.prompts import PromptBatches, PromptConfig, load_prompts
from gptjax.data.records import read_record, start_record, write_record
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling
from gptjax.model.spec import GPTConfig
from gptjax.objectives.ppo import adaptive_kl_coefficient
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.ppo import PPOConfig, ppo
from gptjax.rlhf import best_of_n as best_of_n_tool
from gptjax.rlhf import memory, reward_model, rollout
from gptjax.rlhf.best_of_n import best_of_n, expected_best
from gptjax.rlhf.config import PtxConfig
from gptjax.rlhf.ptx import Text, batch_shape, sequences
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.rlhf.rewards import load_callable
from gptjax.sample import continue_texts
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import JsonLines

METRICS = {
    "objective/kl", "objective/score", "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
    "policy/approxkl", "policy/clipfrac", "policy/ratio_mean", "policy/ratio_max", "policy/ratio_min",
    "value/explained_var", "value/clipfrac", "loss/policy", "loss/value", "loss/ptx", "grad_norm/ppo", "grad_norm/ptx",
    "grad_norm/cosine", "grad_norm/value", "kl_coef", "response/length", "response/eos_rate", "time/rollout",
    "time/score", "time/update", "tokens_per_second/rollout",
}  # fmt: skip
WHOLE = {  # everything an iteration can depend on is at work
    "steps": 4, "ppo__ptx_coefficient": 0.5, "ptx__per_episode": 1.0, "kl__target": 0.05, "kl__horizon": 100.0,
    "kl__coefficient": 0.1, "optimizer__learning_rate": 1e-3,
}  # fmt: skip
LIKED = ("ba", "la")
# How far log-probabilities of up to 10 may lie apart in two programs, and so their ratio from 1.
ROUNDING = 10 * tolerance(model_terms(GPTConfig(300, n_layer=2, n_head=4, d_model=32, context_length=48)))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with on_one_device():
        yield


def share(prompts, responses):
    """The planted rule: what part of the words is of LIKED."""
    return [sum(w in LIKED for w in r.split()) / max(len(r.split()), 1) for r in responses]


@pytest.fixture(scope="module")
def config(tuned, reward_dir, alignment):
    return lambda **overrides: ppo_config(tuned, reward_dir, alignment["prompts"], **overrides)


@pytest.fixture(scope="module")
def ruled(tuned, alignment):
    """A config without a reward model."""
    return lambda **overrides: ppo_config(tuned, None, alignment["prompts"], **overrides)


@pytest.fixture(scope="module")
def seen(config, tmp_path_factory):
    """Of the whole of WHOLE, uninterrupted, by a reward model and a rule: the workdir; the frozen models as they went
    into each judging; (scored, score) of each."""
    workdir, frozen, finished = tmp_path_factory.mktemp("ppo") / "run", [], []
    score, finish = rollout.score, rollout.compute_advantages

    def judging(policy, value, reference, reward, *args, **kwargs):
        frozen.append(jax.tree.map(np.array, (reference, reward)))
        return score(policy, value, reference, reward, *args, **kwargs)

    def finishing(scored, score, *args, **kwargs):
        finished.append((jax.device_get(scored), np.asarray(score)))
        return finish(scored, score, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.rollout, "score", judging)
        patch.setattr(stage.rollout, "compute_advantages", finishing)
        assert ppo(config(**WHOLE), str(workdir), share).finished
    return types.SimpleNamespace(workdir=workdir, frozen=frozen, finished=finished)


@pytest.fixture(scope="module")
def straight(seen):
    return seen.workdir


def same_bits(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(t) for t in (a, b))
    assert [p for p, _ in a] == [p for p, _ in b]
    return [jax.tree_util.keystr(p) for (p, x), (_, y) in zip(a, b, strict=True)
            if np.asarray(x).tobytes() != np.asarray(y).tobytes()]  # fmt: skip


# --- one run, looked at from all sides --------------------------------------------------------------------


def test_every_figure_is_there(straight):
    metrics = lines(straight)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and [m["episodes"] for m in metrics] == [16, 32, 48, 64]
    for m in metrics:
        assert METRICS - m.keys() == set()
        assert all(np.isfinite(m[k]) for k in METRICS)
        assert m["time/rollout"] > 0 and m["tokens_per_second/rollout"] > 0
        assert 0 < m["response/length"] <= RESPONSE and 0 <= m["response/eos_rate"] <= 1
        assert m["policy/ratio_min"] <= m["policy/ratio_mean"] <= m["policy/ratio_max"]
        summed = m["objective/score"] + m["objective/non_score_reward"]
        assert m["objective/rlhf_reward"] == approx(summed, terms=16 * RESPONSE, scale=1)
        penalty = -m["kl_coef"] * m["objective/kl"]
        assert m["objective/non_score_reward"] == approx(penalty, terms=16 * RESPONSE, scale=1)
        assert -1 <= m["grad_norm/cosine"] <= 1


def test_the_first_kl_is_0_and_every_first_ratio_1(straight):
    metrics = lines(straight)
    assert metrics[0]["objective/kl"] == 0.0 and metrics[0]["objective/non_score_reward"] == 0.0
    assert all(m["objective/kl"] != 0 for m in metrics[1:])
    assert all(m["policy/first_ratio_deviation"] < ROUNDING for m in metrics)
    assert all(m["policy/rollout_logp_diff"] < ROUNDING for m in metrics)
    assert all(m["policy/ratio_max"] > 1.001 for m in metrics)  # there was something to get wrong


def test_the_frozen_models_are_what_they_were(seen, tuned, reward_dir):
    frozen = seen.frozen
    assert len(frozen) == 4 + 3  # iterations and evaluations
    for later in frozen[1:]:
        assert same_bits(frozen[0], later) == []
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reference, reward = frozen[0]
    assert same_bits(reference, load_model(tuned, mesh=mesh).params) == []
    assert same_bits(reward, load_reward_model(reward_dir, mesh=mesh).params) == []


def test_the_kl_coefficient_is_steered_once_an_iteration(straight):
    """Ziegler et al. 2019 §2.2 by hand; it falls where KL is under the target and rises where it is above."""
    metrics = lines(straight)
    expected = 0.1
    for m in metrics:
        assert m["kl_coef"] == approx(expected, terms=4 * 8)
        expected *= 1 + np.clip(m["objective/kl"] / 0.05 - 1, -0.2, 0.2) * 16 / 100
    for m, after in itertools.pairwise(metrics):
        assert (after["kl_coef"] > m["kl_coef"]) is (m["objective/kl"] > 0.05)
    assert max(m["objective/kl"] for m in metrics[:-1]) > 0.05 > metrics[0]["objective/kl"]  # both ways


def test_what_the_checkpoint_holds(straight):
    there = arrays(straight, 4)
    roots = {k.split("]")[0] for k in there}
    names = {"policy", "policy_opt", "value", "value_opt", "kl_coefficient", "key", "prompt_position", "ptx_position"}
    assert {f"training['{n}'" for n in names} <= roots and any(r.startswith("params") for r in roots)
    assert there["training['prompt_position']"] == 4 * 16
    assert there["training['ptx_position']"] == 4 * 2 * 8  # iterations, minibatches, one sequence an episode
    counts = {k: int(v) for k, v in there.items() if k.endswith("['count']")}
    assert len(counts) == 2 and set(counts.values()) == {4 * 2 * 2}  # iterations, epochs, minibatches


def test_the_average_is_what_is_sampled(straight):
    workdir = straight
    there = arrays(workdir, 4)
    model = load_model(workdir)
    wte = np.asarray(model.params["wte"])
    assert wte.tobytes() == there["params['wte']"].tobytes() and model.step == 4
    assert not np.array_equal(wte, there["training['policy']['wte']"])
    assert continue_texts(model, ["ba"], max_new_tokens=3, sampling=Sampling(1.0), seed=0)


def test_the_average_by_hand(straight, tuned):
    """average <- decay average + (1 - decay) policy, once an iteration, from the policy it began with."""
    workdir = straight
    kept = Checkpointer(workdir).steps()
    assert kept == [3, 4]
    before, after = arrays(workdir, 3), arrays(workdir, 4)
    expected = 0.992 * before["params['wte']"] + 0.008 * after["training['policy']['wte']"]
    assert_close(after["params['wte']"], expected, terms=3)
    assert np.abs(after["params['wte']"] - before["params['wte']"]).max() > 1e-6


def test_evaluations_and_samples(straight):
    workdir = straight
    evaluations, samples = lines(workdir, "evaluations"), lines(workdir, "samples")
    assert [e["step"] for e in evaluations] == [0, 2, 4]
    assert all({"score", "kl", "entropy", "length", "eos_rate", "lm_loss"} <= e.keys() for e in evaluations)
    assert evaluations[0]["kl"] == 0.0 and evaluations[-1]["kl"] != 0.0
    assert [s["step"] for s in samples] == [0, 0, 2, 2, 4, 4]
    assert all("<|" not in s["text"] and {"prompt", "text", "score"} <= s.keys() for s in samples)
    page = (workdir / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "training curves" in page and "ppo" in page


def test_the_value_network_begins_as_the_reward_model(config, reward_dir, tmp_path, monkeypatch):
    seen = {}

    class Stop(Exception):
        pass

    def stop(state, *_):
        seen["state"] = jax.device_get((state.value, state.policy, state.average))
        raise Stop

    monkeypatch.setattr(stage, "memory_plan", stop)
    with pytest.raises(Stop):
        ppo(config(), str(tmp_path / "run"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    value, policy, average = seen["state"]
    assert same_bits(value, load_reward_model(reward_dir, mesh=mesh).params) == []
    assert same_bits(policy, average) == []


# --- stopped and gone on with -----------------------------------------------------------------------------


def assert_same_ppo(workdir, other, steps):
    """The whole PPOState, metrics, evaluations and samples, bit for bit."""
    a, b = arrays(workdir, steps), arrays(other, steps)
    assert a.keys() == b.keys() and len(a) > 100
    assert [k for k in a if a[k].tobytes() != b[k].tobytes()] == []
    assert [m["step"] for m in lines(workdir)] == list(range(1, steps + 1))
    for name in ("metrics", "evaluations", "samples"):
        assert without_times(lines(workdir, name)) == without_times(lines(other, name)), name


@contextlib.contextmanager
def heard(number):
    """A signal that whoever started the tests may ignore."""
    before = signal.signal(number, signal.default_int_handler)
    yield
    signal.signal(number, before)


class Killed(BaseException):
    """What no except clause stops, as kill -9 would not be."""


def test_stopped_five_ways_it_is_the_same_run(config, straight, tmp_path, monkeypatch):
    """Killed between a checkpoint and its evaluation; finished, and made longer, in episodes; killed between a
    checkpoint and the next; told to stop by Ctrl-C. Neither an evaluation nor a line is missing, and none is twice."""
    parts, begun, write = tmp_path / "parts", [], JsonLines.write
    real = stage.check_iteration

    def run(patched=None, **overrides):
        c = config(**WHOLE | overrides)
        with monkeypatch.context() as patch:
            for place, name, value in (patched,) if patched else ():
                patch.setattr(place, name, value)
            return ppo(c, str(parts), share)

    def write_no_evaluation(self, record):
        if self.path.name == "evaluations.jsonl" and record["step"] == 2:
            raise Killed
        return write(self, record)

    def kill_in_the_fourth(line, iteration, *args):
        if iteration == 3:
            raise Killed
        return real(line, iteration, *args)

    def interrupt_in_the_third(line, iteration, *args):
        real(line, iteration, *args)
        begun.append(iteration)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Killed):
        run((JsonLines, "write", write_no_evaluation), steps=2)
    assert Checkpointer(parts).steps()[-1] == 2 and [e["step"] for e in lines(parts, "evaluations")] == [0]
    assert run(steps=2).finished
    assert [e["step"] for e in lines(parts, "evaluations")] == [0, 2]
    longer = {"steps": None, "episodes": 4 * 16}
    with pytest.raises(Killed):
        run((stage, "check_iteration", kill_in_the_fourth), checkpoint__every=2, **longer)
    assert Checkpointer(parts).steps()[-1] == 2 and [m["step"] for m in lines(parts)] == [1, 2, 3]
    with heard(signal.SIGINT):
        assert not run((stage, "check_iteration", interrupt_in_the_third), checkpoint__every=10, **longer).finished
    assert Checkpointer(parts).steps()[-1] == 3 and begun == [2]
    assert run().finished
    assert_same_ppo(parts, straight, 4)


def test_a_full_disk_and_models_in_host_memory_change_no_bit(config, straight, tmp_path, monkeypatch, capsys):
    """The records of iterations 2 and 3 wait until there is room; the frozen models come to the device to score."""
    real, check, at, away = os.pwrite, stage.check_iteration, [0], []

    def pwrite(file, data, offset):
        if at[0] in (2, 3):
            real(file, bytes(data)[:10], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    def checked(line, iteration, *args):
        at[0] = iteration + 1
        return check(line, iteration, *args)

    def offloaded(params):
        away.append(memory.offloaded(params))
        return away[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(stage, "check_iteration", checked)
        patch.setattr(stage, "offloaded", offloaded)
        assert ppo(config(**WHOLE, offload=True), str(tmp_path / "run"), share).finished
    assert_same_ppo(tmp_path / "run", straight, 4)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: /")]
    assert len(said) == 2 and "cannot be written" in said[0] and "complete again" in said[1], said
    assert len(away) == 2


def test_other_prompts_are_not_gone_on_with(config, straight, tmp_path, alignment, monkeypatch):
    copy, source = shutil.copytree(straight, tmp_path / "run"), tmp_path / "rows.jsonl"
    source.write_text("".join(alignment["prompts"].read_text().splitlines(keepends=True)[1:]))
    without_one = lambda c, *args: load_prompts(dataclasses.replace(c, source=str(source)), *args)
    monkeypatch.setattr(stage, "load_prompts", without_one)
    with pytest.raises(InputError, match="prompts.jsonl has changed since the run began"):
        ppo(config(**WHOLE | {"steps": 5}), str(copy), share)


KILLED = """
from alignment_runs import ppo_config

def get_config():
    return ppo_config({policy!r}, {reward!r}, {prompts!r}, **{options!r})
"""


@pytest.mark.slow
def test_kill_9_and_gone_on_with(straight, tuned, reward_dir, alignment, tmp_path):
    options = WHOLE | {"steps": 12}
    text = KILLED.format(policy=str(tuned), reward=str(reward_dir), prompts=str(alignment["prompts"]), options=options)
    (tmp_path / "config.py").write_text(text)
    environment = one_device_environment(PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}")

    def start(workdir):
        return subprocess.Popen(
            [sys.executable, "-m", "gptjax.ppo", f"--config={tmp_path}/config.py", f"--workdir={workdir}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    whole = start(tmp_path / "straight")
    output = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, output
    process, there = start(tmp_path / "parts"), tmp_path / "parts" / "checkpoints"
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if there.exists() and any(n.isdecimal() and int(n) >= 4 for n in os.listdir(there)):
            break
        time.sleep(0.001)
    assert process.poll() is None
    process.kill()
    process.communicate()
    again = start(tmp_path / "parts")
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0 and "resuming from iteration" in output, output
    assert_same_ppo(tmp_path / "parts", tmp_path / "straight", 12)


# --- rewards ----------------------------------------------------------------------------------------------


LEARNS = {"steps": 15, "eval__every": 15, "eval__lm_batches": 0, "checkpoint__every": 15}


@pytest.fixture(scope="module")
def learned(ruled, tuned, tmp_path_factory):
    """{what the rule gets: (workdir, [(prompts, responses) of each call])} of two runs by the planted rule alone:
    'text' on a trunk that policy and value head share, 'tokens' with a value network."""
    found, t = {}, template(tuned)
    for on in ("text", "tokens"):
        workdir, calls = tmp_path_factory.mktemp(on) / "run", []

        def rule(prompts, responses, on=on, calls=calls):
            calls.append((prompts, responses))
            return share(prompts, responses if on == "text" else [t.decode(r) for r in responses])

        assert ppo(ruled(shared_trunk=on == "text", reward_on=on, **LEARNS), str(workdir), rule).finished
        found[on] = workdir, calls
    return found


@pytest.mark.parametrize("on", ["text", "tokens"])
def test_a_planted_rule_is_learned(learned, on):
    """By the rule alone: the share of two of ten words goes from a fifth to most. With a value network, and with a
    value head on the policy's own trunk."""
    workdir, _ = learned[on]
    score = [m["objective/score"] for m in lines(workdir)]
    assert np.mean(score[:2]) < 0.3 and np.mean(score[-3:]) > 0.6
    assert [m["policy/first_ratio_deviation"] < ROUNDING for m in lines(workdir)] == [True] * 15
    there = arrays(workdir, 15)
    values = {k.split("']")[1] for k in there if k.startswith("training['value']")}
    assert (values == {"['head"}) is (on == "text")
    assert not {"loss/ptx", "grad_norm/ptx", "grad_norm/cosine"} & lines(workdir)[0].keys()
    assert there["training['ptx_position']"] == 0


def test_what_a_callable_gets(learned, alignment, tuned):
    """Texts, or ids: of one sampling the same, the prompt as it stands in the file, the response with its end."""
    t = template(tuned)
    known = {json.loads(line)["prompt"] for line in alignment["prompts"].read_text().splitlines()}
    texts, ids = (learned[on][1][1] for on in ("text", "tokens"))  # of the first iteration, after an evaluation
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
    assert [prompts for prompts, _ in learned["text"][1][1:16]] == expected
    assert sorted(itertools.chain(*expected)) == sorted(10 * loaded.texts)


def test_scores_are_the_normalized_reward_models_and_the_rules_summed(seen, reward_dir, tuned):
    """What PPO sees is what load_reward_model gives of the same texts, left padding or not, and what the rule does."""
    scored, score = seen.finished[1]  # of the first iteration, after an evaluation
    model = load_reward_model(reward_dir, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    tokens, real = scored["tokens"], scored["real"]
    slots = tokens.shape[1] - RESPONSE
    prompts = [r[:slots][m[:slots] > 0] for r, m in zip(tokens, real, strict=True)]
    responses = [r[slots:][m[slots:] > 0] for r, m in zip(tokens, real, strict=True)]
    assert len({len(p) for p in prompts}) > 1 and len({len(r) for r in responses}) > 1
    of_model, of_rule = model.score(prompts, responses), share(prompts, map(template(tuned).decode, responses))
    assert_close(scored["score"], of_model, terms=model_terms(model.config))
    assert_close(score, scored["score"] + np.float32(of_rule), terms=2, scale=np.abs(of_model).max())
    assert of_model.std() > 0.1 and np.std(of_rule) > 0.01
    ended = np.array([template(tuned).eos_id in r for r in responses])
    mean = float(np.where(ended, score, PPOConfig().rollout.missing_eos).mean())
    line = lines(seen.workdir)[0]
    assert line["objective/score"] == approx(mean, terms=16, scale=np.abs(score).max())


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
    source = write(root / "rows.jsonl", 24 * [{"prompt": "ba ko mi"}])
    c = ruled(
        steps=3, data__source=str(source), eval__lm_batches=0, eval__every=3, eval__prompts=24,
        rollout__forward_rows=16, rollout__missing_eos=-7.0, optimizer__learning_rate=1e-12,
        value_optimizer__learning_rate=1e-12, reward_fn="test_ppo:recording", eval__gold_fn="test_ppo:gold",
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


def test_a_named_callable_and_a_gold_score(still, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    last, samples = lines(still, "evaluations")[-1], lines(still, "samples")
    assert last["gold"] > 0 and all(s["gold"] == len(s["text"]) for s in samples)
    for name in ("nowhere:f", "test_ppo:nothing", "test_ppo", "test_ppo:METRICS"):
        with pytest.raises(InputError, match="reward function"):
            load_callable(name)


# --- variants of one computation --------------------------------------------------------------------------

VARIANT = WHOLE | {"steps": 2}


@pytest.fixture(scope="module")
def first_two(straight):
    return without_times(lines(straight))[:2]


def nearly(found, expected, rel=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=rel, abs=rel), k


@pytest.mark.slow
def test_pieces_of_a_batch_give_the_same_figures(config, first_two, tmp_path):
    ppo(config(**VARIANT, ppo__microbatch_size=2, rollout__forward_rows=4), str(tmp_path / "run"), share)
    nearly(without_times(lines(tmp_path / "run")), first_two)


MESHES = {
    "stage 2 fsdp 2 tensor 2": {"mesh__data": 1, "mesh__stage": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    "data 2 fsdp 2 tensor 2, other rules": {
        "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__rules__embed": "data,fsdp",
        "mesh__rules__heads": "none", "mesh__rules__residual": "seq",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_of_8_gives_the_figures_of_one_device(config, first_two, tmp_path, monkeypatch, name):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    ppo(config(**VARIANT, **MESHES[name]), str(tmp_path / "run"), share)
    nearly(without_times(lines(tmp_path / "run")), first_two)
    assert lines(tmp_path / "run")[0]["objective/kl"] == 0.0


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


# --- bad input --------------------------------------------------------------------------------------------

GOOD = {"prompt": "ba"}
BAD = {
    "no policy": ({"policy": None}, GOOD, "--config.policy"),
    "no reward": ({"reward": None}, GOOD, "--config.reward"),
    "no source": ({"data.source": None}, GOOD, "--config.data.source"),
    "no length": ({"steps": None}, GOOD, "--config.episodes or --config.steps"),
    "no field": ({}, {"question": "ba"}, "rows.jsonl:3.*no field 'prompt'"),
    "empty": ({}, {"prompt": ""}, "rows.jsonl:3.*empty"),
    "too long": ({}, {"prompt": "ba ko " * 20}, "rows.jsonl:3.*more than the 40"),
    "no room": ({"rollout.max_new_tokens": 48}, GOOD, "leaves no room for a prompt"),
    "top-p": ({"rollout.top_p": 0.9}, GOOD, "top_p=0.9.*whole distribution"),
    "top-k": ({"rollout.top_k": 5}, GOOD, "top_k=5.*whole distribution"),
    "minibatches": ({"ppo.minibatches": 3}, GOOD, "batch_size=16 is not a multiple of ppo.minibatches=3"),
    "micro-batch": ({"ppo.microbatch_size": 3}, GOOD, "8 episodes is not a multiple of ppo.microbatch_size=3"),
    "forward_rows": ({"rollout.forward_rows": 5}, GOOD, "rollout.forward_rows"),
    "callable": ({"reward_fn": "gptjax.nowhere:f"}, GOOD, "cannot be imported"),
    "float16": ({"precision.compute": "float16"}, GOOD, "float32 or bfloat16"),
    "reward_on": ({"reward_on": "words"}, GOOD, "text or tokens"),
    "cold": ({"rollout.temperature": 1e-40}, GOOD, "rollout.temperature=1e-40: give at least 0.01"),
    "hot": ({"rollout.temperature": float("inf")}, GOOD, "rollout.temperature=inf"),
    "horizon": ({"kl.target": 6.0, "kl.horizon": 3.2}, GOOD, "kl.horizon=3.2 with batch_size=16.*above 3.2 episodes"),
    "no horizon": ({"kl.horizon": float("nan")}, GOOD, "kl.horizon=nan"),
    "no coefficient": ({"kl.target": 6.0, "kl.coefficient": 0.0}, GOOD, "kl.target with kl.coefficient=0"),
    "not a coefficient": ({"kl.coefficient": float("nan")}, GOOD, "kl.coefficient=nan"),
    "not a target": ({"kl.target": float("nan")}, GOOD, "kl.target=nan"),
}  # fmt: skip


def refused(c, workdir, says, claimed=False, **kwargs):
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        ppo(c, str(workdir), **kwargs)
    assert "\n" not in str(caught.value)
    assert not (workdir / "metrics.jsonl").exists() or not lines(workdir)
    assert (workdir / "config.json").exists() is claimed


def test_a_reference_that_moved_on_is_refused(config, straight, tuned, tmp_path, monkeypatch):
    """Taken up again, a run must find the policy it began with."""
    copy = shutil.copytree(straight, tmp_path / "run")
    real = stage.load_model
    monkeypatch.setattr(stage, "load_model", lambda *a, **k: dataclasses.replace(real(*a, **k), step=999))
    with pytest.raises(InputError, match="policy: .* is at step 999 now and was at"):
        ppo(config(**WHOLE), str(copy), share)


def test_a_reference_trained_anew_to_the_same_step_is_refused(config, straight, tuned, tmp_path):
    """The same folder and step, other weights; the same weights in another folder are the same policy."""
    run, policy = shutil.copytree(straight, tmp_path / "run"), shutil.copytree(tuned, tmp_path / "policy")
    c = config(**WHOLE)
    c.policy = str(policy)
    assert ppo(c, str(run), share).finished  # moved
    there = load_model(policy)
    shutil.rmtree(policy / "checkpoints")
    checkpointer = Checkpointer(policy)
    checkpointer.save_params(there.step, jax.tree.map(lambda x: 1.01 * x, there.params))
    checkpointer.close()
    with pytest.raises(InputError, match=f"(?s)began with other models.*policy: {policy} has other weights now"):
        ppo(c, str(run), share)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(config, tmp_path, name):
    options, row, says = BAD[name]
    c = config(data__source=str(write(tmp_path / "rows.jsonl", [GOOD, GOOD, row])))
    for key, value in options.items():
        section, _, last = key.rpartition(".")
        place = c
        for part in section.split(".") if section else ():
            place = place[part]
        place[last] = value
    refused(c, tmp_path / "run", says)


def test_models_that_can_not_be(config, ruled, pretrained, tuned, reward_dir, tmp_path):
    c = ruled()
    c.policy = str(pretrained)
    refused(c, tmp_path / "run", "no padding token of its own", reward_fn=share)
    c.policy = str(reward_dir)
    refused(c, tmp_path / "run", "is a reward model", reward_fn=share)
    c = config()
    c.reward = str(tuned)
    refused(c, tmp_path / "run", "not a reward model")


@pytest.mark.parametrize("coefficient, horizon", [(1.0, 3.21), (1e-3, 100.0)])
def test_the_adaptive_coefficient_stays_positive(coefficient, horizon):
    """At every horizon that the config takes, whatever KL is measured; at 3.2 episodes of 16 would make it 0."""
    c = configs.build(stage.PPOConfig, {"batch_size": 16, "kl": {"target": 6.0, "horizon": horizon}})
    value = np.float32(coefficient)
    for kl in (-5.0, 0.0, 0.0, 1e-3, 0.0):
        after = np.float32(adaptive_kl_coefficient(value, kl, c.batch_size, c.kl.target, c.kl.horizon))
        assert 0 < after < value
        value = after


def shortened(load, context):
    """load_reward_model whose models have a shorter context."""

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        trunk = model.params["trunk"] | {"wpe": model.params["trunk"]["wpe"][:context]}
        config = dataclasses.replace(model.config, context_length=context)
        return dataclasses.replace(model, config=config, params={**model.params, "trunk": trunk})

    return loaded


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_a_reward_model_of_a_shorter_context(config, tmp_path, monkeypatch, shared_trunk):
    """The policy has room for 48 tokens, the reward model for 24: no text it scores may be longer."""
    monkeypatch.setattr(stage, "load_reward_model", shortened(stage.load_reward_model, 24))
    c = lambda **overrides: config(shared_trunk=shared_trunk, **overrides)
    reader = "reward model" if shared_trunk else "value network"
    refused(c(rollout__max_new_tokens=24), tmp_path / "run", f"no room for a prompt in the {reader}'s context of 24")
    refused(c(data__max_length=17), tmp_path / "run", "more than the shortest context, 24")
    rows = [GOOD, {"prompt": "ba ko " * 8}]
    source = str(write(tmp_path / "rows.jsonl", rows))
    refused(c(data__source=source), tmp_path / "run", "rows.jsonl:2: The prompt has 19 tokens, more than the 16")


def test_a_batch_that_does_not_divide_over_the_mesh(config, tmp_path, monkeypatch):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    refused(
        config(batch_size=12, ppo__minibatches=1), tmp_path / "run", "12 is not divisible over.*8 devices: use 8 or 16"
    )


@pytest.mark.parametrize(
    "rule, says",
    [
        (lambda p, r: [1.0] * (len(r) + 1), r"shape \(17,\) for 16 responses"),
        (lambda p, r: [1.0, float("nan")] + [0.0] * (len(r) - 2), "gave nan for response 1"),
    ],
)
def test_callables_that_can_not_be(ruled, tmp_path, rule, says):
    """The workdir is claimed by then: only a first sampling could tell. (All of them: test_update.py.)"""
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


def test_forward_passes_that_do_not_divide_over_the_mesh(ruled, tmp_path, monkeypatch):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    refused(ruled(rollout__forward_rows=4), tmp_path / "run", "forward_rows=4 is not divisible over the 8 devices",
            reward_fn=share)  # fmt: skip


@pytest.mark.parametrize(
    "per_episode, microbatch, ways, shape",
    [
        (8.0, None, 1, (2, 8, 8)),  # InstructGPT's 8 for each of a minibatch's 8 episodes
        (0.5, None, 1, (2, 1, 4)),
        (0.1, None, 8, (2, 1, 8)),  # rounded up to whole devices
        (1.25, 4, 4, (2, 3, 4)),  # and to whole micro-batches
    ],
)
def test_rows_of_pretraining_text(per_episode, microbatch, ways, shape):
    mesh = make_mesh(MeshConfig(data=ways), jax.devices()[:ways])
    assert batch_shape(PtxConfig(per_episode=per_episode), 2, 8, microbatch, mesh) == shape


@pytest.mark.parametrize("isolated", [False, True])
def test_the_text_of_ptx_does_not_depend_on_the_micro_batches(isolated):
    """3 sequences for each of two minibatches, one after the other, and rows of padding beside them, which have
    segments and positions as any other row."""

    class Examples:
        def read(self, index):
            return np.repeat(np.asarray(index)[:, None], 5, axis=1)

    c, mesh = PtxConfig(per_episode=0.75), make_mesh(MeshConfig(), jax.devices()[:1])
    source = Text(Examples(), types.SimpleNamespace(eot_id=11 if isolated else None), 4)
    for microbatch in (None, 4, 2, 1):
        shape = batch_shape(c, 2, 4, microbatch, mesh)
        batch = jax.tree.map(np.asarray, source.batch(10, shape, sequences(c, 4), mesh))
        tokens = batch.pop("tokens")
        assert tokens.shape == (*shape, 5)
        assert [row[row[..., 0] >= 0][:, 0].tolist() for row in tokens] == [[10, 11, 12], [13, 14, 15]]
        assert set(batch) == ({"segment_ids", "positions"} if isolated else set())
        for found in batch.values():
            assert found.shape == (*shape, 4) and found.min() >= 0
        if isolated:
            each = batch["segment_ids"][tokens[..., 0] >= 0][:, -1]
            assert each.tolist() == [1, 4, 1, 1, 1, 1]  # 11 ends a document, wherever its row is


def test_text_of_its_own_is_gone_on_with_as_it_was(tmp_path, tuned):
    """A source that changed after the run began changes nothing; another run takes it as it is now. Two runs may share
    a cache, and without one a remote workdir is refused with the key to give."""
    (tmp_path / "more.txt").write_text("ba la da " * 400)

    def read(name, known):
        workdir = tmp_path / name
        shutil.copytree(tuned / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
        record = start_record(workdir, known)
        source, cache = str(tmp_path / "more.txt"), str(tmp_path / "cache")
        text = load_text(source, tuned, workdir, cache, "ptx.cache", 0, record, known)
        if not known:
            write_record(workdir, record, text)
        return text.examples(16, 0, record["shuffle"]).read(np.arange(4))

    before = read("a", False)
    (tmp_path / "more.txt").write_text("da ba ba " * 400)
    assert read("b", False).tobytes() != before.tobytes()
    assert read("a", True).tobytes() == before.tobytes()
    shutil.rmtree(tmp_path / "cache" / read_record(tmp_path / "a")["text"]["parts"][""]["directory"])
    with pytest.raises(InputError, match="are not those that .*a was trained on"):
        read("a", True)  # what is made anew is another text now
    with pytest.raises(InputError, match="memory-mapped and cannot be in memory://run.*--config.ptx.cache=DIR"):
        load_text(str(tmp_path / "more.txt"), tuned, "memory://run", None, "ptx.cache", 0, {}, False)


def test_ptx_without_a_text_leaves_no_workdir(config, tmp_path):
    c = config(ppo__ptx_coefficient=1.0, ptx__source=str(tmp_path / "nothing.txt"))
    refused(c, tmp_path / "run", "ppo.ptx_coefficient > 0 needs pre-training text.*nothing.txt")


def test_a_reward_model_of_another_tokenizer(config, reward_dir, tmp_path):
    other = shutil.copytree(reward_dir, tmp_path / "reward")
    shutil.rmtree(other / "tokenizer")
    text = "quick brown foxes jump over lazy dogs 0123 " * 20
    chat_tokenizer(train_bpe([text], 290)).save(other / "tokenizer")
    c = config()
    c.reward = str(other)
    refused(c, tmp_path / "run", "another tokenizer")


# --- best of n --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    scores, gold = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    best, other = [], []
    for row, of_gold in zip(scores, gold, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(5), n)]
        chosen = [s[int(np.argmax(row[s]))] for s in subsets]
        best.append(np.mean(row[chosen]))
        other.append(np.mean(of_gold[chosen]))
    assert expected_best(scores, gold, n) == (pytest.approx(np.mean(best)), pytest.approx(np.mean(other)))


def test_best_of_n_keeps_the_best_of_the_first_n():
    scores = np.array([[0.0, 2.0, 9.0], [3.0, 1.0, 9.0]])
    kept, kl = best_of_n(scores, 2)
    assert kept.tolist() == [1, 0] and kl == pytest.approx(np.log(2) - 0.5)
    assert best_of_n(scores, 3)[0].tolist() == [2, 2] and best_of_n(scores, 1)[1] == 0.0
    for n in (0, 4):
        with pytest.raises(InputError, match=f"best-of-{n} needs {n} samples of each prompt and there are 3"):
            best_of_n(scores, n)
        with pytest.raises(InputError, match="there are 3"):
            expected_best(scores, scores, n)


@pytest.fixture
def choose(tuned, reward_dir, monkeypatch):
    """best_of_n's main, in this process, with these values of its flags and its defaults for the others."""

    def chosen(prompts, **values):
        flags = {"policy": tuned, "reward": reward_dir, "prompts": str(prompts), "n": 2, "limit": 64,
                 "max_new_tokens": 8, "drop_long": False, "bad_rows": "stop", "fields.prompt": "prompt",
                 "seed": 0}  # fmt: skip
        monkeypatch.setattr(best_of_n_tool, "FLAGS", types.SimpleNamespace(**flags | values), raising=False)
        best_of_n_tool.main(None)

    return chosen


def test_errors_of_best_of_n_name_its_own_flags(choose, tmp_path):
    rows = [{"prompt": "ba ko"}, {"prompt": "ba ko " * 30}, {"question": "ba"}, {"prompt": ""}]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="(?s)^There are 3 bad rows.*jsonl:2.*jsonl:3.*jsonl:4") as caught:
        choose(source)
    named = set(re.findall(r"--([\w.]+)", str(caught.value)))
    assert named == {"drop_long", "bad_rows", "fields.prompt"}
    assert named <= set(re.findall(r'flags.DEFINE_\w+\("([\w.]+)"', inspect.getsource(best_of_n_tool)))


def test_best_of_n_and_a_reward_model_it_does_not_fit(choose, alignment, tmp_path, monkeypatch):
    """Told before anything is sampled."""
    monkeypatch.setattr(reward_model, "load_reward_model", shortened(load_reward_model, 24))
    with pytest.raises(InputError, match="--max_new_tokens=24 leaves no room .* the reward model's context of 24"):
        choose(alignment["prompts"], max_new_tokens=24)
    source = write(tmp_path / "rows.jsonl", [{"prompt": "ba ko " * 8}])
    with pytest.raises(InputError, match="The prompt has 19 tokens, more than the 16"):
        choose(source)
    other = lambda *a, **k: dataclasses.replace(load_reward_model(*a, **k), template="plain")
    monkeypatch.setattr(reward_model, "load_reward_model", other)
    with pytest.raises(InputError, match="saw 'plain' prompts and the policy 'chat' ones"):
        choose(alignment["prompts"])


def test_best_of_n_on_the_command_line(tuned, reward_dir, alignment, tmp_path):
    """It leaves out what it is told to."""
    rows = [{"q": json.loads(line)["prompt"]} for line in alignment["prompts"].read_text().splitlines()]
    source = write(tmp_path / "rows.jsonl", [{"q": "ba ko " * 30}, {"question": "ba"}, *rows])
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.rlhf.best_of_n", f"--policy={tuned}", f"--reward={reward_dir}",
         f"--prompts={source}", "--n=4", "--limit=3", "--max_new_tokens=8", "--fields.prompt=q", "--drop_long",
         "--bad_rows=drop"],
        cwd=ROOT, env=one_device_environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rows left out: 1 too long, 1 bad" in done.stderr
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert len(rows) == 3 and all(r.keys() == {"prompt", "response", "score"} for r in rows)
    assert last["n"] == 4 and last["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert last["score"] == pytest.approx(np.mean([r["score"] for r in rows]), abs=1e-5)
    assert last["score"] > last["score_of_one"]
