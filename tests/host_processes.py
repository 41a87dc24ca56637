"""Real processes on one machine that stand in for hosts: `python -m gptjax.<stage>` with a host's environment."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from numerics import tolerance
from runs import lines, one_device_environment

from gptjax.config import config_dict, to_json
from gptjax.pretrain import PretrainConfig

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def hosts_config(root) -> Path:
    """A config file for a GPT of 27k parameters on words that it writes next to it; two micro-batches per step."""
    if not (root / "words.txt").exists():
        rng = random.Random(0)
        words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(60)]
        (root / "words.txt").write_text("".join(rng.choice(words) + rng.choice(" \n") for _ in range(3000)))
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=2, n_head=4, d_model=32, context_length=32, unroll=2)
    c.data.update(source=str(root / "words.txt"), tokenizer="char")
    c.steps, c.batch_size, c.microbatch_size = 6, 16, 8
    c.eval.update(every=100, batches=2)
    c.checkpoint.every, c.log.tensorboard = 3, False
    c.optimizer.learning_rate, c.schedule.kind = 3e-3, "constant"  # no step depends on their number
    return config_file(root / "tiny.py", PretrainConfig, c)


def config_file(path, cls, config) -> Path:
    """A config, as a file for --config."""
    path.write_text(
        f"import json\n\nfrom gptjax.config import config_dict\nfrom {cls.__module__} import {cls.__name__}\n\n\n"
        f"def get_config(arg=None):\n    c = config_dict({cls.__name__})\n"
        f"    c.update(json.loads({json.dumps(to_json(config.to_dict()))!r}))\n    return c\n"
    )
    return path


@dataclasses.dataclass(frozen=True)
class End:
    code: int
    text: str  # what it wrote to stdout and stderr


class Processes:
    """`count` processes of a stage, each with its own devices; on leaving the context all are ended.

    only: the process ids to start. each: {process id: further options}. options: --config.<key>=<value>.
    """

    def __init__(self, stage, config, workdir, count, *, devices=None, only=None, each=None, flags=(), **options):
        self.workdir = workdir
        port, devices = free_port(), devices or 8 // count
        environment = one_device_environment(
            JAX_PLATFORMS="cpu", NPROC="32", JAX_NUM_CPU_DEVICES=str(devices), JAX_DEFAULT_MATMUL_PRECISION="highest",
            PYTHONPATH=f"{ROOT}{os.pathsep}{TESTS}",
        )  # fmt: skip
        self._logs, self._processes = {}, {}
        for index in range(count) if only is None else only:
            job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
                   "JAX_PROCESS_ID": str(index)}  # fmt: skip
            command = [sys.executable, "-m", f"gptjax.{stage}", f"--config={config}", f"--workdir={workdir}", *flags]
            command += [f"--config.{k}={v}" for k, v in (options | (each or {}).get(index, {})).items()]
            self._logs[index] = Path(f"{workdir}-{os.getpid()}-{port}-{index}.log")
            with open(self._logs[index], "w") as log:
                self._processes[index] = subprocess.Popen(
                    command, env=environment | (job if count > 1 else {}), stdout=log, stderr=log, cwd=ROOT
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self, index) -> str:
        return "\n".join(x for x in self._logs[index].read_text().split("\n") if not x.startswith("[Gloo]"))

    def wait_for_lines(self, count, limit=300):
        """Waits until metrics.jsonl has `count` lines."""
        path, end = Path(self.workdir) / "metrics.jsonl", time.monotonic() + limit
        while not (path.exists() and path.read_text().count("\n") >= count):
            dead = [i for i, p in self._processes.items() if p.poll() is not None]
            assert not dead and time.monotonic() < end, "\n".join(self.text(i)[-2000:] for i in self._processes)
            time.sleep(0.05)

    def signal(self, index, number: signal.Signals):
        self._processes[index].send_signal(number)

    def ends(self, limit=300) -> list[End]:
        """Exit code and output of each. AssertionError: one still runs after `limit` seconds."""
        end = time.monotonic() + limit
        for index, process in self._processes.items():
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {index} still runs:\n{self.text(index)[-3000:]}") from None
        return [End(p.returncode, self.text(i)) for i, p in self._processes.items()]


def read_config_file(path):
    scope = {}
    exec(path.read_text(), scope)
    return scope["get_config"]()


def assert_same_figures(workdir, other, relative=tolerance(2000)):
    """All values of metrics.jsonl and evaluations.jsonl but times agree. Sums over processes are taken in another order
    than within one, so not bitwise but to float32 rounding."""
    timed = ("tokens_per_second", "prompts_per_second", "mfu", "seconds", "time/")
    for name in ("metrics", "evaluations"):
        a, b = (lines(w, name) for w in (workdir, other))
        assert [line["step"] for line in a] == [line["step"] for line in b] and a
        for mine, theirs in zip(a, b, strict=True):
            assert mine.keys() == theirs.keys()
            for key in [k for k in mine if not k.startswith(timed)]:
                assert mine[key] == pytest.approx(theirs[key], rel=relative, abs=relative), (
                    mine["step"],
                    key,
                    mine[key],
                    theirs[key],
                )
