"""PPO and PPO-ptx end to end: one run from all sides, what is frozen, resuming, meshes."""

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from alignment_runs import RESPONSE, ppo_config, template
from conftest import ROOT
from numerics import approx, assert_close, model_terms
from ppo_runs import ROUNDING, WHOLE, share
from runs import arrays, lines, one_device_environment, without_times

from gptjax import ppo as stage
from gptjax.data.prompts import load_prompts
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.ppo import PPOConfig, ppo
from gptjax.rlhf import memory, rollout, start
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.sample import continue_texts
from gptjax.trained import load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import JsonLines

pytestmark = pytest.mark.usefixtures("one_device")

METRICS = {
    "objective/kl", "objective/score", "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
    "policy/approxkl", "policy/clipfrac", "policy/ratio_mean", "policy/ratio_max", "policy/ratio_min",
    "value/explained_var", "value/clipfrac", "loss/policy", "loss/value", "loss/ptx", "grad_norm/ppo", "grad_norm/ptx",
    "grad_norm/cosine", "grad_norm/value", "kl_coef", "response/length", "response/eos_rate", "time/rollout",
    "time/score", "time/update", "tokens_per_second/rollout",
}  # fmt: skip


@pytest.fixture(autouse=True)
def programs_of_what_is_patched():
    """In place of conftest's: nothing that is patched here is traced, so all runs share their programs."""


@pytest.fixture(scope="module")
def config(tuned, reward_dir, alignment):
    return lambda **overrides: ppo_config(tuned, reward_dir, alignment["prompts"], **overrides)


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


@pytest.mark.slow
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
    monkeypatch.setattr(start, "load_prompts", without_one)
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


def test_a_reference_that_moved_on_is_refused(config, straight, tuned, tmp_path, monkeypatch):
    """Taken up again, a run must find the policy it began with."""
    copy = shutil.copytree(straight, tmp_path / "run")
    real = start.load_model
    monkeypatch.setattr(start, "load_model", lambda *a, **k: dataclasses.replace(real(*a, **k), step=999))
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("stage 2 fsdp 2 tensor 2", marks=pytest.mark.long),  # its parts: tests/test_pipeline.py
        pytest.param("data 2 fsdp 2 tensor 2, other rules", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_of_8_gives_the_figures_of_one_device(config, first_two, tmp_path, monkeypatch, name):
    for module in (sys.modules["gptjax.run"], sys.modules["gptjax.trained"]):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    ppo(config(**VARIANT, **MESHES[name]), str(tmp_path / "run"), share)
    nearly(without_times(lines(tmp_path / "run")), first_two)
    assert lines(tmp_path / "run")[0]["objective/kl"] == 0.0
