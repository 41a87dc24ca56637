"""The compute accounting against the papers' figures and against XLA's own count."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from test_spec import config_file

from gptjax.describe import describe
from gptjax.generation.speed import bytes_per_token, describe_speed
from gptjax.hardware import MEMORY_BANDWIDTH, PEAK_FLOPS, memory_bandwidth, peak_flops
from gptjax.model import gpt
from gptjax.model.flops import PF_DAY, appendix_f, flops_per_token, mfu, pf_days, six_nd, visible_pairs
from gptjax.model.spec import GPT2, GPT3, GPTConfig, parameter_count


@pytest.mark.parametrize(
    "size, forward_per_sequence, train_per_token",
    [
        ("124m", 291_648_307_200, 854_438_400),
        ("355m", 826_951_073_792, 2_422_708_224),
        ("774m", 1_774_570_700_800, 5_198_937_600),
        ("1558m", 3_506_703_564_800, 10_273_545_600),
    ],
)
def test_all_matmuls_of_gpt2(size, forward_per_sequence, train_per_token):
    full = flops_per_token(GPT2[size]).full
    assert full == train_per_token
    assert full * 1024 == 3 * forward_per_sequence


def test_the_other_conventions_for_gpt2_124m():
    flops = flops_per_token(GPT2["124m"])
    assert flops.six_n == 746_638_848
    assert flops.palm == 855_166_464  # nanoGPT's MFU
    # Dense causal attention needs half of its T^2: 4 L T d, times 3 passes, halved, is 56,623,104 less.
    assert flops.causal == 854_438_400 - 56_623_104


def test_visible_pairs_of_gpt3():
    assert visible_pairs(2048, None) == 2_098_176
    assert visible_pairs(2048, 256) == 491_648


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7, 8, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    """7 positions, counted one by one."""
    pairs = sum(1 for q in range(7) for k in range(7) if k <= q and (window is None or q - k < window))
    assert visible_pairs(7, window) == pairs


def test_banded_layers_are_counted_by_their_band():
    """GPT-3 125M: 6 layers see 1,024 keys on average, 6 see 491,648 / 2,048 = 240.0625."""
    matmuls = 2 * (12 * 12 * 768**2 + 50257 * 768)
    assert flops_per_token(GPT3["125m"]).causal == 3 * (matmuls + 4 * 768 * 6 * (1024 + 240.0625))
    dense = dataclasses.replace(GPT3["125m"], local_window=None)
    wide = dataclasses.replace(GPT3["125m"], local_window=2048)
    assert flops_per_token(wide).causal == flops_per_token(dense).causal
    assert flops_per_token(GPT3["125m"]).full == flops_per_token(dense).full  # full counts T^2 everywhere


@pytest.mark.parametrize(
    "size, expected, flops",
    [
        ("125m", 2.60, 2.25e20),
        ("350m", 7.42, 6.41e20),
        ("760m", 15.8, 1.37e21),
        ("1.3b", 27.5, 2.38e21),
        ("2.7b", 55.2, 4.77e21),
        ("6.7b", 139, 1.20e22),
        ("13b", 268, 2.31e22),
        ("175b", 3640, 3.14e23),
    ],
)
def test_gpt3_table_d1(size, expected, flops):
    """Brown et al. 2020, Table D.1: 300B tokens at 6 N, to the 1 % that its rounding leaves."""
    total = flops_per_token(GPT3[size]).six_n * 300e9
    assert total == six_nd(parameter_count(GPT3[size]), 300e9) == pytest.approx(flops, rel=0.01)
    assert total / PF_DAY == pf_days(total) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "layers, d_model, d_ff, heads, d_head, printed, ratio",
    [
        (10, 640, 2560, 10, 64, 1.03, 1.025),
        (20, 1024, 4096, 16, 64, 1.10, 1.101),
        (24, 1280, 5120, 10, 128, 1.08, 1.083),
        (26, 1792, 7168, 14, 128, 1.04, 1.044),
        (28, 2048, 8192, 16, 128, 1.03, 1.033),
        (40, 3584, 14336, 28, 128, 0.99, 0.994),
    ],
)
def test_chinchilla_table_a4(layers, d_model, d_ff, heads, d_head, printed, ratio):
    """Hoffmann et al. 2022, Table A4: appendix F over 6 N D. It is reproduced only if the FLOPs of embeddings and
    logits are left out, though N has the vocabulary's matrix, biases, and relative positions (d^2 + 2 d a layer)."""
    parts = appendix_f(layers, d_model, d_ff, heads, d_head, 2048, 32_000)
    inside = sum(value for name, value in parts.items() if name not in ("embeddings", "logits"))
    attention = 5 * d_model**2 + 6 * d_model  # queries, keys, values, output, relative positions
    n = layers * (attention + 2 * d_model * d_ff + d_ff + d_model + 4 * d_model) + 2 * d_model
    n += 32_000 * d_model
    found = 3 * inside / (6 * n * 2048)
    assert found == pytest.approx(ratio, abs=1e-3) and found == pytest.approx(printed, abs=0.006)


