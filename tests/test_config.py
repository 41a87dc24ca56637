"""Configs: keys that scripts rely on, misspelt keys and presets, workdirs of another run, the command line."""

import dataclasses
import errno
import functools
import importlib.util
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from ml_collections import config_dict as mlc
from runs import main_of

from gptjax import command_line, run_config
from gptjax import config as configs
from gptjax.command_line import run
from gptjax.config import build, choose, config_dict, to_json
from gptjax.errors import InputError
from gptjax.json_files import json_safe, read_json_lines, write_json, write_json_lines
from gptjax.parallel import sharding
from gptjax.pretrain import PretrainConfig
from gptjax.run_config import claim_workdir, read_config

STABLE = {
    "seed", "steps", "batch_size", "data.source", "data.tokenizer", "model.n_layer", "model.n_head", "model.d_model",
    "model.context_length", "model.dropout", "optimizer.learning_rate", "precision.compute", "mesh.data", "mesh.fsdp",
    "mesh.tensor", "mesh.stage", "mesh.seq", "checkpoint.every", "eval.every",
}  # fmt: skip
OF_GPTS = {"model.n_layer", "model.n_head", "model.d_model"}
ALIGNMENT = {"nplus", "ziegler", "dpo", "grpo", "gpt1_finetune"}  # tests/test_presets.py
FILES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - ALIGNMENT)
PRESETS = [
    ("gpt1", None), *(("gpt2", s) for s in ("124m", "355m", "774m", "1558m")),
    *(("gpt3", s) for s in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b", "125m,mixture")),
    ("shakespeare_char", "cpu"), ("shakespeare_char", "gpu"),
]  # fmt: skip


def load(name, argument=None):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if argument is None else module.get_config(argument)


@pytest.fixture
def config():
    c = load("shakespeare_char")
    c.model.vocab_size = 65
    return c


def built(config, **overrides):
    config = mlc.ConfigDict(config.to_dict())
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return build(PretrainConfig, config)


# --- config files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_has_the_keys_scripts_rely_on(name):
    c = load(name)
    c.model.vocab_size = c.model.vocab_size or 65
    flat = run_config._flatten(to_json(build(PretrainConfig, c)))
    stable = STABLE - OF_GPTS if name == "lstm" else STABLE
    assert stable <= flat.keys()
    c.lock()
    new = {  # each can be set from the command line, whether it has a value or not
        "seed": 5, "steps": 7, "batch_size": 16, "data.source": "x", "data.tokenizer": "char", "model.n_layer": 4,
        "model.n_head": 2, "model.d_model": 64, "model.context_length": 8, "model.dropout": 0.25,
        "optimizer.learning_rate": 0.5, "precision.compute": "float16", "mesh.data": 2, "mesh.fsdp": 2,
        "mesh.tensor": 2, "mesh.stage": 1, "mesh.seq": 1, "checkpoint.every": 3, "eval.every": 4,
    }  # fmt: skip
    assert new.keys() == STABLE
    new = {key: new[key] for key in stable}
    c.update_from_flattened_dict({**new, "microbatch_size": None})
    flat = run_config._flatten(to_json(build(PretrainConfig, c)))
    assert {k: flat[k] for k in new} == new


@pytest.mark.parametrize("name, argument", PRESETS)
def test_config_json_tells_the_whole_config(name, argument):
    """A config goes to JSON and back to itself."""
    c = load(name, argument)
    c.model.vocab_size = c.model.vocab_size or 65
    first = build(PretrainConfig, c)
    again = build(PretrainConfig, json.loads(json.dumps(to_json(first))))
    assert again == first and to_json(again) == to_json(first)


def test_defaults_come_from_the_dataclasses_alone():
    c = config_dict(PretrainConfig)
    c.model.update(vocab_size=10, n_layer=1, n_head=1, d_model=8, context_length=4)
    model = build(PretrainConfig, c).model
    assert build(PretrainConfig, c) == PretrainConfig(model=model)


# --- misspelt ---------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        size: int = 3
        learning_rate: float = 1.0

    with pytest.raises(InputError, match=r"Unknown key config.lerning_rate: did you mean 'learning_rate'\?"):
        build(Outer, {"lerning_rate": 2.0})
    with pytest.raises(InputError, match="Unknown key config.zzz: there are learning_rate, size"):
        build(Outer, {"zzz": 2.0})


@pytest.mark.parametrize(
    "section, key, nearest",
    [
        ("model", "n_layers", "n_layer"),
        ("optimizer", "learning_rat", "learning_rate"),
        ("mesh", "fdsp", "fsdp"),
        ("mesh.rules", "mpl", "mlp"),
    ],
)
def test_an_unknown_key_deeper_down(config, section, key, nearest):
    tree = config.to_dict()
    functools.reduce(dict.get, section.split("."), tree)[key] = 1
    with pytest.raises(InputError, match=f"Unknown key config.{section}.{key}: did you mean '{nearest}'"):
        build(PretrainConfig, tree)


def test_a_key_that_is_not_set_or_missing(config):
    tree = config.to_dict()
    tree["model"]["d_model"] = None
    with pytest.raises(InputError, match="config.model.d_model is not set"):
        build(PretrainConfig, tree)
    tree = config.to_dict()
    del tree["model"]["n_head"]
    with pytest.raises(InputError, match="config.model: .*n_head"):
        build(PretrainConfig, tree)


@pytest.mark.parametrize(
    "name, argument, says",
    [
        ("gpt2", "124M", "Unknown GPT-2 size '124M': did you mean '124m'"),
        ("gpt2", "huge", "there are 124m, 1558m, 355m, 774m"),
        ("gpt3", "175", "did you mean '175b'"),
        ("gpt3", "125m,mixtur", "Unknown GPT-3 config option 'mixtur': did you mean 'mixture'"),
        ("shakespeare_char", "gpus", "did you mean 'gpu'"),
    ],
)
def test_an_unknown_preset_names_the_nearest(name, argument, says):
    with pytest.raises(InputError, match=says):
        load(name, argument)


def test_choose_takes_what_is_there():
    assert choose({"a": 1}, "a", "letter") == 1


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch"),
        ({"batch_size": 12, "microbatch_size": 5}, "batch_size=12 is not a multiple of microbatch_size=5"),
        ({"model__n_head": 3}, "d_model=128 is not a multiple of model.n_head=3"),
        ({"model__dropout": 1.0}, "dropout"),
        ({"model__n_layer": 0}, "n_layer"),
        ({"model__attention": "flash"}, "choose one of"),
        ({"model__remat": "some"}, "choose one of"),
        ({"precision__compute": "fp16"}, "float16"),
        ({"eval__every": 0}, "eval.every"),
        ({"checkpoint__every": 0}, "every"),
        ({"model__pipeline_virtual_stages": 0}, "pipeline_virtual_stages"),
        ({"model__pipeline_microbatches": 0}, "pipeline_microbatches"),
    ],
)
def test_values_that_can_not_be(config, overrides, says):
    with pytest.raises(InputError, match=says):
        built(config, **overrides)


