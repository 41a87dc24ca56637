"""The 13 published shapes: exact parameter counts, counted three ways, and what a config refuses."""

import dataclasses
import importlib.util
import math

import jax
import pytest
from conftest import ROOT

from gptjax import config as configs
from gptjax.errors import InputError
from gptjax.model import gpt, spec
from gptjax.model.spec import GPT1, GPT2, GPT3, GPTConfig, non_embedding_count, parameter_count
from gptjax.pretrain import PretrainConfig

# name: (config file and argument, preset, all parameters, those outside the embeddings)
PRESETS = {
    "gpt1": ("gpt1", None, GPT1, 116_534_784, 85_054_464),
    "gpt2:124m": ("gpt2", "124m", GPT2["124m"], 124_439_808, 85_056_000),
    "gpt2:355m": ("gpt2", "355m", GPT2["355m"], 354_823_168, 302_311_424),
    "gpt2:774m": ("gpt2", "774m", GPT2["774m"], 774_030_080, 708_390_400),
    "gpt2:1558m": ("gpt2", "1558m", GPT2["1558m"], 1_557_611_200, 1_475_561_600),
    "gpt3:125m": ("gpt3", "125m", GPT3["125m"], 125_226_240, 85_056_000),
    "gpt3:350m": ("gpt3", "350m", GPT3["350m"], 355_871_744, 302_311_424),
    "gpt3:760m": ("gpt3", "760m", GPT3["760m"], 760_300_032, 679_959_552),
    "gpt3:1.3b": ("gpt3", "1.3b", GPT3["1.3b"], 1_315_723_264, 1_208_602_624),
    "gpt3:2.7b": ("gpt3", "2.7b", GPT3["2.7b"], 2_651_553_280, 2_517_652_480),
    "gpt3:6.7b": ("gpt3", "6.7b", GPT3["6.7b"], 6_658_404_352, 6_444_163_072),
    "gpt3:13b": ("gpt3", "13b", GPT3["13b"], 12_853_386_240, 12_585_584_640),
    "gpt3:175b": ("gpt3", "175b", GPT3["175b"], 174_604_259_328, 173_961_535_488),
}
every_preset = pytest.mark.parametrize("name", PRESETS)


def config_file(name):
    module_spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def count(config):
    shapes = jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# --- counts -----------------------------------------------------------------------------------------------


def test_every_published_size_is_here():
    assert len(PRESETS) == 13
    assert {name.split(":")[1] for name in PRESETS if name.startswith("gpt2")} == GPT2.keys()
    assert {name.split(":")[1] for name in PRESETS if name.startswith("gpt3")} == GPT3.keys()


@every_preset
def test_the_closed_form_counts_the_papers_parameters(name):
    _, _, preset, total, inner = PRESETS[name]
    assert parameter_count(preset) == total
    assert non_embedding_count(preset) == inner


@every_preset
def test_the_real_init_makes_as_many_parameters(name):
    _, _, preset, total, _ = PRESETS[name]
    assert count(preset) == total


@every_preset
def test_the_config_file_describes_the_same_model(name):
    file, argument, preset, total, _ = PRESETS[name]
    get_config = config_file(file).get_config
    c = configs.build(PretrainConfig, get_config() if argument is None else get_config(argument))
    assert parameter_count(c.model) == total
    assert dataclasses.replace(c.model, remat=preset.remat) == preset  # only the memory policy is the file's own


def test_default_sizes_of_the_config_files():
    for file, total in (("gpt2", 124_439_808), ("gpt3", 125_226_240)):
        assert parameter_count(configs.build(PretrainConfig, config_file(file).get_config()).model) == total


@pytest.mark.parametrize("file, size", [("gpt2", "1.5b"), ("gpt2", "117m"), ("gpt3", "13m"), ("gpt3", "125m,mixtur")])
def test_unknown_sizes_are_refused(file, size):
    with pytest.raises(InputError, match="Unknown GPT-"):
        config_file(file).get_config(size)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
def test_closed_form_equals_init_for_either_norm_and_head(norm, tied):
    c = GPTConfig(11, 3, 2, 6, 5, norm=norm, tied_head=tied)
    assert parameter_count(c) == count(c)
    embeddings = (11 + 5) * 6 + (0 if tied else 11 * 6)
    assert non_embedding_count(c) == count(c) - embeddings == 3 * (12 * 36 + 13 * 6) + (12 if norm == "pre" else 0)


# --- shapes -----------------------------------------------------------------------------------------------


