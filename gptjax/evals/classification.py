"""Metrics of predictions on labeled examples, numpy over a whole split, and the evaluator that computes them.

Sources: F1 and Matthews correlation as in GLUE (Wang et al. 2019 §3): of the second label against the first;
Matthews correlation of more than two classes is Gorodkin's R_K (2004).
"""

from collections.abc import Sequence

import jax
import numpy as np

from gptjax.data.labeled import Example
from gptjax.distributed import hosts
from gptjax.model.architecture import ModelConfig
from gptjax.objectives.finetune import extracted, task_logits
from gptjax.parallel.sharding import batch_sharding
from gptjax.training.stage import Evaluation
from gptjax.training.stopping import leave_if_asked


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    return float((predicted == gold).mean())


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where nothing is class 1."""
    both = ((predicted == 1) & (gold == 1)).sum()
    return float(2 * both / max((predicted == 1).sum() + (gold == 1).sum(), 1))


def macro_f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Mean over the classes that are predicted or right of the F1 of each."""
    return float(np.mean([f1(predicted == c, gold == c) for c in np.union1d(predicted, gold)]))


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews correlation in [-1, 1]; 0 where either has a single class."""
    classes = 1 + max(predicted.max(), gold.max())
    counts = np.zeros((classes, classes))
    np.add.at(counts, (gold, predicted), 1)
    n, of_gold, of_predicted = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = n * np.trace(counts) - of_gold @ of_predicted
    spread = (n**2 - of_gold @ of_gold) * (n**2 - of_predicted @ of_predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman correlation: Pearson's of the ranks, equal values having the mean of theirs."""
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """softmax, float64."""
    z_NC = np.asarray(logits_NC, np.float64)
    p_NC = np.exp(z_NC - z_NC.max(-1, keepdims=True))
    return p_NC / p_NC.sum(-1, keepdims=True)


def expected_scores(logits_NC: np.ndarray, scores: Sequence[int]) -> np.ndarray:
    """The expected score under the predicted distribution over whole scores."""
    return probabilities(logits_NC) @ np.arange(scores[0], scores[1] + 1)


def figures(logits_NC: np.ndarray, examples: Sequence[Example], scores: Sequence[int] | None) -> dict:
    """'loss', the mean cross-entropy, and the metrics of labeled examples: of scores 'pearson' and 'spearman', else
    'accuracy' with its standard error, and for two classes 'f1' and 'matthews'; for more, 'matthews'."""
    target_NC = np.stack([e.target for e in examples])
    gold = np.array([e.value for e in examples])
    p_NC = probabilities(logits_NC)
    log_p_NC = np.log(np.where(target_NC > 0, p_NC, 1).clip(1e-300))
    found = {"loss": float(-(target_NC * log_p_NC).sum(-1).mean())}
    if scores is not None:
        predicted = expected_scores(logits_NC, scores)
        return found | {"pearson": pearson(predicted, gold), "spearman": spearman(predicted, gold)}
    predicted, gold = logits_NC.argmax(-1), gold.astype(int)
    share = accuracy(predicted, gold)
    found |= {"accuracy": share, "accuracy_stderr": float(np.sqrt(share * (1 - share) / max(len(gold) - 1, 1)))}
    if logits_NC.shape[1] == 2:
        found["f1"] = f1(predicted, gold)
    return found | {"matthews": matthews(predicted, gold)}


def predictions(split: str, logits_NC, examples: Sequence[Example], labels: Sequence[str], scores) -> list[dict]:
    """Rows of predictions.jsonl: the split, the row's number in it, the predicted label or score, the probabilities,
    and the row's own label or score where it has one."""
    p_NC, rows = probabilities(logits_NC), []
    predicted = expected_scores(logits_NC, scores) if scores is not None else logits_NC.argmax(-1)
    for number, (e, p_C, value) in enumerate(zip(examples, p_NC, predicted, strict=True)):
        name = (lambda v: float(v)) if scores is not None else (lambda v: labels[int(v)])
        row = {"split": split, "row": number, "predicted": name(value)}
        row["probabilities"] = dict(zip(labels, map(float, p_C), strict=True))
        rows.append(row | ({"label": name(e.value)} if e.target.any() else {}))
    return rows


def logits_of(config: ModelConfig, task: str, dtype, mesh):
    """Returns (params of a classifier, batch of labeled.LabeledBatches) -> logits [B, C]."""

    def logits(params, batch):
        _, last_BND = extracted(params, config, batch["tokens"], batch["lengths"], dtype=dtype, mesh=mesh)
        return task_logits(params["head"], last_BND, batch["valid"], task)

    return logits


def predictor(logits, mesh):
    """Returns predict(params, batches) -> float32 [examples, C], the logits of all batches' rows of weight 1.

    logits: (params, batch of labeled.LabeledBatches) -> [B, C].
    """
    # Each host has some of the rows and needs all logits.
    step = jax.jit(lambda params, b: (logits(params, b), b["weights"]), out_shardings=hosts.replicated(mesh))

    def predict(params, batches) -> np.ndarray:
        sharding, parts = batch_sharding(mesh, 0), []
        for i in range(len(batches)):
            leave_if_asked()
            batch = {k: hosts.global_array(a, sharding) for k, a in batches[i].items()}
            logits_BC, weights_B = jax.device_get(step(params, batch))
            parts.append(logits_BC[weights_B > 0])
        return np.concatenate(parts)

    return predict


def labeled_metrics(predict, batches, examples: Sequence[Example], scores: Sequence[int] | None):
    """Returns evaluate(state) -> Evaluation of `figures`. predict: of predictor; batches: of these examples, in
    order."""
    return lambda state: Evaluation(figures(predict(state.params, batches), examples, scores))
