"""From logits to a token: temperature, top-k, top-p, greedy."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gptjax.errors import InputError

# Temperatures below this are greedy, as in vLLM: a float32 logit divided by it has a rounding error of nats, and by
# 1e-40 it overflows.
_GREEDY_BELOW = 1e-5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature: divides the logits; 0 (and below 1e-5) = greedy. top_k: keep the k likeliest; 0 = all. top_p: keep
    the likeliest tokens until their mass reaches p (Holtzman et al. 2020); 1 = all. Top-k is applied first."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # NaN fails these comparisons too
            raise InputError(f"sampling: temperature={self.temperature}: give a finite number, 0 for greedy.")
        if self.top_k < 0:
            raise InputError(f"sampling: top_k={self.top_k}: give the number of tokens to keep, 0 for all.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling: top_p={self.top_p}: give a share above 0, up to 1 for all tokens.")

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


def filtered_logits(logits, s: Sampling):
    """Logits [..., V] of the distribution that is sampled from; -inf for tokens that are filtered out."""
    logits = logits.astype(jnp.float32) / s.temperature
    if 0 < s.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, s.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if s.top_p < 1.0:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
        kept = (before < s.top_p).at[..., 0].set(True)  # 0 < top_p is false of a top_p that float32 rounds to 0
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)
    return logits


def sample(logits, key, s: Sampling):
    """One token per row: int32 [...] from logits [..., V]."""
    if s.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    noisy = filtered_logits(logits, s)
    noisy = noisy + jax.random.gumbel(key, noisy.shape)  # bitwise what jax.random.categorical does
    # Two plain reductions: XLA:CPU takes three times as long over an argmax with the noise fused into it.
    ids = jnp.arange(noisy.shape[-1], dtype=jnp.int32)
    return jnp.where(noisy == noisy.max(-1, keepdims=True), ids, ids[-1]).min(-1)
