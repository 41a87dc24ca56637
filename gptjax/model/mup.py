"""Maximal-update parametrization (muP): a learning rate that is best at one width is nearly the best at any other.

Yang et al. 2022 (Tensor Programs V), Table 8, the form in which input and output matrix have one scaling and can be
tied. r = d_model / mup_base_width; K and K0 are the features of a head here and in the base model. Depth, batch size
and length of the run are not scaled.

    parameters                                   initial std    Adam's rate    multiplier
    blocks/*/kernel (fan-in grows with width)    .02/sqrt(r)    lr/r           1
    wte, wpe, lm_head, biases, LayerNorms        as before      lr             logits: 1/r
    scores q k                                                                 sqrt(K0)/K in place of 1/sqrt(K)

At r = 1 and K = K0 all of it is the standard parametrization. The output multiplier is applied to the final hidden
states (gpt.hidden), so that a scalar head and a classifier, which are output matrices too, have it as well. Decoupled
weight decay shrinks every parameter by lr x weight_decay a step, at all widths: it does not get Adam's 1/r (as mup's
MuAdamW). Adam's eps is not scaled: it has to stay small beside the gradients.
"""

import dataclasses

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.model.spec import GPTConfig

HIDDEN = r"(^|/)blocks/.*kernel$"  # paths of the matrices whose fan-in grows with the width


def fold(config: GPTConfig, params) -> tuple[GPTConfig, dict]:
    """(config, params) of the same function in standard parametrization, for formats without multipliers: those of the
    scores go into the queries' weights, those of the output into the last LayerNorm, which only the head reads.

    params: of a language model or a trunk; not changed. A multiplier that is a power of two rounds nothing; another one
    rounds each of these weights once, to float32.
    """
    if config.mup_base_width is None:
        return config, params
    flat = flatten_dict(params, sep="/")
    last, layer = ("ln_f", ...) if config.norm == "pre" else ("blocks/ln_2", -1)
    queries = (..., 0, slice(None))  # of a kernel [L, D, 3, D] and a bias [L, 3, D]
    parts = [(f"blocks/attn/c_attn/{name}", queries, config.attention_multiplier) for name in ("kernel", "bias")]
    parts += [(f"{last}/{name}", layer, config.output_multiplier) for name in ("scale", "bias")]
    for name, where, multiplier in parts:
        flat[name] = np.array(flat[name], np.float32)  # a copy
        flat[name][where] *= np.float32(multiplier)
    return dataclasses.replace(config, mup_base_width=None, mup_base_heads=None), unflatten_dict(flat, sep="/")
