"""A run that is interrupted, killed, damaged or out of disk ends bitwise where an uninterrupted one ends."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from numerics import approx, assert_close, model_terms
from runs import arrays, assert_same_run, lines, one_device_environment, until_sigterm

from gptjax import pretrain as stage
from gptjax import run as spine
from gptjax.config import config_dict
from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.trained import load_model
from gptjax.training import checkpoint, files, stopping, supervised
from gptjax.training import step as step_module
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer
from gptjax.training.loop import TrainingDiverged
from gptjax.training.schedule import Schedule
from gptjax.training.stage import Evaluation

STEPS, STOP = 25, 13
TERMS = model_terms(GPTConfig(100, n_layer=2, n_head=4, d_model=32, context_length=32), rows=8)  # of tiny()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of nonsense words: the source of every run here."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(rng.choice(words) + rng.choice(" \n") for _ in range(4000)))
    return path


def tiny(text, **overrides):
    """A PretrainConfig of 27k parameters; overrides by dotted key, with __ for the dot."""
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=2, n_head=4, d_model=32, context_length=32)
    c.data.update(source=str(text), tokenizer="char")
    c.steps, c.batch_size = STEPS, 8
    c.eval.update(every=10, batches=2)
    c.checkpoint.every = 5
    c.log.tensorboard = False
    c.optimizer.learning_rate = 3e-3
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


@pytest.fixture
def one_device(monkeypatch):
    """pretrain() in this process, which has 8 virtual devices, on the first of them."""
    monkeypatch.setattr(spine, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """Workdir of tiny(text) on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spine, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        assert pretrain(tiny(text), str(workdir)).finished
    return workdir


def interrupted(config, workdir, stop=STOP):
    """The step saved by a run that was sent a SIGTERM while step `stop` was being computed."""
    assert not until_sigterm(pretrain, config, workdir, stop).finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return Checkpointer(workdir).steps()[-1]


# --- interrupted and resumed -------------------------------------------------------------------------------

CASES = {
    "dropout": {"model__dropout": 0.2},
    "float16": {"precision__compute": "float16", "precision__growth_interval": 4, "precision__initial_scale": 2.0**22},
    "ramp": {
        "schedule__ramp_tokens": 3000.0, "schedule__ramp_start_batch_tokens": 128.0, "microbatch_size": 4,
        "schedule__warmup_tokens": 1000.0,
    },
    "5 steps a dispatch": {"steps_per_dispatch": 5, "checkpoint__every": 7, "eval__every": 14, "model__dropout": 0.2},
}  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", ["float16", "ramp", slow("dropout"), slow("5 steps a dispatch")])
def test_13_steps_and_12_are_25(text, tmp_path, monkeypatch, one_device, case):
    config = tiny(text, **CASES[case])
    assert pretrain(config, str(tmp_path / "straight")).finished
    stopped = interrupted(config, tmp_path / "parts")
    assert stopped == (14 if "5 steps" in case else STOP)  # between two device calls
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, stopped + 1))
    assert pretrain(config, str(tmp_path / "parts")).finished
    assert_same_run(tmp_path / "parts", tmp_path / "straight", STEPS)

    metrics = lines(tmp_path / "straight")
    assert metrics[-1]["tokens_seen"] == sum(m["batch_tokens"] for m in metrics)
    if case == "float16":  # its scale went both ways on both sides of the stop
        scales = [m["loss_scale"] for m in metrics]
        for part in (scales[:STOP], scales[STOP:]):
            assert any(a < b for a, b in zip(part, part[1:], strict=False))
        assert any(m["skipped"] for m in metrics) and not all(m["skipped"] for m in metrics)
    if case == "ramp":
        sizes = [m["batch_tokens"] for m in metrics]
        assert sizes[0] == 4 * 32 and sizes[-1] == 8 * 32 and set(sizes) == {n * 32 for n in (4, 5, 6, 7, 8)}
        assert all(b >= a - 32 for a, b in zip(sizes, sizes[1:], strict=False))  # rounded to whole sequences


def test_one_and_five_steps_a_dispatch_are_the_same_run(text, tmp_path, one_device):
    """To rounding: one device call of several steps is a loop, which XLA may fuse otherwise than a single step."""
    for n in (1, 5):
        pretrain(tiny(text, model__dropout=0.2, steps_per_dispatch=n), str(tmp_path / str(n)))
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "5"), strict=True):
        assert (a["step"], a["tokens_seen"], a["learning_rate"]) == (b["step"], b["tokens_seen"], b["learning_rate"])
        assert a["loss"] == approx(b["loss"], terms=TERMS)


