"""Real processes, slow: killed and resumed with other process counts and meshes, hosts that differ, every stage."""

import json
import signal
import time

import alignment_runs
import pytest
from host_processes import Processes, assert_same_figures, config_file, hosts_config, read_config_file
from numerics import approx, tolerance
from runs import lines

from gptjax.ppo import PPOConfig, ppo
from gptjax.pretrain import pretrain
from gptjax.reward import RewardConfig, reward
from gptjax.sft import SFTConfig, sft
from gptjax.training.checkpoint import Checkpointer

pytestmark = pytest.mark.slow


def one_killed(config, workdir, killed):
    """A run of 2 x 4, one process killed: the other exits by itself and names it. The steps of its checkpoints."""
    with Processes("pretrain", config, workdir, 2, steps=400) as run:
        run.wait_for_lines(10)
        run.signal(killed, signal.SIGKILL)
        began = time.monotonic()
        ends = run.ends(60)
        assert time.monotonic() - began < 30
    survivor = ends[1 - killed]
    assert survivor.code in (75, -signal.SIGABRT), survivor.text  # JAX may notice first where process 0 died
    assert f"error: Lost process {killed} (" in survivor.text
    steps = Checkpointer(workdir).steps()
    assert len(steps) > 1 and steps[-1] % 3 == 0
    return steps


def here(config, workdir, steps):
    """The same run as 1 x 8, in this process."""
    c = read_config_file(config)
    c.steps = steps
    assert pretrain(c, str(workdir)).finished


def test_killed_and_resumed_on_other_hosts(tmp_path):
    """2 x 4 with fsdp, 1 x 8, and 4 x 2 with a tensor axis over all hosts resume; together they equal one uninterrupted
    run of 1 x 8."""
    config, workdir = hosts_config(tmp_path), tmp_path / "run"
    done = one_killed(config, workdir, 1)[-1]
    for more, count, mesh in ((2, 2, {"mesh.data": 2, "mesh.fsdp": 4}), (6, 4, {"mesh.tensor": 4})):
        with Processes("pretrain", config, workdir, count, steps=done + more, **mesh) as run:
            ends = run.ends()
        assert all(end.code == 0 for end in ends), "\n".join(end.text for end in ends)
        assert f"resuming from step {done + more - 2} of" in ends[0].text
        if count == 2:
            here(config, workdir, done + 4)
        assert [line["step"] for line in lines(workdir)] == list(range(1, done + max(more, 4) + 1))
    here(config, tmp_path / "straight", done + 6)
    assert_same_losses(workdir, tmp_path / "straight")


def assert_same_losses(workdir, other):
    a, b = lines(workdir), lines(other)
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        assert mine["loss"] == approx(theirs["loss"], terms=2000), mine["step"]


def test_a_host_that_never_connects(tmp_path):
    began = time.monotonic()
    with Processes("pretrain", hosts_config(tmp_path), tmp_path / "w", 3, only=[0, 2], flags=["--join_limit=8"]) as run:
        ends = run.ends(60)
    assert time.monotonic() - began < 40
    assert all(end.code == 2 and "1 of 3 processes did not connect within 8 s: 1." in end.text for end in ends)
    assert not (tmp_path / "w").exists()


def test_hosts_that_differ(tmp_path):
    each = {1: {"seed": 7, "optimizer.learning_rate": 0.5}}
    with Processes("pretrain", hosts_config(tmp_path), tmp_path / "w", 2, each=each) as run:
        ends = run.ends(60)
    for end in ends:
        assert end.code == 2 and "Traceback" not in end.text
        assert "config.seed is 7, on process 0 it is 0." in end.text
        assert "config.optimizer.learning_rate is 0.5" in end.text


