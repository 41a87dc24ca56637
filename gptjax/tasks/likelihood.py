"""Log-probabilities of requests under a model, computed in packed rows (packing.py)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.console import progress
from gptjax.errors import InputError
from gptjax.model import architecture
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.tasks.packing import Row, pack
from gptjax.tasks.requests import Request, truncated
from gptjax.trained import Model
from gptjax.training.precision import frozen

_LOGITS_AT_ONCE = 512  # rows of [., V] held at a time


class Score(NamedTuple):
    """log_prob: log p(continuation | context), nats. tokens: of the continuation. greedy: whether each of its tokens
    was the most likely one; last_greedy: whether the last one was, given those before. truncated: whether the context
    was cut on the left. spanned: Request's."""

    log_prob: float
    tokens: int
    greedy: bool
    last_greedy: bool
    truncated: bool
    spanned: bool


def log_likelihoods(model: Model, requests: Sequence[Request], *, rows: int = 16, desc: str = "scoring") -> list[Score]:
    """The score of each request, in their order.

    rows: packed rows at a time. What is scored together changes results by rounding only. InputError: a token beyond
    the model's vocabulary.
    """
    fitted = [truncated(request, model.config.context_length) for request in requests]
    for request, _ in fitted:
        if max(max(request.context), max(request.continuation)) >= model.config.vocab_size:
            raise InputError("The tokenizer has ids beyond the model's vocabulary: it is not this model's tokenizer.")
    packed = pack([request for request, _ in fitted], share=isinstance(model.config, GPTConfig))
    values = [np.zeros(len(request.continuation)) for request, _ in fitted]
    hits = [np.zeros(len(request.continuation), bool) for request, _ in fitted]
    filled = np.zeros(len(fitted), int)
    with (
        jax.set_mesh(model.mesh),
        progress(total=sum(map(len, packed.values())), desc=desc, unit="row", leave=False) as bar,
    ):
        params = frozen(model.params, model.dtype)
        for same_length in packed.values():
            for some, log_probs_BN, greedy_BN in _batches(model, params, same_length, rows):
                for row, log_probs_N, greedy_N in zip(some, log_probs_BN, greedy_BN, strict=False):
                    for (i, _, _), log_prob, is_greedy in zip(row.asked, log_probs_N, greedy_N, strict=False):
                        values[i][filled[i]], hits[i][filled[i]] = log_prob, is_greedy
                        filled[i] += 1
                bar.update(len(some))
    return [
        Score(float(v.sum()), len(v), bool(h.all()), bool(h[-1]), cut, request.spanned)
        for v, h, (request, cut) in zip(values, hits, fitted, strict=True)
    ]


def _batches(model: Model, params, packed: Sequence[Row], rows: int):
    """(rows, log-probabilities [B, N], greedy [B, N]) of each batch; one compiled program for all of them."""
    shards = batch_shards(model.mesh.shape)
    B = -(-min(rows, 1 << (len(packed) - 1).bit_length()) // shards) * shards
    M, N = _rounded(max(len(row.read) for row in packed)), _rounded(max(len(row.asked) for row in packed))
    chunk = min(M, max(1, _LOGITS_AT_ONCE // B))
    M = -(-M // chunk) * chunk
    sharding, pending = batch_sharding(model.mesh, 0), None
    for start in range(0, len(packed), B):
        some = packed[start : start + B]
        arrays = [np.stack([row[i] for row in some]) for i in range(3)]
        arrays.append(np.stack([_padded(row.read, M) for row in some]))
        arrays += [np.stack([_padded(row.asked[:, i], N) for row in some]) for i in (1, 2)]
        arrays = [jax.device_put(np.pad(a, ((0, B - len(some)), (0, 0))), sharding) for a in arrays]
        result = _score_rows(params, model.config, *arrays, chunk=chunk, dtype=model.dtype, mesh=model.mesh)
        if pending:  # read one batch late, so that the device never waits for the host
            yield pending[0], *map(np.asarray, pending[1])
        pending = some, result
    yield pending[0], *map(np.asarray, pending[1])


@functools.partial(jax.jit, static_argnames=("config", "chunk", "dtype", "mesh"))
def _score_rows(params, config, tokens_BT, positions_BT, visible_until_BT, read_BM, index_BN, targets_BN, *, chunk: int,
                dtype, mesh):  # fmt: skip
    """(log-probabilities float32 [B, N], whether each target is the most likely token [B, N]).

    Logits are computed only where a prediction is read, `chunk` of a row's at a time. M must be a multiple of chunk.
    """
    if isinstance(config, GPTConfig):
        isolated = {"positions": positions_BT, "visible_until": visible_until_BT}
    else:  # nothing is shared: every request is a segment
        isolated = {"segment_ids": jnp.cumsum(positions_BT == 0, axis=1)}
    x_BTD = architecture.hidden(params, config, tokens_BT, **isolated, dtype=dtype, mesh=mesh)
    x_BMD = jnp.take_along_axis(x_BTD, read_BM[..., None], axis=1)
    B, M, D = x_BMD.shape

    def summarize(x_BCD):
        logits_BCV = architecture.logits(params, config, x_BCD)
        return jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1)

    lse, best = lax.map(summarize, jnp.swapaxes(x_BMD.reshape(B, M // chunk, chunk, D), 0, 1))
    lse_BM, best_BM = (jnp.swapaxes(a, 0, 1).reshape(B, M) for a in (lse, best))
    x_BND, w_VD = architecture.readout(params, config, jnp.take_along_axis(x_BMD, index_BN[..., None], axis=1))
    w_BND = w_VD[targets_BN].astype(x_BND.dtype)
    chosen_BN = jnp.einsum("bnd,bnd->bn", x_BND, w_BND, preferred_element_type=jnp.float32)
    of_index = lambda a_BM: jnp.take_along_axis(a_BM, index_BN, axis=1)
    return chosen_BN - of_index(lse_BM), of_index(best_BM) == targets_BN


def _rounded(n: int) -> int:
    """n rounded up by at most a quarter, so that few shapes are compiled: 16, 20, 24, 28, 32, 40, ..."""
    step = max(4, 1 << (max(n, 16) - 1).bit_length() - 3)
    return max(16, -(-n // step) * step)


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)))
