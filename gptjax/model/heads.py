"""What later stages put on a pre-trained trunk: rows for new tokens, and a head.

A scalar model (reward model, value network) is {'trunk': the GPT's parameters, 'head': {'kernel' [D], 'bias' []}}. A
classifier (fine-tuning) is {'trunk', 'head': {'kernel' [D, C], 'bias' [C]}}, with C outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.model import architecture, gpt
from gptjax.model.architecture import ModelConfig
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


# --- classifiers --------------------------------------------------------------------------------------------

STD = 0.02  # of GPT-1's new embeddings and head


def classifier(params, config: ModelConfig, outputs: int, key):
    """A classifier on a language model, whose un-embedding it keeps for the auxiliary loss. New embedding rows up to
    config.vocab_size and the head's kernel are drawn from N(0, .02), biases are 0 (GPT-1's released code)."""
    rows_key, head_key, key_of_unembedding = jax.random.split(key, 3)
    keys = {"wte": rows_key, "lm_head": key_of_unembedding}

    def grow(name, table_VD):
        V, D = table_VD.shape
        return jnp.concatenate([table_VD, STD * jax.random.normal(keys[name], (config.vocab_size - V, D))])

    trunk_params = {k: grow(k, v) if k in keys else v for k, v in params.items()}
    if "lm_bias" in params:
        trunk_params["lm_bias"] = jnp.pad(params["lm_bias"], (0, config.vocab_size - params["lm_bias"].shape[0]))
    kernel_DC = STD * jax.random.normal(head_key, (config.d_model, outputs))
    return {"trunk": trunk_params, "head": {"kernel": kernel_DC, "bias": jnp.zeros(outputs)}}


def abstract_classifier(config: ModelConfig, outputs: int):
    """A classifier's shapes with logical axis names attached, like gpt.abstract_params."""
    box = lambda shape, *names: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
    head = {"kernel": box((config.d_model, outputs), "norm", None), "bias": box((outputs,), None)}
    return {"trunk": architecture.abstract_params(config), "head": head}


def transferred(params, fresh, config: ModelConfig, layers: int | None):
    """Parameters for a transfer of the first `layers` layers: embeddings and these layers of `params`, the rest of
    `fresh`. None or all layers = everything, -1 = nothing (GPT-1 Figure 2; n_transfer of the released code)."""
    if layers is None or layers == config.n_layer:
        return params
    if layers < 0:
        return fresh

    def mixed(name):
        if name == "blocks":
            return jax.tree.map(lambda old, new: jnp.concatenate([old[:layers], new[layers:]]), params[name],
                                fresh[name])  # fmt: skip
        return (params if name in ("wte", "wpe") else fresh)[name]

    return {name: mixed(name) for name in fresh}
