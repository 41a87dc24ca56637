"""Fine-tuning on a labeled task (GPT-1, Radford et al. 2018 §3.2-3.3), and its auxiliary language-model term.

    L2 = -log P(label | text)                      eq. 4: softmax(h W + b), h the hidden state at the `extract` token
    L3 = L2 + lambda L1                            eq. 5: L1 the language-model loss of the text, lambda = .5
"""

import jax
import jax.numpy as jnp

from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.objectives.base import Sums
from gptjax.objectives.chunked import cross_entropy_sum
from gptjax.parallel.sharding import shared


def auxiliary_weights(task_mask, lm_mask, lm_weight: float):
    """Token weights w under which one weighted sum is both terms of GPT-1 eq. 5.

        sum(w nll) / sum(task_mask) = mean of nll over the task's tokens + lambda x mean of nll over all tokens

    Args:
        task_mask, lm_mask: the tokens of either term, over the whole (global) batch, any shape.
    Returns:
        float32, the same shape. Divide the weighted sum by sum(task_mask).
    """
    ratio = task_mask.sum() / jnp.maximum(lm_mask.sum(), 1)
    return (task_mask + lm_weight * ratio * lm_mask).astype(jnp.float32)


def task_logits(head, x_BND, valid_BN, task: str, dropout: float = 0.0, keys_B=None):
    """The logits of the head's outputs, float32 [B, C]: of classes, or of the N choices of each example.

    Args:
        head: {'kernel' [D, C], 'bias' [C]}; for `choice` C = 1, and the outputs are the N choices.
        x_BND: hidden states at the `extract` tokens. The two orders of a similarity are summed.
        valid_BN: 1 where there is a sequence; a choice that is not there gets the logit -inf.
        keys_B: for dropout of x with one mask for all sequences of an example, as in the released code; None = no
            dropout.
    """
    x_BND = x_BND.astype(jnp.float32)
    if task == "similarity":
        x_BND = x_BND.sum(1, keepdims=True)
    if keys_B is not None and dropout:
        keep_BD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, x_BND.shape[-1:]))(keys_B)
        x_BND = jnp.where(keep_BD[:, None], x_BND / (1 - dropout), 0)
    logits_BNC = jnp.einsum("bnd,dc->bnc", x_BND, head["kernel"]) + head["bias"]
    if task == "choice":
        return jnp.where(valid_BN > 0, logits_BNC[..., 0], -jnp.inf)
    return logits_BNC[:, 0]


def task_loss(logits_BC, target_BC):
    """-sum of target x log softmax(logits), [B]. A target of 0 contributes 0, whatever its logit."""
    log_p_BC = jax.nn.log_softmax(logits_BC, axis=-1)
    return -jnp.where(target_BC > 0, target_BC * log_p_BC, 0.0).sum(-1)


def extracted(params, config: ModelConfig, tokens_BNT, lengths_BN, *, dtype, mesh=None, dropout_keys=None):
    """(hidden states [P, T, D], those at each sequence's last token [B, N, D])."""
    B, N, T = tokens_BNT.shape
    x_PTD = architecture.hidden(
        params["trunk"], config, tokens_BNT.reshape(B * N, T), dtype=dtype, mesh=mesh, dropout_keys=dropout_keys
    )
    last_PD = jnp.take_along_axis(x_PTD, (lengths_BN.reshape(B * N) - 1)[:, None, None], axis=1)[:, 0]
    return x_PTD, last_PD.reshape(B, N, -1)


@shared
def finetune_loss(config: ModelConfig, task: str, lm_weight: float, dropout: float, dtype, chunk: int, mesh=None):
    """The loss of an Objective, L3 summed over examples: (params, micro-batch of labeled.LabeledBatches, keys) -> Sums.

    L1 of an example is the mean over its sequences of their mean loss per token, as in the released code. lm_weight:
    lambda. dropout: of the classifier's input.
    """

    def loss(params, batch, keys_B) -> Sums:
        B, N, T = batch["tokens"].shape
        keys = head_keys_B = None
        if keys_B is not None:
            head_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, N)
            keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N)))(keys_B).reshape(-1)
        x_PTD, last_BND = extracted(
            params, config, batch["tokens"], batch["lengths"], dtype=dtype, mesh=mesh, dropout_keys=keys
        )
        logits_BC = task_logits(params["head"], last_BND, batch["valid"], task, dropout, head_keys_B)
        nll_B = batch["weights"] * task_loss(logits_BC, batch["target"])
        total, lm = nll_B.sum(), jnp.float32(0)
        if lm_weight:
            # Over all T positions, the last of which predicts nothing: T divides over the mesh, T - 1 does not.
            share_BN = batch["weights"][:, None] * batch["valid"] / batch["valid"].sum(1, keepdims=True).clip(1)
            share_BN = share_BN / (batch["lengths"] - 1).clip(1)
            predicts_BNT = jnp.arange(T) < batch["lengths"][..., None] - 1
            weights_PT = (share_BN[..., None] * predicts_BNT).reshape(B * N, T)
            targets_PT = jnp.roll(batch["tokens"], -1, axis=-1).reshape(B * N, T)
            x_PTD, w_VD = architecture.readout(params["trunk"], config, x_PTD)
            lm = cross_entropy_sum(x_PTD, w_VD, targets_PT, weights_PT, chunk)
            total = total + lm_weight * lm
        right_B = logits_BC.argmax(-1) == batch["target"].argmax(-1)
        sums = {"task_loss": nll_B.sum(), "lm_loss": lm, "correct": (batch["weights"] * right_B).sum()}
        return Sums(total, batch["weights"].sum(), sums | {"examples": batch["weights"].sum()})

    return loss
