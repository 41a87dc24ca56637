"""The LSTM that GPT-1 is compared with, and the multiplicative LSTM of the sentiment unit, behind gpt.py's functions.

    lstm     i, f, o, u = x Wx + h Wh + b                                 (Gers et al. 2000)
    mlstm    i, f, o, u = x Wx + m Wh + b,  m = (x Wmx) * (h Wmh)         (Krause et al. 2016)
    both     c = sigmoid(f) c + sigmoid(i) tanh(u),  h = sigmoid(o) tanh(c)

GPT-1 (Radford et al. 2018 §5) replaces its Transformer by "a single layer 2048 unit LSTM using the same framework".
The mlstm is that of Radford, Jozefowicz and Sutskever 2017, "Learning to Generate Reviews and Discovering Sentiment":
bytes, an embedding of 64, 4,096 units, and weight normalization of the four matrices (Salimans & Kingma 2016): the
columns of W are g v / |v|, g and v learned.

Time is a scan. What does not depend on the state is one product for all steps before it, and so are the gradients of
the recurrent matrices after it. The state is 0 where a row or a segment begins. Shape suffixes: model/__init__.py.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gptjax.errors import InputError
from gptjax.model.layers import INIT_STD, drop
from gptjax.model.matmul import dot_over_tokens, matmul
from gptjax.parallel.sharding import constrain
from gptjax.ranges import BelowOne, Count

SHAPE = ("cell", "vocab_size", "units", "d_embed", "tied_head")  # the keys that weights depend on


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """The architecture of an LSTM language model of one layer. Hashable, so that it can be a static argument of jit.

    cell: 'lstm', or 'mlstm', the multiplicative LSTM with weight normalization.
    units: width of the state.
    d_embed: width of the token embedding.
    vocab_size: rows of the embedding; pre-training takes the tokenizer's size where it is not set.
    context_length: tokens of a training sequence, at whose start the state is 0.
    tied_head: the output projection is the token embedding (as GPT's), which then is as wide as the state; False = a
        matrix and a bias of its own.
    dropout: probability that an element of the embeddings and of the outputs is dropped in training, never one of the
        state that the next step gets (Zaremba et al. 2014).
    """

    vocab_size: Count
    units: Count
    d_embed: Count
    context_length: Count
    cell: str = "lstm"
    tied_head: bool = True
    dropout: BelowOne = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "units", "d_embed", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"model.{name} must be a positive whole number, not {value!r}.")
        if self.cell not in ("lstm", "mlstm"):
            raise InputError(f"model.cell={self.cell!r}: choose lstm or mlstm.")
        if self.tied_head and self.d_embed != self.units:
            raise InputError(
                f"model.tied_head needs an embedding as wide as the state: model.d_embed={self.d_embed}, model.units="
                f"{self.units}. Change one, or set model.tied_head=False."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout must be in [0, 1), not {self.dropout}.")

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return self.units

    @property
    def n_layer(self) -> int:
        return 1


class State(NamedTuple):
    """What a step gets from the one before it. In generation it is what the KV cache is to a GPT."""

    h_BU: jax.Array  # in the dtype of the activations
    c_BU: jax.Array  # the cell, float32


def parameter_count(c: LSTMConfig) -> int:
    """V E + 4 U (E + U + 1), of an mlstm also U (E + U) + 10 U gains [+ V (U + 1), untied head]."""
    E, U, V = c.d_embed, c.units, c.vocab_size
    multiplicative = U * (E + U) + 10 * U if c.cell == "mlstm" else 0
    return V * E + 4 * U * (E + U + 1) + multiplicative + (0 if c.tied_head else V * (U + 1))


def non_embedding_count(c: LSTMConfig) -> int:
    """Parameters of the cell alone."""
    return parameter_count(c) - c.vocab_size * (c.d_embed + (0 if c.tied_head else c.units + 1))


def matmul_flops(c: LSTMConfig) -> int:
    """FLOPs of a token's matrix products, forward."""
    E, U = c.d_embed, c.units
    return 2 * ((E + U) * U * (5 if c.cell == "mlstm" else 4) + c.vocab_size * U)


# --- parameters -------------------------------------------------------------------------------------------


def abstract_params(config: LSTMConfig):
    """The parameters as shapes with logical axis names attached (for sharding); nothing is computed.

    {'wte', 'cell': {'x', 'h' [, 'mx', 'mh']}, [, 'lm_head', 'lm_bias']}: each part of the cell has a 'kernel' [in, out]
    (gates i, f, o, u: [in, 4, U]), 'x' a 'bias' too, those of an mlstm a 'gain' for each column.
    """
    c, gates = config, (4, config.units)
    box = lambda shape, *names: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    def part(inputs, outputs):
        made = {"kernel": box((inputs, *outputs), "embed", *(None,) * len(outputs))}
        return made | ({"gain": box(outputs, *(None,) * len(outputs))} if c.cell == "mlstm" else {})

    cell = {"x": part(c.d_embed, gates) | {"bias": box(gates, None, None)}, "h": part(c.units, gates)}
    if c.cell == "mlstm":
        cell |= {"mx": part(c.d_embed, (c.units,)), "mh": part(c.units, (c.units,))}
    params = {"wte": box((c.vocab_size, c.d_embed), "vocab", "embed"), "cell": cell}
    if not c.tied_head:
        params |= {"lm_head": box((c.vocab_size, c.units), "vocab", "embed"), "lm_bias": box((c.vocab_size,), "vocab")}
    return params


def init(config: LSTMConfig, key):
    """Parameters, float32: matrices ~ N(0, 1/inputs), gains = the columns' norms, biases 0, but 1 of the forget gate
    (Jozefowicz et al. 2015); a head, or the embedding that is one, ~ N(0, .02), another embedding ~ N(0, 1)."""
    shapes = jax.tree.map(lambda x: x.shape, nn.meta.unbox(abstract_params(config)))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))

    def make(path, shape, key):
        name = path[-1].key
        if name in ("bias", "lm_bias", "gain"):
            return jnp.zeros(shape)
        embedding = 1.0 if name == "wte" and not config.tied_head else INIT_STD
        return jax.random.normal(key, shape) * (shape[0] ** -0.5 if name == "kernel" else embedding)

    params = structure.unflatten(make(p, s, jax.random.fold_in(key, i)) for i, (p, s) in enumerate(paths))
    params["cell"]["x"]["bias"] = params["cell"]["x"]["bias"].at[1].set(1.0)
    for part in params["cell"].values():
        if "gain" in part:
            part["gain"] = jnp.sqrt((part["kernel"] ** 2).sum(0))
    return params