def test_architectures_are_the_papers():
    """layers, width, heads, context: GPT-1 §4.1, GPT-2 Table 2, GPT-3 Table 2.1."""
    shape = lambda c: (c.n_layer, c.d_model, c.n_head, c.context_length)
    assert shape(GPT1) == (12, 768, 12, 512)
    assert [shape(c) for c in GPT2.values()] == [
        (12, 768, 12, 1024), (24, 1024, 16, 1024), (36, 1280, 20, 1024), (48, 1600, 25, 1024)
    ]  # fmt: skip
    assert [shape(c) for c in GPT3.values()] == [
        (12, 768, 12, 2048), (24, 1024, 16, 2048), (24, 1536, 16, 2048), (24, 2048, 16, 2048),
        (32, 2560, 32, 2048), (32, 4096, 32, 2048), (40, 5120, 40, 2048), (96, 12288, 96, 2048),
    ]  # fmt: skip
    assert [c.d_head for c in GPT3.values()] == [64, 64, 96, 128, 80, 128, 128, 128]
    assert all(c.d_ff == 4 * c.d_model for c in (GPT1, *GPT2.values(), *GPT3.values()))


def test_gpt1_is_post_norm_with_dropout_and_the_later_ones_are_not():
    assert GPT1.norm == "post" and GPT1.dropout == 0.1 and GPT1.vocab_size == 40_478
    for c in (*GPT2.values(), *GPT3.values()):
        assert c.norm == "pre" and c.dropout == 0.0 and c.tied_head and c.vocab_size == 50_257
    assert all(c.local_window is None for c in (GPT1, *GPT2.values()))
    assert all(c.local_window == 256 for c in GPT3.values())


def test_banded_layers_are_the_odd_ones_and_only_with_a_window():
    assert [GPT3["125m"].is_local(layer) for layer in range(4)] == [False, True, False, True]
    assert not any(GPT2["124m"].is_local(layer) for layer in range(12))


def test_the_two_misprints_of_table_2_1_are_mended_and_explained():
    """XL: 24 heads of 128 do not make 2,048. 13B: 5,140 is not 40 x 128, and gives 12.953B, not 12.850B."""
    assert (GPT3["1.3b"].n_head, GPT3["1.3b"].d_head) == (16, 128)
    assert (GPT3["13b"].d_model, GPT3["13b"].d_head) == (5120, 128)
    with pytest.raises(InputError, match="not a multiple"):
        dataclasses.replace(GPT3["1.3b"], n_head=24)
    with pytest.raises(InputError, match="not a multiple"):
        dataclasses.replace(GPT3["13b"], d_model=5140, n_head=128)
    d = 5140  # as printed: 40 layers
    assert 50257 * d + 2048 * d + 40 * (12 * d * d + 13 * d) + 2 * d == 12_952_938_780
    for words in ("24 heads", "1,315,723,264", "5,140", "12,853,386,240"):
        assert words in spec.__doc__


# --- validation -------------------------------------------------------------------------------------------

GOOD = dict(vocab_size=11, n_layer=2, n_head=2, d_model=8, context_length=4)
BAD = [
    *[({name: value}, name) for name in GOOD for value in (0, -1, 2.0, "2", None)],
    ({"d_model": 9}, r"d_model=9 is not a multiple of model.n_head=2"),
    ({"norm": "rms"}, "'pre' or 'post', not 'rms'"),
    ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"dropout": float("nan")}, r"dropout must be in \[0, 1\)"),
    ({"local_window": 0}, "local_window must be at least 1"),
    ({"local_window": -5}, "local_window must be at least 1"),
    ({"attention": "flash"}, "'flash': choose one of auto, reference, xla, cpu, splash, cudnn"),
    ({"remat": "some"}, "'some': choose one of none, dots, full"),
    ({"unroll": 0}, "unroll=0 must lie between 1 and model.n_layer=2"),
    ({"unroll": 3}, "unroll=3 must lie between 1 and model.n_layer=2"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[str(change) for change, _ in BAD])
def test_what_a_config_refuses(change, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**GOOD | change)


def test_what_a_config_takes():
    for change in ({"dropout": 0.0}, {"dropout": 0.99}, {"local_window": 1}, {"local_window": 99}, {"unroll": 2}):
        GPTConfig(**GOOD | change)


def test_a_config_can_be_a_static_argument():
    assert hash(GPTConfig(**GOOD)) == hash(GPTConfig(**GOOD))
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig(**GOOD).n_layer = 3
