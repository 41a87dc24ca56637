"""A workdir: who may write in it, and what its config.json says wherever it is read from."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from runs import one_device_environment

from gptjax import convert, lock, paths
from gptjax.command_line import _PathParser, _SeedsParser, _StepParser
from gptjax.config import build, config_dict
from gptjax.data import sources
from gptjax.data.records import pretraining_run
from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig
from gptjax.ppo import PPOConfig, ppo
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.reward import RewardConfig, reward
from gptjax.run import Claim
from gptjax.run_config import claim_workdir, read_config
from gptjax.sft import SFTConfig, sft
from gptjax.trained import best_step, origin
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer


def claim(workdir, stage="sft", origin=None, **fields):
    c = config_dict(SFTConfig)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    c = build(SFTConfig, c)
    return claim_workdir(workdir, stage, c, model=GPTConfig(64, 1, 1, 8, 8), **({"origin": origin} if origin else {}))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in, with runs/pre and texts/a.jsonl in it."""
    root = tmp_path / "work"
    (root / "runs" / "pre").mkdir(parents=True)
    (root / "texts").mkdir()
    (root / "texts" / "a.jsonl").write_text("{}\n")
    monkeypatch.chdir(root)
    return root


FIELDS = {"init_from": "runs/pre", "data__source": "texts/a.jsonl"}


def test_nothing_in_the_workdir_of_another_run_changes_before_it_is_refused(here):
    """Nor in one that has lost its config.json, whose checkpoints are of an unknown run."""
    saved = []
    tokenizer = types.SimpleNamespace(save=lambda path: saved.append(str(path)))
    config = lambda seed: dataclasses.replace(build(SFTConfig, config_dict(SFTConfig)), seed=seed)
    first = Claim("sft", "runs/sft", "lm")
    first.begin()
    first.make(config(0), tokenizer)
    assert saved == ["runs/sft/tokenizer"]
    files = {path: path.read_bytes() for path in (here / "runs" / "sft").rglob("*") if path.is_file()}
    other = Claim("sft", "runs/sft", "lm")
    other.begin()
    with pytest.raises(InputError, match="holds another run's config(?s:.*)seed: saved 0, requested 1"):
        other.make(config(1), tokenizer)
    (here / "runs" / "lost" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(InputError, match="has checkpoints but no config.json"):
        Claim("sft", "runs/lost", "lm")
    assert len(saved) == 1 and not (here / "runs" / "lost" / "data.json").exists()
    assert files == {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "sft", "reward", "dpo", "ppo"])
def test_a_stage_leaves_its_tokenizer_to_the_claim(stage):
    code = (ROOT / "gptjax" / f"{stage}.py").read_text()
    assert "tokenizer.save(" not in code and "claim.make(" in code


# --- paths in config.json ---------------------------------------------------------------------------------


def test_paths_mean_the_same_from_another_folder(here, tmp_path, monkeypatch, capsys):
    claim("runs/sft", **FIELDS)
    monkeypatch.chdir(tmp_path)
    run = read_config(here / "runs" / "sft")
    assert run["init_from"] == str(here / "runs" / "pre")
    assert run["data"]["source"] == str(here / "texts" / "a.jsonl")
    assert run["data"]["validation"] == "0.05" and "paths" not in run
    for spelling in ("work/runs/pre", here / "runs" / "." / "sft" / ".." / "pre"):
        assert claim(here / "runs" / "sft", init_from=str(spelling), data__source="work/texts/a.jsonl") is True
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="init_from: saved '.*runs/pre', requested '.*/other'"):
        claim(here / "runs" / "sft", init_from="other", data__source="work/texts/a.jsonl")


