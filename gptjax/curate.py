"""Makes a corpus of crawled text: deduplication, quality, personal data, decontamination, by a recipe of steps.

    python -m gptjax.curate --config=configs/curate/gpt3.py --workdir=runs/curated --config.input='crawl/*.jsonl.gz' \
        [--workers=4]

The config file has, beside get_config, which gives what is read, get_steps(config, ARGUMENT), which returns the steps:
Python functions and objects, each documented in gptjax/curation. The workdir is then a source of pre-training
(--config.data.source=runs/curated). manifest/ says of every document why it was kept or removed, removed/ has texts of
each reason for reading, report.html the counts. The same command continues after any interruption.

Workers on other hosts are the same command there, with the same workdir on a disk that all see.
"""

import json
import os
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gptjax import command_line, paths
from gptjax.config import build
from gptjax.console import progress
from gptjax.curation import plan
from gptjax.curation.config import CurateConfig
from gptjax.curation.engine import Run
from gptjax.curation.finish import SUMMARY
from gptjax.curation.worker import COMMAND
from gptjax.queue.workers import Workers

_POLL = 0.2  # seconds between two looks at the workers


def curate(config: CurateConfig, path: str, workdir, *, workers: int = 1, lease: float = 60.0) -> dict | None:
    """Runs or continues a curation with so many worker processes; its summary, None if it has not come to its end.

    path: FILE[:ARGUMENT] of the config file with get_steps. InputError: as plan.begin.
    """
    run = plan.begin(config, plan.load_steps(path, config), workdir, _absolute(path))
    if not (run.workdir / SUMMARY).exists():
        supervise(run, workers, lease)
    if not (run.workdir / SUMMARY).exists():
        return None
    return json.loads((run.workdir / SUMMARY).read_text())


def supervise(run: Run, workers: int, lease: float = 60.0) -> None:
    """Has worker processes do all tasks; returns when none is left at work."""
    stages = [(name, tasks, run.queue(name, lease)) for name, tasks, _ in run.stages()]
    queues = [queue for _, _, queue in stages]
    failed = lambda pid, reason: any([queue.fail_attempt_of(pid, reason) for queue in queues])
    most = max(len(tasks) for _, tasks, _ in stages)
    pool = Workers(min(workers, most), [*COMMAND, str(run.workdir), str(lease)], dict(os.environ), failed)
    with progress(total=sum(len(tasks) for _, tasks, _ in stages), desc="curating", unit="task") as bar:
        while True:
            try:
                at_work = pool.check()
                bar.update(sum(len(queue.folder.names("results")) for queue in queues) - bar.n)
                if not at_work:
                    return
                time.sleep(_POLL)
            except KeyboardInterrupt:  # the terminal has told the workers too
                pool.stopping = True


def failures(run: Run) -> list[str]:
    """A sentence for each task that failed as often as it may."""
    found = []
    for stage, tasks, _ in run.stages():
        for task, state in run.queue(stage).states(tasks).items():
            if state.kind == "failed":
                found.append(f"{stage}/{task}: {state.reason}")
    return found


def retry(run: Run) -> None:
    """Lets the tasks that have failed be tried again."""
    for stage, tasks, _ in run.stages():
        run.queue(stage).reset_failures(tasks)


def _absolute(path: str) -> str:
    file, colon, argument = path.partition(":")
    return str(Path(file).resolve()) + colon + argument


def main(_):
    path = config_flags.get_config_filename(FLAGS["config"])
    if FLAGS.print_config:
        print("\n".join([f"--config={path}", *command_line.config_lines(FLAGS.config, CurateConfig)]))
        return 0
    config = build(CurateConfig, FLAGS.config)
    if (paths.local(FLAGS.workdir) / plan.PLAN).exists():
        retry(plan.begin(config, plan.load_steps(path, config), FLAGS.workdir, _absolute(path)))
    summary = curate(config, path, FLAGS.workdir, workers=FLAGS.workers, lease=FLAGS.lease)
    if summary is None:
        run = plan.opened(FLAGS.workdir)
        for sentence in (failed := failures(run)):
            print(f"failed: {sentence}")
        print("The same command tries them again." if failed else "stopped: the same command continues")
        return 1 if failed else 0
    print(table(summary))
    return 0


def table(summary: dict) -> str:
    """The funnel as text."""
    lost = ", ".join(f"{n:,} {reason}" for reason, n in summary["unreadable"].items())
    lines = [f"{'read':<16}{summary['read']:>12,} documents {summary['read_characters']:>16,} characters"
             + (f"   unreadable: {lost}" if lost else "")]  # fmt: skip
    for name, step in summary["steps"].items():
        if "in" in step:
            why = ", ".join(f"{n:,} {reason}" for reason, n in step["reasons"].items())
            lines.append(f"{name:<16}{step['out']:>12,} documents {step['chars_out']:>16,} characters   {why}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "A recipe, as configs/curate/gpt3.py.", lock_config=True)
    command_line.define_path("workdir", None, "Where documents, manifest and report are written.")
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "Worker processes on this host.", lower_bound=1)
    flags.DEFINE_float("lease", 60.0, "Seconds after which a silent worker's task is taken over.", lower_bound=0.5)
    flags.DEFINE_bool("print_config", False, "Print the resolved config, one flag per key, and exit.")
    flags.mark_flag_as_required("config")
    flags.register_validator(
        "workdir", lambda value: value is not None or FLAGS["print_config"].value,
        message="Flag --workdir must have a value other than None.",
    )  # fmt: skip
    command_line.run(main, CurateConfig)
