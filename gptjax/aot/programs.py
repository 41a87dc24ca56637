"""The stages' device programs from shapes alone, made by the functions that their mains call: what check.py compiles.

Nothing is allocated: states, batches and frozen models are jax.ShapeDtypeStruct with shardings.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import dpo, finetune, pretrain, reward, sft
from gptjax.cost.memory import cache_bytes, training_peak
from gptjax.cost.roofline import Work, train_work
from gptjax.data import comparisons
from gptjax.data.labeled import names_of
from gptjax.data.prompts import bucket_widths
from gptjax.data.transforms import NEW_TOKENS
from gptjax.dpo import DPOConfig
from gptjax.errors import InputError
from gptjax.finetune import FinetuneConfig
from gptjax.generation.decode import Decoder, Stop, decode
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt, heads
from gptjax.model.attention import resolve
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, non_embedding_count, parameter_count
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import batch_shards, check_fits
from gptjax.parallel.sharding import batch_sharding, num_shards, parameter_shardings
from gptjax.ppo import PPOConfig
from gptjax.pretrain import PretrainConfig
from gptjax.reward import RewardConfig
from gptjax.rlhf import rollout
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.program import PPOProgram, boxed_params, context_lengths, make_spec, ppo_program
from gptjax.rlhf.ptx import batch_shape
from gptjax.rlhf.reward_model import prompt_room
from gptjax.sft import SFTConfig
from gptjax.training import precision
from gptjax.training.offload import MEMORY
from gptjax.training.state import unboxed_shapes


@dataclasses.dataclass(frozen=True)
class Program:
    """jitted.lower(*arguments) under jax.set_mesh(mesh) is the program. tokens: that one execution processes.
    parts: our own estimate of the bytes on one device, by what they are. arrays: the largest that the forward pass
    saves, (name, shape over all devices, bytes on one device)."""

    jitted: Any
    arguments: tuple
    mesh: Any
    tokens: int
    work: Work
    parts: dict[str, int]
    arrays: tuple[tuple[str, tuple[int, ...], int], ...] = ()

    def compile(self):
        """Compiles without the persistent cache, which can write programs for a described TPU but not read them."""
        name = "jax_persistent_cache_min_compile_time_secs"
        before = getattr(jax.config, name)
        jax.config.update(name, float("inf"))
        try:
            with jax.set_mesh(self.mesh):
                return self.jitted.lower(*self.arguments).compile()
        finally:
            jax.config.update(name, before)


def device_bytes(tree) -> int:
    """Bytes in the memory of one device of abstract arrays with shardings."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != MEMORY]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)


def placed(tree, shardings):
    """The abstract arrays with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def replicated(mesh, *arrays):
    """Abstract arrays (shape, dtype) that every device has."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in arrays)


# --- training ---------------------------------------------------------------------------------------------


def train_program(c: PretrainConfig, mesh) -> Program:
    """One optimizer step at the full batch (pretrain.py)."""
    return _language_program(c, c.model, pretrain.program, mesh, c.model.context_length, c.data.isolate_documents)


def sft_program(c: SFTConfig, base: GPTConfig, mesh) -> Program:
    """The same for supervised fine-tuning (sft.py) of a model like `base`."""
    model = c.model.apply(base)
    return _language_program(c, model, sft.program, mesh, c.data.max_length or model.context_length, c.data.packing)


def reward_program(c: RewardConfig, base: GPTConfig, mesh, completions: int = comparisons.MOST) -> Program:
    """The same for a reward model (reward.py) on a trunk like `base`, with the maximum number of completions."""
    model = reward.trunk(c, base)
    time, rows = c.data.max_length or model.context_length, c.microbatch_rows
    shapes = _comparison_shapes(completions, time)
    return _step_program(c, model, reward.program, mesh, time, shapes, sequences=rows * completions, chunk=1)


def dpo_program(c: DPOConfig, base: GPTConfig, mesh, completions: int = comparisons.MOST) -> Program:
    """The same for DPO (dpo.py) of a model like `base`, with the maximum number of completions."""
    model = c.model.no_dropout_by_default().apply(base)
    time, rows = c.data.max_length or model.context_length, c.microbatch_rows
    shapes = _comparison_shapes(completions, time) | {
        "starts": ((completions,), jnp.int32), "reference": ((completions,), jnp.float32)
    }  # fmt: skip
    return _step_program(
        c, model, dpo.program, mesh, time, shapes, sequences=rows * completions, chunk=c.loss_chunk
    )


