"""What later stages put on a pre-trained trunk: rows for new tokens, and a scalar head in place of the un-embedding.

A scalar model (reward model, value network) is {'trunk': the GPT's parameters, 'head': {'kernel' [D], 'bias' []}}.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig


def grow_vocabulary(params, vocab_size: int):
    """Parameters with rows for ids up to vocab_size: each new row is the mean of the old ones.

    The mean gives a new token about the logit of an average one, so that the growth hardly moves the model.
    """

    def grow(table_VD):
        V, D = table_VD.shape
        new_VD = jnp.broadcast_to(table_VD.mean(0), (vocab_size - V, D))
        return jnp.concatenate([table_VD, new_VD])

    return {k: grow(v) if k in ("wte", "lm_head") and v.shape[0] < vocab_size else v for k, v in params.items()}


def trunk(params):
    """The parameters without an untied un-embedding."""
    return {k: v for k, v in params.items() if k != "lm_head"}


def new_head(d_model: int, key):
    """kernel ~ N(0, 1/sqrt(D + 1)), bias 0 (Stiennon et al. 2020; openai/summarize-from-feedback). key None: zeros,
    as in Ziegler et al.'s value head."""
    if key is None:
        kernel_D = jnp.zeros(d_model, jnp.float32)
    else:
        kernel_D = jax.random.normal(key, (d_model,)) / (d_model + 1) ** 0.5
    return {"kernel": kernel_D, "bias": jnp.zeros((), jnp.float32)}


def scalar_model(params, config: GPTConfig, key):
    """A scalar model on the trunk of a language model."""
    return {"trunk": trunk(params), "head": new_head(config.d_model, key)}


def abstract_head(config: GPTConfig):
    """A head's shapes with logical axis names attached, like gpt.abstract_params."""
    box = lambda shape, *names: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
    return {"kernel": box((config.d_model,), "norm"), "bias": box(())}


def abstract_scalar_model(config: GPTConfig):
    return {"trunk": trunk(gpt.abstract_params(config)), "head": abstract_head(config)}


def scalar(head, x):
    """w . x + b: [..., D] -> float32 [...]."""
    return jnp.einsum("...d,d->...", x.astype(jnp.float32), head["kernel"]) + head["bias"]
