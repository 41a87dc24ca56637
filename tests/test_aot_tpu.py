"""Compiled for a TPU by the real TPU compiler, with no TPU here: the train step, its kernels, and sampling.

libtpu (`pip install "jax[tpu]"`) compiles for a topology it is only told of. Nothing is run.
"""

import contextlib
import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.generation import decode as generation
from gptjax.generation.decode import Decoder, Stop
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt
from gptjax.model.attention import resolve
from gptjax.model.spec import GPT2, GPT3, GPTConfig, parameter_count
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import state_shardings
from gptjax.training.step import jit_train_step, memory_needed, train_step

pytestmark = pytest.mark.optimized

HBM = 15.75 * 2**30  # of a v5e chip, as its compiler counts it
BF16 = PrecisionConfig("bfloat16")


@pytest.fixture(scope="module")
def chips():
    """Eight v5e chips. A second process may load libtpu at the same time: none of them holds a TPU."""
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"))
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


@contextlib.contextmanager
def as_in_training(mesh):
    """The context of pretrain.py; conftest.py's matmul precision is for the CPU, Mosaic does not take it in bf16."""
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        yield


def abstract(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def compiled_train_step(model: GPTConfig, mesh, *, micro, rows, packed=False):
    """The train step as pretrain.py puts it together, from shapes alone."""
    model = dataclasses.replace(model, attention=resolve("auto", "tpu"))
    optimizer = OptimizerConfig()
    tx = make_optimizer(optimizer)
    state, shardings = state_shardings(gpt.abstract_params(model), tx, BF16, mesh)
    loss = causal_lm_loss(model, BF16.dtype, 128, mesh)
    step = train_step(Objective(loss), tx, optimizer.clip_norm, BF16, seed=0, dropout=model.dropout > 0)
    time = model.context_length
    fields = {"tokens": (time + 1, jnp.int32), "weights": (time, jnp.float32)}
    if packed:
        fields |= {"segment_ids": (time, jnp.int32), "positions": (time, jnp.int32)}
    batch = {
        name: jax.ShapeDtypeStruct((1, micro, rows, length), dtype, sharding=batch_sharding(mesh, 2))
        for name, (length, dtype) in fields.items()
    }
    rates = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with as_in_training(mesh):
        return jit_train_step(step, shardings).lower(abstract(state, shardings), batch, rates).compile()


def kernels(compiled):
    """How many Pallas kernels are called in the program."""
    return len(re.findall(r'custom_call_target="tpu_custom_call"', compiled.as_text()))


def arrays(text):
    """Shapes in a piece of HLO."""
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:bf16|f32|f16)\[([\d,]+)\]", text)]


@pytest.mark.parametrize(
    "model_and_rows",
    [
        pytest.param((GPTConfig(1500, 2, 2, 256, 512), 16), marks=pytest.mark.slow),
        pytest.param((GPT2["124m"], 64), marks=pytest.mark.long),
    ],
    ids=["small", "gpt2-124m"],
)
def test_train_step_on_eight_v5e_chips(chips, model_and_rows):
    """bf16, Splash, FSDP over 8, two micro-batches of 2 or 8 sequences a chip, 'dots' remat."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), chips)
    model, rows = dataclasses.replace(model_and_rows[0], remat="dots"), model_and_rows[1]
    time, vocab = model.context_length, model.vocab_size
    compiled = compiled_train_step(model, mesh, micro=2, rows=rows)

    needed = memory_needed(compiled)
    assert sum(needed.values()) < HBM
    # parameters and two moments in float32, each an eighth a chip; gains and biases are whole: little more
    batch = 2 * (rows // 8) * (2 * time + 1) * 4
    assert 1 <= (needed["state and batch"] - batch) / (12 * parameter_count(model) / 8) < 1.05
    # the old state is given back: new parameters and moments take no memory of their own
    assert compiled.memory_analysis().alias_size_in_bytes > 0.99 * 12 * parameter_count(model) / 8

    assert kernels(compiled) >= 3  # Splash forward, and backward for q and for k, v
    text = compiled.as_text()
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    gathers = [shape for result in results for shape in arrays(result)]
    assert gathers  # FSDP gathers parameters
    for shape in gathers:
        assert math.prod(shape) <= vocab * model.d_model, shape  # a parameter at the most, never logits
    for shape in arrays(text):
        if vocab in shape:  # on a chip, logits of a chunk of 128 steps at the most
            assert math.prod(shape) <= max(rows // 8 * 128, model.d_model) * vocab, shape
        assert shape.count(time) < 2, shape  # and no [time, time] scores


@pytest.mark.slow
def test_gpt3_banded_and_packed_train_step_over_heads_too(chips):
    """Two layers of GPT-3 125M, one dense and one of its band, documents apart, whole heads on each chip."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), chips)
    model = dataclasses.replace(GPT3["125m"], n_layer=2, vocab_size=1024, remat="full")
    compiled = compiled_train_step(model, mesh, micro=1, rows=8, packed=True)
    assert sum(memory_needed(compiled).values()) < HBM
    assert kernels(compiled) >= 6  # three for the dense layer, three for the banded one
    for shape in arrays(compiled.as_text()):
        assert shape.count(model.context_length) < 2, shape


class Captured(Exception):
    """Carries the arguments of decode out of generate."""


def decode_arguments(decoder, prompts, stop, sampling, sizes, monkeypatch):
    """What generate hands to decode on a mesh of these sizes; found on CPU devices, since it makes real arrays."""

    def capture(*arguments):
        raise Captured(*arguments)

    monkeypatch.setattr(generation, "decode", capture)
    with jax.set_mesh(make_mesh(sizes)), pytest.raises(Captured) as found:
        generation.generate(None, decoder, prompts, stop, sampling)
    monkeypatch.undo()
    return found.value.args


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_sampling_from_a_prompt_long_enough_for_splash(chips, rows, monkeypatch):
    """A prompt of 65 tokens and more is padded to 128, which Splash takes: one row or several, on eight chips."""
    sizes = MeshConfig(data=1, fsdp=8)
    mesh = make_mesh(sizes, chips)
    model = GPTConfig(512, 2, 2, 128, 256, attention=resolve("auto", "tpu"))
    decoder, stop, sampling = Decoder(model, 512, BF16.dtype, mesh), Stop(128, 3), Sampling(0.8, top_p=0.95)
    _, _, *given, stop, sampling = decode_arguments(decoder, [[1] * 70] * rows, stop, sampling, sizes, monkeypatch)
    state, shardings = state_shardings(gpt.abstract_params(model), make_optimizer(OptimizerConfig()), BF16, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in given]
    assert inputs[0].shape[1] == 128
    with as_in_training(mesh):
        try:
            params = abstract(state.params, shardings.params)
            lowered = generation.decode.lower(params, decoder, *inputs, stop, sampling)
        except NotImplementedError as error:  # it comes with a program of a thousand lines
            pytest.fail(str(error))
        assert kernels(lowered.compile()) >= 1