def test_a_finished_run_started_again_changes_nothing(text, tmp_path, one_device):
    config = tiny(text, steps=5)
    pretrain(config, str(tmp_path / "run"))
    before = {name: lines(tmp_path / "run", name) for name in ("metrics", "evaluations")}
    assert pretrain(config, str(tmp_path / "run")).finished
    assert {name: lines(tmp_path / "run", name) for name in before} == before


def test_a_finished_run_can_be_made_longer(text, tmp_path, one_device):
    constant = {"schedule__kind": "constant"}
    pretrain(tiny(text, steps=10, **constant), str(tmp_path / "parts"))
    pretrain(tiny(text, steps=25, **constant), str(tmp_path / "parts"))
    pretrain(tiny(text, steps=25, **constant), str(tmp_path / "straight"))
    assert_same_run(tmp_path / "parts", tmp_path / "straight", STEPS)


def test_a_run_whose_schedule_was_another_is_told(text, tmp_path, one_device, capsys):
    """By the rate in its metrics: of an earlier version (whose decay ended one step sooner), or of another length."""
    pretrain(tiny(text, steps=3), str(tmp_path / "run"))
    said = r"the learning rate of step 3 was 0.0003; by the schedule as it is now it would have been 0.002325"
    assert "the learning rate of step" not in capsys.readouterr().out
    path = tmp_path / "run" / "metrics.jsonl"
    rows = lines(tmp_path / "run")
    pretrain(tiny(text, steps=3), str(tmp_path / "run"))  # finished: nothing to tell
    assert "the learning rate of step" not in capsys.readouterr().out
    path.write_text("".join(json.dumps(r | {"learning_rate": 3e-4}) + "\n" for r in rows))
    pretrain(tiny(text, steps=6), str(tmp_path / "run"))
    assert re.search(said, capsys.readouterr().out)


