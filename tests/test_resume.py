"""A run that is interrupted, killed, damaged or out of disk ends bitwise where an uninterrupted one ends."""

import errno
import json
import os
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
from numerics import approx, assert_close, model_terms
from runs import arrays, assert_same_run, lines, nonsense, until_sigterm

from gptjax import pretrain as stage
from gptjax import run as spine
from gptjax.config import config_dict
from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.trained import load_model
from gptjax.training import checkpoint, files, supervised
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer
from gptjax.training.loop import TrainingDiverged
from gptjax.training.schedule import Schedule, ScheduleConfig

STEPS, STOP = 25, 13
TERMS = model_terms(GPTConfig(100, n_layer=2, n_head=4, d_model=32, context_length=32), rows=8)  # of tiny()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The source of every run here."""
    return nonsense(tmp_path_factory.mktemp("text"))


def tiny(text, **overrides):
    """A PretrainConfig of 27k parameters, with dropout; overrides by dotted key, with __ for the dot."""
    c = config_dict(PretrainConfig)
    c.model.update(n_layer=2, n_head=4, d_model=32, context_length=32, dropout=0.2)
    c.data.update(source=str(text), tokenizer="char")
    c.steps, c.batch_size = STEPS, 8
    c.eval.update(every=10, batches=2)
    c.checkpoint.every = 5
    c.log.tensorboard = False
    c.optimizer.learning_rate, c.optimizer.eps = 3e-3, 1e-4
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


@pytest.fixture(autouse=True)
def programs_of_what_is_patched():
    """In place of conftest's: nothing that is patched here is traced, so all runs share their programs."""


def on_one_device(patch):
    """pretrain() in this process, which has 8 virtual devices, on the first of them."""
    patch.setattr(spine, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """finished_run(config) -> workdir of that run on one device, from start to end."""

    def run(config):
        workdir = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            on_one_device(patch)
            assert pretrain(config, str(workdir)).finished
        return workdir

    return run


@pytest.fixture(scope="module")
def uninterrupted(text, finished_run):
    """Workdir of tiny(text) on one device."""
    return finished_run(tiny(text))


@pytest.fixture(scope="module")
def float16_run(text, finished_run):
    """Workdir of tiny(text, **FLOAT16) on one device."""
    return finished_run(tiny(text, **FLOAT16))


def interrupted(config, workdir, stop=STOP):
    """The step saved by a run that was sent a SIGTERM while step `stop` was being computed."""
    assert not until_sigterm(pretrain, config, workdir, stop).finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return Checkpointer(workdir).steps()[-1]


@pytest.fixture(scope="module")
def stopped_at_13(text, tmp_path_factory):
    """Workdir of tiny(text) on one device, stopped after step 13."""
    workdir = tmp_path_factory.mktemp("stopped_at_13")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        assert interrupted(tiny(text), workdir) == STOP
    return workdir


def copy(workdir, to):
    return shutil.copytree(workdir, to, dirs_exist_ok=True)


# --- interrupted and resumed -------------------------------------------------------------------------------

FLOAT16 = {  # with dropout, a ramp of the batch size, a warmup, micro-batches and their noise scale
    "precision__compute": "float16", "precision__growth_interval": 4, "precision__initial_scale": 2.0**22,
    "schedule__ramp_tokens": 3000.0, "schedule__ramp_start_batch_tokens": 128.0, "microbatch_size": 4,
    "schedule__warmup_tokens": 1000.0, "noise_scale": True,
}  # fmt: skip


def test_13_steps_and_12_are_25(text, tmp_path, one_device, uninterrupted, stopped_at_13):
    """With dropout."""
    parts = copy(stopped_at_13, tmp_path)
    assert [line["step"] for line in lines(parts)] == list(range(1, STOP + 1))
    assert pretrain(tiny(text), str(parts)).finished
    assert_same_run(parts, uninterrupted, STEPS)


def test_13_steps_and_12_are_25_with_float16_and_a_ramp(text, tmp_path, one_device, float16_run):
    config = tiny(text, **FLOAT16)
    assert interrupted(config, tmp_path) == STOP
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STOP + 1))
    assert pretrain(config, str(tmp_path)).finished
    assert_same_run(tmp_path, float16_run, STEPS)

    metrics = lines(float16_run)
    assert metrics[-1]["tokens_seen"] == sum(m["batch_tokens"] for m in metrics)
    scales = [m["loss_scale"] for m in metrics]  # the scale went both ways on both sides of the stop
    for part in (scales[:STOP], scales[STOP:]):
        assert any(a < b for a, b in zip(part, part[1:], strict=False))
    assert any(m["skipped"] for m in metrics) and not all(m["skipped"] for m in metrics)
    sizes = [m["batch_tokens"] for m in metrics]
    assert sizes[0] == 4 * 32 and sizes[-1] == 8 * 32 and set(sizes) == {n * 32 for n in (4, 5, 6, 7, 8)}
    assert all(b >= a - 32 for a, b in zip(sizes, sizes[1:], strict=False))  # rounded to whole sequences
    assert ["noise_scale" in m for m in metrics] == [n > 4 * 32 for n in sizes]  # where there are two micro-batches


