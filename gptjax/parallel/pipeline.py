"""Pipeline parallelism: layers sharded over the mesh axis `stage`, micro-batches flowing through a ring of stages.

S stages, M micro-batches, V virtual stages per stage: stage s holds the V groups of layers s, S + s, 2 S + s, ...
(V = 1: consecutive layers), and a micro-batch passes V times around the ring. In every tick each stage applies one
group of layers to one micro-batch, then all send their output to the next stage at once:

    tick t, stage s:  u = t - s,  virtual stage v = u // S mod V,  micro-batch m = u // (S V) S + u mod S,  0 <= u < M V

So S micro-batches at a time pass through all virtual stages, and each returns to stage 0 in exactly the tick in which
stage 0 processes it again: nothing is buffered. The schedule takes M V + S - 1 ticks, and each stage works in M V:

    bubble = (S - 1) / (M V + S - 1)

is the fraction of time that a stage is idle. V = 1 is GPipe (Huang et al. 2019, §2.3: negligible from M = 4 S on);
V > 1 is the interleaved schedule of Megatron-LM (Narayanan et al. 2021, §2.2: bubble over ideal time (p - 1) / (m v)).

Only the axis `stage` is manual, in a shard_map; data, fsdp, tensor and seq stay automatic inside it. A stage keeps its
own layers, so parameters are never gathered over stages. The backward pass is the derivative of the loop: the same
ring in reverse, after the whole forward pass. Unlike 1F1B it keeps all M micro-batches until then, but with the model's
remat='full' only the stage's input of each tick (GPipe's re-materialization), plus the activations of the one group of
layers that is being recomputed.

Everything outside the layers (embedding, un-embedding, loss) is divided among the stages: each owns M / S
micro-batches, which move toward stage 0 as it needs them, and whose outputs move back to their owner as the last stage
finishes them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptjax.errors import InputError
from gptjax.parallel.sharding import RESIDUAL, constrain


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pipeline schedule: S stages, M micro-batches, V virtual stages per stage."""

    stages: int
    microbatches: int
    virtual_stages: int = 1

    @property
    def ticks(self) -> int:
        """Length of the schedule: M V + S - 1."""
        return self.microbatches * self.virtual_stages + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of the time that a stage is idle: (S - 1) / (M V + S - 1)."""
        return (self.stages - 1) / self.ticks

    def __str__(self):
        virtual = f", {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"{self.stages} stages, {self.microbatches} micro-batches{virtual}, bubble {self.bubble:.1%}"


def work(tick, stage, plan: Plan):
    """(virtual stage, micro-batch, u) of a stage in a tick, as in the module's docstring. Where u < 0 or u >= M V the
    stage is idle: its result is discarded. All are integers or integer arrays."""
    u = tick - stage
    micro = u // (plan.stages * plan.virtual_stages) * plan.stages + u % plan.stages
    return u // plan.stages % plan.virtual_stages, micro, u


def stages() -> int:
    """Size of the axis `stage` of the current mesh (jax.set_mesh); 1 without a mesh and where the axis is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or "stage" in mesh.manual_axes else mesh.shape["stage"]