def test_a_run_goes_on_with_its_own_tokens_whatever_became_of_the_source(text, tmp_path, one_device):
    source = tmp_path / "source.txt"
    shutil.copy(text, source)
    for steps, name in ((5, "parts"), (10, "straight")):
        pretrain(tiny(source, steps=steps, schedule__kind="constant"), str(tmp_path / name))
    source.write_text("other words " * 500)
    pretrain(tiny(source, steps=10, schedule__kind="constant"), str(tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "straight", 10)


def test_another_seed_is_another_run(text, tmp_path, one_device):
    for seed in (0, 1):
        pretrain(tiny(text, steps=2, seed=seed), str(tmp_path / str(seed)))
    a, b = (lines(tmp_path / str(seed)) for seed in (0, 1))
    assert a[0]["loss"] != b[0]["loss"]


@pytest.mark.parametrize(
    "first, then",
    [
        slow("fsdp 8", "one device"), slow("one device", "fsdp 8"), slow("stage 2 fsdp 4", "one device"),
        slow("one device", "stage 2 fsdp 4"), ("fsdp 8", "fsdp 4 seq 2, other rules"),
    ],
)  # fmt: skip
def test_taken_up_on_another_mesh(text, tmp_path, monkeypatch, first, then):
    """1e-5 of the run on one device. Adam's eps is raised: it would blow up the rounding of gradients that are 0."""
    meshes = {
        "one device": {"mesh__data": 1, "mesh__fsdp": 1},
        "fsdp 8": {"mesh__data": 1, "mesh__fsdp": 8},
        "stage 2 fsdp 4": {"mesh__data": 1, "mesh__stage": 2, "mesh__fsdp": 4},
        "fsdp 4 seq 2, other rules": {"mesh__data": 1, "mesh__fsdp": 4, "mesh__seq": 2,
                                      "mesh__rules__embed": "fsdp,seq", "mesh__rules__residual": "none"},
    }  # fmt: skip

    def run(mesh, workdir, how):
        with monkeypatch.context() as patch:
            if mesh == "one device":
                patch.setattr(spine, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
            return how(tiny(text, optimizer__eps=1e-4, **meshes[mesh]), workdir)

    straight = lambda config, workdir: pretrain(config, str(workdir))
    run("one device", tmp_path / "straight", straight)
    assert run(first, tmp_path / "parts", interrupted) == STOP
    assert run(then, tmp_path / "parts", straight).finished
    a, b = lines(tmp_path / "parts"), lines(tmp_path / "straight")
    assert [m["step"] for m in a] == list(range(1, STEPS + 1))
    losses = lambda rows: np.array([m["loss"] for m in rows])
    assert_close(losses(a), losses(b), terms=TERMS)
    expected = arrays(tmp_path / "straight", STEPS)
    for path, value in arrays(tmp_path / "parts", STEPS).items():
        if path.startswith("params"):
            assert_close(value, expected[path], terms=TERMS, err_msg=path)


# --- divergence -------------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_the_run(text, tmp_path, monkeypatch, one_device, uninterrupted):
    """An infinite learning rate at step 7 makes the loss of step 8 NaN; the checkpoint of step 5 goes on from there."""
    real = Schedule.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "learning_rate", lambda self, t: float("inf") if t == 6 else real(self, t))
        with pytest.raises(
            TrainingDiverged, match="at step 8; .*last good checkpoint is step 5.*learning_rate"
        ) as caught:
            pretrain(tiny(text), str(tmp_path / "run"))
    assert isinstance(caught.value, InputError) and "nan" in str(caught.value)
    assert [m["step"] for m in lines(tmp_path / "run")] == list(range(1, 8))  # up to the last finite one, on disk
    assert Checkpointer(tmp_path / "run").steps()[-1] == 5
    assert load_model(tmp_path / "run").step == 5
    assert pretrain(tiny(text), str(tmp_path / "run")).finished
    assert_same_run(tmp_path / "run", uninterrupted, STEPS)


def test_a_huge_learning_rate_before_any_checkpoint(text, tmp_path, one_device):
    with pytest.raises(TrainingDiverged, match="no checkpoint had been written yet"):
        pretrain(tiny(text, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0), str(tmp_path / "run"))


def test_float16_whose_loss_stays_nan_stops_too(text, tmp_path, monkeypatch, one_device):
    """Halving the scale mends an overflow, never a NaN: to skip every step up to the last is no training."""
    real = stage.causal_lm_loss

    def planted(*args, **kwargs):
        loss = real(*args, **kwargs)

        def nan(*inputs):
            total, count = loss(*inputs)
            return total * float("nan"), count

        return nan

    monkeypatch.setattr(stage, "causal_lm_loss", planted)
    monkeypatch.setattr(stage, "text_loss", lambda *_: lambda state: Evaluation({}))
    config = tiny(text, precision__compute="float16", precision__initial_scale=2.0, steps=60)
    with pytest.raises(TrainingDiverged, match="step"):
        pretrain(config, str(tmp_path / "run"))


def test_a_float16_run_whose_last_step_is_skipped_has_a_report(text, tmp_path, monkeypatch, one_device):
    """metrics.jsonl has null for a loss that is not finite, as JSON has no NaN."""
    from gptjax import report

    pretrain(tiny(text, steps=2, precision__compute="float16"), str(tmp_path / "run"))
    records = lines(tmp_path / "run")
    records[-1] |= {"loss": None, "bits_per_byte": None, "grad_norm": None, "skipped": 1}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "run" / "evaluations.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 2, "loss": null}\n')
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 0, "prompt": "a", "text": "b", "score": null}\n')
    assert "training curves" in report.write(tmp_path / "run").read_text()


# --- a full disk ------------------------------------------------------------------------------------------


def fill_disk(patch, *steps):
    """Saving these steps fails, after the save before has been waited for, as Orbax does it."""
    real = Checkpointer.manager.fget

    def manager(self):
        m = real(self)
        if not hasattr(m, "real_save"):
            m.real_save = m.save

            def save(step, *args, **kwargs):
                m.wait_until_finished()
                if step in steps:
                    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
                return m.real_save(step, *args, **kwargs)

            m.save = save
        return m

    patch.setattr(Checkpointer, "manager", property(manager))


