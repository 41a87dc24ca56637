"""Shared by the evaluators: sums over batches, and evenly spaced batches of a validation split."""

import jax
import numpy as np

from gptjax.console import progress
from gptjax.distributed import hosts
from gptjax.training.stopping import leave_if_asked


def evaluation_sums(eval_step, params, batches, sharding) -> tuple[float, float, dict]:
    """(loss sum, count, {name: another sum}) over all batches, each of which has this host's rows.

    Raises Interrupted if the run has been asked to stop."""
    results, quiet = [], len(batches) < 20 or not hosts.first()
    for i in progress(range(len(batches)), desc="evaluating", unit="batch", disable=quiet, leave=False):
        leave_if_asked()
        batch = {k: v for k, v in batches[i].items() if isinstance(v, np.ndarray)}
        results.append(eval_step(params, jax.tree.map(lambda a: hosts.global_array(a, sharding), batch)))
    return jax.tree.map(lambda *xs: sum(map(float, xs)), *results) if results else (0.0, 0.0, {})


def spread(batches, most: int):
    """At most `most` of the batches, evenly spaced; 0 = all."""
    if not 0 < most < len(batches):
        return batches
    return [batches[i * len(batches) // most] for i in range(most)]
