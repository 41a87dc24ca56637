"""--help, --print_config and `python -m gptjax`: every key explained, every command listed, every preset shown."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import typing

import pytest
from absl import flags
from conftest import ROOT
from jax._src import xla_bridge
from ml_collections import config_dict as mlc
from runs import main_of
from test_ranges import STAGES

from gptjax import command_line, usage
from gptjax.config import build, config_dict, documentation, flatten, section_class, sections
from gptjax.errors import InputError
from gptjax.pretrain import PretrainConfig


@pytest.fixture
def printed_by(monkeypatch):
    """printed_by(command, options) -> what `python -m command` prints where no device can be asked for."""

    def no_device(*_, **__):
        raise AssertionError("JAX was asked for its devices")

    def printed(command, *options, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.chdir(ROOT)
        for name in ("backends", "get_backend"):
            monkeypatch.setattr(xla_bridge, name, no_device)
        code, out, err = main_of(command, *options)
        assert (code, err) == (0, "")
        return out

    return printed


def dataclasses_of(cls):
    """A config's class and those of its sections."""
    found = {cls}
    for kind in typing.get_type_hints(cls).values():
        if section_class(kind):
            for one in typing.get_args(kind) or (kind,):
                found |= dataclasses_of(one)
    return found


def load(path, *argument):
    spec = importlib.util.spec_from_file_location("preset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


@pytest.fixture
def parsed(monkeypatch):
    """parsed(arguments) -> the config that a main is given."""

    def parse(*arguments, config_class=None):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        command_line.config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        monkeypatch.setattr(command_line.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
        found = []
        command_line.run(lambda _: found.append(values.config), config_class)
        return found[0]

    return parse


# --- every key has its line -------------------------------------------------------------------------------


def test_the_stages_of_these_tests_are_all_there_are():
    assert {f"gptjax.{name}" for name in STAGES} == {c.name for c in usage.commands() if c.stage}


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_config_is_explained(stage):
    missing = [f"{s.path}.{name}" for s in sections(STAGES[stage]) for name, key in s.keys.items() if len(key[2]) < 8]
    assert not missing, "give them a line `key: explanation` in the docstring of their dataclass"
    assert all(section.about for section in sections(STAGES[stage]))


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_a_docstring_explains_a_key(stage):
    for cls in dataclasses_of(STAGES[stage]):
        about, explained = documentation(cls)
        assert explained.keys() <= {field.name for field in dataclasses.fields(cls)}, cls
        words = [about, *(f"{key}: {text}" for key, text in explained.items())]
        if cls.__base__ is object:  # nothing of the docstring is lost, as a line that lacks its indentation would be
            assert " ".join(words).split() == inspect.cleandoc(cls.__doc__).split(), cls


def test_a_config_that_extends_another_has_its_keys_too():
    @dataclasses.dataclass(frozen=True)
    class Base:
        """What all have.

        size: in meters,
            not in feet.
        color: of the lid.
        """

        size: float = 1.0
        color: str = "red"

    @dataclasses.dataclass(frozen=True)
    class Box(Base):
        """A box.

        weight: in kg: both
        color: of all of it.
        """

        weight: int = 2

    @dataclasses.dataclass(frozen=True)
    class Bare(Box):
        pass

    expected = {"size": "in meters, not in feet.", "color": "of all of it.", "weight": "in kg: both"}
    assert documentation(Box) == documentation(Bare) == ("A box.", expected)
    shown = command_line.config_help(Box, mlc.ConfigDict({"size": 3e-9}), 80)
    assert shown.splitlines() == [
        "config: A box.",
        "  --config.size=FLOAT  in meters, not in feet. (at least 0; default: 3e-09)",
        "  --config.color=TEXT  of all of it. (default: red)",
        "  --config.weight=INT  in kg: both (at least 0; default: 2)",
    ]


# --- --help of a stage ------------------------------------------------------------------------------------


def test_help_of_a_stage(printed_by):
    shown = printed_by("gptjax.pretrain", "--help", columns=100)
    assert shown.startswith("Pre-training: ") and "    python -m gptjax.pretrain --config=" in shown
    assert max(map(len, shown.splitlines())) <= 100
    for flag in ("--config=FILE[:ARGUMENT]", "--workdir=PATH", "--join_limit=INT", "--print_config"):
        assert re.search(rf"^  {re.escape(flag)}( |$)", shown, re.MULTILINE), flag
    keys = re.findall(r"^  --config\.([\w.]+)=", shown, re.MULTILINE)
    assert keys[0] == "KEY" and len(keys) == len(set(keys))
    c = config_dict(PretrainConfig)
    c.model.update(vocab_size=1, n_layer=1, n_head=1, d_model=1, context_length=1)
    assert set(keys[1:]) == flatten(build(PretrainConfig, c)).keys() | {"data.mixture.NAME"}
    text = " ".join(shown.split())
    for told in (
        "--config.batch_size=INT sequences of a step over all devices. (at least 1; default: 32)",
        "--config.model.norm=pre|post 'pre' = GPT-2/3",
        "--config.mesh.fsdp=INT devices that the rows of the batch, parameters, gradients and optimizer state are "
        "sharded over. (at least 1, or -1; default: 1)",
        "--config.samples.prompts=(TEXT, ...) texts",
        "(0 to 1; default: 0.1)",
        "config.optimizer: ",
        "configs/gpt2.py GPT-2 (Radford et al. 2019) on any text. ARGUMENT: 124m (default) | 355m | 774m | 1558m",
        "configs/gpt1.py GPT-1",
    ):
        assert told in text, told
    assert "configs/ziegler.py" not in shown


def test_help_with_a_config_shows_its_values(printed_by):
    shown = printed_by("gptjax.ppo", "-h", "--config=configs/nplus.py:ppo", "--config.no.such.key=1")
    text = " ".join(shown.split())
    assert "values in configs/nplus.py:ppo where" in text and max(map(len, shown.splitlines())) <= 80
    assert "FLOAT beta of the per-token KL penalty; 0 = none. (at least 0; default: 0.05)" in text
    assert "configs/nplus.py TL;DR" in text and "ARGUMENT: ppo (default)" in text and "configs/gpt1.py" not in text
    assert "--config.data.fields.NAME=TEXT" in text and "(default: prompt=prompt)" in text


@pytest.mark.parametrize(
    "file, says", [("gpt2.pyy", "There is no config file"), ("gpt2.py:125m", "Unknown GPT-2 size '125m': did you mean")]
)
def test_help_with_a_config_that_cannot_be(parsed, capsys, file, says):
    with pytest.raises(SystemExit) as caught:
        parsed("--help", f"--config={ROOT / 'configs' / file}", config_class=PretrainConfig)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(f"error: {says}")


def test_help_whose_reader_is_gone():
    read, write = os.pipe()
    os.close(read)
    for command in ("gptjax", "gptjax.describe"):
        done = subprocess.run(
            [sys.executable, "-m", command, "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)


def test_help_of_a_tool_has_its_own_flags_alone(printed_by):
    shown = printed_by("gptjax.sample", "--helpshort")
    assert "    python -m gptjax.sample --workdir=runs/x" in shown and " \\\n        --max_new_tokens=" in shown
    flags_ = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert flags_[0] == "workdir" and {"prompt", "step", "speed"} < set(flags_) and "verbosity" not in flags_
    assert "A training run's workdir. (required)" in shown and "(at least 1; default: 128)" in " ".join(shown.split())


def test_a_value_is_no_request_for_help(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_string("prompt", "", "", flag_values=values)
    flags.DEFINE_bool("raw", False, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    asks = lambda *arguments: command_line._asks_for_help(["main", *arguments])
    assert all(asks(*a) for a in (["-h"], ["--raw", "--help"], ["--prompt=x", "-?"], ["--prompt", "x", "--helpshort"]))
    assert not any(asks(*a) for a in ([], ["--prompt", "--help"], ["--prompt=--help"], ["--", "-h"], ["--helpfull"]))


# --- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_presets_of_a_stage_are_its_configs(stage):
    found = usage.presets(stage)
    assert found
    for preset in found:
        if preset.arguments and preset.default in preset.arguments:
            assert load(preset.path) == load(preset.path, preset.default)
        for argument in preset.arguments or (None,):
            c = load(ROOT / preset.path, *([argument] if argument else []))
            if stage == "pretrain":
                c.model.vocab_size = c.model.vocab_size or 65
            build(STAGES[stage], c)


def test_every_config_file_is_a_preset_of_some_stage():
    listed = {preset.path for stage in (*STAGES, "curate") for preset in usage.presets(stage)}
    assert listed == {os.path.relpath(path) for path in (ROOT / "configs").rglob("*.py")}


def test_config_files_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "a.py").write_text('"""Ours."""\nPRESETS = {"sft": []}\nraise SystemExit\n')  # never run
    (tmp_path / "b.py").write_text("PRESETS = {sft}\n")
    (tmp_path / "c.py").write_text("def get_config(\n")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.py").write_text("PRESETS = 3\n")
    (preset,) = usage.presets("sft", tmp_path)
    assert preset == (str(tmp_path / "a.py"), "Ours.", (), None)


# --- --print_config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, file",
    [("pretrain", "gpt3.py:125m,mixture"), ("sft", "instructgpt/sft.py:6b,rl"), ("reward", "nplus.py:reward"),
     ("ppo", "ziegler.py:ppo")],
)  # fmt: skip
def test_what_is_printed_is_the_config_as_flags(parsed, stage, file):
    """Given in a shell, they make the same config; of a key without a value there is a comment."""
    file = f"--config={ROOT / 'configs' / file}"
    given = ["--config.seed=7", "--config.data.source=it's here/*", "--config.optimizer.learning_rate=1.23456789e-5"]
    if stage == "pretrain":
        prompts = r"""('a "b"\n$x `y` don\'t', '😀 \\', '')"""
        given += ["--config.data.mixture.web=.5", f"--config.samples.prompts={prompts}"]
    c = parsed(file, *given)
    printed = command_line.config_lines(c, STAGES[stage])
    assert "# --config.steps is not set" in printed and "--config.seed=7" in printed
    assert '--config.data.source="it\'s here/*"' in printed
    again = parsed(file, *shlex.split("\n".join(printed), comments=True))
    assert build(STAGES[stage], again) == build(STAGES[stage], c)


def test_a_printed_config_needs_no_workdir_and_no_devices(printed_by):
    options = ("--config=configs/shakespeare_char.py:gpu", "--config.steps=9", "--print_config")
    printed = printed_by("gptjax.pretrain", *options).splitlines()
    assert printed[0] == "--config=configs/shakespeare_char.py:gpu"
    assert {"--config.steps=9", "--config.model.n_layer=6", "# --config.model.vocab_size is not set"} < set(printed)
    assert "--config.samples.prompts='(\"\\n\",)'" in printed


def test_a_config_that_cannot_be_is_not_printed():
    c = load(ROOT / "configs/shakespeare_char.py")
    c.batch_size, c.microbatch_size = 12, 5
    with pytest.raises(InputError, match="batch_size=12 is not a multiple of microbatch_size=5"):
        command_line.config_lines(c, PretrainConfig)
    assert c.model.vocab_size is None  # as it was
    c.log.every = 0
    with pytest.raises(InputError, match=r"config.log.every=0 must be at least 1 and at most 2,147,483,647.$"):
        command_line.config_lines(c, PretrainConfig)


# --- python -m gptjax -------------------------------------------------------------------------------------


def test_every_module_that_runs_is_listed():
    files = (ROOT / "gptjax").rglob("*.py")
    guarded = {path for path in files if re.search(r"^if __name__ ==", path.read_text(), re.MULTILINE)}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for p in guarded}
    commands = usage.commands()
    assert {c.name for c in commands} == names - {"gptjax"} and "gptjax.aot" in names
    stages = ("pretrain", "finetune", "sft", "reward", "dpo", "ppo")
    assert [c.name for c in commands][:6] == [f"gptjax.{s}" for s in stages]
    assert all(10 < len(c.about) <= 120 for c in commands)


def test_the_commands_are_listed_without_jax():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gptjax"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 0 and "gptjax.usage" in imported
    assert not imported & {"jax", "numpy", "absl", "ml_collections", "gptjax.config"}
    for command in usage.commands():
        assert re.search(rf"^  {command.name} +{re.escape(command.about[:40])}", done.stdout, re.MULTILINE)


def test_the_version_and_a_command_by_its_short_name(capsys):
    from gptjax import __version__
    from gptjax.__main__ import main

    assert main(["--version"]) == 0 and capsys.readouterr().out == f"gptjax {__version__}\n"
    assert main(["sft", "--help"]) == 2 and "run python -m gptjax.sft" in capsys.readouterr().err
    assert main(["stf"]) == 2 and "lists the commands" in capsys.readouterr().err