def test_process_0_killed_and_a_damaged_checkpoint_skipped_by_all(tmp_path):
    config, workdir = hosts_config(tmp_path), tmp_path / "run"
    older, newest = one_killed(config, workdir, 0)[-2:]
    for path in (workdir / "checkpoints" / str(newest) / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with Processes("pretrain", config, workdir, 2, steps=newest + 1) as run:
        ends = run.ends()
    assert all(end.code == 0 for end in ends), ends[0].text + ends[1].text
    assert all(f"checkpoint {newest} is damaged" in end.text for end in ends)
    assert f"resuming from step {older} of {newest + 1}" in ends[0].text
    assert [p.name for p in (workdir / "checkpoints-damaged").iterdir()] == [str(newest)]


# --- the stages of alignment --------------------------------------------------------------------------------


def both(tmp_path, run, cls, config, relative=tolerance(2000)):
    """The workdirs of a stage run as 2 x 4 and, in this process, as 1 x 8, whose metrics agree."""
    two, one = tmp_path / "two", tmp_path / "one"
    file = config_file(tmp_path / "config.py", cls, config)
    with Processes(run.__name__, file, two, 2) as processes:
        ends = processes.ends()
    assert all(end.code == 0 for end in ends), "\n".join(end.text for end in ends)
    assert run(config, str(one)).finished
    assert_same_figures(two, one, relative)
    return two, one


def test_sft(tmp_path, alignment, pretrained):
    config = alignment_runs.sft_config(
        pretrained, alignment["demonstrations"], mix__fraction=0.25, batch_size=16, steps=4, microbatch_size=8,
        optimizer__eps=1e-3,  # otherwise Adam turns rounding into steps
    )  # fmt: skip
    two, one = both(tmp_path, sft, SFTConfig, config)
    assert lines(two, "samples") == lines(one, "samples")


def test_reward(tmp_path, alignment, tuned):
    config = alignment_runs.reward_config(tuned, alignment["comparisons"], steps=4, microbatch_size=8)
    two, one = both(tmp_path, reward, RewardConfig, config)
    a, b = (json.loads((w / "reward.json").read_text()) for w in (two, one))
    # not the bias: comparisons do not determine it, so Adam turns the rounding of its gradient into steps
    assert a["std_before"] == pytest.approx(b["std_before"], rel=1e-4)
    assert a["mean_after"] == approx(0, terms=2000, scale=1) == b["mean_after"]
    assert {k: a[k] for k in ("pairs", "accuracy", "demonstrations")} == {
        k: b[k] for k in ("pairs", "accuracy", "demonstrations")
    }


def test_ppo(tmp_path, alignment, tuned, reward_dir):
    """A reward model and a reward function of the whole batch, PPO-ptx, two iterations."""
    config = alignment_runs.ppo_config(
        tuned, reward_dir, alignment["prompts"], reward_fn="host_rewards:shortness", ppo__ptx_coefficient=1.0, seed=1
    )
    two, one = both(tmp_path, ppo, PPOConfig, config, 1e-4)
    assert [s["text"] for s in lines(two, "samples")] == [s["text"] for s in lines(one, "samples")]
    with Processes("ppo", tmp_path / "config.py", two, 2, steps=3) as run:
        ends = run.ends()
    assert all(end.code == 0 for end in ends) and "resuming from iteration 2 of 3" in ends[0].text


def test_ppo_on_a_reward_model_alone(tmp_path, tuned, reward_dir):
    """No Python between the models and the update; prompts of two lengths; all hosts pad a batch to the same width."""
    rows = [{"prompt": "ko mi ru te ko mi ru" if i == 5 else "ba"} for i in range(24)]
    source = alignment_runs.write(tmp_path / "prompts.jsonl", rows)
    config = alignment_runs.ppo_config(tuned, reward_dir, source, eval__lm_batches=0, steps=3)
    two, _ = both(tmp_path, ppo, PPOConfig, config, 1e-4)
    assert {line["prompt/width"] for line in lines(two)} == {8, 16}


def test_an_error_on_one_host_ends_all(tmp_path, alignment, tuned):
    config = config_file(
        tmp_path / "ppo.py", PPOConfig, alignment_runs.ppo_config(tuned, None, alignment["prompts"])
    )
    with Processes("ppo", config, tmp_path / "w", 2, reward_fn="host_rewards:no_number", steps=1) as run:
        ends = run.ends()
    assert all(end.code == 2 and "The reward function gave nan" in end.text for end in ends)
    assert "error: Stopped by process 0 (" in ends[1].text