@pytest.mark.parametrize("how", ["moved", "copied", "moved and something else put there"])
def test_folders_moved_or_copied_together_mean_their_own(here, tmp_path, monkeypatch, how):
    claim("runs/sft", **FIELDS)
    monkeypatch.chdir("/")
    there = tmp_path / "elsewhere"
    (shutil.copytree if how == "copied" else shutil.move)(here, there)
    if how.startswith("moved and"):
        (here / "runs" / "pre").mkdir(parents=True)
    run = read_config(there / "runs" / "sft")
    assert (run["init_from"], run["data"]["source"]) == (str(there / "runs/pre"), str(there / "texts/a.jsonl"))
    assert claim(there / "runs" / "sft", init_from=str(there / "runs/pre"), data__source=run["data"]["source"]) is True


def test_a_workdir_moved_alone_finds_what_stayed(here, tmp_path):
    claim("runs/sft", **FIELDS)
    shutil.move("runs/sft", tmp_path / "sft")
    assert read_config(tmp_path / "sft")["init_from"] == str(here / "runs" / "pre")


def test_what_is_nowhere_is_named_in_absolute_form(here, tmp_path):
    claim("runs/sft", **FIELDS)
    shutil.rmtree("runs/pre")
    with pytest.raises(InputError, match=f"^{here}/runs/pre is not a workdir: there is no such folder"):
        pretraining_run("runs/sft")


@pytest.mark.parametrize("value", ["stdlib", "hf:name:config", "gs://bucket/x.jsonl", None])
def test_names_that_are_no_paths_stay(here, value):
    claim("runs/sft", init_from="runs/pre", data__source=value)
    assert read_config("runs/sft")["data"]["source"] == value


def test_patterns_below_a_folder_with_brackets(tmp_path, monkeypatch):
    """The folder one stands in is not part of the pattern."""
    here = tmp_path / "[2026] x"
    (here / "texts").mkdir(parents=True)
    for name in "ab":
        (here / "texts" / f"{name}.jsonl").write_text('{"text": "t"}\n')
    monkeypatch.chdir(here)
    claim("sft", init_from="pre", data__source="texts/*.jsonl")
    monkeypatch.chdir("/")
    assert len(list(sources.rows(read_config(here / "sft")["data"]["source"]))) == 2
    moved = shutil.move(here, tmp_path / "[y]")
    assert read_config(moved / "sft")["data"]["source"].startswith(str(tmp_path))
    assert len(list(sources.rows(read_config(moved / "sft")["data"]["source"]))) == 2


def test_a_config_of_an_earlier_version_is_read_from_where_one_stands(here, tmp_path, monkeypatch, capsys):
    claim("runs/sft", **FIELDS)
    path = here / "runs" / "sft" / "config.json"
    run = json.loads(path.read_text())
    del run["paths"]
    path.write_text(json.dumps(run | {"init_from": "runs/pre", "data": run["data"] | {"source": "texts/a.jsonl"}}))
    assert read_config("runs/sft")["init_from"] == "runs/pre"
    assert claim("runs/sft", **FIELDS) is True and capsys.readouterr().out == ""
    monkeypatch.chdir(tmp_path)
    assert read_config(here / "runs" / "sft")["init_from"] == str(here / "runs" / "pre")  # from now on


SIZES = ("vocab_size", "n_layer", "n_head", "d_model", "context_length")


@pytest.mark.parametrize(
    "config, keys",
    [
        (PretrainConfig, "init_from data.source data.tokenizer data.validation data.cache"),
        (SFTConfig, "init_from reward data.source data.validation mix.source"),
        (RewardConfig, "init_from demonstrations data.source data.validation"),
        (PPOConfig, "policy reward data.source eval.source ptx.source"),
    ],
)
def test_the_fields_that_hold_paths(config, keys):
    assert set(paths.fields(config)) >= set(keys.split())
    for key in keys.split():
        c = config_dict(config)
        sizes = {f"model.{k}": 8 for k in SIZES} if config is PretrainConfig else {}
        c.update_from_flattened_dict({key: "~/there", **sizes})
        if key == "reward" and config is SFTConfig:
            c.update(selection="reward", eval={"every": 1000})
        value = build(config, c)
        for name in key.split("."):
            value = getattr(value, name)
        assert value == os.path.expanduser("~/there"), key


