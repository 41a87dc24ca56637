"""Every number in the config of every stage is checked: those that cannot be are refused in one line."""

import functools
import typing

import pytest
from ml_collections import config_dict as mlc

from gptjax import ranges
from gptjax.config import build, config_dict, section_class
from gptjax.dpo import DPOConfig
from gptjax.errors import InputError
from gptjax.finetune import FinetuneConfig
from gptjax.ppo import PPOConfig
from gptjax.pretrain import PretrainConfig
from gptjax.reward import RewardConfig
from gptjax.sft import SFTConfig
from gptjax.training.metrics import LogConfig

STAGES = {
    "pretrain": PretrainConfig, "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig,
    "finetune": FinetuneConfig,
}  # fmt: skip
MODEL = {"vocab_size": 16, "n_layer": 1, "n_head": 1, "d_model": 8, "context_length": 8}
DIGITS_20 = 12_345_678_901_234_567_890

# Where 0 is not refused, and what it means there. A new field that takes 0 belongs here.
ZERO = {
    "seed", "data.split_seed", "model.dropout", "samples.temperature", "samples.count", "mix.fraction", "lm_weight",
    "rollout.top_k",
    "optimizer.weight_decay", "value_optimizer.weight_decay", "optimizer.clip_norm", "value_optimizer.clip_norm",
    "optimizer.b1", "optimizer.b2", "value_optimizer.b1", "value_optimizer.b2",  # no memory
    "schedule.warmup_tokens", "schedule.warmup_fraction", "head_dropout", "transfer",
    "schedule.ramp_tokens", "schedule.final_fraction", "rate.warmup", "rate.warmup_start",
    "checkpoint.keep_every", "eval.batches", "eval.lm_batches", "eval.samples",
    "log.profile_start", "log.profile_steps",
    "rollout.missing_eos", "rollout.gamma", "rollout.lam", "kl.coefficient",
    "ppo.value_coefficient", "ppo.ptx_coefficient", "ppo.ema_decay",
}  # fmt: skip
MINUS_ONE = {"mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.stage", "mesh.seq", "rollout.missing_eos", "transfer"}


def numbers(cls, path=""):
    """Dotted names of the number fields of a config and its sections: {name: int or float}."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if section := section_class(hint):
            found |= numbers(section, f"{path}{name}.")
        elif (kind := ranges.split(hint)[0]) in (int, float):
            found[f"{path}{name}"] = kind
    return found


FIELDS = [(stage, name, kind) for stage, cls in STAGES.items() for name, kind in numbers(cls).items()]


def with_value(stage, name, value):
    """The stage's config with one field set, whatever the type."""
    c = config_dict(STAGES[stage]).to_dict()
    if stage == "pretrain":
        c["model"] |= MODEL
    c["mesh"]["data"] = 1  # at most one axis takes the rest
    *sections, last = name.split(".")
    functools.reduce(dict.get, sections, c)[last] = value
    return build(STAGES[stage], c)


def refused(stage, name, value) -> str | None:
    try:
        with_value(stage, name, value)
    except InputError as error:
        return str(error)
    return None


def test_the_walk_sees_all_of_them():
    assert len(FIELDS) > 150 and ("ppo", "rollout.temperature", float) in FIELDS
    assert ("pretrain", "optimizer.b2", float) in FIELDS and ("sft", "log.stuck_after", float) in FIELDS
    with_value("pretrain", "seed", 0)  # what it starts from is a config


