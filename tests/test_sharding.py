"""Sharded = unsharded on 8 virtual devices, state that is really sharded, and meshes that do not fit."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numerics import assert_close, model_terms

from gptjax.distributed.hosts import global_array
from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, batch_shards, check_fits, make_mesh
from gptjax.parallel.sharding import (
    ARRAYS,
    Rules,
    batch_sharding,
    constrain,
    parameter_shardings,
    partition_spec,
    use_rules,
)
from gptjax.rlhf import state as ppo_state
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state, state_shardings
from gptjax.training.step import jit_train_step, train_step

# A prime vocabulary, as hard to divide as GPT-2's; a dense layer and a banded one.
MODEL = GPTConfig(61, n_layer=2, n_head=4, d_model=32, context_length=16, local_window=5)
F32 = PrecisionConfig()
# Adam divides each entry of the gradient by its own size: with a smaller eps, rounding, relative to the largest entry,
# would be blown up in the small ones, up to whole steps in the keys' bias, whose gradient is 0.
OPTIMIZER = OptimizerConfig(eps=1e-2)
STEPS = 3
TERMS = model_terms(MODEL, 16)
MESHES = {
    "data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 8": MeshConfig(data=8),
    "seq 4 tensor 2": MeshConfig(data=1, seq=4, tensor=2),
}


# Other rules: parameters sharded over a second axis, residual stream or heads not over tensor, norms sharded.
WIDE = MeshConfig(
    data=1, fsdp=2, seq=2, tensor=2, rules=Rules(embed="fsdp,seq", residual="seq", norm="fsdp", position="tensor")
)
WHOLE = MeshConfig(data=2, fsdp=2, tensor=2, rules=Rules(embed="data,fsdp", heads="none", residual="none"))


ALONE = MeshConfig(data=1)


@functools.cache
def train(config, optimizer=OPTIMIZER):
    with use_rules(config.rules):
        return _train(config, jax.devices()[: 1 if config == ALONE else 8], optimizer)


def _train(config, devices, optimizer):
    """(initial state, compiled text, final state, metrics) of 3 steps of 2 micro-batches on a mesh."""
    mesh = make_mesh(config, devices)
    model = dataclasses.replace(MODEL, attention="xla")
    tx = make_optimizer(optimizer)
    _, shardings = state_shardings(gpt.abstract_params(model), tx, F32, mesh)
    step = train_step(Objective(causal_lm_loss(model, jnp.float32, 8, mesh)), tx, 1.0, F32, seed=0, dropout=False)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 61, (STEPS, 2, 8, 17), np.int32),
        "weights": (rng.random((STEPS, 2, 8, 16)) < 0.7).astype(np.float32),
        "segment_ids": np.sort(rng.integers(0, 3, (STEPS, 2, 8, 16), np.int32)),
    }
    with jax.set_mesh(mesh):
        initial = init_state(model, tx, F32, shardings, 0)
        batch = jax.tree.map(lambda a: global_array(a, batch_sharding(mesh, 2)), batch)
        compiled = jit_train_step(step, shardings).lower(initial, batch, np.full(STEPS, 1e-2, np.float32)).compile()
        initial_state = jax.device_get(initial)
        state, metrics = compiled(initial, batch, np.full(STEPS, 1e-2, np.float32))
    return initial_state, compiled.as_text(), state, jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone():
    return train(ALONE)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["data 2 fsdp 2 tensor 2", slow("data 8"), slow("seq 4 tensor 2")])
def spread(request):
    return request.param, *train(MESHES[request.param])


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_sharded_is_unsharded(alone, spread):
    _, _, state, metrics = alone
    _, _, _, got, got_metrics = spread
    for name in ("loss_sum", "count", "grad_norm"):
        assert_close(got_metrics[name], metrics[name], terms=TERMS)
    moved = lambda state: jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, alone[0].params)
    assert_close(moved(got), moved(state), terms=TERMS, stored=alone[0].params)
    assert min(np.abs(v).max() for k, v in leaves(moved(state)).items() if "kernel" in k or "wte" in k) > 1e-3


def test_sharded_initialization_is_unsharded_initialization(alone, spread):
    """Bitwise: the same seed gives the same model on any mesh."""
    jax.tree.map(np.testing.assert_array_equal, alone[0], spread[1])


def test_parameters_and_moments_are_really_sharded(spread):
    name, _, _, state, _ = spread
    mesh = make_mesh(MESHES[name])
    f, t = mesh.shape["fsdp"], mesh.shape["tensor"]
    shapes = {
        "['wte']": (61, 32 // f),
        "['wpe']": (16, 32 // f),
        "['blocks']['attn']['c_attn']['kernel']": (2, 32 // f, 3, 32 // t),
        "['blocks']['attn']['c_attn']['bias']": (2, 3, 32 // t),
        "['blocks']['attn']['c_proj']['kernel']": (2, 32 // t, 32 // f),
        "['blocks']['attn']['c_proj']['bias']": (2, 32),
        "['blocks']['mlp']['c_fc']['kernel']": (2, 32 // f, 128 // t),
        "['blocks']['mlp']['c_fc']['bias']": (2, 128 // t),
        "['blocks']['mlp']['c_proj']['kernel']": (2, 128 // t, 32 // f),
        "['blocks']['ln_1']['scale']": (2, 32),
        "['ln_f']['bias']": (32,),
    }
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        found = leaves(tree)
        for path, shape in shapes.items():
            assert {s.data.shape for s in found[path].addressable_shards} == {shape}, path
            assert len(found[path].addressable_shards) == 8
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves(state).values())
    whole = sum(leaf.nbytes for leaf in leaves(state).values())
    # norms and biases are replicated, embeddings replicated over the tensor axis
    tables = sum(3 * state.params[name].nbytes for name in ("wte", "wpe"))
    assert on_one < (whole - tables) * (1 / (f * t) + 0.06) + tables / f


def test_the_compiled_step_communicates_as_it_should(spread):
    name, _, text, _, _ = spread
    reduces = "all-reduce" in text or "reduce-scatter" in text
    assert reduces
    if "fsdp" in name:
        assert "all-gather" in text
    if name == "data 8":
        assert "all-gather" not in text  # every device has the whole model


# --- rules ---


RULED = {
    "wide": (WIDE, {
        "['wte']": (61, 8), "['wpe']": (8, 8), "['ln_f']['bias']": (16,), "['blocks']['ln_1']['scale']": (2, 16),
        "['blocks']['attn']['c_attn']['kernel']": (2, 8, 3, 16), "['blocks']['attn']['c_proj']['bias']": (2, 16),
        "['blocks']['mlp']['c_proj']['kernel']": (2, 64, 8),
    }),
    "whole": (WHOLE, {
        "['wte']": (61, 8), "['wpe']": (16, 8), "['ln_f']['bias']": (32,), "['blocks']['ln_1']['scale']": (2, 32),
        "['blocks']['attn']['c_attn']['kernel']": (2, 8, 3, 32), "['blocks']['attn']['c_attn']['bias']": (2, 3, 32),
        "['blocks']['mlp']['c_fc']['kernel']": (2, 8, 64),
    }),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "whole"])
def test_other_rules_only_change_the_layout(alone, name):
    config, shapes = RULED[name]
    ruled = train(config)
    test_sharded_is_unsharded(alone, (name, *ruled))
    test_sharded_initialization_is_unsharded_initialization(alone, (name, *ruled))
    adam = ruled[2].opt_state[0]
    for tree in (ruled[2].params, adam.mu, adam.nu):
        found = leaves(tree)
        for path, shape in shapes.items():
            assert {s.data.shape for s in found[path].addressable_shards} == {shape}, path


def test_one_jitted_function_under_two_rules():
    """Activations follow the active rules, even if the function was compiled under others before."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    function = jax.jit(lambda x: constrain(x + 1, "batch", "time", "mlp"))
    with jax.set_mesh(mesh):
        for rules, last in ((Rules(), "tensor"), (Rules(mlp="none"), None), (Rules(), "tensor")):
            with use_rules(rules):
                found = function(jnp.zeros((4, 4, 4))).sharding
            expected = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "seq", last))
            assert found.is_equivalent_to(expected, 3), found