def finetune_program(c: FinetuneConfig, base: GPTConfig, mesh, choices: int = 4) -> Program:
    """The same for fine-tuning on a labeled task (finetune.py) of a model like `base`. choices: how many, in a choice
    task whose config does not list its labels."""
    model = c.model.apply(base, vocab_size=base.vocab_size + NEW_TOKENS)
    time, low_high = c.data.max_length or model.context_length, c.data.score_range
    labels = low_high[1] - low_high[0] + 1 if low_high else len(names_of(c.data.labels) or range(choices))
    choice = c.data.task == "choice"
    n = labels if choice else 2 if c.data.task == "similarity" else 1
    shapes = {
        "tokens": ((n, time), jnp.int32), "lengths": ((n,), jnp.int32), "valid": ((n,), jnp.float32),
        "target": ((labels,), jnp.float32), "weights": ((), jnp.float32),
    }  # fmt: skip
    program = functools.partial(finetune.program, outputs=1 if choice else labels)
    return _step_program(
        c, model, lambda c, model, mesh: program(c, model, mesh=mesh), mesh, time, shapes,
        sequences=c.microbatch_rows * n, chunk=c.loss_chunk,
    )  # fmt: skip


def _comparison_shapes(completions: int, time: int) -> dict:
    return {
        "tokens": ((completions, time), jnp.int32), "lengths": ((completions,), jnp.int32),
        "ranks": ((completions,), jnp.float32), "valid": ((completions,), jnp.float32), "weights": ((), jnp.float32),
    }  # fmt: skip


def _language_program(c, model: GPTConfig, program, mesh, time: int, isolated: bool) -> Program:
    shapes = {"tokens": ((time + 1,), jnp.int32), "weights": ((time,), jnp.float32)}
    if isolated:
        shapes |= {"segment_ids": ((time,), jnp.int32), "positions": ((time,), jnp.int32)}
    return _step_program(c, model, program, mesh, time, shapes, sequences=c.microbatch_rows, chunk=c.loss_chunk)


def _step_program(c, model, program, mesh, time, shapes, *, sequences, chunk) -> Program:
    """A stage's optimizer step. program: of its main. shapes: {name: (shape of a row, dtype)} of a batch; sequences:
    those of a micro-batch, of `time` tokens."""
    rows, micro = c.microbatch_rows, c.batch_size // c.microbatch_rows
    check_fits(mesh.shape, n_head=model.n_head, batch_size=c.batch_size, microbatch_size=rows, time=time)
    model = dataclasses.replace(model, attention=resolve(model.attention, mesh.devices.flat[0].platform))
    train = program(c, model, mesh)
    state = placed(train.abstract, train.shardings)
    batch = {
        name: jax.ShapeDtypeStruct((1, micro, rows, *shape), dtype, sharding=batch_sharding(mesh, 2))
        for name, (shape, dtype) in shapes.items()
    }
    rates = replicated(mesh, ((1,), jnp.float32))[0]

    state_bytes = {
        "params": device_bytes(state.params), "optimizer": device_bytes(state.opt_state), "batch": device_bytes(batch)
    }  # fmt: skip
    parts, kept, arrays = training_peak(
        dataclasses.replace(model, context_length=time), mesh.shape, rows=sequences, micro_batches=micro, chunk=chunk,
        dtype=c.precision.dtype, state=state_bytes,
    )  # fmt: skip
    tokens = micro * sequences * time
    work = train_work(
        model, tokens=tokens, devices=mesh.size, micro_batches=micro, ways=mesh.shape["tensor"] * mesh.shape["stage"],
        state_bytes=state_bytes["params"] + state_bytes["optimizer"], parameter_bytes=state_bytes["params"],
        kept_bytes=kept, bubble=pipeline.make_plan(model, mesh.shape, sequences).bubble,
    )  # fmt: skip
    return Program(train.step, (state, batch, rates), mesh, tokens, work, parts, arrays)


# --- generation -------------------------------------------------------------------------------------------


def forward_flops(c: GPTConfig, time: int) -> float:
    """FLOPs of a forward pass over one sequence of `time` tokens, causal attention counted as half."""
    return flops_per_token(dataclasses.replace(c, context_length=time)).causal / 3 * time


