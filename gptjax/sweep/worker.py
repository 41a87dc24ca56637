"""A worker of a sweep: takes a point, runs it, writes its result, until there is none left."""

import contextlib
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax import lock, paths
from gptjax.data.corpus import shards_directory
from gptjax.data.tokens import read_manifest
from gptjax.errors import InputError
from gptjax.queue.claims import FAILED, RELEASED, Lease, Queue
from gptjax.queue.files import Folder
from gptjax.queue.workers import LOST
from gptjax.run_config import read_config
from gptjax.sweep.grid import FIGURES, Point, Sweep
from gptjax.training.loop import TrainingDiverged
from gptjax.training.metrics import JsonLines
from gptjax.training.stage import RunResult

RISE = 1.05  # a run whose training loss ends above this times its lowest has diverged


def work(sweep: Sweep, queue: Queue, workdir, *, poll: float = 1.0, on_lost: Callable[[], None] | None = None) -> bool:
    """Runs points until all are finished or have failed; False if it was asked to stop before. on_lost: called, from a
    thread, when a point is another worker's now; None = this process ends.

    Points of the shape of the one before come first: they share its compiled programs (parallel/sharding.shared).
    """
    points = {point.name: point for point in sweep.points}
    shapes, last = {name: shape(point) for name, point in points.items()}, None
    while True:
        states = queue.states(points)
        ended = {name for name, state in states.items() if state.kind in ("finished", "failed")}
        if len(ended) == len(points):
            return True
        ready = [name for name, p in points.items() if name not in ended and (p.parent is None or p.parent in ended)]
        lease = queue.acquire(sorted(ready, key=lambda name, last=last: last is not None and shapes[name] != last))
        if lease is None:
            time.sleep(poll)
            continue
        last = shapes[lease.name]
        runs = paths.local(workdir) / "runs" / lease.name
        with lease.kept(lambda runs=runs: progress(runs), on_lost or (lambda: os._exit(LOST))):
            row = _attempt(sweep, points[lease.name], lease, workdir)
        if row is not None:
            queue.finish(lease, row)
        elif lease.how == RELEASED:
            return False


def shape(point: Point) -> str:
    """What compiled programs depend on, as text: points where it is equal are run one after the other."""
    keys = ("model", "batch_size", "microbatch_size", "optimizer", "precision", "mesh")
    config = point.config.to_dict()
    found = {key: config.get(key) for key in keys}
    found["optimizer"] = {k: v for k, v in (found["optimizer"] or {}).items() if k != "learning_rate"}
    return json.dumps(found, sort_keys=True, default=str)


def _attempt(sweep: Sweep, point: Point, lease: Lease, workdir) -> dict | None:
    """The result's row; None if the run failed (the lease says why) or was asked to stop."""
    run_dir = paths.local(workdir) / "runs" / point.name
    try:
        with _output_to(run_dir):
            _wait_for(run_dir, lease.queue.lease)
            if point.parent:
                branch(paths.local(workdir) / "runs" / point.parent, point.branch_step, run_dir)
            result = sweep.run(_config(point, workdir), str(run_dir))
        if result.finished:
            return row_of(sweep, point, run_dir, result)
        lease.end(RELEASED)
    except TrainingDiverged as error:
        return row_of(sweep, point, run_dir, None, str(error))
    except KeyboardInterrupt:
        lease.end(RELEASED)
        raise
    except Exception as error:  # whatever it is, the other points can be run
        known = isinstance(error, InputError)
        lease.end(FAILED, str(error) if known else "".join(traceback.format_exception_only(error)).strip())
    return None


def _config(point: Point, workdir):
    """The config of the point's run: all points share the folder of the tokens, which are prepared once."""
    config = point.config.copy_and_resolve_references()
    if "cache" in config.get("data", {}) and config.data.cache is None and not paths.is_remote(workdir):
        config.data.cache = str(paths.local(workdir) / "data")
    return config


def _wait_for(run_dir, patience: float):
    """Waits while an earlier owner, which had been stopped for longer than its lease, still has the run's folder: it
    ends when it goes on. InputError: after `patience` seconds it still has it."""
    until = time.monotonic() + patience
    while run_dir.exists():
        try:
            with lock.held(run_dir):
                return
        except InputError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def branch(parent, step: int, run_dir):
    """Makes run_dir a run that has done the first `step` steps of another, to be resumed with a config of its own;
    nothing where it has begun, or the other has no such checkpoint: the run is then trained from its beginning, to the
    same end."""
    source = parent / "checkpoints" / str(step)
    if (run_dir / "checkpoints").exists() or not source.exists():
        return
    for name in ("data.json", "metrics.jsonl", "evaluations.jsonl", "config.json"):
        if (parent / name).exists():
            (parent / name).copy(run_dir / name, overwrite=True)
    partial = run_dir / "checkpoints.partial"
    partial.rmtree(missing_ok=True)
    _copy_folder(source, partial / str(step))
    partial.rename(run_dir / "checkpoints")  # last: what was killed before is begun again
    print(f"begins with step {step} of {parent}")


