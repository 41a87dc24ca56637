"""A process that is told to stop, or killed, leaves a run that ends where an uninterrupted one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from runs import assert_same_run, nonsense, one_device_environment

from gptjax.training import stopping
from gptjax.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return nonsense(tmp_path_factory.mktemp("text"))


def test_the_loop_puts_the_signal_handler_back():
    """SIGTERM, Ctrl-C and SIGHUP each ask to stop, but for one that is ignored (nohup)."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        for number in numbers:
            with stopping.stop_on_signals() as asked:
                assert asked() is False
                os.kill(os.getpid(), number)
                time.sleep(0.01)
                assert asked() is True
            assert [signal.getsignal(n) for n in numbers] == [signal.SIG_DFL] * 3
            assert signal.set_wakeup_fd(-1) == -1
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stopping.stop_on_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert asked() is False
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


LONG = 120  # steps, of some 5 ms


class Process:
    """`python -m gptjax.pretrain` on one device, always the same run."""

    def __init__(self, text, workdir):
        self.workdir = workdir
        self.options = {
            "steps": LONG, "batch_size": 8, "steps_per_dispatch": 1, "model.n_layer": 2, "model.unroll": 1,
            "model.d_model": 32, "model.context_length": 32, "model.dropout": 0.1, "eval.every": 60, "eval.batches": 2,
            "checkpoint.every": 10, "log.tensorboard": False, "samples.prompts": (), "data.source": str(text),
        }  # fmt: skip

    def start(self):
        command = (
            "-m", "gptjax.pretrain", "--config=configs/shakespeare_char.py", f"--workdir={self.workdir}",
            *(f"--config.{k}={v}" for k, v in self.options.items()),
        )  # fmt: skip
        return self._start(*command)

    def finish(self, *workdirs):
        """What a process prints that finishes the run in each of these."""
        script = (
            "import json, sys\n"
            "from configs.shakespeare_char import get_config\n"
            "from gptjax.pretrain import pretrain\n"
            "config = get_config()\n"
            "config.update_from_flattened_dict(json.loads(sys.argv[1]) | {'samples.prompts': ()})\n"
            "for workdir in sys.argv[2:]:\n"
            "    assert pretrain(config, workdir).finished\n"
        )
        process = self._start("-c", script, json.dumps(self.options), *map(str, workdirs))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        return output

    def _start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=one_device_environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def signal_when(self, condition, number):
        """(whether it was still running, its exit code, output): sends a signal once condition(names) holds for
        the names in checkpoints/."""
        process, there = self.start(), self.workdir / "checkpoints"
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if condition(os.listdir(there) if there.exists() else []):
                break
            time.sleep(0.0005)
        running = process.poll() is None
        if running:
            os.kill(process.pid, number)
        output = process.communicate(timeout=60)[0]
        return running, process.returncode, output


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """A run that was sent SIGINT, as by Ctrl-C, after step 20: its workdir, last step, exit code; what it printed."""
    workdir = tmp_path_factory.mktemp("stopped")
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    running, code, output = Process(text, workdir).signal_when(lambda names: "20" in names, signal.SIGINT)
    signal.signal(signal.SIGINT, heard)
    assert running
    return workdir, Checkpointer(workdir).steps()[-1], code, output


@pytest.fixture(scope="module")
def killed(text, tmp_path_factory):
    """A run that was killed in the middle of a save: its workdir, and its last whole checkpoint."""
    workdir = tmp_path_factory.mktemp("killed")
    saving = lambda names: any(n.endswith("-tmp") and n.split(".")[0] >= "30" for n in names if n[0] in "3456789")
    for _ in range(3):  # the save may end between the look and the blow: then the next start tries again
        running, code, _ = Process(text, workdir).signal_when(saving, signal.SIGKILL)
        assert running and code == -signal.SIGKILL
        left = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        if left:
            break
    assert left, "no save was caught in its middle"
    whole = max(int(n) for n in os.listdir(workdir / "checkpoints") if n.isdecimal())
    assert whole < int(left[0].name.split(".")[0])
    return workdir, whole


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory, stopped, killed):
    """The workdir of the run without any interruption, and the steps from which the two others were resumed: all by one
    process."""
    straight = tmp_path_factory.mktemp("straight")
    output = Process(text, straight).finish(straight, stopped[0], killed[0])
    return straight, [int(step) for step in re.findall(rf"resuming from step (\d+) of {LONG}", output)]


def test_ctrl_c_saves_and_a_second_one_ends_at_once(text, tmp_path):
    """Also in a call that does not come back, a compilation say: Python's own handlers would wait for it."""
    script = (
        "import hashlib, os, signal, time\n"
        "from gptjax.training.stopping import stop_on_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stop_on_signals() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1); print(asked(), flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2 * 10**9)\n"  # one call that does not come back
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=one_device_environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.split("\n") == ["", "asked to stop: finishing this step and saving it; Ctrl-C again ends at once, "
                                "without saving", "", "ended at once, without saving", ""]  # fmt: skip


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path):
    script = (
        "import signal, sys\n"
        "from gptjax.command_line import run\n"
        "def main(_): signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=one_device_environment(), text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_saves_exits_cleanly_and_goes_on(stopped, finished):
    workdir, step, code, output = stopped
    assert code == 0 and 20 <= step < LONG and "Traceback" not in output
    assert f"asked to stop: saved step {step}" in output
    straight, resumed_from = finished
    assert resumed_from[0] == step
    assert_same_run(workdir, straight, LONG)


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save(killed, finished):
    workdir, whole = killed
    straight, resumed_from = finished
    assert resumed_from[1:] == [whole]
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_same_run(workdir, straight, LONG)
