"""What a training stage minimizes."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax


class Sums(NamedTuple):
    """total / count is the loss. All three are sums over a micro-batch, so that they add up over micro-batches, devices
    and hosts; extra: further sums by name."""

    total: jax.Array
    count: jax.Array
    extra: dict = {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss: (params, micro-batch, dropout keys of its rows [rows] or None) -> Sums, or a tuple of its fields.
    prepare: of the whole global batch, arrays [micro-batches, rows, ...], before it is computed in parts: for weights
    that depend on all of it. metrics: {name: extra sum of a step} -> {name: figure of metrics.jsonl}.
    unit: what `count` counts."""

    loss: Callable
    prepare: Callable[[dict], dict] = lambda batch: batch
    metrics: Callable[[dict], dict] = lambda sums: {}
    unit: str = "tokens"
