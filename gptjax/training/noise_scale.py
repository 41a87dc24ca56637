"""The gradient noise scale tr(Sigma) / |G|^2: about the batch size beyond which more data a step saves few steps.

McCandlish et al. 2018, An Empirical Model of Large-Batch Training: B_simple (eq. 2.9), estimated as in appendix A.1. G
is the gradient of the loss over all data, Sigma the covariance of a single datum's. A mean gradient over B data has

    E |g_B|^2 = |G|^2 + tr(Sigma) / B

so that its mean squared norms at two batch sizes give both, unbiased. A step has two sizes: its micro-batches' and its
own. The two parts are noisy, |G|^2 may even come out negative, so each is averaged over steps before they are divided.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

DECAY = 0.99  # of the averages, once there are as many steps


def squared_norm(tree):
    """The sum of squares of all entries, float32."""
    return sum(jnp.vdot(x, x, preferred_element_type=jnp.float32) for x in jax.tree.leaves(tree))


def gradient_and_noise(counts, squared_norms, count, squared):
    """(|G|^2, tr(Sigma)) by the mean gradients of M micro-batches and of the batch that they make up.

    counts [M], count: data of each, and of all. squared_norms [M], squared: squared norms of their mean gradients.
    Micro-batches without data do not matter; with fewer than two others there is no estimate, which then is nan.
    """
    used = counts > 0
    small, big = jnp.mean(1 / jnp.maximum(counts, 1), where=used), 1 / count
    trace = (jnp.mean(squared_norms, where=used) - squared) / (small - big)
    return squared - trace * big, trace


class Averages:
    """Averages over steps of |G|^2 and tr(Sigma): over all steps so far, of more than 100 exponentially weighted."""

    def __init__(self, squared: float | None = None, trace: float | None = None):
        self.parts = None if squared is None or trace is None else np.array([squared, trace])

    def add(self, step: int, squared: float, trace: float) -> dict[str, float | None]:
        """The fields of metrics.jsonl after a step, counted from 1. A value that is not finite is left out."""
        new = np.array([squared, trace], float)
        if np.isfinite(new).all():
            keep = 0.0 if self.parts is None else min(DECAY, 1 - 1 / step)
            self.parts = new if self.parts is None else keep * self.parts + (1 - keep) * new
        squared, trace = (math.nan, math.nan) if self.parts is None else map(float, self.parts)
        ratio = trace / squared if squared > 0 else math.nan
        return {"noise/squared_gradient": squared, "noise/trace": trace, "noise_scale": ratio}