# --- the workdir ------------------------------------------------------------------------------------------


def test_a_workdir_is_claimed_and_taken_up_again(config, tmp_path):
    c = built(config)
    assert claim_workdir(tmp_path / "new" / "run", "pretrain", c) is False
    assert claim_workdir(tmp_path / "new" / "run", "pretrain", c) is True
    written = read_config(tmp_path / "new" / "run")
    assert written.pop("stage") == "pretrain" and written.pop("kind") == "lm"
    assert build(PretrainConfig, written) == c


def test_another_runs_workdir_is_refused_and_left_alone(config, tmp_path):
    claim_workdir(tmp_path, "pretrain", built(config))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError) as caught:
        claim_workdir(tmp_path, "pretrain", built(config, model__n_layer=5, optimizer__learning_rate=0.5, steps=9))
    message = str(caught.value)
    assert "model.n_layer: saved 4, requested 5" in message
    assert "optimizer.learning_rate: saved 0.001, requested 0.5" in message
    assert "steps" not in message and "--workdir" in message  # a longer run is the same run
    assert (tmp_path / "config.json").read_bytes() == before


def test_another_stages_workdir_is_refused(config, tmp_path):
    claim_workdir(tmp_path, "pretrain", built(config))
    with pytest.raises(InputError, match="stage: saved 'pretrain', requested 'sft'"):
        claim_workdir(tmp_path, "sft", built(config))