def _copy_folder(source, target):
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name)


@contextlib.contextmanager
def _output_to(run_dir):
    """What a run prints goes to log.txt in its folder; in a bucket, where nothing can be appended, to the terminal."""
    if paths.is_remote(run_dir):
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "log.txt", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise


# --- what a run came to -----------------------------------------------------------------------------------


def row_of(sweep: Sweep, point: Point, run_dir, result: RunResult | None, reason: str | None = None) -> dict:
    """The row of results.jsonl. result: None of a run that ended on a value that is not finite, which is `reason`."""
    lines, evaluations = JsonLines.read(run_dir / "metrics.jsonl"), JsonLines.read(run_dir / "evaluations.jsonl")
    loss, figure = None, FIGURES.get(sweep.metric, sweep.metric)
    if result is not None:
        reason = diverged(lines, evaluations)
        if figure not in (result.evaluation or {}):
            raise InputError(f"The evaluations of {run_dir} have no {figure!r}: give another metric in get_sweep.")
        loss = result.evaluation[figure]
    text = _text(run_dir)
    seen = point.tokens / text["text_tokens"] if point.tokens and text["text_tokens"] else None
    return {
        "name": point.name, "N": point.params, "count": point.count, "D": point.tokens, "C": point.flops,
        "rule": point.rule, "budget": point.budget, "loss": loss, "metric": sweep.metric,
        **text, "epochs": seen, "seed": point.config.get("seed"),
        "learning_rate": (point.config.get("optimizer") or {}).get("learning_rate"),
        "status": "diverged" if reason else "done", "reason": reason,
        "steps": result.steps if result else (lines[-1]["step"] if lines else 0),
        "seconds": result.seconds if result else (lines[-1].get("seconds") if lines else None),
        "workdir": f"runs/{point.name}",
    }  # fmt: skip


def diverged(lines: Sequence[dict], evaluations: Sequence[dict]) -> str | None:
    """Why a run that came to its end is flagged as diverged; None if it is not.

    The rule: its last validation loss is not finite (null), or not below the one before training; or the mean training
    loss of the last tenth of its lines is above 1.05 times the lowest such mean of any tenth, of at least 100 lines.
    """
    losses = [e.get("loss") for e in evaluations if "loss" in e]
    if losses and losses[-1] is None:
        return "the last validation loss is not finite"
    if len(losses) > 1 and losses[0] is not None and losses[-1] >= losses[0]:
        return f"the last validation loss, {losses[-1]:.4f}, is not below the one before training, {losses[0]:.4f}"
    losses = [line["loss"] if line.get("loss") is not None else math.inf for line in lines if "loss" in line]
    size = len(losses) // 10
    if size >= 10:
        means = [sum(losses[i * size : (i + 1) * size]) / size for i in range(9)] + [sum(losses[-size:]) / size]
        if means[-1] > RISE * min(means):
            return f"the training loss rose from {min(means):.4f} to {means[-1]:.4f}, means of tenths of the run"
    return None


def _text(run_dir) -> dict:
    """Of the text that a run was trained on: the tokenizer's fingerprint, and how many tokens it has. None where that
    is not known, as of a run without a text."""
    try:
        text = json.loads((run_dir / "data.json").read_text())["text"]
        cache = shards_directory(read_config(run_dir)["data"]["cache"], run_dir)
        manifests = [read_manifest(Path(cache) / part["directory"]) for part in text["parts"].values()]
        tokens = sum(manifest["splits"]["train"]["tokens"] for manifest in manifests)
        return {"tokenizer": text["tokenizer"], "text_tokens": tokens}
    except (OSError, ValueError, KeyError, TypeError):
        return {"tokenizer": None, "text_tokens": None}


def progress(run_dir) -> dict:
    """The steps and seconds of a run so far, by the last line of its metrics; {} before the first."""
    end = Folder(run_dir).tail("metrics.jsonl", 2**14)
    for line in reversed(end.split(b"\n")[:-1]):
        try:
            record = json.loads(line)
            return {"step": record["step"], "seconds": record["seconds"]}
        except (ValueError, KeyError):
            continue
    return {}