def test_the_rules_reach_all_of_ppos_models():
    """Policy, average, value network and both optimizers' moments."""
    mesh, tx = make_mesh(WIDE), make_optimizer(OPTIMIZER)
    with use_rules(WIDE.rules):
        boxed = gpt.abstract_params(MODEL), heads.abstract_scalar_model(MODEL)
        _, places = ppo_state.state_shardings(*boxed, tx, tx, mesh)
    kernels = [p["blocks"]["mlp"]["c_fc"]["kernel"] for p in (places.policy, places.average, places.value["trunk"])]
    kernels += [places.policy_opt[0].mu["blocks"]["mlp"]["c_fc"]["kernel"]]
    kernels += [places.value_opt[0].nu["trunk"]["blocks"]["mlp"]["c_fc"]["kernel"]]
    assert {k.spec for k in kernels} == {PartitionSpec("stage", ("fsdp", "seq"), "tensor")}
    assert places.value["head"]["kernel"].spec == PartitionSpec("fsdp")


@pytest.mark.parametrize(
    "rules, says",
    [
        ({"mlp": "tensr"}, "mesh.rules.mlp='tensr': there is no mesh axis 'tensr'. Use some of data, .*or 'none'"),
        ({"embed": "fsdp seq"}, "there is no mesh axis 'fsdp seq'"),
        ({"embed": None}, "mesh.rules.embed=None: give mesh axes, as 'fsdp'"),
        ({"embed": "fsdp,tensor"}, r"c_attn/kernel \[.*twice over tensor: embed=fsdp,tensor and heads=tensor. Use"),
        ({"mlp": "seq"}, "the MLP's features .*twice over seq: time=seq and mlp=seq"),
        ({"vocab": "tensor,tensor"}, r"wte \[vocab, embed\] twice over tensor: vocab=tensor,tensor\. Use"),
        ({"residual": "seq,fsdp"}, "the residual stream .*twice over fsdp"),
        ({"batch": "data"}, "mesh.rules.batch must stay 'data,fsdp,stage': hosts load"),
        ({"time": "none"}, "mesh.rules.time must stay 'seq': attention gathers"),
        ({"features": "tensor"}, "mesh.rules.features must stay 'none': a matmul's inputs"),
        ({"layers": "none"}, "mesh.rules.layers must stay 'stage': the pipeline splits"),
    ],
)  # fmt: skip
def test_invalid_rules(rules, says):
    with pytest.raises(InputError, match=says):
        Rules(**rules)


