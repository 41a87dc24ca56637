"""Pipelined = unpipelined: the schedule, the routes of layers and rows, losses and gradients, communication."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, model_terms
from test_gpt import random_params

from gptjax.errors import InputError
from gptjax.generation.decode import Decoder, Stop, generate
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt, heads
from gptjax.model.spec import GPT3, GPTConfig
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import AXES, MeshConfig, make_mesh
from gptjax.parallel.pipeline import Plan, make_plan, work
from gptjax.parallel.sharding import parameter_shardings
from gptjax.rlhf import networks, rollout, update
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.reward_model import score_at_end

MODEL = GPTConfig(64, n_layer=8, n_head=4, d_model=32, context_length=16, attention="xla")
ROWS = 16
TERMS = model_terms(MODEL, ROWS)


def mesh_of(**sizes):
    config = MeshConfig(**{"data": 1} | sizes)
    return make_mesh(config, jax.devices()[: math.prod(getattr(config, axis) for axis in AXES)])


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


ALONE = mesh_of()


# --- the schedule -----------------------------------------------------------------------------------------

PLANS = [Plan(2, 2), Plan(4, 4), Plan(4, 16), Plan(3, 6, 2), Plan(4, 8, 3), Plan(2, 6, 5)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_schedule(plan):
    """Every micro-batch passes every group of layers once, in order, one tick after the group before."""
    S, M, V = plan.stages, plan.microbatches, plan.virtual_stages
    when = {}
    for tick in range(plan.ticks):
        for stage in range(S):
            virtual, micro, begun = work(tick, stage, plan)
            if 0 <= begun < M * V:
                when[micro, virtual * S + stage] = tick
    assert when.keys() == {(m, g) for m in range(M) for g in range(S * V)}
    assert all(when[m, g] == when[m, g - 1] + 1 for m, g in when if g)
    assert max(when.values()) == plan.ticks - 1
    assert plan.bubble == pytest.approx(1 - len(when) / (S * plan.ticks))  # the idle fraction


def test_the_bubble_of_the_papers():
    assert Plan(4, 16).bubble == pytest.approx(3 / 19)  # GPipe: (K - 1) / (M + K - 1)
    for v in (1, 2, 4):  # Narayanan et al. 2021 §2.2: over ideal time, (p - 1) / (m v)
        bubble = Plan(8, 32, v).bubble
        assert bubble / (1 - bubble) == pytest.approx(7 / (32 * v))
    assert str(Plan(4, 16, 2)) == "4 stages, 16 micro-batches, 2 virtual stages, bubble 8.6%"


@pytest.mark.parametrize(
    "sizes, rows, change, microbatches",
    [
        (dict(stage=4), 64, {}, 16),  # 4 per stage
        (dict(stage=4), 64, dict(pipeline_microbatches=64), 64),
        (dict(stage=4), 24, {}, 12),
        (dict(stage=4, fsdp=2), 24, {}, 12),
        (dict(stage=4, fsdp=2), 16, {}, 8),
        (dict(stage=4, fsdp=2), 16, dict(pipeline_microbatches=7), 4),
    ],
)
def test_how_many_micro_batches(sizes, rows, change, microbatches):
    plan = make_plan(dataclasses.replace(MODEL, **change), MeshConfig(**{"data": 1} | sizes).sizes(
        int(np.prod(list(sizes.values())))), rows)  # fmt: skip
    assert plan == Plan(4, microbatches)


@pytest.mark.parametrize(
    "sizes, rows, change, says",
    [
        (dict(stage=3), 12, {}, "n_layer=8 is not divisible by mesh.stage=3:"),
        (dict(stage=4), 16, dict(pipeline_virtual_stages=3), "n_layer=8 .* mesh.stage=4 x .*virtual_stages=3:"),
        (dict(stage=4), 16, dict(pipeline_microbatches=3), "microbatches=3 is fewer than mesh.stage=4,.*at least 4"),
        (dict(stage=2, seq=2), 8, dict(n_layer=6, local_window=5), "even number of layers per .*stage, not 3: change"),
        (dict(stage=4), 2, {}, "2 rows .* use a multiple of 4 rows"),
        (dict(stage=2, data=2), 6, {}, "6 rows .* mesh.fsdp = 2 devices: use a multiple of 4 rows"),
    ],
)
def test_what_cannot_be_pipelined(sizes, rows, change, says):
    sizes = MeshConfig(**{"data": 1} | sizes).sizes(int(np.prod(list(sizes.values()))))
    with pytest.raises(InputError, match=says):
        make_plan(dataclasses.replace(MODEL, **change), sizes, rows)


def test_a_run_reports_its_pipeline():
    sizes = MeshConfig(data=1, stage=4).sizes(4)
    assert pipeline.describe(MODEL, sizes, 16) == ", pipeline of 4 stages, 16 micro-batches, bubble 15.8%"
    assert pipeline.describe(MODEL, MeshConfig(data=1).sizes(1), 16) == ""


# --- routes: layers that are affine maps, which do not commute ---------------------------------------------


@pytest.mark.parametrize(
    "stages, virtual, fsdp", [(2, 2, 4), (4, 1, 2), (4, 2, 1), (4, 3, 1)]
)
def test_every_row_passes_every_layer_in_order(stages, virtual, fsdp):
    n = stages * virtual * 2
    config = dataclasses.replace(MODEL, n_layer=n, pipeline_virtual_stages=virtual)
    rng = np.random.default_rng(0)
    scale, x = rng.integers(-2, 3, (n,)).astype(float), rng.integers(-4, 5, (32, 3, 2)).astype(float)
    scale[scale == 0], ids = 1, np.arange(32)

    def layer(params, x, by_layer, by_row):
        return (x * params["scale"] + by_layer["layer"] * (1 + by_row["id"][:, None, None])) % 1009

    expected = x
    for i in range(n):
        expected = layer({"scale": scale[i]}, expected, {"layer": i}, {"id": ids})
    with jax.set_mesh(mesh_of(stage=stages, fsdp=fsdp)):
        run = jax.jit(lambda p, x, ids: pipeline.run(layer, p, x, {"layer": jnp.arange(n)}, {"id": ids}, config))
        found = run({"scale": scale}, x, ids)
    np.testing.assert_array_equal(found, expected)


# --- loss and gradients -----------------------------------------------------------------------------------


def batch(model=MODEL):
    rng = np.random.default_rng(0)
    shape = (ROWS, model.context_length)
    return {
        "tokens": rng.integers(0, 64, (ROWS, model.context_length + 1), np.int32),
        "weights": (rng.random(shape) < 0.7).astype(np.float32),
        "segment_ids": np.sort(rng.integers(0, 3, shape, np.int32)),
        "positions": rng.integers(0, model.context_length, shape, np.int32),
    }


def drawn_for(model):
    """How layers are computed is not what they are."""
    return dataclasses.replace(model, remat="none", unroll=1, pipeline_virtual_stages=1, pipeline_microbatches=None)


@functools.cache
def compiled(model, mesh):
    """(loss and gradients of a batch of packed rows, compiled, and its arguments)."""
    loss = causal_lm_loss(model, jnp.float32, 8, mesh)
    shardings = parameter_shardings(gpt.abstract_params(model), mesh)
    rows = batch(model)["tokens"].shape[0]
    keys = jax.random.split(jax.random.key(3), rows) if model.dropout else None
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(drawn_for(model)), shardings)
        run = jax.jit(jax.value_and_grad(lambda p, b, k: loss(p, b, k)[0]), out_shardings=(None, shardings))
        return run.lower(params, batch(model), keys).compile(), (params, batch(model), keys)


@functools.cache
def loss_and_gradients(model, mesh):
    program, arguments = compiled(model, mesh)
    return jax.device_get(program(*arguments))


def same(found, expected, terms=TERMS):
    """Equal losses and gradients; that of the keys' bias is 0 up to rounding."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert_close(loss, expected_loss, terms=terms)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    assert_close(grads, expected_grads, terms=terms, scale=1e-3 * largest)