def decode_program(c: PretrainConfig, mesh, *, rows: int, prompt: int, new_tokens: int) -> Program:
    """Prefill and sampling of `rows` prompts (generation/decode.py), parameters in float32 as training keeps them."""
    if prompt + new_tokens > c.model.context_length:
        raise InputError(
            f"prompt_length={prompt} and new_tokens={new_tokens} are together more than the context of "
            f"{c.model.context_length}: lower one of them."
        )
    check_fits(mesh.shape, n_head=c.model.n_head, batch_size=rows, microbatch_size=rows)
    model = dataclasses.replace(c.model, attention=resolve(c.model.attention, mesh.devices.flat[0].platform))
    boxed = gpt.abstract_params(model)
    params = placed(unboxed_shapes(boxed), parameter_shardings(boxed, mesh))
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    prompts, lengths, limits, keys = replicated(
        mesh, ((rows, prompt), jnp.int32), ((rows,), jnp.int32), ((rows,), jnp.int32), (key.shape, key.dtype)
    )
    tensor, ways = mesh.shape["tensor"], batch_shards(mesh.shape) * num_shards(mesh.shape, "heads")
    cache = cache_bytes(model, rows * (prompt + new_tokens), c.precision.dtype) // ways
    flops = rows * forward_flops(model, prompt + new_tokens) / mesh.size
    matrices = 2 * (non_embedding_count(model) + model.vocab_size * model.d_model) / tensor
    mean_cache = cache * (prompt + new_tokens / 2) / (prompt + new_tokens)
    work = Work(flops, 0.0, flops, (new_tokens + 1) * matrices + new_tokens * mean_cache)
    parts = {"params": device_bytes(params), "key-value cache": cache + cache * prompt // (prompt + new_tokens) // 2}
    decoder = Decoder(model, model.vocab_size, c.precision.dtype, mesh)
    arguments = (params, decoder, prompts, lengths, limits, keys, Stop(new_tokens, 0), Sampling(0.8, top_p=0.95))
    return Program(decode, arguments, mesh, rows * (prompt + new_tokens), work, parts)


# --- PPO --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PPOParts:
    """The abstract models of PPO on a mesh, as in ppo.py. slots: the largest width that prompts are padded to."""

    spec: RLSpec
    program: PPOProgram
    state: Any
    reference: Any
    reward: Any
    slots: int


def ppo_parts(c: PPOConfig, policy: GPTConfig, reward: GPTConfig | None, mesh) -> PPOParts:
    resolved = lambda m: dataclasses.replace(
        m, attention=resolve(c.model.attention or m.attention, mesh.devices.flat[0].platform)
    )
    reward = reward and dataclasses.replace(c.model, dropout=0.0).apply(resolved(reward))
    policy = resolved(policy)
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, attention=None))
    spec = make_spec(c, policy, reward, mesh, eos_id=0, pad_id=1, vocab=policy.vocab_size)
    program = ppo_program(c, spec)
    room = prompt_room(context_lengths(spec), spec.response, "rollout.max_new_tokens")
    slots = bucket_widths(c.data.max_length or room, c.data.buckets, room)[-1]
    in_dtype = lambda boxed: jax.eval_shape(lambda p: precision.frozen(p, spec.dtype), unboxed_shapes(boxed))
    frozen = lambda boxed: placed(in_dtype(boxed), parameter_shardings(boxed, mesh))
    reward_params = frozen(heads.abstract_scalar_model(reward)) if reward else None
    reference = frozen(boxed_params(spec)[0])
    return PPOParts(spec, program, placed(program.abstract, program.shardings), reference, reward_params, slots)


def _ppo_bytes(p: PPOParts, offload: bool) -> dict[str, int]:
    s = p.state
    frozen = {"reference": device_bytes(p.reference), "reward model": device_bytes(p.reward)}
    return {
        "policy": device_bytes(s.policy),
        "policy's optimizer": device_bytes(s.policy_opt),
        "policy's average": device_bytes(s.average),
        "value network": device_bytes(s.value),
        "value's optimizer": device_bytes(s.value_opt),
    } | ({} if offload else frozen)


