"""Memory of PPO's four models and their optimizers on one mesh, and offloading the frozen models to host memory."""

import math

import jax

from gptjax.cost.memory import cache_bytes
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import num_shards
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import PPOState


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays on one device, by their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_plan(state: PPOState, reference, reward, spec: RLSpec, batch: int, prompt_slots: int, offload: bool) -> str:
    """A table of what PPO keeps on each device between and during iterations; activations come on top."""
    rows, heads, platform = batch, 1, jax.default_backend()
    if spec.mesh is not None:
        rows, heads = batch / batch_shards(spec.mesh.shape), num_shards(spec.mesh.shape, "heads")
        platform = spec.mesh.devices.flat[0].platform
    cache = cache_bytes(spec.policy, batch * (prompt_slots + spec.response), spec.dtype, platform)
    cache *= rows / batch / heads
    logits = rows * min(spec.loss_chunk, spec.response) * spec.vocab * 4
    where = "host" if offload else "device"
    parts = [
        ("policy", bytes_per_device(state.policy), "device"),
        ("policy's optimizer", bytes_per_device(state.policy_opt), "device"),
        ("policy's average", bytes_per_device(state.average), "device"),
        ("value network", bytes_per_device(state.value), "device"),
        ("value's optimizer", bytes_per_device(state.value_opt), "device"),
        ("gradients", bytes_per_device(state.policy) + bytes_per_device(state.value), "device"),
        ("reference", bytes_per_device(reference), where),
        ("reward model", bytes_per_device(reward) if reward is not None else 0, where),
        ("KV cache", int(cache), "device"),
        ("logits of a chunk", int(logits), "device"),
    ]
    total = sum(size for _, size, place in parts if place == "device")
    lines = [f"  {name:<20}{size / 2**20:>10,.1f} MiB  {place}" for name, size, place in parts if size]
    lines.append(f"  {'total':<20}{total / 2**20:>10,.1f} MiB  device, without activations")
    if offload:  # both are on the device together while scoring, when there are no gradients
        scoring = (
            total
            + sum(size for _, size, place in parts if place == "host")
            - next(size for name, size, _ in parts if name == "gradients")
        )
        lines.append(f"  {'while scoring':<20}{scoring / 2**20:>10,.1f} MiB  device, the frozen models there too")
    return "\n".join(["memory per device:", *lines])


def offloaded(params):
    """The parameters in host memory, sharded as before."""
    if params is None:
        return None
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), params)


def on_device(params, offload: bool):
    """Copies parameters of `offloaded` back to device memory, where they stay as long as the result is referenced."""
    if not offload:
        return params
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), params)