CASES = {  # {name: (mesh, changes of the model)}
    "stage 4 fsdp 2": (dict(stage=4, fsdp=2), {}),
    "stage 2 tensor 2 seq 2": (dict(stage=2, tensor=2, seq=2), {}),
    "interleaved": (dict(stage=4, data=2), dict(pipeline_virtual_stages=2, remat="full")),
    # 3 layers per stage: one begins with a banded layer
    "stage 2 fsdp 2 tensor 2": (
        dict(stage=2, fsdp=2, tensor=2), dict(norm="post", tied_head=False, dropout=0.2, local_window=5, n_layer=6)
    ),
    "interleaved, offload, residual dropout": (
        dict(stage=2, fsdp=2, tensor=2),
        dict(
            pipeline_virtual_stages=2, pipeline_microbatches=2, local_window=5, unroll=2, remat="offload",
            dropout=0.2, dropout_sites="residual",
        ),
    ),
}  # fmt: skip


def case(name):
    sizes, change = CASES[name]
    return dataclasses.replace(MODEL, **change), mesh_of(**sizes)


@pytest.mark.parametrize("name", [*list(CASES)[:3], *map(slow, list(CASES)[3:])])
def test_pipelined_is_unpipelined(name):
    """Of every kind of model, beside one device without remat, where all layers are one group."""
    model, mesh = case(name)
    same(loss_and_gradients(model, mesh), loss_and_gradients(drawn_for(model), ALONE))


