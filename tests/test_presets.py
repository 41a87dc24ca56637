"""Every number of the published alignment recipes, as the papers give them (papers.md lists where)."""

import importlib.util
from pathlib import Path

import jax
import pytest

from configs import gpt3
from configs.instructgpt import ppo, reward, sft
from gptjax import config as configs
from gptjax.aot.check import PRESETS, Request, adjusted, build_program, check
from gptjax.cost.topology import CHIPS, parse, slices
from gptjax.describe import describe
from gptjax.errors import InputError
from gptjax.ppo import PPOConfig
from gptjax.reward import RewardConfig
from gptjax.sft import SFTConfig

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).resolve().parent.parent


def preset(kind, path, *arg):
    spec = importlib.util.spec_from_file_location("preset", ROOT / "configs" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.build(kind, module.get_config(*arg))


def of(section, *names):
    return tuple(getattr(section, name) for name in names)


@pytest.mark.parametrize(
    "arg, batch, rate, epochs, mix, dropout",
    [
        ("1.3b", 32, 9.65e-6, 16, 0.0, 0.2),
        ("6b", 32, 9.65e-6, 16, 0.0, 0.2),
        ("175b", 8, 5.03e-6, 16, 0.0, 0.2),
        ("1.3b,rl", 32, 5e-6, 2, 0.1, None),
        ("6b,rl", 32, 1.04e-5, 2, 0.1, None),
        ("175b,rl", 8, 2.45e-6, 2, 0.1, None),
    ],
)
def test_instructgpt_sft(arg, batch, rate, epochs, mix, dropout):
    c = preset(SFTConfig, "instructgpt/sft.py", arg)
    assert (c.batch_size, c.optimizer.learning_rate, c.epochs, c.mix.fraction) == (batch, rate, epochs, mix)
    assert of(c.schedule, "kind", "final_fraction", "warmup_tokens") == ("cosine", 0.1, 0.0)
    assert of(c.optimizer, "b1", "b2", "weight_decay") == (0.9, 0.95, 0.0)
    assert c.model.dropout == dropout and (dropout is None or c.model.dropout_sites == "residual")
    assert c.data.loss_on == "response" and c.data.drop_long and not c.data.packing


def test_instructgpt_reward():
    c = preset(RewardConfig, "instructgpt/reward.py")
    assert of(c, "epochs", "batch_size", "objective", "normalize") == (1.0, 64, "pairs", "mean")
    assert of(c.optimizer, "learning_rate", "b1", "b2") == (9e-6, 0.9, 0.95)
    assert of(c.schedule, "kind", "final_fraction", "warmup_tokens") == ("cosine", 0.1, 0.0)


@pytest.mark.parametrize(
    "arg, rate, value_rate, gamma",
    [
        ("1.3b", 5e-6, 9e-6, 27.8),
        ("6b", 5e-6, 9e-6, 27.8),
        ("175b", 2.55e-6, 5e-6, 27.8),
        ("1.3b,ppo", 5e-6, 9e-6, 0.0),
    ],
)
def test_instructgpt_ppo(arg, rate, value_rate, gamma):
    c = preset(PPOConfig, "instructgpt/ppo.py", arg)
    assert of(c, "episodes", "batch_size", "shared_trunk") == (256_000, 512, False)
    assert of(c.ppo, "epochs", "minibatches", "clip", "ptx_coefficient", "ema_decay") == (1, 8, 0.2, gamma, 0.992)
    assert (c.ptx.per_episode, c.kl.coefficient, c.kl.target) == (8.0, 0.02, None)
    assert of(c.rollout, "temperature", "gamma", "lam", "whiten_rewards") == (1.0, 1.0, 0.95, False)
    assert (c.optimizer.learning_rate, c.value_optimizer.learning_rate) == (rate, value_rate)
    assert [c.rate.fraction(i, 500) for i in (0, 5, 10, 499)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert c.data.max_length == 1000 and c.rollout.max_new_tokens == 1000


def test_ziegler():
    c = preset(PPOConfig, "ziegler.py", "ppo")
    assert of(c, "episodes", "batch_size", "shared_trunk") == (1_000_000, 512, True)
    assert of(c.ppo, "epochs", "minibatches", "clip", "value_clip", "value_coefficient") == (4, 1, 0.2, 0.2, 0.1)
    assert of(c.kl, "coefficient", "target", "horizon") == (0.15, 6.0, 10_000)
    assert of(c.rollout, "max_new_tokens", "temperature", "gamma", "lam") == (24, 0.7, 1.0, 0.95)
    assert c.rollout.whiten_rewards and c.rollout.missing_eos == -1.0 and c.data.max_length == 64
    assert of(c.optimizer, "name", "learning_rate", "eps") == ("gpt1_adam", 1e-5, 1e-5)  # TensorFlow's epsilon
    assert c.rate.fraction(0, 100) == 1.0 and c.rate.fraction(100, 100) == 0.0
    r = preset(RewardConfig, "ziegler.py", "reward")
    assert of(r, "objective", "batch_size", "epochs", "normalize") == ("best", 32, 1.0, "mean_std")
    assert r.optimizer.learning_rate == 5e-5 and of(r.schedule, "kind", "final_fraction") == ("linear", 0.0)


def test_nplus():
    s, r, c = (preset(k, "nplus.py", a) for k, a in ((SFTConfig, "sft"), (RewardConfig, "reward"), (PPOConfig, "ppo")))
    for stage in (s, r, c):
        assert of(stage.optimizer, "name", "learning_rate", "eps", "weight_decay") == ("adamw", 3e-6, 1e-5, 0.0)
    assert (s.batch_size, s.epochs, s.data.template, s.data.loss_on) == (128, 1.0, "plain", "all")
    assert (r.batch_size, r.epochs, r.normalize) == (64, 1.0, "mean")
    assert s.schedule.final_fraction == r.schedule.final_fraction == 0.0
    assert of(c, "episodes", "batch_size", "shared_trunk") == (1_000_000, 512, False)
    assert of(c.ppo, "epochs", "minibatches", "clip", "value_clip", "value_coefficient") == (4, 1, 0.2, 0.2, 0.1)
    assert of(c.rollout, "max_new_tokens", "temperature", "gamma", "lam", "missing_eos") == (53, 0.7, 1.0, 0.95, -1.0)
    assert (c.kl.coefficient, c.kl.target, c.data.max_length, c.rate.kind) == (0.05, None, 512, "linear")


# --- the hardware that their docstrings name ----------------------------------------------------------------

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}
PROGRAMS = [  # (stage, argument, slice, program, model or policy, reward model)
    *(("sft", size, sft.SLICES[size], "train", sft.MODELS[size], None) for size in sft.SIZES),
    ("reward", None, reward.SLICE, "train", reward.MODEL, None),
    *(
        ("ppo", size, ppo.SLICES[size], program, ppo.MODELS[size], ppo.REWARD)
        for size in ppo.SIZES
        for program in ("ppo_collect", "ppo_update")
    ),
]


def on_its_slice(stage, argument, slice_, program, policy, reward):
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
    config = STAGES[stage].get_config(*([argument] if argument else [])).to_dict()
    return config, parse(slice_), Request(program, policy=PRESETS[policy], reward=reward and PRESETS[reward])


QUICK = (("sft", "175b", "train"), ("reward", None, "train"), ("ppo", "175b", "ppo_collect"),
         ("ppo", "175b", "ppo_update"))  # fmt: skip


def slow_unless(quick, value, id):
    return pytest.param(value, id=id, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    "case", [slow_unless((c[0], c[1], c[3]) in QUICK, c, "-".join(filter(None, (c[0], c[1], c[3])))) for c in PROGRAMS]
)
def test_instructgpt_fits_its_slice_by_our_count(case):
    """Without any setting of the command line."""
    config, topology, request = on_its_slice(*case)
    assert adjusted(config, topology, request)[1] == {}
    program = build_program(config, topology, request)
    assert 0 < sum(program.parts.values()) < 0.9 * topology.chip.hbm


# larger ones take too long; training of the 1.3b is compiled in test_aot.py
COMPILED = (("reward", None, "train"), ("ppo", "1.3b", "ppo_collect"))


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in PROGRAMS if (case[0], case[1], case[3]) in COMPILED])
def test_instructgpt_fits_its_slice_by_the_compiler(case):
    config, topology, request = on_its_slice(*case)
    with jax.default_matmul_precision("default"):  # conftest.py's is for the CPU
        assert check(config, topology, request)["fits"]


SIZES = ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")


@pytest.mark.parametrize("size", [slow_unless(size in ("1.3b", "175b"), size, size) for size in SIZES])
def test_gpt3_fits_a_v5p_slice_of_its_mesh(size):
    d = describe(gpt3.get_config(size).to_dict())
    assert d["devices"] in {t.device_count for t in slices("v5p")}
    assert sum(d["peak_per_tpu_chip"].values()) < 0.9 * CHIPS["v5p"].hbm


def test_a_stage_that_begins_with_another_model_is_told_to_name_it():
    config = sft.get_config().to_dict()
    for request in (Request(), Request("decode", policy=PRESETS["gpt3:1.3b"])):
        with pytest.raises(InputError, match="give --program=train and --policy, one of gpt1"):
            adjusted(config, parse("v5p:2x2x2"), request)


def test_a_preset_of_another_name_is_refused():
    with pytest.raises(InputError, match="2.7b.*did you mean|2.7b"):
        preset(SFTConfig, "instructgpt/sft.py", "2.7b")
    with pytest.raises(InputError, match="stage"):
        preset(PPOConfig, "nplus.py", "dpo")
