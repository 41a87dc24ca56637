"""Sweeps of real pre-training runs: branches of one run are runs of their own, and the command, killed ten times."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from runs import arrays, assert_same_run, lines, one_device_environment
from test_resume import on_one_device, text  # noqa: F401 (a fixture)

from gptjax.config import config_dict
from gptjax.errors import InputError
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.queue.claims import Queue
from gptjax.sweep import plan
from gptjax.sweep.grid import Sweep, decayed
from gptjax.sweep.worker import work

SHAPE = dict(n_layer=1, n_head=2, d_model=16)


def base(source, **schedule):
    c = config_dict(PretrainConfig)
    c.model.update(vocab_size=16, context_length=16, **SHAPE)
    c.data.update(source=str(source), tokenizer="char", split_seed=0)
    c.batch_size = 4
    c.eval.update(every=10**6, batches=2)
    c.log.tensorboard = False
    c.checkpoint.every = 100
    c.schedule.update(**schedule)
    return c


WSD = dict(kind="wsd", warmup_tokens=200.0, decay_fraction=0.25, final_fraction=0.0)


@pytest.mark.slow
def test_branches_of_one_run_are_runs_of_their_own(text, tmp_path, monkeypatch):  # noqa: F811
    """Bit for bit those that are trained from their beginning; only their own steps are computed."""
    on_one_device(monkeypatch)
    points = decayed(base(text, **WSD), SHAPE, multiples=(0.5, 1, 2), tokens_per_parameter=0.3)
    steps = [p.config.steps for p in points]
    assert steps == [4 * steps[2], 2 * steps[2], steps[2]] and steps[2] % 4 == 0
    assert abs(points[2].tokens - 0.5 * 0.3 * points[2].params) <= 2 * 4 * 16  # half of 4 steps
    assert [p.branch_step for p in points] == [0, steps[1] * 3 // 4, steps[2] * 3 // 4]
    assert [p.parent for p in points] == [None, points[0].name, points[0].name]
    assert {p.config.checkpoint.every for p in points} == {steps[2] * 3 // 4}
    assert [p.to_compute / p.flops for p in points] == pytest.approx([1, 0.25, 0.25])
    points = points[:2]
    sweep = Sweep(points)
    assert work(sweep, Queue(tmp_path), tmp_path)
    for point in points[1:]:
        run = tmp_path / "runs" / point.name
        assert f"begins with step {point.branch_step} of" in (run / "log.txt").read_text()
        assert f"resuming from step {point.branch_step} of {point.config.steps}" in (run / "log.txt").read_text()
        alone = tmp_path / "alone" / point.name
        assert pretrain(point.config, str(alone)).finished
        assert_same_run(run, alone, point.config.steps)
        rates = [line["learning_rate"] for line in lines(run)]
        assert rates[point.branch_step - 1] == rates[point.branch_step] > rates[point.branch_step + 1]
    weights = [arrays(tmp_path / "runs" / p.name, p.config.steps)["params['wte']"].tobytes() for p in points]
    assert len(set(weights)) == 2
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["name"], row["steps"], row["D"]) for row in rows} == {
        (p.name, p.config.steps, p.tokens) for p in points
    }
    for row in rows:
        assert row["status"] == "done" and row["tokenizer"] and row["text_tokens"] > 9000 and row["loss"] > 0
        assert row["epochs"] == row["D"] / row["text_tokens"]
    assert plan.picture(sweep).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        ({}, {}, "only with schedule.kind='wsd'"),
        ({"kind": "wsd", "warmup_fraction": 0.1}, {}, "its warm-up in warmup_tokens"),
        (WSD, {"multiples": (1, 1.5)}, "are not whole ones of 1"),
        ({**WSD, "warmup_tokens": 1e6}, {}, "warmup_tokens=1e\\+06 does not end before the shortest run decays, after"),
        ({**WSD, "decay_fraction": 1.0}, {}, "does not end before"),
        ({**WSD, "ramp_tokens": 1e6}, {}, "counted in whole batches: set schedule.ramp_tokens=0"),
    ],
)
def test_what_cannot_branch(tmp_path, schedule, options, message):
    with pytest.raises(InputError, match=message):
        decayed(base(tmp_path, **schedule), SHAPE, **options)


# --- the command ------------------------------------------------------------------------------------------

CONFIG = """
from gptjax.config import config_dict
from gptjax.pretrain import PretrainConfig
from gptjax.sweep.grid import Sweep, at_budget, product

def get_config():
    c = config_dict(PretrainConfig)
    c.model.update(vocab_size=16, context_length=16, n_head=2)
    c.data.update(tokenizer="char", split_seed=0)
    c.batch_size = 4
    c.eval.update(every=10**6, batches=2)
    c.checkpoint.every = 40
    c.log.update(tensorboard=False, every=10)
    return c

def get_sweep(config):
    shapes = [dict(n_layer=1, d_model=16), dict(n_layer=2, d_model=16)]
    return Sweep([at_budget(config, **cell) for cell in product(budget=[6e8, 1.2e9], shape=shapes)])
"""


@pytest.fixture
def command(text, tmp_path):  # noqa: F811
    """command(workdir) -> the process of a sweep there, with two workers; none is left at the end."""
    config, started = tmp_path / "tiny.py", []
    config.write_text(CONFIG)

    def command(workdir):
        started.append(subprocess.Popen(
            [sys.executable, "-m", "gptjax.sweep", f"--config={config}", f"--workdir={workdir}", "--workers=2",
             "--lease=5", "--attempts=20", f"--config.data.source={text}"],
            cwd=ROOT, env=one_device_environment(), start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
        return started[-1]

    yield command
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def finished(process):
    out, _ = process.communicate(timeout=550)
    assert process.returncode == 0, out
    return out


def rows(workdir):
    found = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    return {row["name"]: {k: v for k, v in row.items() if k != "seconds"} for row in found}, len(found)


def claims(workdir) -> list:
    return [path for path in workdir.glob("claims/*.json") if re.search(r"@\d+\.json$", path.name)]


@pytest.mark.slow
def test_the_command_killed_ten_times_has_the_same_results(command, tmp_path):
    """All of its processes, or one worker and then all, at random instants after it has a point: the losses are equal
    to the last bit, each point has one result, and no step is in a run's metrics twice."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    out = finished(command(whole))
    assert "4 of 4 points" in out and len(re.findall(r": done \d", out)) == 4
    work = (whole / "results.jsonl").stat().st_mtime - min(path.stat().st_mtime for path in claims(whole))
    for i in range(10):
        before, process = len(claims(killed)), command(killed)
        while len(claims(killed)) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, work / 4))
        if i % 3 == 2:
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            for pid in workers[:1]:
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(rng.uniform(0, work / 8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished(command(killed))
    (expected, count), (found, lines_found) = rows(whole), rows(killed)
    assert found == expected and count == lines_found == 4
    for name in found:
        steps = [line["step"] for line in lines(killed / "runs" / name)]
        assert steps == [line["step"] for line in lines(whole / "runs" / name)]
    assert len(claims(killed)) > 8  # the kills cost attempts
    made = len(claims(killed))
    finished(command(killed))  # nothing is left to do
    assert len(claims(killed)) == made and rows(killed)[0] == expected


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(command, tmp_path):
    process = command(tmp_path / "run")
    while not list((tmp_path / "run").glob("runs/*/metrics.jsonl")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "stopped, with everything saved: the same command continues" in finished(process)
    finished(command(tmp_path / "run"))
    assert rows(tmp_path / "run")[1] == 4