def test_kaplan_and_appendix_f_of_gpt2_124m():
    """Kaplan's forward FLOPs per token 2 N + 2 L T D; appendix F has `full`'s matmuls, embeddings and softmax."""
    c, flops = GPT2["124m"], flops_per_token(GPT2["124m"])
    assert flops.kaplan == 3 * 188_743_680
    assert flops.chinchilla == flops.full + 3 * (2 * 50257 * 768 + 12 * 3 * 12 * c.context_length)


def test_describe_prints_the_same_figures():
    d = describe(config_file("gpt3").get_config("175b").to_dict())
    json.dumps(d)
    assert (d["params"], d["params_non_embedding"], d["tokens"]) == (174_604_259_328, 173_961_535_488, 300_000_000_000)
    assert d["pf_days"] == pytest.approx(3640, rel=0.01)
    assert d["devices"] == 512
    # float32 parameters over fsdp x tensor; biases and position-wise leftovers make it a little more than 1/512
    assert 1 <= d["bytes_per_device"]["params"] / (4 * 174_604_259_328 / 512) < 1.05
    assert d["bytes_per_device"]["optimizer"] == 2 * d["bytes_per_device"]["params"] + 4
    assert d["bytes_per_device"]["gradients"] == d["bytes_per_device"]["params"]

    d = describe(config_file("gpt2").get_config("124m").to_dict())
    assert d["params"] == 124_439_808
    assert d["flops_per_token"] == {
        "causal_halved": 797_815_296, "palm": 855_166_464, "6n": 746_638_848, "full_attention": 854_438_400,
        "kaplan": 566_231_040, "chinchilla": 1_087_349_760,
    }  # fmt: skip


@pytest.mark.parametrize("tied, norm", [(True, "pre"), (False, "post")])
def test_xla_counts_as_many_in_an_unrolled_forward(tied, norm):
    """XLA adds the elementwise work, a few per cent at this size; a missing or doubled matmul would be 10 or more."""
    c = GPTConfig(512, 2, 2, 128, 128, norm=norm, tied_head=tied, unroll=2, attention="reference")
    params = jax.eval_shape(lambda key: gpt.init(c, key), jax.random.key(0))
    forward = jax.jit(lambda p, tokens: gpt.logits(p, c, gpt.hidden(p, c, tokens)))
    cost = forward.lower(params, jax.ShapeDtypeStruct((1, 128), jnp.int32)).compile().cost_analysis()
    expected = flops_per_token(c).full / 3 * 128
    assert 1.0 <= cost["flops"] / expected < 1.05


# --- decoding ---------------------------------------------------------------------------------------------


def test_bytes_a_decoded_token_reads():
    """GPT-2 124M in bf16: 124.4M parameters less the position table, and 36,864 bytes of keys and values a slot."""
    shapes = jax.eval_shape(lambda key: gpt.init(GPT2["124m"], key), jax.random.key(0))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    weights = 2 * (124_439_808 - 1024 * 768)
    assert bytes_per_token(half, GPT2["124m"], 1, 0, jnp.bfloat16) == weights
    assert bytes_per_token(half, GPT2["124m"], 8, 100, jnp.bfloat16) == weights + 8 * 100 * 36_864
    assert bytes_per_token(shapes, GPT2["124m"], 1, 0, jnp.float32) == 2 * weights


def test_speed_is_said_beside_its_bound():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    params = {
        "w": jax.ShapeDtypeStruct((3_350, 1_000_000), jnp.float32),
        "wpe": jax.ShapeDtypeStruct((7,), jnp.float32),
    }
    said = describe_speed(params, GPT2["124m"], 2, 0, jnp.float32, 100, 1.0, [Device])
    assert said == "100 tokens in 1.00 s: 100.0 tokens/s, 20 % of the 500.0 that reading weights and cache allows"
    Device.device_kind = "cpu"
    assert "no bound" in describe_speed(params, GPT2["124m"], 2, 0, jnp.float32, 100, 1.0, [Device])


def test_every_chip_with_a_peak_has_a_bandwidth():
    assert PEAK_FLOPS.keys() <= MEMORY_BANDWIDTH.keys()
    assert memory_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9 and memory_bandwidth("NVIDIA A100-SXM4-40GB") == 1555e9


# --- peaks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),  # jax.Device.device_kind of a v5e
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_known_chips(kind, peak):
    assert peak_flops(kind) == peak
    assert mfu(peak * 4, kind, 8) == 0.5


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA GeForce GTX 970", "", "AMD Instinct MI300X"])
def test_unknown_chips_have_no_mfu_rather_than_a_wrong_one(kind):
    assert peak_flops(kind) is None
    assert mfu(1e12, kind, 1) is None


def test_peaks_are_looked_up_in_lower_case():
    assert all(name == name.lower() for name in PEAK_FLOPS)
