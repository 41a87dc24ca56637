"""How well scores agree with human rankings: accuracy, calibration, and how much length alone explains.

The statistics are numpy over a complete validation set. A pair is a better and a worse completion of one prompt. B is
the number of prompts and N the number of completions of each.
"""

import dataclasses

import jax
import numpy as np

from gptjax.distributed import hosts
from gptjax.evals.base import evaluation_sums, spread
from gptjax.evals.calibration import bin_figures
from gptjax.objectives.preference import ranking_statistics
from gptjax.parallel.sharding import batch_sharding
from gptjax.training.stage import Evaluation
from gptjax.training.step import jit_eval_step
from gptjax.training.stopping import leave_if_asked


def scorer(score, mesh):
    """Returns score_all(params, batches of comparisons) -> scores, ranks, valid, lengths: [B, N] each.

    score: (params, tokens [rows, T], lengths [rows]) -> [rows].
    """

    def score_batch(params, b):
        B, N, T = b["tokens"].shape
        scores = score(params, b["tokens"].reshape(B * N, T), b["lengths"].reshape(B * N))
        return scores.reshape(B, N), b["ranks"], b["valid"], b["lengths"]

    # Each host has some of the rows and needs all scores.
    score_batch = jax.jit(score_batch, out_shardings=hosts.replicated(mesh))

    def score_all(params, batches):
        sharding, parts = batch_sharding(mesh, 0), []
        for i in range(len(batches)):
            leave_if_asked()
            batch = {k: hosts.global_array(a, sharding) for k, a in batches[i].items() if k != "weights"}
            parts.append(jax.device_get(score_batch(params, batch)))
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

    return score_all


def ranking(scores, criterion, batches):
    """Returns evaluate(state) -> Evaluation: 'loss', 'accuracy', 'margin' and 'pairs' over comparisons.

    scores: what `scorer` returns. criterion: (scores, ranks, valid) -> (sum, count).
    """

    def evaluate(state) -> Evaluation:
        scored, ranks, valid, _ = scores(state.params, batches)
        total, count = criterion(scored, ranks, valid)
        found = ranking_metrics({k: float(v) for k, v in ranking_statistics(scored, ranks, valid).items()})
        return Evaluation({"loss": float(total) / max(float(count), 1), **found})

    return evaluate


def ranking_sums(loss, batches, mesh, most: int = 0):
    """Returns evaluate(state) -> Evaluation: 'loss', 'accuracy', 'margin' and 'pairs' over comparisons.

    loss: of an Objective whose extra sums are ranking_statistics. most: how many batches, evenly spaced; 0 = all.
    """
    step, sharding, batches = jit_eval_step(loss, mesh), batch_sharding(mesh, 0), spread(batches, most)

    def evaluate(state) -> Evaluation:
        total, count, extra = evaluation_sums(step, state.params, batches, sharding)
        return Evaluation({"loss": total / max(count, 1), **ranking_metrics(extra)})

    return evaluate


def ranking_metrics(sums: dict) -> dict:
    """Means of the sums of objectives/preference.ranking_statistics."""
    n = max(sums["pairs"], 1)
    return {"accuracy": sums["correct"] / n, "margin": sums["margin"] / n, "pairs": int(sums["pairs"])}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """margin: r(better) - r(worse); longer: tokens of the better minus tokens of the worse; weight: 1 / number of pairs
    of its prompt; characters: as longer, in characters. All float64 [pairs]."""

    margin: np.ndarray
    longer: np.ndarray
    weight: np.ndarray
    characters: np.ndarray


def pairs(scores, ranks, valid, lengths, characters) -> Pairs:
    """All ranked pairs of arrays [B, N]; equal ranks make no pair. lengths: in tokens."""
    parts = []
    for r, rank, ok, n, chars in zip(scores, ranks, valid, lengths, characters, strict=True):
        keep = np.flatnonzero(ok > 0)
        better, worse = np.nonzero(rank[keep][:, None] < rank[keep][None])
        if better.size:
            r, n, chars = (a[keep].astype(np.float64) for a in (r, n, chars))
            r, n, chars = (a[better] - a[worse] for a in (r, n, chars))
            parts.append((r, n, np.full(better.size, 1 / better.size), chars))
    return Pairs(*(np.concatenate(p) for p in zip(*parts, strict=True))) if parts else Pairs(*np.zeros((4, 0)))