def test_the_home_directory_in_flags_and_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _PathParser().parse("~/r") == str(tmp_path / "r")
    assert paths.expand_flag("--config=~/c.py:124m", "config") == f"--config={tmp_path}/c.py:124m"
    with pytest.raises(InputError, match="There is no user 'nobody-here'.*write ./~nobody-here/r"):
        paths.local("~nobody-here/r")
    claim("~/r", init_from="~/pre")
    assert read_config("~/r")["init_from"] == str(tmp_path / "pre") and (tmp_path / "r" / "config.json").exists()


@pytest.mark.parametrize(
    "command, says",
    [
        (("pretrain", "--config=~/c.py", "--workdir=~/file"), "{home}/file is not a folder"),
        (("sample", "--workdir=~/none"), "{home}/none is not a workdir"),
    ],
    ids=["pretrain", "sample"],
)
def test_the_home_directory_on_the_command_line(tmp_path, command, says):
    (tmp_path / "file").touch()
    shutil.copy(ROOT / "configs" / "gpt2.py", tmp_path / "c.py")
    done = subprocess.run([sys.executable, "-m", f"gptjax.{command[0]}", *command[1:]], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60,
                          env=one_device_environment(HOME=str(tmp_path), PYTHONPATH=str(ROOT)))  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: " + says.format(home=tmp_path))


# --- models that a run depends on -------------------------------------------------------------------------


def model(step=60, weights="w", tokenizer="t"):
    return types.SimpleNamespace(
        params={}, step=step, weights=weights, tokenizer=types.SimpleNamespace(fingerprint=tokenizer)
    )


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"weights": "other"}, "reward: .*/rm has other weights now"),
        ({"step": 80, "weights": "other"}, "is at step 80 now and was at 60 then"),
        ({"tokenizer": "other"}, "has another tokenizer now"),
    ],
)
def test_a_frozen_model_that_has_changed_is_refused(here, changed, says):
    fields = FIELDS | {"selection": "reward", "reward": "rm"}
    assert claim("runs/sft", origin=origin(reward=model()), **fields) is False
    before = (here / "runs" / "sft" / "config.json").read_bytes()
    assert claim("runs/sft", origin=origin(reward=model()), **fields) is True
    with pytest.raises(InputError, match=f"(?s)began with other models.*{says}.*Put back"):
        claim("runs/sft", origin=origin(reward=model(**changed)), **fields)
    assert (here / "runs" / "sft" / "config.json").read_bytes() == before
    with pytest.raises(InputError, match="reward: saved"):  # another folder, and nothing known of it
        claim("runs/sft", **fields | {"reward": "other"})
    assert claim("runs/sft", origin=origin(reward=model()), **fields | {"reward": "other"}) is True  # only moved


def test_weights_that_were_needed_at_step_0_alone(here, capsys):
    claim("runs/sft", origin=origin(init_from=model()), **FIELDS)
    with pytest.raises(InputError, match="init_from: .* has other weights now"):
        claim("runs/sft", origin=origin(init_from=model(80, "later")), **FIELDS)
    (here / "runs" / "sft" / "checkpoints" / "10").mkdir(parents=True)
    assert claim("runs/sft", origin=origin(init_from=model(80, "later")), **FIELDS) is True
    assert "have changed since this run began" in capsys.readouterr().out
    assert read_config("runs/sft")["origin"] == origin(init_from=model())  # what it began with
    assert claim("runs/sft", **FIELDS) is True  # gone
    assert read_config("runs/sft")["origin"] == origin(init_from=model())
    with pytest.raises(InputError, match="another tokenizer"):
        claim("runs/sft", origin=origin(init_from=model(tokenizer="other")), **FIELDS)
    with pytest.raises(InputError, match="init_from: saved"):  # another model altogether
        claim("runs/sft", origin=origin(init_from=model(weights="x")), **FIELDS | {"init_from": "runs/other"})


