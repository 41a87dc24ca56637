"""The best of k samples, and whether any of them is a hit, estimated exactly from n >= k samples.

The mean over all C(n, k) choices of k among the n, without replacement, in closed form: unbiased, and of less variance
than groups of k drawn once. Uses: pass@k (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"), the
expected maximum toxicity and the chance of any toxic text (Gehman et al. 2020, RealToxicityPrompts, k = 25), best-of-n
(Nakano et al. 2021, WebGPT, appendix I).
"""

from collections.abc import Sequence

import numpy as np

from gptjax.errors import InputError


def weights_of_best(n: int, k: int) -> np.ndarray:
    """[n]: the chance that the j-th smallest of n values is the largest of k of them, C(j - 1, k - 1) / C(n, k).

    By the ratio of neighbors, from the largest down, so that nothing overflows. InputError: k is not in 1 ... n.
    """
    if not 1 <= k <= n:
        raise InputError(f"The best of {k} samples cannot be estimated from {n}: take 1 <= k <= {n}, or more samples.")
    j = np.arange(n - 1, k - 1, -1)  # C(j - 1, k - 1) / C(j, k - 1) = (j - k + 1) / j
    found = np.zeros(n)
    found[k - 1 :] = k / n * np.cumprod(np.concatenate([[1.0], (j - k + 1) / j]))[::-1]
    return found


def expected_maximum(values: Sequence[float], k: int) -> float:
    """E[max of k] of samples of one prompt. InputError: fewer than k of them."""
    return float(np.sort(np.asarray(values, np.float64)) @ weights_of_best(len(values), k))


def probability_of_any(samples: int, hits: int, k: int) -> float:
    """P(any of k samples is a hit), of n samples of which c are: 1 - C(n - c, k) / C(n, k).

    As a product, whose factors neither overflow nor cancel (Chen et al. 2021, equation 1 and figure 3). Of code that
    passes its tests it is pass@k. InputError: more hits than samples, or fewer than k samples.
    """
    if not (0 <= hits <= samples and 1 <= k <= samples):
        raise InputError(
            f"P(any of {k}) of {samples} samples, {hits} of them hits: take at least k samples, and 1 <= k."
        )
    if samples - hits < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - hits + 1, samples + 1)))
