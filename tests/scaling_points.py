"""Runs planted on a known law, for the tests of gptjax/scaling."""

import json

import numpy as np

from gptjax.scaling.laws import CHINCHILLA, GPT4, HOFFMANN, KAPLAN, KAPLAN_ND, optimum
from gptjax.scaling.points import of_arrays

BUDGETS = np.array([1e18, 1e19, 1e20, 1e21])
GPT4_TRUTH = dict(a=30.0, c=1.7, b=-0.06)


def isoflop(budgets=BUDGETS, sizes=7, span=4.0, drift=0.0, noise=0.0, seed=0, law=HOFFMANN):
    """`sizes` models a budget, from N*/span to N* span, the grid's middle drifting from 1 to 1 + drift times N*; losses
    of Chinchilla's law times exp(noise)."""
    middle = np.geomspace(1, 1 + drift, len(budgets))
    N = np.concatenate([optimum(law, c)[0] * m * np.geomspace(1 / span, span, sizes)
                        for c, m in zip(budgets, middle, strict=True)])  # fmt: skip
    D = np.repeat(budgets, sizes) / (6 * N)
    errors = noise * np.random.default_rng(seed).standard_normal(len(N))
    return of_arrays(N=N, D=D, loss=CHINCHILLA.loss(law, N=N, D=D) * np.exp(errors))


def scattered(count=60, noise=0.0, seed=0, law=HOFFMANN):
    """Runs over 2.5 decades of N and of D, drawn at random."""
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7.5, 10, count), 10 ** rng.uniform(9, 11.5, count)
    return of_arrays(N=N, D=D, loss=CHINCHILLA.loss(law, N=N, D=D) * np.exp(noise * rng.standard_normal(count)))


def rates(sizes=(1e6, 4e6, 1.6e7), a=3.0, b=-0.4, grid=2.0 ** np.arange(-14, -3)):
    """A sweep over learning rates: losses that are parabolas in log lr about a N^b, at every size and rate."""
    N, lr = (x.ravel() for x in np.meshgrid(sizes, grid, indexing="ij"))
    return of_arrays(N=N, D=20 * N, loss=3.0 + 0.02 * (np.log(lr) - np.log(a * N**b)) ** 2, lr=lr)


def of_kaplan(count, noise, seed):
    """Runs on Kaplan's L(N, D), over 3 decades of N and 2.5 of D, drawn at random."""
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(6, 9, count), 10 ** rng.uniform(8, 10.5, count)
    loss = KAPLAN_ND.loss(KAPLAN["kaplan_nd"], N=N, D=D)
    return of_arrays(N=N, D=D, loss=loss * np.exp(noise * rng.standard_normal(count)))


def of_compute(count, noise, seed):
    """The best runs of `count` budgets over 6 decades, on L = a C^b + c."""
    C = np.geomspace(1e16, 1e22, count)
    loss = GPT4.loss(GPT4_TRUTH, C=C)
    return of_arrays(C=C, loss=loss * np.exp(noise * np.random.default_rng(seed).standard_normal(count)))


def write(points, path, **more):
    """results.jsonl as a sweep writes it."""
    learning_rates = points.columns.get("lr", [None] * len(points))
    rows = [
        {"name": f"run-{i}", "N": n, "D": d, "C": 6 * n * d, "loss": loss, "metric": "nats/token", "tokenizer": "abc",
         "count": "with_embedding", "seed": 0, "learning_rate": lr, "status": "done", "steps": 100, "seconds": 1.0,
         **more}
        for i, (n, d, loss, lr) in enumerate(zip(points["N"], points["D"], points["loss"], learning_rates, strict=True))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