def test_a_run_of_an_earlier_version_has_no_digests_and_goes_on(here, capsys):
    claim("runs/sft", **FIELDS)
    assert claim("runs/sft", origin=origin(init_from=model()), **FIELDS) is True
    assert capsys.readouterr().out.count("kept no digest of init_from") == 1
    assert claim("runs/sft", origin=origin(init_from=model()), **FIELDS) is True
    assert capsys.readouterr().out == ""


# --- one start at a time ----------------------------------------------------------------------------------

HOLD = """
import sys, time
from gptjax import lock
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """(a process that has the lock of a workdir, the workdir)"""
    workdir = tmp_path / "run"
    environment = one_device_environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"held\n"
    yield process, workdir
    process.kill()
    process.wait()


def test_a_second_start_is_refused_until_the_first_is_dead(holder, capsys):
    process, workdir = holder
    for stage in (pretrain, sft, reward, ppo):
        with pytest.raises(InputError, match=f"{workdir} is in use by process {process.pid} on .* since .*--workdir"):
            stage({}, str(workdir))
    with pytest.raises(InputError, match="is in use"):
        convert.import_weights("nowhere", workdir)
    assert [p.name for p in workdir.iterdir()] == ["lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.held(workdir):
        assert f"was in use by process {process.pid} on" in capsys.readouterr().out
    assert list(workdir.iterdir()) == []


def test_the_lock_ends_with_an_error_too(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        with pytest.raises(InputError, match="in use"), lock.held(tmp_path):
            pass
        raise ZeroDivisionError
    with lock.held(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"] and capsys.readouterr().out == ""


def test_storage_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.held(tmp_path):
        assert "has no locks: make sure that no other run" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere/run", "/proc/1"])
def test_places_that_can_be_no_workdir(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder|is not writable") as caught:
        pretrain({}, str(tmp_path / where))
    assert "\n" not in str(caught.value) and "--workdir" in str(caught.value)


def test_a_workdir_on_a_read_only_disk(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lock, "open", read_only, raising=False)
    with pytest.raises(InputError, match="is not writable .Read-only file system.: give another --workdir"):
        sft({}, str(tmp_path))


# --- the best checkpoint ----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path):
    import jax.numpy as jnp

    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep_last=9))
    for step in (0, 10, 20):
        checkpointer.save_params(step, {"a": jnp.full(3, float(step))})
    checkpointer.close()

    def write(*losses):
        found = [x if isinstance(x, dict) else {"loss": x} for x in losses]
        lines = [{"step": 5 * i, **x} for i, x in enumerate(found)]
        (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return best_step(tmp_path, Checkpointer(tmp_path))

    return write


def test_the_best_is_the_lowest_on_disk(evaluated):
    assert evaluated(3.0, 0.1, 2.0, 0.1, 2.5) == 10  # steps 5 and 15 were not kept
    assert evaluated(None, 0.1, None, 0.1, 2.5) == 20
    assert evaluated({"loss": 1.0, "selection": -1.0}, 0.0, {"loss": 2.0, "selection": -3.0}) == 10


def test_where_nothing_was_evaluated_none_is_the_best(evaluated):
    with pytest.raises(InputError, match="no checkpoint with a validation loss.*0, 10, 20.*--step=N"):
        evaluated(None, 1.0, {"score": 3.0})


def test_step_is_a_number_or_best():
    assert _StepParser().parse("best") == "best" and _StepParser().parse("120") == 120
    with pytest.raises(ValueError, match="neither a number nor 'best'"):
        _StepParser().parse("bset")


def test_seeds_are_whole_numbers_with_commas():
    assert _SeedsParser().parse("0,12, 3") == [0, 12, 3]
    with pytest.raises(ValueError, match="whole numbers with commas"):
        _SeedsParser().parse("0,x")