def test_rules_that_do_not_go_with_a_mesh():
    with pytest.raises(InputError, match="mesh.rules.embed uses the axis data, but with mesh.dcn_data=2 .*use fsdp"):
        MeshConfig(data=4, dcn_data=2, rules=Rules(embed="fsdp,data"))
    refused = pytest.raises(InputError, match="wte has an axis of 61, which is not divisible by mesh.tensor = 2")
    with use_rules(Rules(vocab="tensor")), refused:
        parameter_shardings(gpt.abstract_params(MODEL), make_mesh(MeshConfig(tensor=2)))


# --- meshes -----------------------------------------------------------------------------------------------


def test_minus_one_is_all_other_devices():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "stage": 1, "seq": 1}
    shape = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape
    assert shape["fsdp"] == 2 and batch_shards(shape) == 4


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"data": 3}, "data=3 needs 3 devices and there are 8"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 needs 4 devices and there are 8"),
        ({"data": -1, "tensor": 3}, "8 devices are not a multiple of 3, the product"),
    ],
)
def test_a_mesh_that_does_not_multiply_out(sizes, says):
    with pytest.raises(InputError, match=says):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"data": 0}, "Mesh sizes must be positive"),
        ({"data": -1, "fsdp": -1}, "-1 on at most one"),
        ({"fsdp": -2}, "positive"),
    ],
)
def test_invalid_sizes(sizes, says):
    with pytest.raises(InputError, match=says):
        MeshConfig(**sizes)