def make_plan(config, sizes, rows: int) -> Plan:
    """The schedule for `rows` rows of a batch and a model (GPTConfig) on a mesh. sizes: {mesh axis: size}.

    The number of micro-batches is the largest multiple of the stages that divides the rows of a device and is at most
    config.pipeline_microbatches (None: 4 per stage). Raises InputError if the layers or rows are not divisible.
    """
    S, V = sizes["stage"], config.pipeline_virtual_stages
    if S == 1:
        return Plan(1, 1)
    most = config.pipeline_microbatches or 4 * S
    if config.n_layer % (S * V):
        raise InputError(
            f"model.n_layer={config.n_layer} is not divisible by mesh.stage={S}"
            f"{f' x model.pipeline_virtual_stages={V}' * (V > 1)}: every stage needs the same number of layers. "
            "Change one of them."
        )
    if sizes["seq"] > 1 and config.local_window is not None and config.n_layer // (S * V) % 2:
        # Else the banded layers would differ between stages, and so would what they gather over seq.
        raise InputError(
            f"model.local_window on mesh.seq={sizes['seq']} needs an even number of layers per virtual stage, "
            f"not {config.n_layer // (S * V)}: change mesh.stage or model.pipeline_virtual_stages."
        )
    if most < S:
        raise InputError(
            f"model.pipeline_microbatches={most} is fewer than mesh.stage={S}, so some stages would always be idle: "
            f"use at least {S}."
        )
    shards = sizes["data"] * sizes["fsdp"]
    fitting = [m for m in range(S, most + 1, S) if rows % (shards * m) == 0]
    if not fitting:
        raise InputError(
            f"{rows} rows per forward pass cannot be split into mesh.stage={S} equal micro-batches, or a multiple of "
            f"that, on each of mesh.data x mesh.fsdp = {shards} devices: use a multiple of {shards * S} rows."
        )
    return Plan(S, fitting[-1], V)


def describe(config, sizes, rows: int) -> str:
    """A clause about the pipeline for the messages at a run's start; '' without a pipeline."""
    return f", pipeline of {make_plan(config, sizes, rows)}" if sizes["stage"] > 1 else ""