def collect_program(c: PPOConfig, policy: GPTConfig, reward: GPTConfig | None, mesh) -> Program:
    """Sampling and the four models' forward passes (rlhf/rollout.py), with everything that is in memory meanwhile."""
    p = ppo_parts(c, policy, reward, mesh)
    spec, rows = p.spec, c.batch_size
    by_row = batch_sharding(mesh, 0)
    prompts = jax.ShapeDtypeStruct((rows, p.slots), jnp.int32, sharding=by_row)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row)
    key = jax.eval_shape(lambda: jax.random.key(0))
    (key,) = replicated(mesh, (key.shape, key.dtype))
    jitted = jax.jit(_collect(c, spec), keep_unused=True)
    texts = p.slots + spec.response
    models = [spec.policy, spec.policy, *filter(None, (spec.value, spec.reward))]  # the second is the reference
    flops = rows * (forward_flops(spec.policy, texts) + sum(forward_flops(m, texts) for m in models)) / mesh.size
    tensor, ways = mesh.shape["tensor"], batch_shards(mesh.shape) * num_shards(mesh.shape, "heads")
    cache = cache_bytes(spec.policy, rows * texts, spec.dtype) // ways
    matrices = 2 * parameter_count(spec.policy) / tensor
    read = (spec.response + 1) * matrices + spec.response * cache * (p.slots + spec.response / 2) / texts
    work = Work(flops, 0.0, flops, read)
    parts = _ppo_bytes(p, offload=False) | {"key-value cache": cache + cache * p.slots // texts // 2}
    return Program(jitted, (p.state, p.reference, p.reward, prompts, lengths, key), mesh, rows * texts, work, parts)


def _collect(c: PPOConfig, spec: RLSpec):
    # Without a reward model the whole score is a rule's, which is no part of the program.
    rule = None if spec.reward else lambda tokens, lengths, mask: mask[:, 0]

    def collect(state, reference, reward, prompts, lengths, key):
        models = rollout.Models(state.policy, state.value, lambda: (reference, reward))
        experience, metrics, _ = rollout.collect(
            models, prompts, lengths, key, state.kl_coefficient, spec, c.rollout, rule=rule
        )
        return experience, metrics["policy/rollout_logp_diff"]

    return collect


def update_program(c: PPOConfig, policy: GPTConfig, reward: GPTConfig | None, mesh) -> Program:
    """All epochs and minibatches of one iteration, and PPO-ptx's text (rlhf/update.py)."""
    p = ppo_parts(c, policy, reward, mesh)
    spec, rows, texts = p.spec, c.batch_size, p.slots + p.spec.response
    by_row = batch_sharding(mesh, 0)
    array = lambda slots, dtype: jax.ShapeDtypeStruct((rows, slots), dtype, sharding=by_row)
    experience = rollout.Experience(
        tokens=array(texts, jnp.int32),
        real=array(texts, jnp.float32),
        **{f.name: array(spec.response, jnp.float32) for f in dataclasses.fields(rollout.Experience)[2:]},
    )
    ptx, ptx_flops, ptx_tokens = None, 0.0, 0
    steps = c.ppo.epochs * c.ppo.minibatches
    if c.ppo.ptx_coefficient:
        time = c.ptx.context_length or spec.policy.context_length
        shape = batch_shape(c.ptx, c.ppo.minibatches, rows // c.ppo.minibatches, c.ppo.microbatch_size, mesh)
        ptx = {"tokens": jax.ShapeDtypeStruct((*shape, time + 1), jnp.int32, sharding=batch_sharding(mesh, 2))}
        sequences = c.ppo.epochs * math.prod(shape)
        ptx_flops, ptx_tokens = 3 * sequences * forward_flops(spec.policy, time), sequences * time
    resident, update = () if c.offload else (p.reference, p.reward), p.program.update.__wrapped__
    jitted = jax.jit(
        lambda state, experience, ptx, rates, *resident: update(state, experience, ptx, rates),
        donate_argnums=0, out_shardings=(p.program.shardings, None), keep_unused=True,
    )  # fmt: skip
    per_text = sum(forward_flops(m, texts) for m in (spec.policy, spec.value) if m)
    flops = (3 * c.ppo.epochs * rows * per_text + ptx_flops) / mesh.size
    state = device_bytes((p.state.policy, p.state.policy_opt, p.state.value, p.state.value_opt))
    gradients = device_bytes((p.state.policy, p.state.value))
    work = Work(flops, 0.0, flops, steps * (2 * state + 2 * gradients))
    parts = _ppo_bytes(p, c.offload) | {"gradients": gradients}
    arguments = (p.state, experience, ptx, replicated(mesh, ((), jnp.float32), ((), jnp.float32)), *resident)
    return Program(jitted, arguments, mesh, c.ppo.epochs * rows * texts + ptx_tokens, work, parts)