def on(mesh, tree, boxed):
    return jax.device_put(tree, parameter_shardings(boxed, mesh))


SMALL = dataclasses.replace(MODEL, n_layer=4)  # a decoder on one device is not a loop over the layers
SMALL_TERMS = model_terms(SMALL, ROWS)


def scalar_model(seed=0):
    head = {"kernel": np.linspace(-1, 1, 32, dtype=np.float32), "bias": np.float32(0.3)}
    return {"trunk": heads.trunk(random_params(SMALL, seed)), "head": head}


@pytest.mark.slow
def test_reward_models_loss():
    """score_at_end, on which reward.py's loss stands: scores and gradients of trunk and head."""
    boxed = heads.abstract_scalar_model(SMALL)
    tokens, lengths = batch()["tokens"][:, :-1], np.arange(ROWS) % 16 + 1

    def run(mesh):
        loss = lambda p: (score_at_end(p, tokens, lengths, SMALL, jnp.float32, mesh) * np.arange(ROWS)).sum()
        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(on(mesh, scalar_model(), boxed)))

    same(run(mesh_of(stage=4, fsdp=2)), run(ALONE), SMALL_TERMS)


@functools.cache
def ppo_on(mesh):
    """A rollout by the policy, its judgment by the four models, and the gradients of policy and value."""
    spec = RLSpec(policy=SMALL, value=SMALL, reward=SMALL, response=6, eos_id=5, pad_id=7, vocab=60, mesh=mesh)
    prompts, lengths = batch()["tokens"][:, :8], np.arange(ROWS, dtype=np.int32) % 8 + 1
    language, scores = gpt.abstract_params(SMALL), heads.abstract_scalar_model(SMALL)
    with jax.set_mesh(mesh):
        policy, reference = on(mesh, random_params(SMALL), language), on(mesh, random_params(SMALL, 1), language)
        value, reward = on(mesh, scalar_model(2), scores), on(mesh, scalar_model(3), scores)
        tokens, mask, log_prob = rollout.sample(policy, prompts, lengths, jax.random.key(3), spec)
        scored = rollout.score(policy, value, reference, reward, tokens, lengths, mask, spec)
        real = networks.real_tokens(lengths, mask, prompts.shape[1])
        advantage = jnp.sin(jnp.arange(mask.size)).reshape(mask.shape)
        arrays = dict(
            tokens=tokens, mask=mask, real=real, advantage=advantage, returns=scored["value"] + advantage / 10,
            reward=advantage, **{k: scored[k] for k in ("log_prob", "ref_log_prob", "value")},
        )  # fmt: skip
        made = rollout.Experience(**{name: a[None] for name, a in arrays.items()})
        gradients = jax.jit(lambda p, v, b: update.ppo_gradients(update.UpdateConfig(), spec, p, v, b))
        return jax.device_get((tokens, mask, log_prob, scored, gradients(policy, value, made)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(stage=2, fsdp=2, tensor=2), dict(fsdp=4, seq=2)], ids=str)
def test_ppo_samples_scores_and_learns(sizes):
    found, expected = ppo_on(mesh_of(**sizes)), ppo_on(ALONE)
    np.testing.assert_array_equal(found[0], expected[0])
    assert_close(found[1:4], expected[1:4], terms=SMALL_TERMS)
    losses = lambda result: (result[4][1]["loss/policy"] + 1, result[4][0])
    same(losses(found), losses(expected), SMALL_TERMS)


def test_text_is_generated_on_a_mesh_with_stages():
    model = dataclasses.replace(MODEL, n_layer=2)

    def run(mesh):
        with jax.set_mesh(mesh):
            params = on(mesh, random_params(model), gpt.abstract_params(model))
            return generate(params, Decoder(model, mesh=mesh), [[1, 2, 3], [4]], Stop(5), Sampling(0.0))

    assert run(mesh_of(stage=2, data=2)) == run(ALONE)


# --- communication, and what is saved ---------------------------------------------------------------