def _kernel(part):
    """The matrix of a part of the cell, float32, normalized where it has gains."""
    w = part["kernel"].astype(jnp.float32)
    return w if "gain" not in part else w * lax.rsqrt((w * w).sum(0).clip(1e-12)) * part["gain"]


def normalized(params):
    """The parameters of the same function without gains, so that not every token's step has to normalize them."""
    part = lambda p: {"kernel": _kernel(p)} | {name: a for name, a in p.items() if name == "bias"}
    return {**params, "cell": {name: part(p) for name, p in params["cell"].items()}}


# --- the recurrence ---------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """The recurrent matrices, float32."""

    h_U4U: jax.Array
    mh_UU: jax.Array | None  # of an mlstm


class _Inputs(NamedTuple):
    """What a step gets from outside: [T, ...] of all steps."""

    z_B4U: jax.Array  # x Wx + b
    m_BU: jax.Array | None  # x Wmx, of an mlstm
    keep_B1: jax.Array  # float32: 0 where the state is reset before the step, else 1


def _gates(z_B4U, c_BU):
    """(h, c) from the gates' inputs and the cell before; c and what is inside is float32."""
    i_BU, f_BU, o_BU, u_BU = (z_B4U[:, k].astype(jnp.float32) for k in range(4))
    c_BU = jax.nn.sigmoid(f_BU) * c_BU + jax.nn.sigmoid(i_BU) * jnp.tanh(u_BU)
    return (jax.nn.sigmoid(o_BU) * jnp.tanh(c_BU)).astype(z_B4U.dtype), c_BU


@jax.custom_vjp
def _recurrence(w: _Weights, inputs: _Inputs, state: State):
    """(h [T, B, U], c [T, B, U], float32) after each step."""
    return _forward(w, inputs, state)[0]