def test_a_full_disk_does_not_stop_training(text, tmp_path, monkeypatch, capsys, one_device):
    with monkeypatch.context() as patch:
        fill_disk(patch, 10, 15)
        assert pretrain(tiny(text), str(tmp_path / "run")).finished
    assert capsys.readouterr().err.count("is full") == 2
    assert [m["step"] for m in lines(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert Checkpointer(tmp_path / "run").steps()[-2:] == [20, 25]


def test_the_last_checkpoint_does_not_fit(text, tmp_path, monkeypatch, one_device, uninterrupted):
    with monkeypatch.context() as patch:
        fill_disk(patch, STEPS)
        with pytest.raises(InputError, match="free some disk space and give the same command again.* step 20"):
            pretrain(tiny(text), str(tmp_path / "run"))
    assert pretrain(tiny(text), str(tmp_path / "run")).finished
    assert_same_run(tmp_path / "run", uninterrupted, STEPS)


def full_between(patch, first, last):
    """No record and no best.json can be written while steps first .. last are computed; some of a line still can."""
    real, write, compute = os.pwrite, checkpoint.write_json, supervised.Dispatch.__call__
    at, error = [0], OSError(errno.ENOSPC, "No space left on device")

    def pwrite(file, data, offset):
        if first <= at[0] <= last:
            real(file, bytes(data)[:20], offset)
            raise error
        return real(file, data, offset)

    def write_json(path, value):
        if first <= at[0] <= last:
            raise error
        write(path, value)

    def call(self, state, batch, rates):
        result = compute(self, state, batch, rates)
        at[0] = int(result[0].step)
        return result

    patch.setattr(os, "pwrite", pwrite)
    patch.setattr(checkpoint, "write_json", write_json)
    patch.setattr(supervised.Dispatch, "__call__", call)
    patch.setattr(files, "_failing", {})


def test_records_wait_until_the_disk_has_room(text, tmp_path, monkeypatch, capsys, one_device, uninterrupted):
    """Evaluations of steps 10 and 20, best.json and the lines of three checkpoints meet a full disk."""
    with monkeypatch.context() as patch:
        full_between(patch, 8, 22)
        assert pretrain(tiny(text, log__tensorboard=True), str(tmp_path / "run")).finished
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 2 and "cannot be written (No space left" in said[0] and "complete again" in said[1], said
    assert_same_run(tmp_path / "run", uninterrupted, STEPS)
    best = [json.loads((w / "checkpoints" / "best.json").read_text()) for w in (tmp_path / "run", uninterrupted)]
    assert best[0] == best[1]


def test_a_disk_that_stays_full_ends_in_one_report(text, tmp_path, monkeypatch, capsys, one_device, uninterrupted):
    with monkeypatch.context() as patch:
        full_between(patch, 8, STEPS)
        assert pretrain(tiny(text), str(tmp_path / "run")).finished
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 2 and "metrics.jsonl lacks its last 20 lines, of steps 6 to 25" in said[1], said
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert pretrain(tiny(text), str(tmp_path / "run")).finished  # best.json and the last evaluation are made up for
    assert lines(tmp_path / "run", "evaluations")[-1] == lines(uninterrupted, "evaluations")[-1]
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == STEPS


def test_the_best_checkpoint_that_did_not_fit_is_not_the_best(text, tmp_path, monkeypatch, one_device):
    """It is evaluated while it is being written, and only then the disk turns out to be full."""
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    monkeypatch.setattr(type(checkpointer), "manager", property(lambda self: self.steps_there))
    checkpointer.steps_there = types.SimpleNamespace(all_steps=lambda read=False: [5, 10] if not read else [5])
    checkpointer.directory.mkdir()
    checkpointer.report(5, 2.0)
    checkpointer.report(10, 1.0)
    assert checkpointer.best == 10

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert checkpointer._guarded(10, full) is False
    assert checkpointer.best == 5
    assert json.loads((checkpointer.directory / "best.json").read_text()) == {"step": 5, "loss": 2.0}


# --- asked to stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 10, STEPS])
def test_a_long_evaluation_is_left_and_made_up_for(text, tmp_path, monkeypatch, one_device, uninterrupted, step):
    """Ctrl-C in the middle of one, at the start, between checkpoints and at the end: the run goes on as if never."""
    real, asked = stage.text_loss, []

    def evaluator(*args):
        evaluate = real(*args)

        def stopped(state):
            if Evaluated.at == step and not asked:
                asked.append(step)
                os.kill(os.getpid(), signal.SIGINT)
            return evaluate(state)

        return stopped

    class Evaluated:
        at = 0

    compute = supervised.Dispatch.__call__

    def call(self, state, batch, rates):
        result = compute(self, state, batch, rates)
        Evaluated.at = int(result[0].step)
        return result

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "text_loss", evaluator)
            patch.setattr(supervised.Dispatch, "__call__", call)
            assert not pretrain(tiny(text, checkpoint__every=7), str(tmp_path / "run")).finished
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [step] and Checkpointer(tmp_path / "run").steps()[-1:] == [step][: step > 0]
    assert step not in [e["step"] for e in lines(tmp_path / "run", "evaluations")]
    assert pretrain(tiny(text, checkpoint__every=7), str(tmp_path / "run")).finished
    assert_same_run(tmp_path / "run", uninterrupted, STEPS)


class Broken(Exception):
    pass


def test_an_exception_keeps_the_lines_and_the_checkpoint_being_written(text, tmp_path, monkeypatch, one_device):
    compute = supervised.Dispatch.__call__

    def call(self, state, batch, rates):
        if int(state.step) == 13:
            raise Broken
        return compute(self, state, batch, rates)

    with monkeypatch.context() as patch:
        patch.setattr(supervised.Dispatch, "__call__", call)
        with pytest.raises(Broken):
            pretrain(tiny(text), str(tmp_path / "run"))
    assert [m["step"] for m in lines(tmp_path / "run")] == list(range(1, 13))
    assert Checkpointer(tmp_path / "run").steps() == [5, 10]


# --- the clock --------------------------------------------------------------------------------------------


def test_compiling_is_not_training_time(text, tmp_path, monkeypatch, one_device):
    """So says the report: "compiling, evaluating and saving not counted"."""
    real = step_module.jit_train_step

    class Slow:
        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            time.sleep(1.0)
            return self.step.lower(*args)

    monkeypatch.setattr(step_module, "jit_train_step", lambda *args: Slow(real(*args)))
    pretrain(tiny(text, steps=2), str(tmp_path / "run"))
    assert lines(tmp_path / "run")[0]["seconds"] < 1.0


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


# --- the process itself: SIGTERM, kill -9, bytes flipped on disk --------------------------------------------

LONG = 120  # steps, of some 5 ms


class Process:
    """`python -m gptjax.pretrain` on one device, always the same run."""

    def __init__(self, text, workdir):
        options = {
            "steps": LONG, "batch_size": 8, "steps_per_dispatch": 1, "model.n_layer": 2, "model.unroll": 1,
            "model.d_model": 32, "model.context_length": 32, "model.dropout": 0.1, "eval.every": 60, "eval.batches": 2,
            "checkpoint.every": 10, "log.tensorboard": False, "samples.max_new_tokens": 4, "data.source": text,
        }  # fmt: skip
        self.workdir = workdir
        self.command = [
            sys.executable, "-m", "gptjax.pretrain", "--config=configs/shakespeare_char.py", f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in options.items()),
        ]  # fmt: skip
        self.environment = one_device_environment()

    def start(self):
        return subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self):
        process = self.start()
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        return output

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
def straight(text, tmp_path_factory):
    """The run without any interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    Process(text, workdir).finish()
    return workdir


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory, straight):
    """A workdir whose run was sent SIGINT, as by Ctrl-C, after step 20, and what it printed."""
    workdir = tmp_path_factory.mktemp("stopped")
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    running, code, output = Process(text, workdir).signal_when(lambda names: "20" in names, signal.SIGINT)
    signal.signal(signal.SIGINT, heard)
    assert running
    return workdir, code, output


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


def copy(workdir, to):
    shutil.copytree(workdir, to, dirs_exist_ok=True)
    return to


def test_ctrl_c_saves_exits_cleanly_and_goes_on(text, tmp_path, straight, stopped):
    workdir, code, output = stopped
    steps = Checkpointer(workdir).steps()
    assert code == 0 and 20 <= steps[-1] < LONG and "Traceback" not in output
    assert f"asked to stop: saved step {steps[-1]}" in output
    again = copy(workdir, tmp_path)
    assert f"resuming from step {steps[-1]} of {LONG}" in Process(text, again).finish()
    assert_same_run(again, straight, LONG)


def test_a_corrupted_newest_checkpoint_goes_on_from_the_older_one(text, tmp_path, straight, stopped):
    again = copy(stopped[0], tmp_path)
    older, newest = Checkpointer(again).steps()[-2:]
    path = max(
        (again / "checkpoints" / str(newest) / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 4):
        content[at] ^= 0xFF
    path.write_bytes(content)
    output = Process(text, again).finish()
    assert f"checkpoint {newest} is damaged" in output and f"resuming from step {older} " in output
    assert_same_run(again, straight, LONG)


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save(text, tmp_path, straight):
    run = Process(text, tmp_path)
    saving = lambda names: any(n.endswith("-tmp") and n.split(".")[0] >= "30" for n in names if n[0] in "3456789")
    for _ in range(3):  # the save may end between the look and the blow: then the next start tries again
        running, code, _ = run.signal_when(saving, signal.SIGKILL)
        assert running and code == -signal.SIGKILL
        left = list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        if left:
            break
    assert left, "no save was caught in its middle"
    whole = max(int(n) for n in os.listdir(tmp_path / "checkpoints") if n.isdecimal())
    assert whole < int(left[0].name.split(".")[0])
    assert f"resuming from step {whole} of {LONG}" in run.finish()
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    assert_same_run(tmp_path, straight, LONG)
