"""GPT or LSTM: the functions that stages and objectives call, of whichever model a config describes.

The type of the config decides, here and nowhere else: gpt.py and lstm.py have functions of the same names.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.errors import InputError
from gptjax.model import flops, gpt, lstm, spec
from gptjax.model.attention import resolve
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPTConfig
from gptjax.parallel import mesh as meshes
from gptjax.parallel import pipeline

ModelConfig = GPTConfig | LSTMConfig


def _of(config: ModelConfig):
    return lstm if isinstance(config, LSTMConfig) else gpt


def require_gpt(config: ModelConfig, what: str):
    """InputError: `what` takes no LSTM."""
    if not isinstance(config, GPTConfig):
        raise InputError(
            f"The model is an LSTM, which can be pre-trained, fine-tuned on labeled tasks (gptjax.finetune), evaluated "
            f"and sampled from: {what} needs a GPT."
        )


# --- the forward pass: as in gpt.py -----------------------------------------------------------------------


def init(config: ModelConfig, key):
    return _of(config).init(config, key)


def abstract_params(config: ModelConfig):
    return _of(config).abstract_params(config)


def hidden(params, config: ModelConfig, tokens_BT, **options):
    return _of(config).hidden(params, config, tokens_BT, **options)


def readout(params, config: ModelConfig, x_BTD):
    """(x [B, T, D], w [V, D]) whose product x w^T is the logits of hidden states [B, T, d_model]."""
    return _of(config).readout(params, config, x_BTD)


def logits(params, config: ModelConfig, x):
    return _of(config).logits(params, config, x)


def prefill(params, config: ModelConfig, tokens_BQ, positions_BQ, segments_BQ, *, new_tokens: int, unstacked: bool,
            **options):  # fmt: skip
    """(parameters for `decode_step`, hidden [B, Q, D], its `cache`: a KV cache with room for the new tokens, or the
    state of an LSTM). unstacked: for decoding without a loop over layers (gpt.unstack_layers)."""
    x_BQD, cache = _of(config).prefill(params, config, tokens_BQ, positions_BQ, segments_BQ, **options)
    if isinstance(config, LSTMConfig):
        return lstm.normalized(params), x_BQD, cache
    cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, new_tokens), (0, 0))), cache)
    if unstacked:
        params, cache = gpt.unstack_layers(params, cache, config)
    return params, x_BQD, cache


def decode_step(params, config: ModelConfig, *arguments, **options):
    return _of(config).decode_step(params, config, *arguments, **options)


# --- what is known of a model without running it ----------------------------------------------------------


def parameter_count(config: ModelConfig) -> int:
    return (lstm if isinstance(config, LSTMConfig) else spec).parameter_count(config)


def non_embedding_count(config: ModelConfig) -> int:
    return (lstm if isinstance(config, LSTMConfig) else spec).non_embedding_count(config)


def flops_per_token(config: ModelConfig) -> flops.FlopsPerToken:
    """Training FLOPs per token. An LSTM has no attention: all conventions but 6N count its matrix products."""
    if isinstance(config, LSTMConfig):
        matmuls = 3 * lstm.matmul_flops(config)
        return flops.FlopsPerToken(matmuls, matmuls, 6 * lstm.parameter_count(config), matmuls)
    return flops.flops_per_token(config)


def hidden_rate(config: ModelConfig) -> float:
    """Learning rate of the blocks' matrices, relative to the other parameters' (muP, mup.py)."""
    return config.hidden_rate if isinstance(config, GPTConfig) else 1.0


def describe(config: ModelConfig) -> str:
    """Its shape, in words."""
    rest = f"context {config.context_length}, vocabulary {config.vocab_size:,}"
    if isinstance(config, LSTMConfig):
        return f"{config.cell} of {config.units} units, embedding {config.d_embed}, {rest}"
    return f"{config.n_layer} layers, {config.d_model} wide, {config.n_head} heads, {rest}"


def computed_by(config: ModelConfig) -> str:
    """What a step spends its time in, in words: 'cpu attention', 'lstm'."""
    return config.cell if isinstance(config, LSTMConfig) else f"{config.attention} attention"


def shape(config: ModelConfig) -> dict:
    """The part of a config that weights depend on."""
    return {key: getattr(config, key) for key in (lstm if isinstance(config, LSTMConfig) else spec).SHAPE}


# --- where it runs ----------------------------------------------------------------------------------------


def resolved(config: ModelConfig, platform: str, **others) -> ModelConfig:
    """The config with its attention path decided for a platform; `others` are replaced, where it has them."""
    if isinstance(config, LSTMConfig):
        fields = LSTMConfig.__dataclass_fields__
        return dataclasses.replace(config, **{k: v for k, v in others.items() if k in fields})
    return dataclasses.replace(config, attention=resolve(config.attention, platform), **others)


def check_fits(config: ModelConfig, sizes, *, batch_size: int, microbatch_size: int, time: int):
    """InputError: rows of `time` tokens, or the model, are not divisible over the mesh. sizes: {mesh axis: size}."""
    rows = {"batch_size": batch_size, "microbatch_size": microbatch_size}
    if isinstance(config, GPTConfig):
        meshes.check_fits(sizes, n_head=config.n_head, time=time, **rows)
        pipeline.make_plan(config, sizes, microbatch_size)
        return
    for axis in ("tensor", "stage", "seq"):
        if sizes[axis] > 1:
            raise InputError(
                f"mesh.{axis}={sizes[axis]}: an LSTM is one layer whose steps wait for one another, so it is sharded "
                "over mesh.data and mesh.fsdp alone. Use those."
            )
    meshes.check_fits(sizes, n_head=1, time=time, **rows)


def pipeline_clause(config: ModelConfig, sizes, rows: int) -> str:
    """A clause about the pipeline for the messages at a run's start; '' without one."""
    return pipeline.describe(config, sizes, rows) if isinstance(config, GPTConfig) else ""
