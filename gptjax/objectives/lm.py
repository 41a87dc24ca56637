"""The language-model loss: -log p(next token), summed over tokens (GPT-1 eq. 1).

`lm_loss` is the plain form. Training uses `causal_lm_loss`, which never holds the whole logits [B, T, V] and equals
it in value and gradient (tests/test_language.py). Losses are (sum, count), not means, so that they add up over
micro-batches, devices and hosts; the mean is taken once.
"""

import jax
import jax.numpy as jnp

from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.objectives.chunked import cross_entropy_sum
from gptjax.parallel.sharding import shared


def lm_loss(params, config: ModelConfig, batch):
    """Sum of weight * -log p(next token), and the sum of the weights. batch: as in `causal_lm_loss`."""
    inputs_BT, targets_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    x_BTD = architecture.hidden(
        params, config, inputs_BT, positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )
    log_probs_BTV = jax.nn.log_softmax(architecture.logits(params, config, x_BTD), axis=-1)
    nll_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return (batch["weights"] * nll_BT).sum(), batch["weights"].sum()


@shared
def causal_lm_loss(config: ModelConfig, dtype, chunk: int, mesh=None):
    """Returns the loss function of training, loss(params, batch, dropout_keys) -> (sum, count): `lm_loss` in any dtype
    and on any mesh, computing the logits of `chunk` time steps at a time (chunked.py).

    batch: tokens int [B, T + 1], weights [B, T], and optionally segment_ids and positions int [B, T].
    dropout_keys: [B], or None for no dropout.
    """

    def loss(params, batch, dropout_keys):
        tokens = batch["tokens"]
        x_BTD = architecture.hidden(
            params, config, tokens[:, :-1],
            positions=batch.get("positions"), segment_ids=batch.get("segment_ids"),
            dropout_keys=dropout_keys, dtype=dtype, mesh=mesh,
        )  # fmt: skip
        x_BTD, w_VD = architecture.readout(params, config, x_BTD)
        return cross_entropy_sum(x_BTD, w_VD, tokens[:, 1:], batch["weights"], chunk), batch["weights"].sum()

    return loss


def log_probs(x, w_VD, targets, temperature: float = 1.0):
    """log softmax(x w^T / temperature)[target], the plain form of `chunked.token_log_probs`.

    Args:
        x: [..., D]; targets: int [...].
    Returns:
        float32 [...].
    """
    logits = jnp.einsum("...d,vd->...v", x, w_VD.astype(x.dtype), preferred_element_type=jnp.float32) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]


def bits_per_byte(nats, n_bytes):
    """Total nats over text of n_bytes UTF-8 bytes -> bits per byte: comparable across tokenizers."""
    return nats / (n_bytes * 0.6931471805599453)  # log 2