def collectives(text, kind):
    """Of each collective of a kind in compiled HLO: (elements of its largest result, groups of devices)."""
    for line in text.splitlines():
        found = re.search(rf"= (.*?) {kind}(?:-start)?\(", line)
        if not found:
            continue
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w\[([\d,]*)\]", found[1])]
        yield max(sizes), groups_of(line)


def groups_of(line):
    """Groups of devices of a collective, in any of HLO's three notations."""
    numbers = lambda text: [int(n) for n in text.split(",")]
    if written := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", line):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", written[1])]
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

    def ids(shape, transposed):
        a = np.arange(np.prod(numbers(shape))).reshape(numbers(shape))
        return a.transpose(numbers(transposed)) if transposed else a

    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", line):
        return ids(iota[2], iota[3]).reshape(numbers(iota[1])).tolist()
    axes, over = re.search(r"replica_groups=mesh\[(.*?)\].*? \{('[^}]*)\}", line).groups()
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
    devices = re.search(rf"device_ids=\({order}\)", line)
    mesh = (ids(*devices.groups()) if devices else np.arange(np.prod([int(n) for n in sizes]))).reshape(
        [int(n) for n in sizes]
    )
    last = [names.index(name) for name in re.findall(r"'(\w+)'", over)]
    assert ":" not in over, line  # part of an axis
    rest = [i for i in range(mesh.ndim) if i not in last]
    return mesh.transpose(rest + last).reshape(-1, int(np.prod([mesh.shape[i] for i in last]))).tolist()


def stage_of(mesh):
    return {
        device: place[AXES.index("stage")]
        for place, device in np.ndenumerate(np.arange(mesh.size).reshape(mesh.devices.shape))
    }


@pytest.mark.parametrize("name", ["stage 4 fsdp 2", "stage 2 tensor 2 seq 2", slow("stage 2 fsdp 2 tensor 2")])
def test_stages_pass_activations_on_and_gather_nothing(name):
    model, mesh = case(name)
    text, stage = compiled(model, mesh)[0].as_text(), stage_of(mesh)
    crosses = lambda groups: any(len({stage[d] for d in group}) > 1 for group in groups)
    S = mesh.shape["stage"]
    passed = [pairs for _, pairs in collectives(text, "collective-permute") if crosses(pairs)]
    assert len(passed) == 6  # to the next stage, inputs, outputs; forward and backward
    for pairs in passed:
        assert {(stage[b] - stage[a]) % S for a, b in pairs} in ({1}, {S - 1})
    for kind in ("all-gather", "all-to-all", "reduce-scatter"):
        gathered = [size for size, groups in collectives(text, kind) if crosses(groups)]
        assert max(gathered, default=0) <= (ROWS if model.dropout else 0), kind  # dropout's key of each row
    # Sums over stages are of replicated parameters, the embedding's gradient at most, and never of a layer's.
    sums = [size for size, groups in collectives(text, "all-reduce") if crosses(groups)]
    assert sums and max(sums) <= MODEL.vocab_size * MODEL.d_model


def test_layers_are_interleaved_without_gathers():
    text = compiled(*case("interleaved"))[0].as_text()
    assert not list(collectives(text, "all-gather")) + list(collectives(text, "all-to-all"))
    stacked = 8 // 4 // 2 * MODEL.d_model * MODEL.d_ff
    assert max(size for size, _ in collectives(text, "collective-permute")) <= stacked  # one group of one parameter


@pytest.mark.slow
def test_what_is_saved_for_the_backward_pass():
    """Not the weights of each tick; with remat 'full' one array per tick."""
    virtual, kept = 2, {}
    for remat in ("none", "full"):
        wide = dataclasses.replace(
            MODEL, d_model=256, pipeline_microbatches=16, pipeline_virtual_stages=virtual, remat=remat
        )
        kept[remat] = compiled(wide, mesh_of(stage=2))[0].memory_analysis().temp_size_in_bytes
    whole = 12 * 256 * 256 * 8 // 2 * 4  # bytes of a stage's layers
    assert kept["full"] < kept["none"]
    assert kept["none"] < Plan(2, 16, virtual).ticks // 2 * whole, (kept, whole)  # more if weights were saved


def test_gpt3_13b_divides():
    sizes = MeshConfig(data=1, stage=4, fsdp=4, tensor=4).sizes(64)
    assert make_plan(dataclasses.replace(GPT3["13b"], pipeline_virtual_stages=2), sizes, 64) == Plan(4, 16, 2)
