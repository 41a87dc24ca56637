"""The language-model loss: -log p(next token), summed over tokens (GPT-1 eq. 1).

Losses are (sum, count), not means: micro-batches, devices and hosts add up, and the mean is taken once. `log_probs` is
the plain form; training uses `chunked.cross_entropy_sum`, which never holds [batch, time,
vocab] and equals it in tests.
"""

import jax
import jax.numpy as jnp

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.chunked import cross_entropy_sum


def log_probs(x, w, targets):
    """log p(target | x) under softmax(x w^T), the plain way: the logits are materialized.

    Args:
        x: [..., d_model]; w: [vocab, d_model]; targets: int [...].
    Returns:
        float32 [...].
    """
    logits = jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def causal_lm_loss(config: GPTConfig, dtype, chunk: int, mesh=None):
    """-log p(next token) (GPT-1 eq. 1). Microbatch: tokens int [rows, time + 1], weights [rows, time], and
    optionally segment_ids and positions [rows, time]."""

    def loss(params, batch, dropout_keys):
        tokens = batch["tokens"]
        x = gpt.hidden(
            params, config, tokens[:, :-1],
            positions=batch.get("positions"), segment_ids=batch.get("segment_ids"),
            dropout_keys=dropout_keys, dtype=dtype, mesh=mesh,
        )  # fmt: skip
        w = gpt.unembedding(params, config)
        return cross_entropy_sum(x, w, tokens[:, 1:], batch["weights"], chunk), batch["weights"].sum()

    return loss


def bits_per_byte(nats, n_bytes):
    """Total nats over text of n_bytes UTF-8 bytes -> bits per byte: comparable between tokenizers."""
    return nats / (n_bytes * 0.6931471805599453)
