"""Decoding speed, and its upper bound: each step has to read the weights and the KV cache from memory."""

import jax
import jax.numpy as jnp

from gptjax.hardware import memory_bandwidth
from gptjax.model.architecture import ModelConfig
from gptjax.model.lstm import LSTMConfig


def bytes_per_token(params, c: ModelConfig, batch: int, slots: float, dtype) -> float:
    """Bytes one decoding step reads: every weight once for all rows, and each row's keys and values.

    params: arrays or their shapes; the position table is looked up, not read. slots: filled slots of the cache, on
    average over the steps. dtype: of the activations and the cache.
    """
    size = lambda x: x.size * jnp.dtype(x.dtype).itemsize
    weights = sum(map(size, jax.tree.leaves(params)))
    if isinstance(c, LSTMConfig):  # of the state, h and c
        return weights + batch * c.units * (jnp.dtype(dtype).itemsize + 4)
    weights -= size(params["wpe"])
    return weights + batch * slots * 2 * c.n_layer * c.d_model * jnp.dtype(dtype).itemsize


def describe_speed(params, c: ModelConfig, batch: int, slots: float, dtype, tokens: int, seconds: float,
                   devices) -> str:  # fmt: skip
    """'N tokens in S s: R tokens/s, P % of the bound'; without the bound on a chip whose bandwidth is not known."""
    rate, kind = tokens / seconds, devices[0].device_kind
    text = f"{tokens} tokens in {seconds:.2f} s: {rate:,.1f} tokens/s"
    bandwidth = memory_bandwidth(kind)
    if bandwidth is None:
        return f"{text} (no bound: the memory bandwidth of {kind!r} is not known)"
    bound = batch * bandwidth * len(devices) / bytes_per_token(params, c, batch, slots, dtype)
    return f"{text}, {100 * rate / bound:.0f} % of the {bound:,.1f} that reading weights and cache allows"