@pytest.mark.parametrize("stage", STAGES)
def test_no_number_that_can_not_be_is_taken(stage):
    for name, kind in numbers(STAGES[stage]).items():
        for value in (-1, float("nan"), float("inf"), float("-inf"), -DIGITS_20, True, "3", 0):
            message = refused(stage, name, value)
            if (value is not True and value == 0 and name in ZERO) or (value == -1 and name in MINUS_ONE):
                assert message is None or "kl" in message, (name, value, message)
            elif value == -DIGITS_20 and name == "rollout.missing_eos":
                assert message is None
            else:
                assert message and message.startswith(f"config.{name}="), (name, value, message)
                assert "\n" not in message and f"{value!r}" in message
        if kind is int:
            for value in (DIGITS_20, 2.5):
                message = refused(stage, name, value)
                assert message and message.startswith(f"config.{name}={value!r} must be "), (name, value, message)
        else:  # floats end where float32 does, or at 1
            assert refused(stage, name, 1e39), name
            assert refused(stage, name, 10**400), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_in_their_ranges(stage):
    for name in numbers(STAGES[stage]):
        c = config_dict(STAGES[stage]).to_dict()
        *sections, last = name.split(".")
        value = functools.reduce(dict.get, sections, c)[last]
        assert value is None or refused(stage, name, value) is None, name


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("log.every", 0, "config.log.every=0 must be at least 1 and at most 2,147,483,647."),
        ("log.stuck_after", 0, "config.log.stuck_after=0 must be above 0 and at most 1,000,000,000."),
        ("microbatch_size", -2, "config.microbatch_size=-2 must be at least 1"),
        ("seed", DIGITS_20, f"config.seed={DIGITS_20} must be at least 0 and at most 4,294,967,295."),
        ("mesh.fsdp", 0, "config.mesh.fsdp=0 must be at least 1 and at most 2,147,483,647, or -1."),
        ("optimizer.b2", 1.0, "config.optimizer.b2=1.0 must be at least 0 and below 1."),
        ("steps", "abc", "config.steps='abc' must be a whole number."),
        ("optimizer.learning_rate", "fast", "config.optimizer.learning_rate='fast' must be a number."),
        ("log.tensorboard", 1, "config.log.tensorboard=1 must be True or False."),
        ("data.source", 3, "config.data.source=3 must be text."),
        ("samples.prompts", "abc", "config.samples.prompts='abc' must be a list, as ('abc',)."),
        ("samples.prompts", ["a", 1], "config.samples.prompts[1]=1 must be text."),
        ("data.mixture", {"web": -1.0}, "config.data.mixture.web=-1.0 must be at least 0."),
        ("data.mixture", {"web": float("nan")}, "config.data.mixture.web=nan must be at least 0."),
        ("batch_size", None, "config.batch_size is not set: give it with --config.batch_size=..."),
        ("mesh", 3, "config.mesh=3 must be a section with the keys data, fsdp"),
        ("mesh", None, "config.mesh=None must be a section with the keys data, fsdp"),
    ],
)
def test_what_is_said(name, value, says):
    assert (refused("pretrain", name, value) or "").startswith(says)


def test_whole_numbers_are_numbers_and_no_value_is_none():
    assert with_value("pretrain", "optimizer.learning_rate", 1).optimizer.learning_rate == 1
    assert with_value("pretrain", "microbatch_size", None).microbatch_size is None
    c = config_dict(PretrainConfig)
    assert isinstance(c.get_ref("microbatch_size"), mlc.FieldReference) and c.get_type("microbatch_size") is int


@pytest.mark.parametrize(
    "hint, metavar, limits",
    [
        (int, "INT", "at least 0"),
        (ranges.Count | None, "INT", "at least 1"),
        (ranges.Axis, "INT", "at least 1, or -1"),
        (ranges.Seed, "INT", "0 to 4,294,967,295"),
        (ranges.Real, "FLOAT", ""),
        (ranges.Positive, "FLOAT", "above 0"),
        (ranges.Share, "FLOAT", "0 to 1"),
        (ranges.BelowOne, "FLOAT", "at least 0 and below 1"),
        (bool, "BOOL", None),
        (str | None, "TEXT", None),
        (typing.Literal["pre", "post"], "pre|post", None),
        (tuple[str, ...], "(TEXT, ...)", None),
        (typing.Mapping[str, float], "FLOAT", None),
    ],
)
def test_what_help_says_of_a_type(hint, metavar, limits):
    _, range_, _ = ranges.split(hint)
    assert ranges.metavar(hint) == metavar and (range_ and range_.brief()) == limits


def test_weights_and_biases_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="log.wandb=True needs the package wandb: pip install wandb"):
        LogConfig(wandb=True)
    assert LogConfig().wandb is False
