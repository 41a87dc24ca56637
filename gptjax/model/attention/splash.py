"""Attention on TPUs: Splash, JAX's Pallas kernel for sparse masks, sharded over rows, heads and the context."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.parallel.collectives import gather
from gptjax.parallel.sharding import Rules

_BLOCK = 128  # the kernel computes blocks of at least so many positions


def splash_supports(T: int, shards: int) -> bool:
    """Whether the kernel takes T positions, sharded over so many devices: whole blocks on each."""
    return T >= _BLOCK and (shards == 1 or T % (_BLOCK * shards) == 0)


def splash_attention(q_BTHK, k_BTHK, v_BTHK, window, segment_ids, mesh, interpret=False):
    """Causal attention; arguments and result as for `attention`. interpret: run the kernel on a CPU, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk

    T, scale = q_BTHK.shape[1], jnp.asarray(q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype)
    if padding := -T % _BLOCK:  # whole blocks: what is added comes after every query, so no query sees it
        q_BTHK, k_BTHK, v_BTHK = (
            jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))) for a in (q_BTHK, k_BTHK, v_BTHK)
        )
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    q_BHTK, k_BHTK, v_BHTK = (jnp.swapaxes(a, 1, 2) for a in (q_BTHK * scale, k_BTHK, v_BTHK))
    shards, tensor = (mesh.shape["seq"], mesh.shape["tensor"]) if mesh is not None else (1, 1)
    # Whole heads on each device: the mask is the same for all of them.
    kernel = _kernel(q_BHTK.shape[2], q_BHTK.shape[1] // tensor, window, shards, interpret)

    def local(kernel, q_BHTK, k_BHSK, v_BHSK, segments_BT):
        """A device's queries against the keys and values of the whole context."""
        if shards > 1:
            k_BHSK, v_BHSK = (gather(a, "seq", 2) for a in (k_BHSK, v_BHSK))
        if segments_BT is None:
            return jax.vmap(lambda q, k, v: kernel(q, k, v))(q_BHTK, k_BHSK, v_BHSK)
        segments_BS = gather(segments_BT, "seq", 1) if shards > 1 else segments_BT
        ids = jax.vmap(sk.SegmentIds)(segments_BT, segments_BS)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q_BHTK, k_BHSK, v_BHSK, ids)

    if mesh is not None and mesh.size > 1:
        manual = jax.sharding.get_abstract_mesh().manual_axes  # within a stage of a pipeline: that axis
        rows = tuple(axis for axis in Rules().axes("batch") if axis not in manual)
        heads, tokens = P(rows, "tensor", "seq"), P(rows, "seq")
        local = jax.shard_map(
            local,
            mesh=None if manual else mesh,
            axis_names=set(mesh.axis_names) - set(manual),
            in_specs=(
                kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "seq"))),
                heads, heads, heads, None if segment_ids is None else tokens,
            ),
            out_specs=heads,
            check_vma=False,
        )  # fmt: skip
    return jnp.swapaxes(local(kernel, q_BHTK, k_BHTK, v_BHTK, segment_ids), 1, 2)[:, :T]


@functools.lru_cache(maxsize=64)
def _kernel(T, H, window, shards, interpret):
    """The kernel of one mask, its queries sharded over `shards` devices. Masks are evaluated in numpy, which takes
    time, so each is built once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    mask = sm.CausalMask((T, T))
    if window is not None:
        mask = mask & sm.LocalMask((T, T), (window - 1, None), 0)
    block = next(b for b in (512, 256, 128) if T // shards % b == 0)
    sizes = sk.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    heads = sm.MultiHeadMask([mask] * H)
    make = lambda: sk.make_splash_mha(heads, head_shards=1, q_seq_shards=shards, block_sizes=sizes, interpret=interpret)
    # In a thread of its own, where no mesh or trace is current, and stored as numpy: the kernel outlives both.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return jax.tree.map(np.asarray, thread.submit(make).result())
