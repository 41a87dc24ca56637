"""Sweeps: the grid, the queue that many workers share, and the same results however often they are killed."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
import sweep_workers
from conftest import ROOT
from runs import main_of
from sweep_workers import EVERY, POINTS, STEPS, sweep

from gptjax.config import config_dict
from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig, non_embedding_count, parameter_count
from gptjax.pretrain import PretrainConfig
from gptjax.queue.claims import FAILED, RELEASED, Queue, gather, identity
from gptjax.queue.files import Folder
from gptjax.sweep import grid, plan
from gptjax.sweep.grid import Point, Sweep, at_budget
from gptjax.sweep.worker import diverged, row_of, work

ISOFLOP = "configs/scaling/isoflop.py"

# --- the grid ---------------------------------------------------------------------------------------------


def test_cells():
    assert grid.product(a=[1, 2], b="xy") == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}
    ]  # fmt: skip
    pairs = grid.zip(a=[1, 2], b="xy")
    assert pairs == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert grid.product(pairs, seed=[0, 1])[1] == {"a": 1, "b": "x", "seed": 1}
    assert grid.chain(pairs, pairs[:1]) == [*pairs, pairs[0]]
    some = grid.subsample(grid.product(a=range(100)), 10)
    assert some == grid.subsample(grid.product(a=range(100)), 10) != grid.subsample(grid.product(a=range(100)), 10, 1)
    assert [c["a"] for c in some] == sorted({c["a"] for c in some}) and len(some) == 10


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grid.zip(a=[1, 2], b=[1]), "zip was given 2, 1 values: give as many of each, or use product"),
        (lambda: grid.product([{"a": 1}], a=[2]), "The axis 'a' is in a grid twice"),
        (lambda: grid.subsample([{}], 2), "subsample was asked for 2 of 1 cells"),
        (lambda: Sweep([]), "no points: its grid is empty"),
        (lambda: Sweep([Point("a", None), Point("a", None)]), "2 points are named a: drop one"),
        (lambda: Sweep([Point("a/b", None)]), "'a/b' is the name of a folder"),
        (lambda: at_budget(base(), 1e3, {}), "1000 FLOPs are less than one step of 256 tokens"),
        (lambda: at_budget(base(vocab_size=None), 1e9, {}), "set config.model.vocab_size"),
    ],
)
def test_what_a_grid_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def base(**model):
    c = config_dict(PretrainConfig)
    c.model.update({"vocab_size": 50, "n_layer": 2, "n_head": 2, "d_model": 16, "context_length": 32, **model})
    c.batch_size = 8
    return c


@pytest.mark.parametrize("count", ["with_embedding", "without_embedding"])
@pytest.mark.parametrize("flops", ["6nd", "exact"])
def test_a_point_costs_its_budget(count, flops):
    """Counted by hand: 6 N D, or three forwards of all products, attention in full; the head with the embedding."""
    config = base()
    point = at_budget(config, 3.21e9, {"n_layer": 3, "d_model": 24}, count=count, flops=flops, tag="seed1")
    model = GPTConfig(50, 3, 2, 24, 32)
    n = {"with_embedding": parameter_count, "without_embedding": non_embedding_count}[count](model)
    head = 6 * 24 * 50 if count == "with_embedding" else 0
    a_token = 6 * n if flops == "6nd" else 3 * (2 * 12 * 3 * 24 * 24 + 3 * 4 * 32 * 24) + head
    assert point.params == n and point.flops == a_token * point.tokens
    assert point.tokens == point.config.steps * 8 * 32
    assert abs(point.flops - 3.21e9) <= a_token * 8 * 32 / 2
    assert point.name.startswith("3.21e9-") and point.name.endswith("-seed1") and point.budget == 3.21e9
    assert config.steps is None and config.model.n_layer == 2  # the base is left as it was
    assert (point.config.model.n_layer, point.config.model.d_model) == (3, 24)


def test_names_keep_budgets_apart():
    assert [grid.short(x) for x in (1e16, 1.5e19, 2.4e19, 9.999e12)] == ["1e16", "1.5e19", "2.4e19", "1e13"]
    assert [grid.short_count(x) for x in (12, 999_499, 999_500, 12_345_678, 1.3e9, 2e12)] == [
        "12", "999k", "1m", "12.3m", "1.3b", "2t"
    ]  # fmt: skip


def test_the_isoflop_grid(monkeypatch):
    monkeypatch.chdir(ROOT)
    from configs.scaling import isoflop

    points = isoflop.get_sweep(isoflop.get_config()).points
    assert len(points) == 24
    for budget in isoflop.BUDGETS["cpu"]:
        of_budget = [p for p in points if p.budget == budget and p.config.seed == 0]
        middle = math.sqrt(budget / 120)
        assert len({p.params for p in of_budget}) == 5
        for ratio, p in zip(isoflop.RATIOS["cpu"], of_budget, strict=True):
            assert abs(math.log(p.params / (ratio * middle))) < math.log(1.35)
            assert abs(p.flops / budget - 1) < 0.01 and p.flops == 6 * p.params * p.tokens
    assert [p.name for p in points if p.config.seed] == [
        f"{p.name}-seed{s}" for p in (points[2], points[12]) for s in (1, 2)
    ]
    (target,) = isoflop.get_sweep(isoflop.get_config("target"), "target").points
    assert target.config.to_dict() == isoflop.get_config("target").to_dict()
    assert target.flops > 9.9 * max(p.flops for p in points)
    # as the file's first lines say
    assert sum(p.to_compute for p in points) == pytest.approx(7.8e13, rel=0.01)
    branches = isoflop.get_sweep(isoflop.get_config("wsd"), "wsd").points
    assert sum(p.to_compute for p in branches) == pytest.approx(2.7e13, rel=0.01)
    assert sum(p.flops for p in branches) == pytest.approx(4.6e13, rel=0.02)


def test_a_dry_run_prints_the_grid_and_its_cost_and_draws_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = main_of("gptjax.sweep", f"--config={ISOFLOP}:coarse", f"--workdir={tmp_path}", "--dry_run",
                             "--rate=1e11", "--price=2", "--config.seed=5")  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["point", "N", "D", "D/N", "epochs", "C", "steps", "shape", "rate", "state"]
    assert "epochs: not known before a run has ended" in out
    assert sum("e11-" in line or "e12-" in line for line in lines) == 6
    assert "N: all parameters; C = 6 N D" in out
    assert "0 of 6 points; 0 of 9.9e+12 FLOPs; at 1e+11 FLOP/s a worker 0:01 h left with 1" in out
    assert sorted(os.listdir(tmp_path)) == ["grid.png"]  # nothing is claimed
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_text_that_is_seen_more_than_once_is_said():
    points = [dataclasses.replace(p, params=10, tokens=100 * i, flops=6e3 * i, count="with_embedding", rule="6nd")
              for i, p in enumerate(sweep(3).points, 1)]  # fmt: skip
    planned = Sweep([dataclasses.replace(p, config=base()) for p in points])
    row = {"name": "p0", "loss": 1.0, "metric": "nats/token", "status": "done", "reason": None, "text_tokens": 150}
    shown = plan.table(planned, {}, {"p0": row}).splitlines()
    assert [line.split()[4] for line in shown[1:4]] == ["0.67", "1.33", "2.00"]
    assert shown[-1].startswith("2 points see their text more than once, up to 2.00 times")
    assert "once" not in plan.table(planned, {}, {"p0": row | {"text_tokens": 300}})
    other = {"p0": row, "p1": row | {"name": "p1", "text_tokens": 400}}  # p2's is not known
    assert plan.epochs(planned, other) == {"p0": 100 / 150, "p1": 0.5}


def test_a_config_without_a_sweep(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    code, _, err = main_of("gptjax.sweep", "--config=configs/demo.py", f"--workdir={tmp_path}")
    assert code == 2 and "configs/demo.py has no get_sweep(config)" in err


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def at_once(functions):
    """What the functions return, each called in a thread of its own, all at the same moment."""
    barrier, found = threading.Barrier(len(functions)), [None] * len(functions)

    def call(i):
        barrier.wait()
        found[i] = functions[i]()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_one_of_many_creates_a_file(place):
    folder = Folder(place)
    for i in range(60):
        names = [str(n) for n in range(8)]
        won = at_once([lambda n=n, i=i: folder.create(f"claims/{i}", n.encode()) for n in names])
        assert sum(won) == 1 and folder.read(f"claims/{i}").decode() == names[won.index(True)]


def test_files_are_replaced_and_listed(place):
    folder = Folder(place)
    assert folder.names("a") == [] and folder.read("a/b") is None and not folder.exists("a/b")
    for data in (b"old", b"new"):
        folder.write("a/b", data)
        assert folder.read("a/b") == data and folder.names("a") == ["b"] and folder.exists("a/b")
    assert not folder.create("a/b", b"other") and folder.read("a/b") == b"new"
    assert folder.tail("a/b", 2) == b"ew" and folder.tail("a/c", 2) == b""
    assert folder.create("a/b", b"new")  # asked for again after a lost answer


# --- claims, leases, attempts -----------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def elsewhere(queue):
    """Makes it the queue of a worker on another machine."""
    queue.me = {**queue.me, "machine": uuid.uuid4().hex}
    return queue


def test_two_workers_never_have_one_point(place):
    names = [f"p{i}" for i in range(20)]
    taken = at_once([lambda: [lease.name for lease in iter(lambda q=Queue(place): q.acquire(names), None)]
                     for _ in range(4)])  # fmt: skip
    assert sorted(sum(taken, [])) == sorted(names)


def test_a_lease_runs_out_when_its_owner_is_silent(place):
    clock = Clock()
    first, second = elsewhere(Queue(place, clock=clock)), Queue(place, lease=60, clock=clock)
    lease = first.acquire(["p"])
    lease.beat(step=3)
    for clock.now in (0, 59):
        assert second.acquire(["p"]) is None
    lease.beat(step=4)
    for clock.now in (61, 120):  # seen anew at 61
        assert second.acquire(["p"]) is None
        assert second.states(["p"])["p"].beat["step"] == 4
    assert not lease.lost()
    clock.now = 121.0
    taken = second.acquire(["p"])
    assert taken.attempt == 2 and lease.lost() and not taken.lost()
    assert first.acquire(["p"]) is None

    # the first one had only been asleep and has a result after all: it is kept, and the other's is not added
    first.finish(lease, {"name": "p", "loss": 1.0})
    second.finish(taken, {"name": "p", "loss": 2.0})
    assert [row["loss"] for row in gather(second.folder)] == [1.0]
    assert second.states(["p"])["p"].kind == "finished" and second.acquire(["p"]) is None


def test_the_heartbeat_keeps_a_lease_and_says_when_it_is_lost(place):
    """With a lease of .2 s: held for a second by its beats, then taken by force."""
    queue, other, lost = elsewhere(Queue(place, lease=0.2)), Queue(place, lease=0.2), threading.Event()
    lease = queue.acquire(["p"])
    with lease.kept(lambda: {"step": 7}, lost.set):
        for _ in range(10):
            time.sleep(0.1)
            assert other.acquire(["p"]) is None
        assert other.states(["p"])["p"].beat["step"] == 7 and not lost.is_set()
        other.folder.create("claims/p@0002.json", b"{}")
        assert lost.wait(2)


def test_a_heartbeat_that_fails_says_so_once_and_goes_on(place, capsys):
    queue, calls = Queue(place, lease=0.1), []
    lease = queue.acquire(["p"])

    def progress():
        calls.append(1)
        if len(calls) < 4:
            raise OSError("no route to host")
        return {"step": len(calls)}

    with lease.kept(progress, lambda: None):
        until(lambda: len(calls) > 5)
    assert queue.states(["p"])["p"].beat["step"] >= 5
    said = capsys.readouterr().out
    assert said.count("warning: the lease of p cannot be renewed (OSError: no route to host); after 0.1 s") == 1


def test_an_owner_cut_off_from_its_storage_ends_soon_after_it_is_back(place):
    """A second, not a fifth of the lease: another worker may have the point."""
    queue, calls, lost = Queue(place, lease=60), [], threading.Event()
    lease = queue.acquire(["p"])

    def progress():
        calls.append(1)
        if len(calls) == 1:
            queue.folder.create("claims/p@0002.json", b"{}")  # meanwhile
            raise OSError("no route to host")
        return {}

    with lease.kept(progress, lost.set):
        assert lost.wait(5)
    assert len(calls) == 1


def test_a_dead_process_of_this_machine_has_lost_its_points_at_once(place):
    queue, other = Queue(place), Queue(place)
    queue.me = {**queue.me, "pid": 2**22 + 1, "started": "1"}  # above every pid
    assert queue.acquire(["p"]).attempt == 1
    assert other.acquire(["p"]).attempt == 2
    assert queue.acquire(["p"]) is None  # the second's process is alive
    queue.me = {**identity(), "started": "1"}  # another process has this pid by now
    assert queue.acquire(["q"]) and other.acquire(["q"])


THREADS = """
import ctypes, os, sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(os.getpid(), flush=True)
libc = ctypes.CDLL(None)
libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit, of this thread alone
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc")
def test_a_process_has_ended_when_its_last_thread_has():
    """A killed process is a zombie by its first thread while others still hold its files and their locks."""
    from gptjax.queue.claims import _started

    with subprocess.Popen([sys.executable, "-c", THREADS], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        stat = lambda: (ROOT / f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        until(lambda: stat()[0] == "Z")
        began = _started(pid)
        expected = stat()[19]
        process.kill()
        assert began == expected
        until(lambda: _started(pid) is None)  # not reaped yet
        assert stat()[0] == "Z"


def test_a_point_may_fail_so_often_and_says_why(place):
    queue = Queue(place, attempts=2)
    queue.acquire(["p"]).end(FAILED, "no text")
    queue.acquire(["p"]).end(RELEASED)  # was asked to stop: does not count
    state = queue.states(["p"])["p"]
    assert (state.kind, state.attempts, state.reason) == ("waiting", 2, "no text")
    queue.acquire(["p"]).end(FAILED, "still none")
    state = queue.states(["p"])["p"]
    assert (state.kind, state.reason) == ("failed", "still none") and queue.acquire(["p"]) is None
    assert queue.reset_failures(["p", "q"]) == ["p"]
    queue.acquire(["p"]).end(FAILED, "again")
    assert queue.states(["p"])["p"].kind == "waiting"
    queue.acquire(["p"]).end(FAILED, "again")
    assert queue.states(["p"])["p"].kind == "failed"


def test_a_point_that_takes_its_machine_down_is_given_up(place):
    """Four machines, each of which goes silent at the point before the next one looks. The second and third came no
    further than the first, and that are two failures; a machine that is preempted does come further."""
    clock = Clock()
    for name, further, kind in (("p", 0, "failed"), ("q", 1, "waiting")):
        for i in range(4):
            queue = elsewhere(Queue(place, attempts=2, clock=clock))
            queue.states([name])
            clock.now += 61
            state = queue.states([name])[name]
            assert (state.kind, state.attempts) == ("waiting" if i < 3 else kind, i)
            if lease := queue.acquire([name]):
                lease.beat(step=7 + i * further)
        assert ("went away while it was at it" in str(state.reason)) == (kind == "failed")
        assert queue.reset_failures([name]) == [name] * (kind == "failed")
        assert queue.states([name])[name].kind == ("waiting" if kind == "failed" else "running")


def test_a_killed_process_is_no_failure_of_its_point(place):
    queue = Queue(place, attempts=2)
    for i in range(4):
        queue.me = {**identity(), "pid": 2**22 + 1, "started": "1"}
        assert queue.acquire(["p"]).attempt == i + 1
    assert queue.states(["p"])["p"].kind == "waiting"


def test_a_worker_ends_with_its_command(tmp_path):
    """The command is killed, so that it cannot tell its worker."""
    worker = (
        "import os, signal, time; from gptjax.queue.claims import end_with\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "end_with(int(os.environ['COMMAND'])); time.sleep(60)"
    )
    command = (
        "import os, subprocess, sys; os.environ['COMMAND'] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", command], env=environment) as process:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        pid = int((tmp_path / "pid").read_text())
        time.sleep(1)
        assert os.path.exists(f"/proc/{pid}")
        process.kill()
    until(lambda: not os.path.exists(f"/proc/{pid}") or "\nState:\tZ" in (ROOT / f"/proc/{pid}/status").read_text(), 10)


def test_a_worker_that_its_command_saw_die_has_failed(place):
    command, worker = Queue(place, attempts=1), Queue(place)
    worker.me = {**worker.me, "pid": 2**22 + 1, "started": "1"}
    worker.acquire(["p"])
    assert not command.fail_attempt_of(os.getpid(), "alive") and command.fail_attempt_of(2**22 + 1, "signal 9")
    assert command.states(["p"])["p"].reason == "signal 9" and command.states(["p"])["p"].kind == "failed"


# --- results ----------------------------------------------------------------------------------------------


def test_a_slow_worker_does_not_write_over_the_results_of_a_fast_one(place):
    """The fast one has its result between the slow one's listing and its writing of results.jsonl."""
    slow, fast = Queue(place), Queue(place)
    leases, write = (slow.acquire(["p"]), fast.acquire(["q"])), slow.folder.write

    def write_later(name, data):
        slow.folder.write = write
        fast.finish(leases[1], {"name": "q"})
        write(name, data)

    slow.folder.write = write_later
    slow.finish(leases[0], {"name": "p"})
    assert [json.loads(line)["name"] for line in slow.folder.read("results.jsonl").splitlines()] == ["p", "q"]


def test_a_results_file_cut_in_a_line_is_whole_again_and_a_damaged_result_is_named(place, capsys):
    queue = Queue(place)
    for name in ("p", "q"):
        queue.finish(queue.acquire([name]), {"name": name, "loss": 1.5})
    whole = queue.folder.read("results.jsonl")
    queue.folder.write("results.jsonl", whole[:-9])
    assert len(gather(queue.folder)) == 2 and queue.folder.read("results.jsonl") == whole
    queue.folder.write("results/p.json", b'{"name": "p", "lo')
    assert gather(queue.folder) == [{"name": "q", "loss": 1.5}]
    assert "results/p.json is damaged and was left out: delete it" in capsys.readouterr().out


def test_the_rule_of_divergence():
    falls = [{"step": i, "loss": 5 - 3 * i / 200} for i in range(200)]
    good = [{"step": 0, "loss": 5.0}, {"step": 200, "loss": 2.0}]
    assert diverged(falls, good) is None
    assert diverged([], good) is None and diverged(falls[:50], good) is None
    assert "is not finite" in diverged(falls, [good[0], {"step": 200, "loss": None}])
    assert "5.1000, is not below the one before training, 5.0000" in diverged(
        falls, [good[0], {"step": 200, "loss": 5.1}]
    )
    rose = falls + [{"step": i, "loss": 2.6} for i in range(200, 240)]
    assert "the training loss rose from 2." in diverged(rose, good)
    spike = falls[:100] + [{"step": 100, "loss": None}] + falls[100:]  # float16 skips such a step
    assert diverged(spike, good) is None


# --- workers ----------------------------------------------------------------------------------------------


def results(workdir):
    """The rows of results.jsonl by name, without seconds."""
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def test_a_worker_runs_what_can_be_run(tmp_path):
    """Of a run that diverges there is a result; one that fails is tried again, and the others are run."""
    planned = sweep(5, faults=["input", "code", "diverged"], steps=4)
    queue = Queue(tmp_path, attempts=2)
    assert work(planned, queue, tmp_path)
    found = results(tmp_path)
    assert found.keys() == {"p2", "p3", "p4"}
    assert found["p3"] == {
        "name": "p3", "N": None, "count": None, "D": None, "C": None, "rule": None, "budget": None, "loss": 5.0,
        "metric": "nats/token", "tokenizer": None, "text_tokens": None, "epochs": None, "seed": 3,
        "learning_rate": None, "status": "done", "reason": None, "steps": 4, "workdir": "runs/p3",
    }  # fmt: skip
    assert (found["p2"]["status"], found["p2"]["loss"], found["p2"]["steps"]) == ("diverged", None, 4)
    assert found["p2"]["reason"] == "The loss became nan"
    states = queue.states(p.name for p in planned.points)
    assert [(s.kind, s.attempts, s.reason) for s in states.values()][:2] == [
        ("failed", 2, "There is no text: give one."), ("failed", 2, "ZeroDivisionError: by nothing")
    ]  # fmt: skip
    assert "ZeroDivisionError" in (tmp_path / "runs" / "p1" / "log.txt").read_text()
    assert "failed (There is no text: give one.)" in plan.table(planned, states, {})


def test_results_are_points_of_a_law(tmp_path):
    """The rows as the worker writes them, read by gptjax.scaling."""
    from gptjax.scaling import points

    made = sweep(3, faults=["diverged"], steps=2)
    of_compute = [dataclasses.replace(p, params=10**6 * i, tokens=10**7, flops=6e13 * i, count="with_embedding",
                                      rule="6nd", budget=6e13 * i) for i, p in enumerate(made.points, 1)]  # fmt: skip
    assert work(Sweep(of_compute, made.run), Queue(tmp_path), tmp_path)
    read = points.read(str(tmp_path / "results.jsonl"))
    assert read.names == ("p1", "p2") and len(read.left_out) == 1 and "p0" in read.left_out[0]
    assert {name: values.tolist() for name, values in read.columns.items()} == {
        "N": [2e6, 3e6], "D": [1e7, 1e7], "C": [1.2e14, 1.8e14], "S": [2, 2], "loss": [3, 4]
    }  # fmt: skip
    assert (read.metric, read.count, read.tokenizer) == ("nats/token", "with_embedding", None)
    assert read.workdirs == (str(tmp_path / "runs/p1"), str(tmp_path / "runs/p2"))


def test_runs_of_one_shape_follow_each_other(tmp_path):
    """Whatever their learning rate and seed: they share compiled programs."""
    order = []
    planned = sweep(6, run=lambda c, w: order.append(c.seed) or sweep_workers.stage(c, w), steps=1)
    for i, point in enumerate(planned.points):
        point.config.update(model={"d_model": i % 2}, optimizer={"learning_rate": i})
    assert work(planned, Queue(tmp_path), tmp_path)
    assert order == [0, 2, 4, 1, 3, 5]


def test_a_metric_that_was_not_evaluated_is_no_result(tmp_path):
    planned = sweep(1)
    planned = Sweep(planned.points, planned.run, metric="bits/byte")
    work(planned, queue := Queue(tmp_path, attempts=1), tmp_path)
    assert "have no 'bits_per_byte': give another metric" in queue.states(["p0"])["p0"].reason
    with pytest.raises(InputError, match="bits_per_byte"):
        row_of(planned, planned.points[0], tmp_path, sweep_workers.stage(planned.points[0].config, tmp_path / "x"))


@pytest.fixture(scope="module")
def start():
    """start(workdir) -> the number of a new process that is a worker of sweep_workers.sweep()."""
    command = [sys.executable, sweep_workers.__file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1, env=environment) as server:

        def start(workdir):
            server.stdin.write(f"{workdir}\n")
            return int(server.stdout.readline())

        yield start
        server.stdin.close()


def steps(workdir):
    """The steps that have been done, by point, each as often as it was."""
    return {run.name: (run / "done").read_text().split() for run in workdir.glob("runs/*") if (run / "done").exists()}


def count(workdir) -> int:
    return sum(map(len, steps(workdir).values()))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_ten_times_and_the_same_results(start, tmp_path):
    """Two workers, of which one or both are killed ten times, some steps after the last time. No run is done twice: of
    a run that is taken up again only the steps since its checkpoint are. No two processes are ever at one run."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    for workdir in (whole, killed):
        pids = [start(workdir), start(workdir)]
        for _ in range(10 if workdir == killed else 0):
            reached = min(count(killed) + rng.randint(0, 15), POINTS * STEPS)
            until(lambda reached=reached: count(killed) >= reached)
            for i in rng.choice([(0,), (1,), (0, 1)]):
                os.kill(pids[i], signal.SIGKILL)
                pids[i] = start(killed)
        until(lambda pids=pids: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    assert results(killed) == results(whole) and len(results(whole)) == POINTS
    assert not (killed / "overlaps").exists()
    once = [str(step) for step in range(1, STEPS + 1)]
    assert list(steps(whole).values()) == [once] * POINTS
    assert all(sorted(set(done), key=int) == once for done in steps(killed).values())
    assert 0 < count(killed) - POINTS * STEPS <= 20 * EVERY


def test_a_sleeping_owner_is_waited_for_while_it_has_the_folder(tmp_path):
    from gptjax import lock
    from gptjax.sweep.worker import _wait_for

    run = tmp_path / "run"
    with lock.held(run), pytest.raises(InputError, match="is in use by process"):
        _wait_for(run, 0.1)
    run.mkdir(exist_ok=True)
    _wait_for(run, 0.1)


# --- the workers of a command -----------------------------------------------------------------------------


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """workers(code) -> Workers that run a piece of Python, and their Queue."""
    from gptjax.queue.workers import Workers

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # theirs would stay
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    queue = Queue(tmp_path, attempts=2)
    return lambda code: (Workers(1, [sys.executable, "-c", code], environment, queue.fail_attempt_of), queue)


def test_a_worker_that_dies_is_replaced_and_its_point_fails_in_the_end(workers, tmp_path):
    started, queue = workers(
        "import os; from gptjax.queue.claims import Queue\n"
        f"if Queue({str(tmp_path)!r}, attempts=2).acquire(['p']): os.kill(os.getpid(), 9)"
    )
    until(lambda: not started.check())
    state = queue.states(["p"])["p"]
    assert (state.kind, state.attempts, state.reason) == ("failed", 2, "its worker ended with signal 9")


def test_a_worker_that_dies_while_it_is_checked_is_at_work_until_the_next_check(workers):
    started, _ = workers("raise SystemExit(0)")
    started._running[0].wait()

    class Dying:
        pid, codes = 2**22 + 1, iter([None, -9, -9])

        def poll(self):
            return next(self.codes)

    started._running[0] = Dying()
    assert started.check() and started.check()
    assert not isinstance(started._running[0], Dying)
    started._running[0].wait()
    assert not started.check()


def test_workers_that_cannot_begin_end_the_command(workers):
    started, _ = workers("raise SystemExit(3)")
    with pytest.raises(InputError, match="Workers end with exit code 3 before they have a point"):
        until(lambda: not started.check())


def test_the_command_gathers_at_its_end(tmp_path, monkeypatch):
    """A worker that wrote an older results.jsonl and was killed before it looked again: nobody else would."""
    from gptjax.sweep import __main__ as command

    planned, queue = sweep(2), Queue(tmp_path)
    for point in planned.points:
        queue.finish(queue.acquire([point.name]), {"name": point.name})

    class Ended:
        stopping, count = False, 0

        def check(self):
            queue.folder.write("results.jsonl", b'{"name": "p0"}\n')
            return False

    monkeypatch.setattr(command, "_money", dict)
    assert command.supervise(planned, queue, Ended()) == 0
    assert results(tmp_path).keys() == {"p0", "p1"}


# --- continuing -------------------------------------------------------------------------------------------


def test_another_config_is_refused_by_its_difference(tmp_path):
    folder = Folder(tmp_path)
    plan.claim(folder, sweep(3))
    plan.claim(folder, sweep(3))
    plan.claim(folder, sweep(4))  # a point more
    with pytest.raises(InputError, match=r"another sweep:\n  p3: it is not in the grid any more\nGive another --work"):
        plan.claim(folder, sweep(3))
    with pytest.raises(InputError, match=r"another sweep:\n  p0: steps was 30 and is 31\n  p1: steps was"):
        plan.check(folder, sweep(4, steps=31))
    with pytest.raises(InputError, match="it was 'nats/token' and is 'bits/byte'"):
        plan.check(folder, Sweep(sweep(4).points, metric="bits/byte"))
    assert plan.check(folder, sweep(4, log={"every": 3}))
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="sweep.json is damaged"):
        plan.check(folder, sweep(4))


def test_cost_and_time_left(tmp_path):
    """Two of four points of 100 FLOPs done in 5 s each, one half way: 20 FLOP/s, 150 left."""
    from gptjax.queue.claims import State

    configs = [p.config for p in sweep(4).points]
    planned = Sweep([Point(f"p{i}", c, 10, 10, 100.0, "with_embedding", "6nd", 100) for i, c in enumerate(configs)])
    rows = {f"p{i}": {"status": "done", "seconds": 5.0, "loss": 2.0, "metric": "nats/token", "reason": None}
            for i in range(2)}  # fmt: skip
    states = {"p0": State("finished"), "p1": State("finished"), "p3": State("waiting"),
              "p2": State("running", 1, {"host": "h"}, {"step": 15, "seconds": 2.0})}  # fmt: skip
    assert plan.speed(planned, states, rows) == 20
    assert plan.speed(planned, states, {}) == 25
    line = plan.cost(planned, states, rows, workers=2, rate=150 / 7200, price=3.0)
    assert line == ("2 of 4 points; 250 of 400 FLOPs; at 0.0208 FLOP/s a worker 1:00 h left with 2; "
                    "5:20 h of a worker in all; 16.00 in all at 3 an hour")  # fmt: skip
    table = plan.table(planned, states, rows)
    assert "done 2.0000 nats/token" in table and "running on h, step 15" in table
