"""Sweeps: many runs from one config file, on any number of workers and hosts; the same command continues.

    python -m gptjax.sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop [--dry_run] [--workers=4]

The config file has, beside get_config, which gives what all runs share (and what --config.KEY=VALUE changes),
get_sweep(config, ARGUMENT), which returns a Sweep: its points, each a complete run, made by plain Python
(gptjax/sweep/grid.py). The results are in results.jsonl of the workdir, a line a run.

Workers on other hosts are the same command there, with the same workdir on storage that all see (or gs://...).
"""

import os
import socket
import sys
import time

from absl import flags
from ml_collections import config_flags

from gptjax import command_line, paths
from gptjax.config import function_of
from gptjax.distributed import gpu_flags
from gptjax.errors import InputError
from gptjax.pretrain import PretrainConfig
from gptjax.queue.claims import Queue, end_with, gather
from gptjax.queue.workers import Workers
from gptjax.sweep import plan
from gptjax.sweep.grid import Sweep
from gptjax.sweep.worker import work

PACE = {False: 0.5, True: 5.0}  # seconds between two looks at the queue, by whether it is in a bucket
EVERY = 30.0  # seconds between two lines of the progress of all runs, if nothing ends meanwhile


def load(path: str, config) -> Sweep:
    """get_sweep(config, ARGUMENT) of a config file. path: FILE[:ARGUMENT]. InputError: the file has none."""
    file, _, argument = path.partition(":")
    get_sweep = function_of(file, "get_sweep")
    if get_sweep is None:
        raise InputError(f"{file} has no get_sweep(config), which gives the points; configs/scaling/isoflop.py has.")
    return get_sweep(config, *([argument] if argument else []))


# --- the workers of this host -----------------------------------------------------------------------------


def supervise(sweep: Sweep, queue: Queue, workers: Workers) -> int:
    """Shows where all runs are until no worker of this host is left. Returns the exit code."""
    names, next_line = [p.name for p in sweep.points], 0.0
    rows = _rows(queue, names)
    seen = {name for name, state in queue.states(names).items() if state.kind in ("finished", "failed")}
    while True:
        try:
            at_work = workers.check()
            states = queue.states(names)
            ended = [name for name in names if states[name].kind in ("finished", "failed") and name not in seen]
            if ended or not at_work:  # at the end also what a worker left that was killed while it gathered
                rows, seen = _rows(queue, names), seen.union(ended)
            for name in ended:
                print(f"{name}: {plan.state(states[name], rows.get(name))}", flush=True)
            if ended or time.monotonic() > next_line or not at_work:
                running = [f"{p.name} {plan.fraction(p, states[p.name]):.0%}" for p in sweep.points
                           if states[p.name].kind == "running"]  # fmt: skip
                cost = plan.cost(sweep, states, rows, workers=max(len(running), workers.count, 1), **_money())
                print(f"{cost}{'; running: ' + ', '.join(running) if running else ''}", flush=True)
                next_line = time.monotonic() + EVERY
            if not at_work:
                for sentence in plan.repetition(sweep, plan.epochs(sweep, rows)):
                    print(sentence)
                return _summary(states, workers.stopping)
            time.sleep(PACE[queue.folder.remote])
        except KeyboardInterrupt:  # the terminal has told the workers too
            workers.stopping = True


def _rows(queue: Queue, names: list[str]) -> dict[str, dict]:
    return {row["name"]: row for row in gather(queue.folder) if row.get("name") in names}


def _summary(states: dict, stopped: bool) -> int:
    kinds = [state.kind for state in states.values()]
    failed = [name for name, state in states.items() if state.kind == "failed"]
    if stopped:
        print("stopped, with everything saved: the same command continues")
    elif len(failed) + kinds.count("finished") < len(kinds):
        print("the workers of this host have ended: the same command continues")
    if failed:
        print(f"{len(failed)} points failed: {', '.join(failed)}. runs/NAME/log.txt has their output; once the cause "
              "is gone, the same command with --retry_failed tries them again.")  # fmt: skip
    return 1 if failed else 0


def _money() -> dict:
    return {"rate": FLAGS.rate, "price": FLAGS.price}


# --- the command ------------------------------------------------------------------------------------------


def main(_):
    config_path = config_flags.get_config_filename(FLAGS["config"])
    sweep = load(config_path, FLAGS.config)
    if FLAGS.dry_run:
        return dry_run(sweep)
    if not FLAGS.workdir:
        raise InputError("Flag --workdir must have a value other than None.")
    queue = Queue(FLAGS.workdir, lease=FLAGS.lease, attempts=FLAGS.attempts)
    if FLAGS.worker:
        end_with(FLAGS.worker)
        gpu_flags.prepare(verbose=False)
        work(sweep, queue, FLAGS.workdir, poll=PACE[queue.folder.remote])
        return 0
    plan.claim(queue.folder, sweep)
    names = [point.name for point in sweep.points]
    if FLAGS.retry_failed:
        queue.reset_failures(names)
    states = queue.states(names)
    left = sum(state.kind not in ("finished", "failed") for state in states.values())
    print(plan.table(sweep, states, _rows(queue, names)))
    environment = dict(os.environ)
    if not queue.folder.remote:
        # by host: a program is for one kind of CPU
        cache = paths.local(FLAGS.workdir).resolve() / "cache" / socket.gethostname()
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    command = [sys.executable, "-m", "gptjax.sweep", *sys.argv[1:], f"--worker={os.getpid()}"]
    return supervise(sweep, queue, Workers(min(FLAGS.workers, left), command, environment, queue.fail_attempt_of))


def dry_run(sweep: Sweep):
    """Prints the table and the cost, and where the sweep is if it has begun; draws the grid into the workdir."""
    states, rows, names = {}, {}, [point.name for point in sweep.points]
    if FLAGS.workdir:
        queue = Queue(FLAGS.workdir, lease=FLAGS.lease, attempts=FLAGS.attempts)
        plan.check(queue.folder, sweep)
        states, rows = queue.states(names), _rows(queue, names)
    print(plan.table(sweep, states, rows))
    print(plan.cost(sweep, states, rows, workers=FLAGS.workers, **_money()))
    if FLAGS.workdir and any(p.params for p in sweep.points):
        queue.folder.write("grid.png", plan.picture(sweep))
        print(f"the grid: {FLAGS.workdir}/grid.png")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "A sweep's file, as configs/scaling/isoflop.py.", lock_config=True)
    command_line.define_path("workdir", None, "Where the runs and their results are kept.")
    flags.DEFINE_integer("workers", 1, "Worker processes on this host.", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "Print the points and their cost, draw the grid, and stop.")
    flags.DEFINE_float("rate", None, "FLOP/s of a worker, for the hours; measured if not given.", lower_bound=1.0)
    flags.DEFINE_float("price", None, "Price of an hour of a worker.", lower_bound=0.0)
    flags.DEFINE_integer("attempts", 3, "Times that a point may fail before it is given up.", lower_bound=1)
    flags.DEFINE_float("lease", 60.0, "Seconds after which a silent worker's point is taken over.", lower_bound=0.5)
    flags.DEFINE_bool("retry_failed", False, "Try the points that were given up again.")
    flags.DEFINE_integer("worker", None, "Be one worker of the command that is this process: how it starts its own.")
    flags.mark_flag_as_required("config")
    command_line.run(main, PretrainConfig)  # --help has the keys of most sweeps