@pytest.mark.parametrize(
    "key", ["model.n_layer", "batch_size", "seed", "data.source", "precision.compute", "schedule.kind"]
)
def test_what_the_run_computes_may_not_change(config, tmp_path, key):
    other = {"data.source": "y", "precision.compute": "bfloat16", "schedule.kind": "linear"}.get(key, 24)
    claim_workdir(tmp_path, "pretrain", built(config))
    with pytest.raises(InputError, match=f"  {key}: "):
        claim_workdir(tmp_path, "pretrain", built(config, **{key.replace(".", "__"): other}))


def test_where_and_how_fast_it_runs_may(config, tmp_path, capsys):
    claim_workdir(tmp_path, "pretrain", built(config))
    changed = built(
        config, mesh__data=1, mesh__fsdp=-1, checkpoint__every=7, eval__batches=3, steps=5000, steps_per_dispatch=1,
        log__every=5, samples__max_new_tokens=9, microbatch_size=4, loss_chunk=7, model__remat="full",
        model__pipeline_microbatches=4, model__pipeline_virtual_stages=2,
    )  # fmt: skip
    assert claim_workdir(tmp_path, "pretrain", changed) is True
    assert "config.mesh.fsdp changed from 1 to -1" in capsys.readouterr().out
    assert read_config(tmp_path)["mesh"]["fsdp"] == -1


def test_a_run_of_an_earlier_version_goes_on(config, tmp_path, capsys):
    """Keys that it has no word of are taken as they are now; a section that was None then is a change."""
    c = built(config)
    claim_workdir(tmp_path, "pretrain", c)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    earlier = json.loads(path.read_text())
    del earlier["optimizer"]["offload"], earlier["mesh"]["rules"], earlier["optimizer"]["eps"]
    write_json(path, earlier)
    assert claim_workdir(tmp_path, "pretrain", c) is True
    assert (
        capsys.readouterr().out
        == f"config.optimizer.eps is newer than this run, which continues with {c.optimizer.eps}\n"
    )
    assert json.loads(path.read_text()) == whole
    write_json(path, earlier)  # no word of it, and now other than by default
    with pytest.raises(InputError, match="optimizer.eps: saved None, requested 0.5"):
        claim_workdir(tmp_path, "pretrain", built(config, optimizer__eps=0.5))
    write_json(path, whole)  # a mapping that was empty
    with pytest.raises(InputError, match="data.mixture.wiki: saved None, requested 1"):
        claim_workdir(
            tmp_path, "pretrain", dataclasses.replace(c, data=dataclasses.replace(c.data, mixture={"wiki": 1.0}))
        )
    write_json(path, {**whole, "optimizer": None})
    with pytest.raises(InputError, match="optimizer.eps: saved None"):
        claim_workdir(tmp_path, "pretrain", c)


