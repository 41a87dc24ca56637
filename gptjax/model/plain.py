"""The forward pass of GPT-1, 2 and 3 as the papers write it: no sharding, dropout, scan or cache.

Read this before gpt.py, which computes the same faster; tests/test_gpt.py compares the two. `params` is what gpt.init
returns, `p` a part of it. The multipliers are 1 but for muP (mup.py). Sources: Radford et al. 2018 §3.1 (LayerNorm
after each residual sum), Radford et al. 2019 §2.3 (before each sub-layer), Brown et al. 2020 §2.1 (dense and banded
layers).
"""

import jax
import jax.numpy as jnp

from gptjax.model.attention import reference_attention
from gptjax.model.layers import LAYER_NORM_EPS
from gptjax.model.spec import GPTConfig


def forward(params, c: GPTConfig, tokens_BT):
    """Token ids [B, T] -> logits [B, T, V], float32."""
    x_BTD = params["wte"][tokens_BT] + params["wpe"][: tokens_BT.shape[1]]
    for i in range(c.n_layer):
        p = jax.tree.map(lambda a, i=i: a[i], params["blocks"])  # blocks are stacked [L, ...]
        window = c.local_window if c.is_local(i) else None
        if c.norm == "pre":
            x_BTD += attention(p["attn"], layer_norm(p["ln_1"], x_BTD), c, window)
            x_BTD += mlp(p["mlp"], layer_norm(p["ln_2"], x_BTD))
        else:
            x_BTD = layer_norm(p["ln_1"], x_BTD + attention(p["attn"], x_BTD, c, window))
            x_BTD = layer_norm(p["ln_2"], x_BTD + mlp(p["mlp"], x_BTD))
    if c.norm == "pre":
        x_BTD = layer_norm(params["ln_f"], x_BTD)
    return c.output_multiplier * x_BTD @ (params["wte"] if c.tied_head else params["lm_head"]).T


def attention(p, x_BTD, c: GPTConfig, window):
    """[B, T, D] -> [B, T, D]. window: how many positions back a query sees, its own included; None = all."""
    B, T, D = x_BTD.shape
    qkv_BT3D = jnp.einsum("btd,dce->btce", x_BTD, p["c_attn"]["kernel"]) + p["c_attn"]["bias"]
    q_BTHK, k_BTHK, v_BTHK = (qkv_BT3D[:, :, i].reshape(B, T, c.n_head, c.d_head) for i in range(3))
    y_BTHK = reference_attention(c.attention_multiplier * q_BTHK, k_BTHK, v_BTHK, window=window)
    return linear(p["c_proj"], y_BTHK.reshape(B, T, D))


def mlp(p, x_BTD):
    """[B, T, D] -> [B, T, D], with the tanh approximation of GELU."""
    return linear(p["c_proj"], jax.nn.gelu(linear(p["c_fc"], x_BTD), approximate=True))


def linear(p, x):
    """[..., in] -> [..., out]; the kernel is [in, out]."""
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x_BTD):
    """[B, T, D] -> [B, T, D], normalized over D with the biased variance."""
    mean, variance = x_BTD.mean(-1, keepdims=True), x_BTD.var(-1, keepdims=True)
    return (x_BTD - mean) / jnp.sqrt(variance + LAYER_NORM_EPS) * p["scale"] + p["bias"]