def _forward(w, inputs, state):
    weights = _gathered(w, inputs.z_B4U.dtype)

    def step(state, now: _Inputs):
        h_BU, c_BU = state.h_BU * now.keep_B1.astype(state.h_BU.dtype), state.c_BU * now.keep_B1
        if now.m_BU is not None:
            h_BU = (now.m_BU * _dot("bu,uv->bv", h_BU, weights.mh_UU)).astype(h_BU.dtype)
        z_B4U = (now.z_B4U + _dot("bu,ugv->bgv", h_BU, weights.h_U4U)).astype(now.z_B4U.dtype)
        state = State(*_gates(z_B4U, c_BU))
        return state, (*state, z_B4U)

    _, (h_TBU, c_TBU, z_TB4U) = lax.scan(step, state, inputs)
    return (h_TBU, c_TBU), (w, inputs, state, h_TBU, c_TBU, z_TB4U)


def _backward(residuals, cotangents):
    """The scan backwards gives the gradients of what each step summed; the matrices' are products over all steps."""
    w, inputs, first, h_TBU, c_TBU, z_TB4U = residuals
    dtype = z_TB4U.dtype
    weights = _gathered(w, dtype)
    before = lambda one_BU, all_TBU: jnp.concatenate([one_BU[None], all_TBU[:-1]]) * inputs.keep_B1
    h_TBU, c_TBU = before(first.h_BU, h_TBU).astype(dtype), before(first.c_BU, c_TBU)  # what the steps began with
    mh_TBU = None if w.mh_UU is None else _dot("tbu,uv->tbv", h_TBU, weights.mh_UU)

    def step(carry, now):
        (d_h_BU, d_c_BU), ((d_h_out_BU, d_c_out_BU), z_B4U, c_BU, (_, m_BU, keep_B1), mh_BU) = carry, now
        pull = jax.vjp(_gates, z_B4U, c_BU)[1]
        d_z_B4U, d_c_BU = pull(((d_h_BU + d_h_out_BU).astype(dtype), d_c_BU + d_c_out_BU))
        d_h_BU, of_m = _dot("bgv,ugv->bu", d_z_B4U, weights.h_U4U), None
        if m_BU is not None:
            d_m_BU, d_mh_BU = (d_h_BU * mh_BU).astype(dtype), (d_h_BU * m_BU).astype(dtype)
            d_h_BU, of_m = _dot("bv,uv->bu", d_mh_BU, weights.mh_UU), (d_m_BU, d_mh_BU)
        return (d_h_BU * keep_B1, d_c_BU * keep_B1), (d_z_B4U, of_m)

    zeros_BU = jnp.zeros_like(first.c_BU)
    (d_h_BU, d_c_BU), (d_z_TB4U, of_m) = lax.scan(
        step, (zeros_BU, zeros_BU), (cotangents, z_TB4U, c_TBU, inputs, mh_TBU), reverse=True
    )
    d_m_TBU, d_mh_TBU = of_m or (None, None)
    into_TBU = h_TBU if of_m is None else (inputs.m_BU * mh_TBU).astype(dtype)
    d_w = _Weights(
        constrain(dot_over_tokens(into_TBU, d_z_TB4U, 2), "embed", None, None),
        None if of_m is None else constrain(dot_over_tokens(h_TBU, d_mh_TBU, 2), "embed", None),
    )
    return d_w, _Inputs(d_z_TB4U, d_m_TBU, jnp.zeros_like(inputs.keep_B1)), State(d_h_BU.astype(dtype), d_c_BU)


_recurrence.defvjp(_forward, _backward)


def _gathered(w: _Weights, dtype) -> _Weights:
    """In the dtype of the activations, and gathered over fsdp once, before the scan."""
    return jax.tree.map(lambda a: constrain(a.astype(dtype), *(None,) * a.ndim), w)