def test_checkpoints_without_the_config_that_made_them(config, tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(InputError, match="has checkpoints but no config.json"):
        claim_workdir(tmp_path, "pretrain", built(config))
    assert not (tmp_path / "config.json").exists()


def test_a_config_may_leave_out_its_mesh():
    seen = []
    stage = configs.with_sharding_rules(lambda config: seen.append(sharding.partition_spec(("embed",))))
    for config in ({}, {"mesh": None}, {"mesh": {"data": 1}}, {"mesh": {"rules": {"embed": "none"}}}):
        stage(config)
    assert [spec[0] for spec in seen] == ["fsdp", "fsdp", "fsdp", None]


def test_no_workdir_and_a_damaged_one(tmp_path):
    with pytest.raises(InputError, match="is not a workdir"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"stage": ')
    with pytest.raises(InputError, match="config.json is damaged"):
        read_config(tmp_path)


def test_json_lines(tmp_path):
    """A row a line, whatever is in its texts; NaN is null; a row that cannot be written leaves the old file."""
    path, rows = tmp_path / "a.jsonl", [{"text": "é\n\u2028x", "loss": float("nan")}, {"n": np.int32(3)}]
    write_json_lines(path, iter(rows))
    assert read_json_lines(path) == [{"text": "é\n\u2028x", "loss": None}, {"n": 3}]
    with pytest.raises(TypeError):
        write_json_lines(path, [{"a": 1}, {"a": object()}])
    assert len(read_json_lines(path)) == 2 and [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_write_json_is_atomic(tmp_path):
    """A reader beside a writer of large files never sees half of one."""
    path = tmp_path / "value.json"
    values = [{"n": n, "filler": [n] * 20_000} for n in (1, 2)]
    write_json(path, values[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for value in values:
                write_json(path, value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            assert json.loads(path.read_text()) in values
    finally:
        stop.set()
        writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_safe_at_any_depth(tmp_path):
    """A bare NaN is no JSON: jq and every parser but Python's refuse the file."""
    nan, inf = float("nan"), float("inf")
    value = {
        "loss": nan, "parts": {"web": [1.0, -inf, {"deep": inf}]}, "pair": (nan, 2), "number": np.float32(0.5),
        "nan": np.float32("nan"), "counts": np.arange(3), "curve": np.array([0.5, nan]), "whole": np.int64(7),
        "text": "NaN", "none": None, "yes": True,
    }  # fmt: skip
    expected = {
        "loss": None, "parts": {"web": [1.0, None, {"deep": None}]}, "pair": [None, 2], "number": 0.5, "nan": None,
        "counts": [0, 1, 2], "curve": [0.5, None], "whole": 7, "text": "NaN", "none": None, "yes": True,
    }  # fmt: skip
    assert json_safe(value) == expected
    write_json(tmp_path / "value.json", value)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads((tmp_path / "value.json").read_text(), parse_constant=refuse) == expected


def test_write_json_leaves_no_temporary_file_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_json(tmp_path / "value.json", {"a": 1})
    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", full)
    with pytest.raises(OSError):
        write_json(tmp_path / "value.json", {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}


# --- the command line -------------------------------------------------------------------------------------

DESCRIBE = ("gptjax.describe",)
PRETRAIN = ("gptjax.pretrain", "--workdir=/nonexistent/workdir")


@pytest.mark.parametrize(
    "command, says",
    [
        ((*DESCRIBE, "--config=configs/gpt2.py:125m"), "Unknown GPT-2 size '125m': did you mean '124m'"),
        ((*PRETRAIN, "--config=configs/gpt2.py", "--config.model.n_layers=3"), "unknown config key.*n_layer"),
        (
            (*PRETRAIN, "--config=configs/gpt2.py", "--config.optimizer.lr=3"),
            "unknown config key config.optimizer.lr: there are b1, b2, clip_norm, .*learning_rate, name",
        ),
        ((*DESCRIBE, "--config=configs/gpt2.py", "--config.log.every=0"), "config.log.every=0 must be at least 1"),
        (
            (*DESCRIBE, "--config=configs/gpt2.py", "--config.data.mixture.web=much"),
            "config.data.mixture.web='much' must be a number",
        ),
        (
            (*DESCRIBE, "--config=configs/gpt4.py"),
            "There is no config file configs/gpt4.py: did you mean 'configs/gpt[123].py'",
        ),
        ((*DESCRIBE, "--config=configs/gpt2.py", "--config.model.n_layer=many"), "many"),
        (("gptjax.pretrain", "--config=configs/gpt2.py"), "--workdir"),
        ((*DESCRIBE, "--config=configs/gpt2.py", "json"), "Unexpected argument 'json'"),
    ],
    ids=["preset", "key", "no near key", "range", "weight", "file", "value", "no workdir", "no flag"],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(command, says, request, monkeypatch):
    monkeypatch.chdir(ROOT)
    if request.node.callspec.id == "range":  # one of them as a process of its own
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = main_of(*command)
    assert code == 2, err
    assert "Traceback" not in err and out == ""
    lines = [line for line in err.strip().splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(says, lines[0]), lines[0]


UNKNOWN = {  # the argument: what is said
    "checkpoint.keep": "config.checkpoint.keep: did you mean 'keep_last'?",
    "eval.foo": "config.eval.foo: there are batches, every",
    "foo": "config.foo: there are batch_size, checkpoint, data,",
    "data.sources": "config.data.sources: did you mean 'source'?",
    "zzz.every": "config.zzz: there are batch_size",
    "data.mixtures.web": "config.data.mixtures: did you mean 'mixture'?",
    "steps.most": "config.steps.most: config.steps has no keys of its own.",
}


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """parsed(config file, arguments) -> the config that a main is given."""
    from absl import flags

    def parse(file, *arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["main", f"--config={ROOT / 'configs' / file}", *arguments])
        command_line.config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        monkeypatch.setattr(command_line.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
        found = []
        run(lambda _: found.append(values.config))
        return found[0]

    return parse


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_of_the_command_line_names_the_nearest_or_all(parsed, capsys, key):
    with pytest.raises(SystemExit) as caught:
        parsed("gpt2.py", f"--config.{key}=1")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: unknown config key {UNKNOWN[key]}")


def test_unroll_follows_the_layers_and_not_the_other_way_round(parsed):
    model = parsed("shakespeare_char.py", "--config.model.n_layer=2").model
    assert (model.n_layer, model.unroll) == (2, 2)
    model = parsed("shakespeare_char.py", "--config.model.n_layer=2", "--config.model.unroll=1").model
    assert (model.n_layer, model.unroll) == (2, 1)


def test_a_mixture_where_there_can_be_none(parsed, capsys):
    with pytest.raises(SystemExit):
        parsed("instructgpt/sft.py", "--config.data.mixture.web=.5")
    assert capsys.readouterr().err.startswith("error: unknown config key config.data.mixture: there are ")


def test_a_mixture_is_named_on_the_command_line(parsed, tmp_path):
    """Its keys are the user's own, so that no config file has them: they are added, or override what is there."""
    before = list(sys.argv)
    c = parsed("gpt2.py", "--config.data.mixture.web=.5", "--config.data.mixture.my_books=2", "--config.steps=7")
    assert c.data.mixture.to_dict() == {"web": 0.5, "my_books": 2.0} and c.steps == 7
    (tmp_path / "whole.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'data': {'mixture': {'web': 1, 'books': 1}}})\n"
    )
    c = parsed(tmp_path / "whole.py", "--config.data.mixture.web=.5")
    assert c.data.mixture.to_dict() == {"web": 0.5, "books": 1}
    c = parsed("gpt3.py:125m,mixture", "--config.data.mixture.books1=3", "--config.data.mixture.web=1")
    assert c.data.mixture["books1"] == 3.0 and c.data.mixture["web"] == 1.0 and c.data.mixture["webtext2"] == 22.0
    assert c.is_locked and sys.argv[1] != before


def test_an_input_error_of_a_main_is_told_the_same_way(monkeypatch, capsys):
    def main(_):
        raise InputError("There is no oil in the lamp: buy some.")

    monkeypatch.setattr(sys, "argv", ["lamp"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: There is no oil in the lamp: buy some.\n"


# --- config.json of earlier versions ----------------------------------------------------------------------


def test_a_run_of_an_earlier_version_resumes(config, tmp_path, capsys):
    """Keys that have been renamed, and no word of what kind of model it is."""
    c = built(config)
    claim_workdir(tmp_path, "pretrain", c)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["model"]["pipeline_rounds"] = saved["model"].pop("pipeline_virtual_stages")
    del saved["kind"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert claim_workdir(tmp_path, "pretrain", c) is True
    assert capsys.readouterr().out == ""
    assert read_config(tmp_path)["model"]["pipeline_virtual_stages"] == 1


@pytest.mark.parametrize(
    "saved, expected",
    [
        ({"stage": "reward", "normalise": "mean"}, {"kind": "scalar", "normalize": "mean"}),
        ({"stage": "ppo", "ppo": {"normalise": "token", "ptx_normalise": "sequence"}},
         {"kind": "lm", "ppo": {"normalize": "token", "ptx_normalize": "sequence"}}),
        ({"stage": "convert"}, {"kind": "lm", "without_tokenizer": True}),
        ({"stage": "sft"}, {"kind": "lm"}),
    ],
)  # fmt: skip
def test_what_an_earlier_version_wrote_is_read_in_todays_words(tmp_path, saved, expected):
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path) == {"stage": saved["stage"], **expected}


@pytest.mark.parametrize("old, new", [("normalise", "normalize"), ("model.pipeline_rounds", "pipeline_virtual_stages")])
def test_a_renamed_key_on_the_command_line_names_the_new_one(parsed, capsys, old, new):
    with pytest.raises(SystemExit):
        parsed("gpt2.py" if "." in old else "instructgpt/reward.py", f"--config.{old}=mean")
    assert new in capsys.readouterr().err
