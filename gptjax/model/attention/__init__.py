"""Causal self-attention: one function, a plain reference, and the fast path of each platform.

    attention(q, k, v, ...)      q, k, v [batch, time, head, d_head] -> [batch, time, head, d_head]

Paths, all equal to `reference` in value and gradient (tests/test_attention.py):

    reference  einsum, softmax in float32, the mask written out
    xla        jax.nn.dot_product_attention
    cpu        own VJP: blocks of queries that skip the keys of the future, one batch row at a time so that
               the scores stay in cache, probabilities recomputed in the backward pass (Dao et al. 2022)
    splash     the Pallas kernel for TPU, banded and segmented masks included
    cudnn      cuDNN's flash attention, through jax.nn.dot_product_attention, in bf16 and fp16

Where the mesh cuts up the context (axis `seq`), each device has its queries and gathers the keys and values: exact, and
for dropout too, since the masks are by position. Contiguous parts leave the last device most of the causal work.

Dropout on the probabilities (GPT-1) exists in `reference` only: with dropout every path becomes it.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.parallel.collectives import gather
from gptjax.parallel.sharding import Rules, constrain

NEG_INF = -1e30  # finite, so that a fully masked row gives no NaN


def resolve(path: str, platform: str) -> str:
    """The path that 'auto' means on a platform ('cpu', 'tpu', 'gpu', ...)."""
    if path != "auto":
        return path
    if platform in ("gpu", "cuda"):
        return "cudnn" if _flash_capable_gpu() else "xla"
    return {"cpu": "cpu", "tpu": "splash"}.get(platform, "xla")


def attention(q, k, v, *, path, window=None, segment_ids=None, dropout=0.0, dropout_keys=None, mesh=None):
    """Causal attention of time on itself.

    Args:
        q, k, v: [batch, time, head, d_head], one dtype. Scores are scaled by 1/sqrt(d_head).
        path: 'reference', 'xla', 'cpu', 'splash' or 'cudnn'; 'auto' asks `resolve` for the default backend,
            which is wrong when compiling for another platform: resolve it for that one first.
        window: None, or how many positions back a query sees, its own included (a band).
        segment_ids: None, or int [batch, time]; a position sees its own segment only.
        dropout, dropout_keys: probability of dropping an attention weight, and a key for each row, [batch].
        mesh: the mesh that q, k, v are sharded over; needed by 'splash' on more than one device.
    Returns:
        [batch, time, head, d_head] in the dtype of q.
    """
    path = resolve(path, jax.default_backend())
    if window is not None and window >= q.shape[1]:
        window = None
    shards = _shards_of_time()
    if path == "splash" and (q.shape[1] < 128 or q.shape[1] % (128 * shards) and shards > 1):
        path = "xla"
    if shards > 1 and (dropout > 0.0 or path != "splash"):
        # The keys and values of all the context beside a part of its queries. The blocks of `cpu` and cuDNN's causal
        # mask begin at query 0, so both become `xla`, whose mask is sharded like any array.
        k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
        path = "xla" if path in ("cpu", "cudnn") else path
    if dropout > 0.0 and dropout_keys is not None:
        return reference(q, k, v, window=window, segment_ids=segment_ids, dropout=dropout, dropout_keys=dropout_keys)
    if path == "cpu" and (q.shape[1] > _SHORT or q.dtype == jnp.float16):  # XLA's takes no float16 on a CPU
        return _cpu(q, k, v, segment_ids, window)
    if path == "splash":
        return _splash(q, k, v, window, segment_ids, mesh)
    if path == "cudnn" and _cudnn_takes(q):
        return _dot_product(q, k, v, window, segment_ids, "cudnn")
    if path in ("xla", "cpu", "cudnn"):  # shapes and dtypes that the kernels do not take
        return _dot_product(q, k, v, window, segment_ids, "xla")
    return reference(q, k, v, window=window, segment_ids=segment_ids)


def _shards_of_time() -> int:
    """Over how many devices of the mesh in force the context is cut up."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["seq"]


def _cudnn_takes(q) -> bool:
    """What jax asks of cuDNN's flash attention: 16 bits, heads of a multiple of 8 up to 128, even time."""
    # Even time under a mask alone, says its message; its check takes the lack of a bias for one (0.10.2).
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return half and width % 8 == 0 and width <= 128 and q.shape[1] % 2 == 0


def _flash_capable_gpu() -> bool:
    """cuDNN's flash attention needs Ampere (compute capability 8.0) or newer; T4 and V100 are older."""
    try:
        capability = jax.devices("gpu")[0].compute_capability
        return tuple(int(n) for n in str(capability).split(".")) >= (8, 0)
    except (RuntimeError, AttributeError, ValueError):
        return True  # no GPU here: compiling for one elsewhere


