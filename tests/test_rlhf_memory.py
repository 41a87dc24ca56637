"""PPO's plan of memory, models put away in the host's, and its state taken apart for checkpoints."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import N
from test_update import fresh, same

from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf import memory
from gptjax.rlhf.state import PPOState

MIB = 2**20


def mebibytes(n, dtype=np.float32):
    return {"kernel": jnp.zeros((n, MIB // np.dtype(dtype).itemsize), dtype)}


def test_bytes_per_device():
    assert memory.bytes_per_device({"a": jnp.zeros((3, 5)), "b": jnp.zeros(7, jnp.bfloat16)}) == 60 + 14
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    cut = jax.device_put(jnp.zeros((16, 4)), batch_sharding(mesh, 0))
    assert memory.bytes_per_device({"cut": cut}) == 2 * 4 * 4


def plan(offload, reward=True, mesh=None):
    """Sizes in MiB by name, of a state whose parts are 1, 2, 3, ... MiB."""
    scalar = jnp.int32(0)
    state = PPOState(
        step=scalar, policy=mebibytes(1), policy_opt=mebibytes(2), average=mebibytes(3), value=mebibytes(4),
        value_opt=mebibytes(5), kl_coefficient=scalar, key=scalar, prompt_position=scalar, ptx_position=scalar,
    )  # fmt: skip
    n = dataclasses.replace(N, response=12, vocab=1024, loss_chunk=4, mesh=mesh)
    table = memory.memory_plan(state, mebibytes(6), mebibytes(7) if reward else None, n, 512, 20, offload)
    lines = re.findall(r"  (.+?) +([\d.,]+) MiB  (\w+)", table)
    return {name.strip(): (float(size.replace(",", "")), place) for name, size, place in lines}


def test_the_plans_cache_is_cut_up_over_rows_and_heads():
    whole, cut = (plan(False, mesh=make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:ways]))["KV cache"][0]
                  for sizes, ways in (({}, 1), ({"fsdp": 2, "tensor": 2}, 4)))  # fmt: skip
    assert cut == pytest.approx(whole / 4, rel=0.01)


@pytest.mark.parametrize("offload", [False, True])
def test_the_memory_plan_adds_up(offload):
    found = plan(offload)
    expected = {
        "policy": 1, "policy's optimizer": 2, "policy's average": 3, "value network": 4, "value's optimizer": 5,
        "gradients": 5, "reference": 6, "reward model": 7,
        "KV cache": 2 * 2 * 512 * 32 * 16 * 4 / MIB,  # k and v, layers, rows, slots, width, float32
        "logits of a chunk": 512 * 4 * 1024 * 4 / MIB,
    }  # fmt: skip
    total, _ = found.pop("total")
    if offload:  # both frozen models are there and no gradients
        assert found.pop("while scoring")[0] == pytest.approx(total + 6 + 7 - 5, abs=0.051)
    assert {k: v for k, (v, _) in found.items()} == pytest.approx(expected, abs=0.051)
    on_host = {k for k, (_, place) in found.items() if place == "host"}
    assert on_host == ({"reference", "reward model"} if offload else set())
    on_device = sum(expected.values()) - (13 if offload else 0)
    assert total == pytest.approx(on_device, abs=0.051)


def test_no_reward_model_no_line():
    assert "reward model" not in plan(False, reward=False)


def test_what_is_put_away_comes_back_bit_for_bit():
    kinds = {m.kind for m in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip("this backend has no pinned host memory")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    params = jax.device_put({"kernel": np.random.default_rng(0).standard_normal((16, 4))}, batch_sharding(mesh, 0))
    away = memory.offloaded(params)
    assert away["kernel"].sharding.memory_kind == "pinned_host"
    assert away["kernel"].sharding.spec == params["kernel"].sharding.spec
    back = memory.on_device(away, True)
    assert back["kernel"].sharding == params["kernel"].sharding
    same(back, params)
    assert memory.offloaded(None) is None and memory.on_device(params, False) is params


def test_a_state_is_split_and_joined_whole():
    state = fresh()
    average, rest = state.split()
    assert "average" not in rest and "step" not in rest
    joined = PPOState.join(state.step, average, rest)
    same(joined, state)
