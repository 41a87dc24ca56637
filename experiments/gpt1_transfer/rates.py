"""The choice of the learning rates, by what the study does not evaluate on.

A rate is GPT-1's, times the root of how much narrower the model is (runs.py), times one of FACTORS:

- Pre-training: each model for a quarter of the updates; the lowest loss on the held-out text. Those must be some
  hundreds: after 80 any rate has learned the words' frequencies and no more, also one that stays there (LOG.md).
- Fine-tuning: one rate for all variants of a model. A fifth of the training rows of two tasks is held out, and the
  highest mean of the scores on it is taken: of the Transformer over both `full` and `no_pretraining`, which is not to
  suffer from a rate that suits the pre-trained one; of the LSTM, which the study has pre-trained only, over that.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.gpt1_transfer import runs
from experiments.gpt1_transfer.rows import Task
from gptjax.pretrain import pretrain

FACTORS = {"pretraining": (1.0, 3.0, 9.0), "finetuning": (1.0, 4.0, 16.0)}
SHORTER = 4
HELD_OUT = "0.2"  # of the training rows
VARIANTS = {"transformer": ("full", "no_pretraining"), "lstm": ("lstm",)}
SEED = 1000  # of fine-tuning, none of the study's


def unchosen() -> dict:
    """Both models at a factor of 1."""
    return {model: {"factor": 1.0, "tried": []} for model in VARIANTS}


def factors(chosen: dict) -> dict[str, float]:
    return {model: found["factor"] for model, found in chosen.items()}


def pretraining(size: runs.Size, text: str, workdir: Path) -> dict:
    """{model: {factor: the best one, tried: [{factor, learning_rate, loss on the held-out text}]}}."""
    found = {}
    for model in VARIANTS:
        tried = []
        for factor in FACTORS["pretraining"]:
            c = runs.pretrain_config(model, size, text, workdir, 0, factor)  # the tokens of seed 0 are kept
            c.steps = -(-size.steps // SHORTER)
            c.schedule.warmup_tokens /= SHORTER
            c.eval.every = c.checkpoint.every = 10**6
            result = runs.finished(pretrain(c, str(workdir / "rates" / f"{model}-{factor:g}")))
            loss = result.evaluation["loss"]
            tried.append({"factor": factor, "learning_rate": c.optimizer.learning_rate, "loss": loss})
        found[model] = {"factor": min(tried, key=lambda t: t["loss"])["factor"], "tried": tried}
    return found


def finetuning(tasks: Sequence[Task], size: runs.Size, workdir: Path) -> dict:
    """{model: {factor: the best one, tried: [{factor, learning_rate, scores: {run: on the held-out rows}}]}}. Of the
    tasks the first two whose score is an accuracy."""
    some, found = [t for t in tasks if t.metric == "accuracy"][:2] or tasks, {}
    for model, variants in VARIANTS.items():
        tried = []
        for factor in FACTORS["finetuning"]:
            scores = {}
            for cell, task in ((runs.Cell(t.name, v, SEED), t) for t in some for v in variants):
                c = runs.finetune_config(cell, task, size, workdir, factor)
                c.data.valid = HELD_OUT
                folder = workdir / "rates" / f"{cell.name}-{factor:g}"
                scores[f"{task.name}-{cell.variant}"], _ = runs.run_cell(c, task, folder, workdir / "runs.log")
            tried.append({"factor": factor, "learning_rate": c.optimizer.learning_rate, "scores": scores})
        best = max(tried, key=lambda t: np.mean(list(t["scores"].values())))
        found[model] = {"factor": best["factor"], "tried": tried}
    return found