def test_slices_are_along_data(monkeypatch):
    """Two slices of eight v5e chips, as libtpu describes them: only the data axis crosses them."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=4, fsdp=4, dcn_data=2), devices)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert slices.shape == (4, 4, 1, 1, 1)
    assert [set(row.flat) for row in slices] == [{0}, {0}, {1}, {1}]
    for wrong in (MeshConfig(data=4, fsdp=4), MeshConfig(data=4, fsdp=4, dcn_data=4)):
        with pytest.raises(InputError, match="the devices belong to 2 slices: set it to 2"):
            make_mesh(wrong, devices)
    with pytest.raises(InputError, match="mesh.data=1 is not a multiple of mesh.dcn_data=2"):
        make_mesh(MeshConfig(data=1, fsdp=16, dcn_data=2), devices)


def test_slices_where_there_are_none():
    with pytest.raises(InputError, match="mesh.dcn_data=2, but the devices belong to 1 slice: set it to 1"):
        make_mesh(MeshConfig(data=2, fsdp=4, dcn_data=2))
    with pytest.raises(InputError, match="mesh.dcn_data=0: it is the number of slices, at least 1"):
        MeshConfig(dcn_data=0)


def test_heads_and_batches_that_do_not_divide():
    sizes = MeshConfig(data=2, fsdp=2, tensor=2).sizes(8)
    check_fits(sizes, n_head=4, batch_size=8, microbatch_size=4)
    with pytest.raises(InputError, match="n_head=5 is not divisible by mesh.tensor=2"):
        check_fits(sizes, n_head=5, batch_size=8, microbatch_size=4)
    with pytest.raises(
        InputError, match=r"^batch_size=10 .*mesh.data x mesh.fsdp x mesh.stage = 4 devices: use 8 or 12"
    ):
        check_fits(sizes, n_head=4, batch_size=10, microbatch_size=4)
    with pytest.raises(InputError, match=r"^microbatch_size=2 .*use 4\."):
        check_fits(sizes, n_head=4, batch_size=8, microbatch_size=2)


def test_rows_that_do_not_divide_over_the_context():
    sizes, fits = MeshConfig(data=2, seq=4).sizes(8), dict(n_head=4, batch_size=8, microbatch_size=4)
    check_fits(sizes, **fits, time=16)
    check_fits(sizes, **fits)  # of many lengths: see model/attention
    with pytest.raises(InputError, match=r"Rows of 18 tokens .*mesh.seq=4 devices: use 16 or 20"):
        check_fits(sizes, **fits, time=18)


def test_an_axis_without_a_rule():
    with pytest.raises(InputError, match="'color'.*parallel/sharding.py"):
        partition_spec(("embed", "color"))
    boxed = {"extra": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), jnp.float32), ("color",))}
    with pytest.raises(InputError, match="'color'"):
        parameter_shardings(boxed, make_mesh(MeshConfig()))


def test_every_logical_axis_of_the_model_has_a_rule_and_every_rule_a_use():
    boxed = jax.tree.leaves(gpt.abstract_params(MODEL), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    named = {name for leaf in boxed for name in leaf.names}
    assert named <= vars(Rules()).keys()
    assert {"embed", "heads", "mlp", "vocab", "layers", "qkv", "norm", "position"} == named
    # and what rules are checked against are the arrays there are
    assert {leaf.names for leaf in boxed} <= set(ARRAYS.values()) | {("norm",)}


@pytest.mark.parametrize(
    "model, mesh, says",
    [
        (dict(d_model=36), MeshConfig(data=1, fsdp=8), "axis of 36, which is not divisible by mesh.fsdp = 8"),
        (dict(d_model=12, n_head=2), MeshConfig(data=1, tensor=8), "c_attn/.* 12, .* not divisible by mesh.tensor = 8"),
    ],
)
def test_an_indivisible_dimension_names_the_parameter(model, mesh, says):
    boxed = gpt.abstract_params(dataclasses.replace(MODEL, **model))
    with pytest.raises(InputError, match=says) as caught:
        parameter_shardings(boxed, make_mesh(mesh))
    assert str(caught.value).split()[0].rsplit("/")[-1] in ("kernel", "bias", "wte", "wpe")


def test_a_parameter_without_names():
    boxed = {"attn": {"extra": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(InputError, match="attn/extra has no logical axis names"):
        parameter_shardings(boxed, make_mesh(MeshConfig()))


@pytest.mark.slow
def test_unrolled_layers_that_are_recomputed_compile_on_a_cpu():
    """Two layers per iteration in a loop over micro-batches: XLA:CPU once dropped arguments of a call in it."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    model = GPTConfig(64, n_layer=4, n_head=2, d_model=32, context_length=16, unroll=2, remat="full", attention="cpu")
    tx, precision = make_optimizer(OptimizerConfig()), PrecisionConfig()
    abstract, shardings = state_shardings(gpt.abstract_params(model), tx, precision, mesh)
    loss = causal_lm_loss(model, precision.dtype, 128, mesh)
    step = jit_train_step(train_step(Objective(loss), tx, 1.0, precision, 0, False), shardings)
    batch = {
        name: jax.ShapeDtypeStruct((1, 2, 8, length), dtype, sharding=batch_sharding(mesh, 2))
        for name, length, dtype in (("tokens", 17, jnp.int32), ("weights", 16, jnp.float32))
    }
    with jax.set_mesh(mesh):
        assert step.lower(abstract, batch, jax.ShapeDtypeStruct((1,), jnp.float32)).compile()
