"""Tensor and context parallelism: every stage's gradient on 8 virtual devices equals that of one device, and the
compiled programs communicate what theory requires and no more."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numerics import approx, assert_close, model_terms

from gptjax.generation.decode import Decoder, Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.sft import sft_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import Rules, batch_sharding, parameter_shardings, use_rules
from gptjax.rlhf.reward_model import reward_loss

ROWS, TIME, VOCAB = 8, 16, 61  # a prime vocabulary
MODEL = GPTConfig(VOCAB, n_layer=2, n_head=4, d_model=32, context_length=TIME)
TERMS = model_terms(MODEL, 3 * ROWS)  # comparisons have three texts per row
# Post-norm, dropout, a banded layer, an untied head.
DROPPED = dataclasses.replace(MODEL, norm="post", dropout=0.2, local_window=5, tied_head=False)
MESHES = {
    "data 2 seq 2 tensor 2": MeshConfig(data=2, seq=2, tensor=2),
    "stage 2 fsdp 2 tensor 2": MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
    "stage 2 fsdp 2 tensor 2, other rules": MeshConfig(
        data=1, stage=2, fsdp=2, tensor=2, rules=Rules(embed="none", residual="none", heads="none", norm="tensor")
    ),
}


init = jax.jit(gpt.init, static_argnums=0)


def alone():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def rows(*shape, high):
    return np.random.default_rng(0).integers(0, high, shape, np.int32)


def of_sft():
    task = (np.random.default_rng(1).random((ROWS, TIME)) < 0.5).astype(np.float32)
    return {
        "tokens": rows(ROWS, TIME + 1, high=VOCAB),
        "weights": task + 0.5,
        "task": task,
        "segment_ids": np.sort(rows(ROWS, TIME, high=3)),
        "positions": np.tile(np.arange(TIME, dtype=np.int32), (ROWS, 1)),
    }


def of_comparisons():
    return {
        "tokens": rows(ROWS, 3, TIME, high=VOCAB),
        "lengths": 1 + rows(ROWS, 3, high=TIME),
        "ranks": np.tile(np.arange(3, dtype=np.int32), (ROWS, 1)),
        "valid": rows(ROWS, 3, high=8) > 0,
    }


STAGES = {
    "sft": (MODEL, gpt, lambda mesh: sft_loss(MODEL, jnp.float32, 8, mesh), of_sft),
    "dropout": (DROPPED, gpt, lambda mesh: sft_loss(DROPPED, jnp.float32, 8, mesh), of_sft),
    "reward": (MODEL, heads, lambda mesh: reward_loss(MODEL, jnp.float32, "pairs", mesh), of_comparisons),
}


def gradient(stage, mesh):
    """(sum, count, gradient) of a stage's loss on one batch."""
    model, of, make_loss, batch = STAGES[stage]
    boxed = gpt.abstract_params(model) if of is gpt else heads.abstract_scalar_model(model)
    shardings = parameter_shardings(boxed, mesh)
    params = init(model, jax.random.key(0))
    if of is heads:
        params = heads.scalar_model(params, model, jax.random.key(1))
        params["head"]["kernel"] = 30 * params["head"]["kernel"]  # scores that differ
    loss = make_loss(mesh)

    def sums(params, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.key(3), rows) if model.dropout else None
        total, count, *_ = loss(params, batch, keys)
        return total, count

    with jax.set_mesh(mesh):
        params = jax.device_put(jax.tree.map(lambda a: 3 * a, params), shardings)
        placed = jax.device_put(batch(), batch_sharding(mesh, 0))
        (total, count), grads = jax.jit(jax.value_and_grad(sums, has_aux=True))(params, placed)
    return float(total), float(count), jax.device_get(grads)


@functools.cache
def expected(stage):
    return gradient(stage, alone())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("stage, mesh", [
    ("dropout", "data 2 seq 2 tensor 2"),
    slow("dropout", "stage 2 fsdp 2 tensor 2"),
    slow("reward", "stage 2 fsdp 2 tensor 2, other rules"),
    slow("reward", "data 2 seq 2 tensor 2"),
    slow("sft", "stage 2 fsdp 2 tensor 2, other rules"),
])  # fmt: skip
def test_a_stage_on_eight_devices_is_one_device(stage, mesh):
    total, count, grads = expected(stage)
    with use_rules(MESHES[mesh].rules):
        found, found_count, found_grads = gradient(stage, make_mesh(MESHES[mesh]))
    assert found == approx(total, terms=TERMS) and found_count == count
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert_close(found_grads, grads, terms=TERMS, scale=0.01 * largest)  # the keys' bias: 0 up to rounding