def _accuracy(difference) -> float | None:
    """Share of positive differences, a tie counting half; None without pairs."""
    return float((np.sign(difference) / 2 + 0.5).mean()) if difference.size else None


def agreement(p: Pairs) -> dict:
    """Figures of agreement.

    accuracy: each pair has the same weight. accuracy_by_prompt: each prompt has the same weight, as in the loss.
    longer_wins, longer_wins_characters: accuracy of choosing the completion with more tokens or characters.
    length_baseline: best accuracy of length alone, {'rule', 'accuracy'}, which a reward model should exceed.
    accuracy_better_is_longer, _is_shorter, accuracy_same_length (within a token): of those pairs alone.
    length_correlation: of the margin and the difference in tokens.
    """
    result = {
        "pairs": int(p.margin.size),
        "accuracy": _accuracy(p.margin),
        "accuracy_by_prompt": float(((np.sign(p.margin) / 2 + 0.5) * p.weight).sum() / max(p.weight.sum(), 1e-9)),
        "margin": float(p.margin.mean()) if p.margin.size else None,
        "longer_wins": _accuracy(p.longer),
        "longer_wins_characters": _accuracy(p.characters),
        "length_baseline": length_baseline(p),
        "accuracy_better_is_longer": _accuracy(p.margin[p.longer > 1]),
        "accuracy_better_is_shorter": _accuracy(p.margin[p.longer < -1]),
        "accuracy_same_length": _accuracy(p.margin[np.abs(p.longer) <= 1]),
    }
    varied = p.margin.size > 1 and p.margin.std() > 0 and p.longer.std() > 0
    result["length_correlation"] = float(np.corrcoef(p.margin, p.longer)[0, 1]) if varied else None
    return result


def length_baseline(p: Pairs) -> dict | None:
    """{'rule', 'accuracy'} of the best of four rules: more or fewer tokens or characters; None without pairs."""
    if not p.margin.size:
        return None
    found = {}
    for unit, difference in (("tokens", p.longer), ("characters", p.characters)):
        more = _accuracy(difference)
        found |= {f"more {unit}": more, f"fewer {unit}": 1 - more}
    rule = max(found, key=found.get)
    return {"rule": rule, "accuracy": found[rule]}


def calibration(p: Pairs, bins: int = 10) -> list[dict]:
    """Pairs in `bins` equal parts by |margin|: the predicted agreement, sigma(|margin|), and the observed one.

    They are equal for a calibrated model (Stiennon et al. 2020 appendix G.2 plots them). The observed one's 95 % Wilson
    interval is too narrow where a prompt has several pairs, which are not independent.
    """
    order = np.argsort(np.abs(p.margin), kind="stable")
    rows = []
    for part in np.array_split(order, min(bins, max(len(order), 1))):
        if part.size:
            size = np.abs(p.margin[part])
            row = bin_figures(1 / (1 + np.exp(-size)), np.sign(p.margin[part]) / 2 + 0.5)  # a tie is half right
            rows.append({"margin": float(size.mean()), "pairs": row.pop("items"), **row})
    return rows


def agreement_with(scores, params, batches, comparisons) -> dict:
    """The entries of reward.json on a split: agreement with its rankings, and calibration.

    scores: what `scorer` returns. batches: of `comparisons`, in their order.
    """
    scored, *rest = scores(params, batches)
    characters = np.zeros(scored.shape)
    for row, comparison in zip(characters, comparisons, strict=False):  # rows of padding follow
        row[: len(comparison.characters)] = comparison.characters
    p = pairs(scored, *rest, characters)
    return {**agreement(p), "calibration": calibration(p)}


def length_explains(figures: dict, within: float = 0.02) -> bool:
    """Whether length alone is as accurate as the model, up to `within`. False for a model no better than chance
    (accuracy within two standard errors of 1/2), which has learned nothing."""
    if not figures["pairs"] or figures["accuracy"] < 0.5 + figures["pairs"] ** -0.5:
        return False
    return figures["length_baseline"]["accuracy"] >= figures["accuracy"] - within