def _dot(subscripts, a, b):
    """float32, whatever the operands are."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


# --- the pure functions that the rest of the code calls ---------------------------------------------------


def states(params, config: LSTMConfig, tokens_BT, *, segment_ids=None, dropout_keys=None, state: State | None = None,
           dtype=jnp.float32):  # fmt: skip
    """The states after each token: h [B, T, U] in dtype, without the outputs' dropout, and c [B, T, U] in float32.

    Args:
        segment_ids: int [B, T], or None; the state is 0 again where a segment begins.
        dropout_keys: a key for each row, [B]; None means no dropout.
        state: before the first token; None = 0.
    """
    B, T = tokens_BT.shape
    cell, by_time = params["cell"], lambda a: constrain(jnp.swapaxes(a, 0, 1), None, "batch", *(None,) * (a.ndim - 2))
    wte_VE = constrain(params["wte"], "vocab", "features")  # gathered whole: its rows are looked up
    x_BTE = drop(wte_VE[tokens_BT].astype(dtype), config.dropout, dropout_keys, 0)
    x_TBE = by_time(x_BTE)
    z_TB4U = matmul(x_TBE, _kernel(cell["x"]), ("embed", None, None))
    z_TB4U = (z_TB4U.astype(jnp.float32) + cell["x"]["bias"]).astype(dtype)
    m_TBU = matmul(x_TBE, _kernel(cell["mx"]), ("embed", None)) if "mx" in cell else None
    keep_BT1 = jnp.ones((B, T, 1), jnp.float32)
    if segment_ids is not None:
        keep_BT1 = keep_BT1.at[:, 1:, 0].set(segment_ids[:, 1:] == segment_ids[:, :-1])
    if state is None:
        state = State(*(constrain(jnp.zeros((B, config.units), kind), "batch", None) for kind in (dtype, jnp.float32)))
    w = _Weights(_kernel(cell["h"]), _kernel(cell["mh"]) if "mh" in cell else None)
    h_TBU, c_TBU = _recurrence(w, _Inputs(z_TB4U, m_TBU, by_time(keep_BT1)), state)
    return tuple(constrain(jnp.swapaxes(a, 0, 1), "batch", None, None) for a in (h_TBU, c_TBU))


def hidden(
    params,
    config: LSTMConfig,
    tokens_BT,
    *,
    positions=None,
    segment_ids=None,
    dropout_keys=None,
    dtype=jnp.float32,
    mesh=None,
):
    """The outputs h after each token, [B, T, U] in dtype; as gpt.hidden, whose `positions` and `mesh` it ignores. Rows
    may be longer than context_length."""
    h_BTU, _ = states(params, config, tokens_BT, segment_ids=segment_ids, dropout_keys=dropout_keys, dtype=dtype)
    return drop(h_BTU, config.dropout, dropout_keys, 1)


def readout(params, config: LSTMConfig, x_BTU):
    """(x [B, T, D], w [V, D]) whose product x w^T is the logits. The head's bias is a column of w, where x is 1;
    columns of 0 keep the width divisible over fsdp."""
    if config.tied_head:
        return x_BTU, params["wte"]
    mesh = jax.sharding.get_abstract_mesh()
    more = 1 if mesh.empty else mesh.shape["fsdp"]
    one_BTN = jnp.zeros((*x_BTU.shape[:-1], more), x_BTU.dtype).at[..., 0].set(1)
    bias_VN = jnp.pad(params["lm_bias"][:, None], ((0, 0), (0, more - 1)))
    return jnp.concatenate([x_BTU, one_BTN], -1), jnp.concatenate([params["lm_head"], bias_VN], -1)


def logits(params, config: LSTMConfig, x):
    """[..., U] -> [..., V], accumulated and returned in float32."""
    w_VU = params["wte" if config.tied_head else "lm_head"].astype(x.dtype)
    out = jnp.einsum("...u,vu->...v", x, w_VU, preferred_element_type=jnp.float32)
    return out if config.tied_head else out + params["lm_bias"]


def prefill(params, config: LSTMConfig, tokens_BT, positions_BT, segment_ids, *, dtype=jnp.float32, mesh=None):
    """Forward pass that keeps the last state: (hidden [B, T, U], State)."""
    h_BTU, c_BTU = states(params, config, tokens_BT, segment_ids=segment_ids, dtype=dtype)
    return h_BTU, State(h_BTU[:, -1], c_BTU[:, -1])


def decode_step(params, config: LSTMConfig, tokens_BT, positions_BT, cache: State, slot, filled_BS, *,
                dtype=jnp.float32):  # fmt: skip
    """One or more new tokens per row: (hidden [B, T, U], State). As gpt.decode_step; there are no slots."""
    h_BTU, c_BTU = states(params, config, tokens_BT, state=cache, dtype=dtype)
    return h_BTU, State(h_BTU[:, -1], c_BTU[:, -1])
