"""Objective: the loss that a training stage minimizes, in the form that the train step takes (training/step.py)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax


class Sums(NamedTuple):
    """total / count is the loss. All three are sums over a micro-batch, so that they add up over micro-batches, devices
    and hosts. extra: further sums by name, for metrics."""

    total: jax.Array
    count: jax.Array
    extra: dict = {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss: (params, micro-batch of arrays [B, ...], dropout keys [B] or None) -> Sums, or a tuple of its fields.
    prepare: (global batch of arrays [M, B, ...]) -> the same, before it is split into micro-batches: for weights that
    depend on the whole batch. metrics: {name: extra sum of a step} -> {name: value in metrics.jsonl}.
    unit: what `count` counts. dropout: the loss has dropout of its own, besides the model's."""

    loss: Callable
    prepare: Callable[[dict], dict] = lambda batch: batch
    metrics: Callable[[dict], dict] = lambda sums: {}
    unit: str = "tokens"
    dropout: bool = False
