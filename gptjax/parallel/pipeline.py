"""Pipeline parallelism: the layers cut over the mesh axis `stage`, micro-batches flowing through them.

S stages, M micro-batches, V rounds: stage s holds the V groups of layers s, S + s, 2 S + s, ... (V = 1: one run of
layers), and a micro-batch goes V times round the ring of stages. Every stage computes one group on one micro-batch a
tick, then all hand on to the next stage at once:

    tick t, stage s:  u = t - s,  round v = u // S mod V,  micro-batch m = u // (S V) S + u mod S       0 <= u < M V

so S micro-batches at a time go through all the rounds, and one comes back to stage 0 in the very tick in which stage
0 turns to it: nothing waits. All is done after M V + S - 1 ticks, of which each stage works M V:

    bubble = (S - 1) / (M V + S - 1)

the share of the time a stage idles. V = 1 is GPipe (Huang et al. 2019, §2.3: negligible from M = 4 S on); V > 1 is the
interleaved schedule of Megatron-LM (Narayanan et al. 2021, §2.2: bubble over ideal time (p - 1) / (m v)).

Only `stage` is manual here, in a shard_map; data, fsdp, tensor and seq go on by annotation within it. A stage keeps
its own layers, so nothing of them is ever gathered over stages. The backward pass is the derivative of the loop: the
same ring, the other way round, after all of the forward pass. Unlike 1F1B it holds all M micro-batches at its turn,
but with the model's remat='full' of each tick only the stage's input (GPipe's re-materialization), and beside them the
activations of the one group of layers that is computed again.

What is not a layer (embedding, un-embedding, loss) is shared out: each stage has its own M / S micro-batches, which
are handed towards stage 0 as it needs them, and their results towards their stage as the last one finishes them.
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
    stages: int
    microbatches: int
    rounds: int = 1

    @property
    def ticks(self) -> int:
        return self.microbatches * self.rounds + self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of its time that a stage has nothing to do: (S - 1) / (M V + S - 1)."""
        return (self.stages - 1) / self.ticks

    def __str__(self):
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"{self.stages} stages, {self.microbatches} micro-batches{rounds}, bubble {self.bubble:.1%}"


def work(tick, stage, plan: Plan):
    """What a stage does in a tick: (round, micro-batch), and how many it has begun before (below 0 or from M V on: it
    idles, or computes on what is not used)."""
    u = tick - stage
    return u // plan.stages % plan.rounds, u // (plan.stages * plan.rounds) * plan.stages + u % plan.stages, u


def stages() -> int:
    """Size of the axis `stage` of the mesh in force (jax.set_mesh); 1 where it is manual already."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or "stage" in mesh.manual_axes else mesh.shape["stage"]


def make_plan(config, sizes, rows: int) -> Plan:
    """How `rows` rows go through the pipeline of a model (GPTConfig) on a mesh of these sizes.

    The micro-batches are the largest multiple of the stages that divides the rows of a device and is not above
    config.pipeline_microbatches (None: 4 a stage). Raises InputError where layers or rows do not divide.
    """
    S, V = sizes["stage"], config.pipeline_virtual_stages
    if S == 1:
        return Plan(1, 1)
    most = config.pipeline_microbatches or 4 * S
    if config.n_layer % (S * V):
        raise InputError(
            f"model.n_layer={config.n_layer} is not divisible by mesh.stage={S}"
            f"{f' x model.pipeline_virtual_stages={V}' * (V > 1)}: each stage takes as many layers as any other."
        )
    if sizes["seq"] > 1 and config.local_window is not None and config.n_layer // (S * V) % 2:
        # Which layers are banded would differ from stage to stage, and what a banded one gathers over seq is its own.
        raise InputError(
            f"model.local_window on mesh.seq={sizes['seq']} needs an even number of layers on each stage and round, "
            f"not {config.n_layer // (S * V)}: change mesh.stage or model.pipeline_virtual_stages."
        )
    if most < S:
        raise InputError(
            f"model.pipeline_microbatches={most} is fewer than mesh.stage={S}: stages would never all have work."
        )
    ways = sizes["data"] * sizes["fsdp"]
    fitting = [m for m in range(S, most + 1, S) if rows % (ways * m) == 0]
    if not fitting:
        raise InputError(
            f"{rows} rows at a time do not give mesh.stage={S} equal micro-batches, or a multiple of that, on each of "
            f"mesh.data x mesh.fsdp = {ways}: use a multiple of {ways * S} rows."
        )
    return Plan(S, fitting[-1], V)


def describe(config, sizes, rows: int) -> str:
    """A clause about the pipeline for the lines at a run's start; '' without one."""
    return f", pipeline of {make_plan(config, sizes, rows)}" if sizes["stage"] > 1 else ""


