"""Intervals over seeds, and the comparison with GPT-1's Table 5."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

# Radford et al. 2018, Table 5. The average is of 8 tasks of GLUE, of which the study has CoLA and SST-2.
TABLE_5 = {
    "full": {"average": 74.7, "cola": 45.4, "sst2": 91.3},
    "no_auxiliary": {"average": 75.0, "cola": 47.9, "sst2": 92.0},
    "no_pretraining": {"average": 59.9, "cola": 18.9, "sst2": 84.0},
    "lstm": {"average": 69.1, "cola": 30.3, "sst2": 90.5},
}
VARIANTS = tuple(TABLE_5)


def interval(values: Sequence[float]) -> dict:
    """Mean, half-width of its 95 % interval by Student's t, and the values. half is None for a single value."""
    n, half = len(values), None
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return {"mean": float(np.mean(values)), "half": half, "values": [float(v) for v in values]}


def verdict(difference: Mapping, published: float) -> str:
    """Whether a measured difference has the published one's sign: 'agrees', 'disagrees', or 'undecided' where its
    interval has both signs."""
    mean, half = difference["mean"], difference["half"]
    if half is None or abs(mean) <= half:
        return "undecided"
    return "agrees" if mean * published > 0 else "disagrees"


def table(cells: Sequence[Mapping], tasks: Sequence[str], seeds: Sequence[int], variants: Sequence[str]) -> dict:
    """{variant: {task: interval, 'average': interval}}, in points of 100, of the seeds that have all cells.

    cells: {'variant', 'task', 'seed', 'value'}. The average of a seed is over the tasks, its interval over seeds.
    """
    value = {(c["variant"], c["task"], c["seed"]): 100 * c["value"] for c in cells}
    found = {}
    for variant in variants:
        whole = [s for s in seeds if all((variant, t, s) in value for t in tasks)]
        if whole:
            of_task = {t: [value[variant, t, s] for s in whole] for t in tasks}
            average = np.mean(list(of_task.values()), axis=0)
            found[variant] = {t: interval(v) for t, v in of_task.items()} | {"average": interval(average)}
    return found


def comparison(rows: Mapping[str, Mapping]) -> dict:
    """{variant: its average minus that of the full model, with its interval (seeds paired), the published difference,
    the verdict, and under 'tasks' the same of each task, without the last two where Table 5 does not have it}."""
    found = {}
    for variant in VARIANTS[1:]:
        if variant in rows and "full" in rows:
            of = {column: _difference(rows, variant, column) for column in rows["full"]}
            found[variant] = of.pop("average") | {"tasks": of}
    return found


def _difference(rows: Mapping[str, Mapping], variant: str, column: str) -> dict:
    one, full = (rows[name][column]["values"] for name in (variant, "full"))
    difference = interval(np.subtract(one, full) if len(one) == len(full) else [np.mean(one) - np.mean(full)])
    if column not in TABLE_5[variant]:
        return difference
    published = TABLE_5[variant][column] - TABLE_5["full"][column]
    return difference | {"published": published, "verdict": verdict(difference, published)}
