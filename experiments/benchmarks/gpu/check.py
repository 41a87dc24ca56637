"""Is it right? The device beside this process's own CPU, its attention beside the plain formula, the sampler beside
teacher forcing, and the first minibatch of PPO: each figure with its bound."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu.common import Scale, half, some_segments
from experiments.benchmarks.ppo_cpu import Ours
from experiments.benchmarks.setup import random_tokens
from gptjax.model import gpt
from gptjax.model.attention import attention, reference_attention, resolve
from gptjax.objectives.lm import causal_lm_loss
from gptjax.training.precision import DTYPES


def run(scale: Scale) -> dict:
    compute = half(jax.devices()[0]).compute
    found = against_the_cpu(scale)
    for window in (None, scale.small.local_window):
        for packed in (False, True):
            found |= attention_path(scale, compute, window, packed)
    for precision in ("float32", *(["bfloat16"] if compute == "bfloat16" else [])):  # PPO knows no float16
        found |= sampler_and_ppo(scale, precision)
    checks = {k: {"value": float(v), "bound": bound, "right": bool(v <= bound)} for k, (v, bound) in found.items()}
    wrong = [k for k, c in checks.items() if not c["right"]]  # NaN too
    return {"path": resolve("auto", jax.default_backend()), "checks": checks, "wrong": wrong}


def against_the_cpu(scale: Scale) -> dict:
    """Loss and gradients of one packed batch in float32, without TF32."""
    model, answers = scale.small, []
    time = model.context_length
    tokens = random_tokens(model.vocab_size, 4, time)
    batch = {"tokens": tokens, "weights": np.ones((4, time), np.float32)}
    batch["segment_ids"] = np.asarray(some_segments(4, time))
    params = jax.device_get(jax.jit(functools.partial(gpt.init, model))(jax.random.key(0)))
    for device, path in ((jax.devices()[0], "auto"), (jax.devices("cpu")[0], "reference")):
        loss = causal_lm_loss(dataclasses.replace(model, attention=path), jnp.float32, 64)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            mean = jax.value_and_grad(lambda p, b, loss=loss: jnp.divide(*loss(p, b, None)))
            answers.append(jax.device_get(jax.jit(mean)(params, batch)))
    (loss, grads), (expected, expected_grads) = answers
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), grads, expected_grads)
    return {
        "float32 loss beside the CPU, relative": (abs(loss / expected - 1), 1e-5),
        "float32 gradients beside the CPU, of an array's largest": (np.max(jax.tree.leaves(apart)), 1e-3),
    }


def attention_path(scale: Scale, compute: str, window, packed: bool) -> dict:
    """The platform's own path and its gradients in 16 bits beside the formula in float32 on the same numbers."""
    m, dtype = scale.small, DTYPES[compute]
    shape = (4, m.context_length, m.n_head, m.d_head)
    arrays = [jax.random.normal(k, shape, dtype) for k in jax.random.split(jax.random.key(0), 4)]
    segments = some_segments(4, m.context_length) if packed else None

    def value_and_gradients(path):
        def both(q, k, v, d_out):
            out, pull = jax.vjp(lambda q, k, v: path(q, k, v, window=window, segment_ids=segments), q, k, v)
            return out, *pull(d_out)

        return jax.jit(both)

    found = value_and_gradients(functools.partial(attention, path="auto"))(*arrays)
    with jax.default_matmul_precision("highest"):
        expected = value_and_gradients(reference_attention)(*(a.astype(jnp.float32) for a in arrays))
    name = f"{compute} attention{', banded' * (window is not None)}{', packed' * packed}"
    # One rounding of the result is a half of 2^-8 of it; the rest is rounded probabilities. As tests/test_attention.py.
    eps = float(jnp.finfo(dtype).eps) / 2
    excess = [jnp.abs(a.astype(jnp.float32) - b) - eps * jnp.abs(b) for a, b in zip(found, expected, strict=True)]
    means = [jnp.abs(a.astype(jnp.float32) - b).mean() for a, b in zip(found, expected, strict=True)]
    return {
        f"{name}: largest difference beyond rounding": (np.max(excess), 2e-2),
        f"{name}: mean difference": (np.max(means), 3e-3),
    }


def sampler_and_ppo(scale: Scale, compute: str) -> dict:
    """One iteration from equal policy and reference."""
    with jax.default_matmul_precision("highest" if compute == "float32" else "default"):
        ours = Ours(scale.small, scale.prompt, scale.response, 8, epochs=1, dtype=DTYPES[compute])
        ours.iterate()
    exact = compute == "float32"
    m = {k: float(v) for k, v in jax.device_get(ours.measured).items()}
    return {
        # 16 bits of a hidden state are 2^-8 of it, and logits add hundreds of such: a fault is far above .1
        f"{compute} sampler's log-probabilities beside teacher forcing": (
            m["policy/rollout_logp_diff"], 1e-4 if exact else 0.1
        ),
        f"{compute} PPO, first minibatch, largest |ratio - 1|": (
            m["policy/first_ratio_deviation"], 1e-4 if exact else 0.1,
        ),
        f"{compute} PPO, KL of equal models": (abs(m["objective/kl"]), 0.0),
    }  # fmt: skip
