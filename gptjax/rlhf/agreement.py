"""How well scores agree with people's rankings: accuracy, calibration, and what length alone would explain.

Plain numpy over a whole validation set. A pair is a better and a worse completion of one prompt.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pairs:
    """margin: r(better) - r(worse); longer: tokens of the better less those of the worse; weight: 1 / pairs of its
    prompt. All float64 [pairs]."""

    margin: np.ndarray
    longer: np.ndarray
    weight: np.ndarray


def pairs(scores, ranks, valid, lengths) -> Pairs:
    """All ranked pairs of [prompts, K] arrays; ties in rank are no pairs."""
    parts = []
    for r, rank, ok, n in zip(scores, ranks, valid, lengths, strict=True):
        keep = np.flatnonzero(ok > 0)
        better, worse = np.nonzero(rank[keep][:, None] < rank[keep][None])
        if better.size:
            r, n = r[keep].astype(np.float64), n[keep].astype(np.float64)
            parts.append((r[better] - r[worse], n[better] - n[worse], np.full(better.size, 1 / better.size)))
    return Pairs(*(np.concatenate(p) for p in zip(*parts, strict=True))) if parts else Pairs(*np.zeros((3, 0)))


def _accuracy(difference) -> float | None:
    """Share of positive differences, a tie counting half; None without pairs."""
    return float((np.sign(difference) / 2 + 0.5).mean()) if difference.size else None


def agreement(p: Pairs) -> dict:
    """accuracy (pairs equal), accuracy_by_prompt (prompts equal, as the loss has it), margin; longer_wins: what
    choosing the longer one would get; accuracy where the better one is longer, shorter, or within a token; and
    length_correlation of margin and length difference."""
    result = {
        "pairs": int(p.margin.size),
        "accuracy": _accuracy(p.margin),
        "accuracy_by_prompt": float(((np.sign(p.margin) / 2 + 0.5) * p.weight).sum() / max(p.weight.sum(), 1e-9)),
        "margin": float(p.margin.mean()) if p.margin.size else None,
        "longer_wins": _accuracy(p.longer),
        "accuracy_better_is_longer": _accuracy(p.margin[p.longer > 1]),
        "accuracy_better_is_shorter": _accuracy(p.margin[p.longer < -1]),
        "accuracy_same_length": _accuracy(p.margin[np.abs(p.longer) <= 1]),
    }
    varied = p.margin.size > 1 and p.margin.std() > 0 and p.longer.std() > 0
    result["length_correlation"] = float(np.corrcoef(p.margin, p.longer)[0, 1]) if varied else None
    return result


def calibration(p: Pairs, bins: int = 10) -> list[dict]:
    """Pairs in `bins` equal parts by |margin|: the agreement the model predicts, sigma(|margin|), beside what it gets.

    A calibrated model's two columns are equal (Stiennon et al. 2020 appendix G.2 plots them).
    """
    order = np.argsort(np.abs(p.margin), kind="stable")
    rows = []
    for part in np.array_split(order, min(bins, max(len(order), 1))):
        if part.size:
            size = np.abs(p.margin[part])
            rows.append({
                "margin": float(size.mean()),
                "predicted": float((1 / (1 + np.exp(-size))).mean()),
                "observed": _accuracy(p.margin[part]),
                "pairs": int(part.size),
            })  # fmt: skip
    return rows


def length_explains(figures: dict, within: float = 0.02) -> bool:
    """Whether choosing by length alone (the longer, or the shorter) would do as well, but for `within`."""
    if figures["longer_wins"] is None or figures["accuracy"] is None:
        return False
    by_length = max(figures["longer_wins"], 1 - figures["longer_wins"])
    return by_length >= figures["accuracy"] - within