def visible(q_positions, kv_positions, window=None):
    """Causal mask, cut to a band if `window` is given: bool [..., query, key]."""
    distance = q_positions[..., :, None] - kv_positions[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def reference(q, k, v, *, window=None, segment_ids=None, dropout=0.0, dropout_keys=None):
    """Attention as the papers write it: softmax(q k^T / sqrt(d_head)) v, in float32 inside."""
    t = jnp.arange(q.shape[1])
    mask = visible(t, t, window)[None, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(mask, scores, NEG_INF), axis=-1)
    if dropout > 0.0 and dropout_keys is not None:
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout, probs.shape[1:]))(dropout_keys)
        probs = jnp.where(keep, probs / (1.0 - dropout), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", probs.astype(v.dtype), v)


def cached_attention(q, k, v, mask):
    """Attention of a few new positions over a cache.

    Args:
        q: [batch, query, head, d_head]; k, v: [batch, head, slot, d_head], so that a head's slots lie together.
        mask: bool [batch, query, slot].
    Returns:
        [batch, query, head, d_head].
    """
    scores = jnp.einsum("bqhd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, NEG_INF), axis=-1)
    return jnp.einsum("bhqk,bhkd->bqhd", probs.astype(v.dtype), v)


def _dot_product(q, k, v, window, segment_ids, implementation):
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        if implementation == "cudnn":
            # A mask is a bias to cuDNN, and before 9.10.2 it takes a band or a bias: "Left and right bounds are only
            # supported with is_dropout=False, is_bias=False" (cudnn-frontend). So the band goes into the mask.
            if window is not None:
                t = jnp.arange(q.shape[1])
                mask, window = mask & visible(t, t, window), None
            mask = constrain(mask, "batch", None, None, None)  # its partitioner wants rows as those of q, or whole
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=local, implementation=implementation
    )


# --- CPU: a hand-written VJP --------------------------------------------------------------------------
#
# XLA:CPU's autodiff of attention spends most of its time transposing and re-reading [time, time] arrays.
# Per batch row everything fits the cache, and a block of queries needs no key after its own end.

_SHORT = 64  # up to here all scores of a row fit the cache anyway, and keeping them is faster than recomputing
_QUERY_BLOCK = 64
_CACHE_BYTES = 2**20  # of scores held at a time: small shapes take several batch rows at once


def _rows_at_once(batch, head, time):
    rows = max(1, _CACHE_BYTES // (4 * head * min(time, _QUERY_BLOCK) * time))
    return next(n for n in range(min(rows, batch), 0, -1) if batch % n == 0)


def _map_rows(function, rows, head, time):
    """lax.map over batch rows, as many at once as the cache likes."""
    batch = rows[0].shape[0]
    at_once = _rows_at_once(batch, head, time)
    mesh = jax.sharding.get_abstract_mesh()
    if at_once == batch or not (mesh.empty or mesh.size == 1):  # a loop over sharded rows would gather them
        return jax.vmap(function)(rows)
    return lax.map(function, rows, batch_size=None if at_once == 1 else at_once)


def _cpu_blocks(time, window):
    """(first query, end of queries, first key) of each block; its keys end where its queries end."""
    for start in range(0, time, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, time)
        first_key = 0 if window is None else max(0, start - window + 1)
        yield start, end, first_key


def _cpu_bias(start, end, first_key, window, segments):
    """What is added to the scores of a block: 0 or NEG_INF, float32 [query, key]."""
    mask = visible(jnp.arange(start, end), jnp.arange(first_key, end), window)
    if segments is not None:
        mask = mask & (segments[start:end, None] == segments[None, first_key:end])
    return jnp.where(mask, 0.0, NEG_INF)


def _scores(q, k, bias):
    return jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5 + bias


def _cpu_row_forward(q, k, v, segments, window):
    """One batch row; q, k, v [head, time, d_head]. Returns output and log-sum-exp [head, time, 1]."""
    outs, lses = [], []
    for i, j, first in _cpu_blocks(q.shape[1], window):
        s = _scores(q[:, i:j], k[:, first:j], _cpu_bias(i, j, first, window, segments))
        m = s.max(-1, keepdims=True)
        e = jnp.exp(s - m)
        total = e.sum(-1, keepdims=True)
        out = jnp.einsum("hqk,hkd->hqd", e.astype(v.dtype), v[:, first:j], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))  # normalized after the product: fewer divisions
        lses.append(m + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _cpu_row_backward(q, k, v, segments, out, lse, d_out, window):
    time, scale = q.shape[1], q.shape[-1] ** -0.5
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_q, d_k, d_v = [], 0.0, 0.0
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for i, j, first in _cpu_blocks(time, window):
        keys, values, d_o = k[:, first:j], v[:, first:j], d_out[:, i:j]
        s = _scores(q[:, i:j], keys, _cpu_bias(i, j, first, window, segments))
        p = jnp.exp(s - lse[:, i:j])
        d_s = (p * (dot("hqd,hkd->hqk", d_o, values) - delta[:, i:j]) * scale).astype(q.dtype)
        d_q.append(dot("hqk,hkd->hqd", d_s, keys))
        place = ((0, 0), (first, time - j), (0, 0))
        d_k += jnp.pad(dot("hqk,hqd->hkd", d_s, q[:, i:j]), place)
        d_v += jnp.pad(dot("hqk,hqd->hkd", p.astype(v.dtype), d_o), place)
    return jnp.concatenate(d_q, 1).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cpu(q, k, v, segment_ids, window):
    return _cpu_forward(q, k, v, segment_ids, window)[0]


def _by_head(*arrays):
    return tuple(jnp.swapaxes(a, 1, 2) for a in arrays)


def _cpu_forward(q, k, v, segment_ids, window):
    q, k, v = _by_head(q, k, v)
    out, lse = _map_rows(lambda row: _cpu_row_forward(*row, window), (q, k, v, segment_ids), *q.shape[1:3])
    return jnp.swapaxes(out, 1, 2), (q, k, v, segment_ids, out, lse)


def _cpu_backward(window, residuals, d_out):
    (d_out,) = _by_head(d_out)
    d_q, d_k, d_v = _map_rows(lambda row: _cpu_row_backward(*row, window), (*residuals, d_out), *d_out.shape[1:3])
    return (*_by_head(d_q, d_k, d_v), None)


_cpu.defvjp(_cpu_forward, _cpu_backward)


# --- TPU: Splash ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _splash_kernel(time, n_head, window, shards, interpret):
    """The kernel for one mask, its queries cut up over `shards` devices. Masks are evaluated in numpy, so each is
    built once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    mask = sm.CausalMask((time, time))
    if window is not None:
        mask = mask & sm.LocalMask((time, time), (window - 1, None), 0)
    block = next(b for b in (512, 256, 128) if time // shards % b == 0)
    sizes = sk.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    heads = sm.MultiHeadMask([mask] * n_head)
    make = lambda: sk.make_splash_mha(heads, head_shards=1, q_seq_shards=shards, block_sizes=sizes, interpret=interpret)
    # In a thread of its own, where no mesh or trace is in force, and kept as numpy: the kernel outlives both.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return jax.tree.map(np.asarray, thread.submit(make).result())


def _splash(q, k, v, window, segment_ids, mesh, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk

    time, scale = q.shape[1], jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    if more := -time % 128:  # whole blocks: what is added lies behind every query, where none looks
        q, k, v = (jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))) for a in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, more)), mode="edge")
    q, k, v = _by_head(q * scale, k, v)
    shards, tensor = (mesh.shape["seq"], mesh.shape["tensor"]) if mesh is not None else (1, 1)
    # Whole heads on each device: the mask is the same for all of them.
    kernel = _splash_kernel(q.shape[2], q.shape[1] // tensor, window, shards, interpret)

    def local(kernel, q, k, v, segments):
        """A device's queries against the keys and values of all the context."""
        if shards > 1:
            k, v = (gather(a, "seq", 2) for a in (k, v))
        if segments is None:
            return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
        of_kv = gather(segments, "seq", 1) if shards > 1 else segments
        ids = jax.vmap(sk.SegmentIds)(segments, of_kv)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)

    if mesh is not None and mesh.size > 1:
        manual = jax.sharding.get_abstract_mesh().manual_axes  # within a stage of a pipeline: that axis
        ways = tuple(axis for axis in Rules().axes("batch") if axis not in manual)
        heads, rows = P(ways, "tensor", "seq"), P(ways, "seq")
        of_mask = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "seq")))
        local = jax.shard_map(
            local,
            mesh=None if manual else mesh,
            axis_names=set(mesh.axis_names) - set(manual),
            in_specs=(of_mask, heads, heads, heads, None if segment_ids is None else rows),
            out_specs=heads,
            check_vma=False,
        )
    return jnp.swapaxes(local(kernel, q, k, v, segment_ids), 1, 2)[:, :time]