@functools.cache
def texts(mesh=None, rules=Rules()):
    """Of prompts whose length is not divisible, then one token at a time."""
    params = jax.tree.map(lambda a: 5 * a, init(MODEL, jax.random.key(0)))
    mesh = make_mesh(MESHES[mesh]) if mesh else alone()
    with jax.set_mesh(mesh), use_rules(rules):
        placed = jax.device_put(params, parameter_shardings(gpt.abstract_params(MODEL), mesh))
        prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
        return generate(placed, Decoder(MODEL, mesh=mesh), prompts, Stop(7), Sampling(0.8), seed=3)


@pytest.mark.parametrize("rules", [Rules(), slow(Rules(embed="fsdp,seq", residual="seq", heads="none"))])
def test_sampling_on_a_mesh_is_sampling_on_one_device(rules):
    assert texts("data 2 seq 2 tensor 2", rules) == texts() and len(set(map(tuple, texts()))) == 3


# --- communication -----------------------------------------------------------------------------------------


def collectives(text):
    """[(operation, shape of one result)] in a compiled program; a loop's body counts once."""
    found = []
    for results, operation in re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text
    ):
        for shape in re.findall(r"f32\[([\d,]*)\]", results):
            found.append((operation, tuple(map(int, shape.split(","))) if shape else ()))
    return found


def program(sizes, model, backward):
    """The compiled text of a forward pass, or of forward and backward."""
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    shardings = parameter_shardings(gpt.abstract_params(model), mesh)
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    abstract = jax.eval_shape(lambda key: gpt.init(model, key), jax.random.key(0))
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    tokens = jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32, sharding=by_row)

    def forward(params, tokens):
        return gpt.hidden(params, model, tokens, mesh=mesh)

    def loss(params, tokens):
        return (forward(params, tokens) ** 2).sum()

    with jax.set_mesh(mesh):
        f = jax.jit(jax.grad(loss), out_shardings=shardings) if backward else jax.jit(forward)
        return f.lower(params, tokens).compile().as_text()


@pytest.mark.parametrize(
    "sizes, backward", [({"fsdp": 2, "tensor": 4}, True), ({"fsdp": 2, "tensor": 2, "seq": 2}, False)], ids=str
)
def test_tensor_parallel_sub_layers_communicate_one_sum(sizes, backward):
    """Korthikanti et al. 2022: in a layer (the body of the loop) one gather and one sum per sub-layer, once forward and
    once backward. XLA:CPU writes a reduce-scatter as all-reduce and slice."""
    found = collectives(program(sizes, dataclasses.replace(MODEL, attention="xla"), backward))
    rows, time = ROWS // 2, TIME // sizes.get("seq", 1)
    stream = (rows, time, MODEL.d_model)
    per_layer = 4 if backward else 2
    # One more gather is for the embedding's gradient, of which every device of the tensor axis takes its rows.
    assert found.count(("all-gather", stream)) == per_layer + backward
    assert found.count(("all-reduce", stream)) == per_layer
    assert found.count(("reduce-scatter", (rows, time // sizes["tensor"], MODEL.d_model))) == 1  # the embedding
    keys = {(rows, TIME, 1, MODEL.d_model // sizes["tensor"])} if "seq" in sizes else set()
    for operation, shape in found:  # no other activations but context parallelism's K/V: no MLP features, no logits
        assert operation != "all-to-all", shape
        if operation == "all-gather" and shape[:1] == (rows,):
            assert shape == stream or shape in keys, shape


@pytest.mark.parametrize("remat, times", [("none", 2), slow("full", 3)])
def test_parameters_are_gathered_layer_by_layer(remat, times):
    """FSDP: in forward and backward, and once more where the backward pass recomputes the layer; never the whole stack
    of layers, and no activation."""
    model = dataclasses.replace(MODEL, n_layer=4, attention="xla", remat=remat)
    found = [shape for operation, shape in collectives(program({"fsdp": 8}, model, True)) if operation == "all-gather"]
    d = MODEL.d_model
    for matrix in ((d, 3, d), (d, d), (d, 4 * d), (4 * d, d)):
        gathered = [shape for shape in found if shape[-len(matrix) :] == matrix]
        assert all(np.prod(shape) == np.prod(matrix) for shape in gathered), gathered
        assert 1 <= len(gathered) <= times, (matrix, gathered)
    assert all(ROWS not in shape for shape in found), found
