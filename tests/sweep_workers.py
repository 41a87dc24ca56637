"""A stage that takes no time, and a sweep of it, for workers in processes of their own (test_sweep.py)."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from ml_collections import config_dict as mlc

from gptjax.errors import InputError
from gptjax.queue.claims import Queue
from gptjax.sweep.grid import Point, Sweep
from gptjax.sweep.worker import work
from gptjax.training.loop import TrainingDiverged
from gptjax.training.stage import RunResult

EVERY, POINTS, STEPS = 3, 6, 30  # steps between checkpoints; of the sweep


def stage(config, workdir):
    """Steps of 2 ms, of which every third is saved; each writes its number to `done`. A second process in the folder is
    written to `overlaps`. config.fault: 'input', 'code' or 'diverged'."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "busy", "w") as busy:
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (folder.parent.parent / "overlaps").write_text(workdir)
        saved = folder / "saved"
        start = int(saved.read_text()) if saved.exists() else 0
        for step in range(start + 1, config.steps + 1):
            time.sleep(0.002)
            with open(folder / "done", "a") as done:
                done.write(f"{step}\n")
            if step % EVERY == 0 or step == config.steps:
                (folder / "new").write_text(str(step))
                os.replace(folder / "new", saved)
        if config.fault == "input":
            raise InputError("There is no text: give one.")
        if config.fault == "code":
            raise ZeroDivisionError("by nothing")
        line = {"step": config.steps, "loss": 2 + config.seed, "seconds": 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if config.fault == "diverged":
            raise TrainingDiverged("The loss became nan")
        evaluations = [{"step": 0, "loss": 9.0}, {"step": config.steps, "loss": 2.0 + config.seed}]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    return RunResult(workdir, True, config.steps, line, evaluations[-1], evaluations[-1], None, 0.1)


def sweep(points=POINTS, run=stage, faults=(), **config):
    faults = [*faults, *[None] * (points - len(faults))]
    made = [mlc.ConfigDict({"seed": i, "steps": STEPS, "fault": faults[i], **config}) for i in range(points)]
    return Sweep([Point(f"p{i}", c) for i, c in enumerate(made)], run)


def serve():
    """For each line of stdin, a workdir, a worker of `sweep()` in a process of its own, whose number is printed. What
    it imports is there already."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is left as a zombie
    for workdir in sys.stdin:
        pid = os.fork()
        if pid == 0:
            work(sweep(), Queue(workdir.strip()), workdir.strip(), poll=0.02)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