@pytest.mark.slow
def test_several_steps_a_dispatch(text, tmp_path, one_device, uninterrupted, finished_run):
    """Bitwise the same however it is interrupted; to rounding the run of one step a dispatch: one device call of
    several steps is a loop, which XLA may fuse otherwise than a single step."""
    config = tiny(text, steps_per_dispatch=4)
    straight = finished_run(config)
    assert interrupted(config, tmp_path) == 14  # device calls are of 4, 1, 4, 1, 4 steps
    assert pretrain(config, str(tmp_path)).finished
    assert_same_run(tmp_path, straight, STEPS)
    for a, b in zip(lines(uninterrupted), lines(straight), strict=True):
        assert (a["step"], a["tokens_seen"], a["learning_rate"]) == (b["step"], b["tokens_seen"], b["learning_rate"])
        assert a["loss"] == approx(b["loss"], terms=TERMS)


def test_a_finished_run_started_again_changes_nothing_and_a_longer_one_is_told_of_another_schedule(
    text, tmp_path, one_device, uninterrupted, capsys
):
    """By the rate in its metrics: of an earlier version (whose decay ended one step sooner), or of another length."""
    run = copy(uninterrupted, tmp_path)
    assert pretrain(tiny(text), str(run)).finished
    for name in ("metrics", "evaluations"):
        assert lines(run, name) == lines(uninterrupted, name)
    assert "the learning rate of step" not in capsys.readouterr().out  # finished: nothing to tell
    rows = [json.dumps(r | {"learning_rate": 3e-4}) + "\n" for r in lines(run)]
    (run / "metrics.jsonl").write_text("".join(rows))
    pretrain(tiny(text, steps=STEPS + 1), str(run))
    now = Schedule(ScheduleConfig(), batch_size=8, context_length=32, learning_rate=3e-3, steps=STEPS + 1)
    said = "the learning rate of step 25 was 0.0003; by the schedule as it is now it would have been "
    assert said + f"{now.learning_rate(STEPS - 1):.4g}" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer_whatever_became_of_its_source(text, tmp_path, one_device):
    """It goes on with its own tokens."""
    source = tmp_path / "source.txt"
    shutil.copy(text, source)
    for steps, name in ((5, "parts"), (10, "straight")):
        pretrain(tiny(source, steps=steps, schedule__kind="constant"), str(tmp_path / name))
    source.write_text("other words " * 500)
    pretrain(tiny(source, steps=10, schedule__kind="constant"), str(tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "straight", 10)


def test_another_seed_is_another_run(text, tmp_path, monkeypatch, one_device):
    """Other initial parameters and other batches. The noise of dropout: tests/test_step.py."""
    batches = []

    def call(self, state, batch, rates):
        batches.append(jax.device_get(batch["tokens"]))
        raise Broken

    monkeypatch.setattr(supervised.Dispatch, "__call__", call)
    for seed in (0, 1):
        with pytest.raises(Broken):
            pretrain(tiny(text, seed=seed), str(tmp_path / str(seed)))
    a, b = (lines(tmp_path / str(seed), "evaluations")[0] for seed in (0, 1))
    assert a["loss"] != b["loss"] and (batches[0] != batches[1]).any()


MESHES = {
    "stage 2 fsdp 4": {"mesh__data": 1, "mesh__stage": 2, "mesh__fsdp": 4},
    "fsdp 8": {"mesh__data": 1, "mesh__fsdp": 8},
    "fsdp 4 seq 2, other rules": {"mesh__data": 1, "mesh__fsdp": 4, "mesh__seq": 2,
                                  "mesh__rules__embed": "fsdp,seq", "mesh__rules__residual": "none"},
}  # fmt: skip


def assert_same_run_to_rounding(workdir, other):
    """Adam's eps is raised in tiny(): it would blow up the rounding of gradients that are 0."""
    a, b = lines(workdir), lines(other)
    assert [m["step"] for m in a] == list(range(1, STEPS + 1))
    losses = lambda rows: np.array([m["loss"] for m in rows])
    assert_close(losses(a), losses(b), terms=TERMS)
    expected = arrays(other, STEPS)
    for path, value in arrays(workdir, STEPS).items():
        if path.startswith("params"):
            assert_close(value, expected[path], terms=TERMS, err_msg=path)


@pytest.mark.slow
def test_taken_up_on_another_mesh_and_back(text, tmp_path, monkeypatch, uninterrupted, stopped_at_13):
    """13 steps on one device, 6 with parameters and sequences cut up over 8, 6 on one device again."""
    parts = copy(stopped_at_13, tmp_path)
    assert interrupted(tiny(text, **MESHES["fsdp 4 seq 2, other rules"]), parts, stop=19) == 19
    on_one_device(monkeypatch)
    assert pretrain(tiny(text), str(parts)).finished
    assert_same_run_to_rounding(parts, uninterrupted)


@pytest.mark.slow
def test_a_pipelined_run_taken_up_without_the_pipeline(text, tmp_path, uninterrupted):
    assert interrupted(tiny(text, **MESHES["stage 2 fsdp 4"]), tmp_path) == STOP
    assert pretrain(tiny(text, **MESHES["fsdp 8"]), str(tmp_path)).finished
    assert_same_run_to_rounding(tmp_path, uninterrupted)


def test_a_corrupted_newest_checkpoint_goes_on_from_the_older_one(text, tmp_path, one_device, uninterrupted, capsys):
    again = copy(uninterrupted, tmp_path)
    older, newest = Checkpointer(again).steps()[-2:]
    path = max(
        (again / "checkpoints" / str(newest) / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 4):
        content[at] ^= 0xFF
    path.write_bytes(content)
    assert pretrain(tiny(text), str(again)).finished
    said = capsys.readouterr()
    assert f"checkpoint {newest} is damaged" in said.err and f"resuming from step {older} " in said.out
    assert_same_run(again, uninterrupted, STEPS)


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
        pretrain(tiny(text, optimizer__learning_rate=1e30), str(tmp_path / "run"))


def test_float16_whose_loss_stays_nan_stops_too(text, tmp_path, monkeypatch, one_device):
    """Halving the scale mends an overflow, never a NaN: to skip every step up to the last is no training."""
    monkeypatch.setattr(Schedule, "learning_rate", lambda self, t: float("inf"))  # the first step not skipped ends it
    with pytest.raises(TrainingDiverged, match="The loss became nan .* at step"):
        pretrain(tiny(text, **FLOAT16, steps=60), str(tmp_path / "run"))
    skipped = [m["skipped"] for m in lines(tmp_path / "run")]
    assert skipped[-20:] == [1] * 20


def test_a_float16_run_whose_last_step_is_skipped_has_a_report(tmp_path, float16_run):
    """metrics.jsonl has null for a loss that is not finite, as JSON has no NaN."""
    from gptjax import report

    run = copy(float16_run, tmp_path)
    records = lines(run)
    records[-1] |= {"loss": None, "bits_per_byte": None, "grad_norm": None, "skipped": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "evaluations.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 25, "loss": null}\n')
    (run / "samples.jsonl").write_text('{"step": 0, "prompt": "a", "text": "b", "score": null}\n')
    assert "training curves" in report.write(run).read_text()


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


def test_a_full_disk_stops_training_only_at_the_last_checkpoint(
    text, tmp_path, monkeypatch, capsys, one_device, uninterrupted
):
    with monkeypatch.context() as patch:
        fill_disk(patch, 10, 15, STEPS)
        with pytest.raises(InputError, match="free some disk space and give the same command again.* step 20"):
            pretrain(tiny(text), str(tmp_path / "run"))
    assert capsys.readouterr().err.count("is full") == 3
    assert [m["step"] for m in lines(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert pretrain(tiny(text), str(tmp_path / "run")).finished
    assert Checkpointer(tmp_path / "run").steps()[-2:] == [20, 25]
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


def test_a_long_evaluation_is_left_and_made_up_for(text, tmp_path, monkeypatch, one_device, uninterrupted):
    """Ctrl-C in the middle of one, at the start, between checkpoints and at the end: the run goes on as if never."""
    config, asked, at = tiny(text, checkpoint__every=7), [], [0]
    real, compute = stage.text_loss, supervised.Dispatch.__call__

    def evaluator(*args):
        evaluate = real(*args)

        def stopped(state):
            if at[0] == step and step not in asked:
                asked.append(step)
                os.kill(os.getpid(), signal.SIGINT)
            return evaluate(state)

        return stopped

    def call(self, state, batch, rates):
        result = compute(self, state, batch, rates)
        at[0] = int(result[0].step)
        return result

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "text_loss", evaluator)
            patch.setattr(supervised.Dispatch, "__call__", call)
            for step in (0, 10, STEPS):
                assert not pretrain(config, str(tmp_path)).finished
                assert asked[-1] == step and Checkpointer(tmp_path).steps()[-1:] == [step][: step > 0]
                assert step not in [e["step"] for e in lines(tmp_path, "evaluations")]
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [0, 10, STEPS]
    assert pretrain(config, str(tmp_path)).finished
    assert_same_run(tmp_path, uninterrupted, STEPS)


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
    real = supervised.Dispatch.__init__

    class Slow:
        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            time.sleep(1.0)
            return self.step.lower(*args)

    monkeypatch.setattr(supervised.Dispatch, "__init__", lambda self, step, seed: real(self, Slow(step), seed))
    pretrain(tiny(text, steps=2), str(tmp_path / "run"))
    assert lines(tmp_path / "run")[0]["seconds"] < 1.0