def _to_microbatches(a, plan: Plan, shards: int):
    """[rows, ...] -> [stage, its micro-batches, rows of each, ...] without communication: row (w, s, j, r) is on device
    w of data x fsdp, belongs to stage s and there to micro-batch j."""
    a = a.reshape(shards, plan.stages, plan.microbatches // plan.stages, -1, *a.shape[1:])
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def _from_microbatches(a, shards: int):
    """The inverse of _to_microbatches."""
    a = a.reshape(*a.shape[:2], shards, -1, *a.shape[3:])
    a = jnp.moveaxis(a, 2, 0)
    return a.reshape(-1, *a.shape[4:])


def _save_all_but_slices(primitive, *_, **__):
    """Remat policy: a tick's slices of the stacked layers, above all its weights, are not saved as copies."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def _interleave_layers(blocks, stage, plan: Plan, size: int):
    """Exchanges a stage's stored layers, groups s V ... s V + V - 1 of `size` layers, for the groups that it computes,
    s, S + s, 2 S + s, ...: V collective-permutes, in each of which every stage sends one group. So the parameters and
    checkpoints keep the order of the layers, and each group is sent once per forward pass."""
    S, V = plan.stages, plan.virtual_stages
    share = S // math.gcd(S, V)  # stages s, s + share, ... would send to one stage at once: each starts a group later
    out = blocks
    for turn in range(V):
        sent = [(turn + s // share) % V for s in range(S)]
        to = [(s * V + sent[s]) % S for s in range(S)]
        virtual = [(to.index(s) * V + sent[to.index(s)]) // S for s in range(S)]

        def move(a, new, sent=sent, to=to, virtual=virtual):
            group = lax.dynamic_slice_in_dim(a, jnp.array(sent)[stage] * size, size)
            group = lax.ppermute(group, "stage", list(enumerate(to)))
            return lax.dynamic_update_slice_in_dim(new, group, jnp.array(virtual)[stage] * size, 0)

        out = jax.tree.map(move, blocks, out)
    return out


def run(layer, blocks, x, by_layer, by_row, config, remat=None):
    """Applies all layers of a model to x, pipelined over the stages of the current mesh.

    Args:
        layer: (parameters of one layer, x, its entries of by_layer, by_row of these rows) -> x.
        blocks: the layers' parameters, stacked [layer, ...], sharded over stage.
        x: [rows, time, d_model]. by_layer: a tree of [layer, ...]; by_row: a tree of integers [rows, ...].
        config: GPTConfig. remat: checkpoint policy for all layers of a tick; None = save everything.
    Returns:
        [rows, time, d_model].
    Raises:
        InputError: see make_plan.
    """
    mesh = jax.sharding.get_abstract_mesh()
    plan = make_plan(config, mesh.shape, x.shape[0])
    S, M, V = plan.stages, plan.microbatches, plan.virtual_stages
    shards, size = mesh.shape["data"] * mesh.shape["fsdp"], config.n_layer // (S * V)
    rows = ("data", "fsdp")

    @functools.partial(jax.checkpoint, policy=remat or _save_all_but_slices, prevent_cse=False)
    def group(blocks, virtual, stage, x, by_row):
        """The layers of one virtual stage applied to one micro-batch."""
        first = (virtual * S + stage) * size

        def one(x, i):
            params = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, virtual * size + i, keepdims=False), blocks)
            mine = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, first + i, keepdims=False), by_layer)
            return layer(params, x, mine, by_row), None

        return lax.scan(one, x, jnp.arange(size), unroll=min(config.unroll, size))[0]

    def one_stage(stage, blocks, inputs, by_row):
        """The program of one stage: its layers [L / S, ...], its micro-batches [1, M / S, rows, ...], all of by_row."""
        stage, inputs = stage[0], constrain(inputs[0], None, *RESIDUAL)
        blocks = _interleave_layers(blocks, stage, plan, size) if V > 1 else blocks
        empty, outputs = (
            constrain(jnp.zeros(a.shape, a.dtype), *(None,) * (a.ndim - 3), *RESIDUAL) for a in (inputs[0], inputs)
        )

        def tick(carry, t):
            x, arriving, leaving, outputs = carry
            virtual, micro, _ = work(t, stage, plan)
            # Micro-batch j S + i is owned by stage i and reaches stage 0, i ticks later, just when it is needed there.
            arriving = jnp.where(t % (S * V) == 0, inputs[jnp.minimum(t // (S * V), M // S - 1)], arriving)
            x = jnp.where((stage == 0) & (virtual == 0), arriving, x)
            x = group(blocks, virtual, stage, x, jax.tree.map(lambda a: a[jnp.clip(micro, 0, M - 1)], by_row))
            # Likewise in reverse: of S outputs of the last stage, the first moves S - 1 times, to stage 0.
            leaving = jnp.where(stage == S - 1, x, leaving)
            finished = t - (S - 1)
            slot = jnp.maximum(finished // (S * V), 0)
            done = finished % (S * V) == S * V - 1
            outputs = outputs.at[slot].set(jnp.where(done & (finished >= 0), leaving, outputs[slot]))
            forward = lambda a: lax.ppermute(a, "stage", [(s, (s + 1) % S) for s in range(S)])
            backward = lambda a: lax.ppermute(a, "stage", [(s, (s - 1) % S) for s in range(S)])
            return (forward(x), backward(arriving), backward(leaving), outputs), None

        return lax.scan(tick, (empty, empty, empty, outputs), jnp.arange(plan.ticks))[0][3][None]

    inputs = lax.with_sharding_constraint(
        _to_microbatches(x, plan, shards), P("stage", None, rows, P.UNCONSTRAINED, P.UNCONSTRAINED)
    )
    # Micro-batch j S + s is the j-th of stage s. by_row is small, so it is replicated over the stages.
    by_row = jax.tree.map(lambda a: jnp.swapaxes(_to_microbatches(a, plan, shards), 0, 1), by_row)
    by_row = jax.tree.map(lambda a: a.reshape(M, *a.shape[2:]), by_row)
    by_row = jax.tree.map(lambda a: lax.with_sharding_constraint(a, P(None, rows)), by_row)
    outputs = jax.shard_map(
        one_stage, axis_names={"stage"}, check_vma=False,
        in_specs=(P("stage"), P("stage"), P("stage"), P()), out_specs=P("stage"),
    )(jnp.arange(S), blocks, inputs, by_row)  # fmt: skip
    return _from_microbatches(outputs, shards)