def _cut(a, plan: Plan, ways: int):
    """[rows, ...] -> [stage, micro-batches of it, rows of one, ...], moving nothing: row (w, s, j, r) is on device w of
    data x fsdp, belongs to stage s and there to micro-batch j."""
    a = a.reshape(ways, plan.stages, plan.microbatches // plan.stages, -1, *a.shape[1:])
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def _join(a, ways: int):
    """What _cut has cut."""
    a = a.reshape(*a.shape[:2], ways, -1, *a.shape[3:])
    a = jnp.moveaxis(a, 2, 0)
    return a.reshape(-1, *a.shape[4:])


def _all_but_slices(primitive, *_, **__):
    """What is sliced out of the layers, weights above all, is not kept beside them, once a tick."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def _deal(blocks, stage, plan: Plan, size: int):
    """A stage's layers as they are stored, groups s V ... s V + V - 1 of `size` layers, for those that it computes,
    groups s, S + s, 2 S + s, ...: V permutations, in each of which every stage sends one group. So the parameters keep
    their order, and with it checkpoints their layout, and each travels once a forward pass."""
    S, V = plan.stages, plan.rounds
    share = S // math.gcd(S, V)  # stages s, s + share, ... would send the same way at once: each begins one group later
    out = blocks
    for turn in range(V):
        sent = [(turn + s // share) % V for s in range(S)]
        to = [(s * V + sent[s]) % S for s in range(S)]
        round_ = [(to.index(s) * V + sent[to.index(s)]) // S for s in range(S)]

        def move(a, new, sent=sent, to=to, round_=round_):
            piece = lax.dynamic_slice_in_dim(a, jnp.array(sent)[stage] * size, size)
            piece = lax.ppermute(piece, "stage", list(enumerate(to)))
            return lax.dynamic_update_slice_in_dim(new, piece, jnp.array(round_)[stage] * size, 0)

        out = jax.tree.map(move, blocks, out)
    return out


def run(layer, blocks, x, by_layer, by_row, config, remat=None):
    """All layers of a model on x, pipelined over the stages of the mesh in force.

    Args:
        layer: (parameters of one layer, x, its entries of by_layer, by_row of these rows) -> x.
        blocks: the layers' parameters, stacked [layer, ...], cut over stage.
        x: [rows, time, features]. by_layer: a tree of [layer, ...]; by_row: a tree of [rows, ...], of whole numbers.
        config: GPTConfig. remat: the policy of its remat, over all layers of a tick at once; None = keep everything.
    Returns:
        [rows, time, features].
    """
    mesh = jax.sharding.get_abstract_mesh()
    plan = make_plan(config, mesh.shape, x.shape[0])
    S, M, V = plan.stages, plan.microbatches, plan.rounds
    ways, size = mesh.shape["data"] * mesh.shape["fsdp"], config.n_layer // (S * V)
    rows = ("data", "fsdp")

    @functools.partial(jax.checkpoint, policy=remat or _all_but_slices, prevent_cse=False)
    def group(blocks, round_, stage, x, by_row):
        """The layers of one round on one micro-batch."""
        first = (round_ * S + stage) * size

        def one(x, i):
            params = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, round_ * size + i, keepdims=False), blocks)
            mine = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, first + i, keepdims=False), by_layer)
            return layer(params, x, mine, by_row), None

        return lax.scan(one, x, jnp.arange(size), unroll=min(config.unroll, size))[0]

    def one_stage(stage, blocks, inputs, by_row):
        """A stage's view: its layers [L / S, ...], its micro-batches [1, M / S, rows, ...], all rows' by_row."""
        stage, inputs = stage[0], constrain(inputs[0], None, *RESIDUAL)
        blocks = _deal(blocks, stage, plan, size) if V > 1 else blocks
        empty, outputs = (
            constrain(jnp.zeros(a.shape, a.dtype), *(None,) * (a.ndim - 3), *RESIDUAL) for a in (inputs[0], inputs)
        )

        def tick(carry, t):
            x, arriving, leaving, outputs = carry
            round_, micro, _ = work(t, stage, plan)
            # Micro-batch j S + i lies with stage i and is at stage 0 when that turns to it, i ticks later.
            arriving = jnp.where(t % (S * V) == 0, inputs[jnp.minimum(t // (S * V), M // S - 1)], arriving)
            x = jnp.where((stage == 0) & (round_ == 0), arriving, x)
            x = group(blocks, round_, stage, x, jax.tree.map(lambda a: a[jnp.clip(micro, 0, M - 1)], by_row))
            # And the other way: of S that the last stage finishes, the first goes on S - 1 times, to stage 0.
            leaving = jnp.where(stage == S - 1, x, leaving)
            finished = t - (S - 1)
            slot = jnp.maximum(finished // (S * V), 0)
            done = finished % (S * V) == S * V - 1
            outputs = outputs.at[slot].set(jnp.where(done & (finished >= 0), leaving, outputs[slot]))
            on = lambda a: lax.ppermute(a, "stage", [(s, (s + 1) % S) for s in range(S)])
            back = lambda a: lax.ppermute(a, "stage", [(s, (s - 1) % S) for s in range(S)])
            return (on(x), back(arriving), back(leaving), outputs), None

        return lax.scan(tick, (empty, empty, empty, outputs), jnp.arange(plan.ticks))[0][3][None]

    inputs = lax.with_sharding_constraint(_cut(x, plan, ways), P("stage", None, rows, P.UNCONSTRAINED, P.UNCONSTRAINED))
    # Micro-batch j S + s is the j-th of stage s. All stages have all of by_row: it is small.
    by_row = jax.tree.map(lambda a: jnp.swapaxes(_cut(a, plan, ways), 0, 1), by_row)
    by_row = jax.tree.map(lambda a: a.reshape(M, *a.shape[2:]), by_row)
    by_row = jax.tree.map(lambda a: lax.with_sharding_constraint(a, P(None, rows)), by_row)
    outputs = jax.shard_map(
        one_stage, axis_names={"stage"}, check_vma=False,
        in_specs=(P("stage"), P("stage"), P("stage"), P()), out_specs=P("stage"),
    )(jnp.arange(S), blocks, inputs, by_row)  # fmt: skip
    return _join(outputs, ways)
