"""Loss-curve collapse: rungs that are trained alike have one curve (L(t T) - E) / (L(T) - E) over the share t of their
steps, and a rung that leaves it was mis-tuned or broke (Qiu et al. 2025, "Scaling collapse", arXiv 2507.02119)."""

import json

import numpy as np

from gptjax import paths
from gptjax.scaling.points import Points

SHARES = np.linspace(0.1, 1.0, 19)
TOLERANCE = 0.02


def curves(points: Points) -> dict[str, np.ndarray]:
    """{run: its loss at SHARES of its steps}, from metrics.jsonl in the runs' workdirs; each value is the mean of the
    lines since the share before. Runs without them are left out."""
    found = {}
    for name, workdir in zip(points.names, points.workdirs, strict=False):
        file = paths.local(workdir) / "metrics.jsonl" if workdir else None
        if file is None or not file.exists():
            continue
        steps, losses = [], []
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
                loss, step = row.get("loss"), row["step"]
            except (ValueError, KeyError, AttributeError):
                continue  # damaged
            if loss is not None:
                steps.append(step)
                losses.append(loss)
        if len(steps) >= 2 * len(SHARES):
            share = np.array(steps) / max(steps)
            cells = np.searchsorted(SHARES, share)
            sums, counts = (np.bincount(cells, w, len(SHARES))[1:] for w in (losses, np.ones(len(losses))))
            if (counts > 0).all():
                found[name] = sums / counts
    return found


def collapsed(found: dict[str, np.ndarray], irreducible: float) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """({run: its curve over its end}, {run that leaves the median of all: by how much}).

    A run leaves it where its root mean square distance is above both 2 % and 3 times the median run's.
    """
    usable = {name: curve for name, curve in found.items() if curve[-1] > irreducible}
    shown = {name: (curve - irreducible) / (curve[-1] - irreducible) for name, curve in usable.items()}
    if len(shown) < 3:
        return shown, {}
    middle = np.median(list(shown.values()), axis=0)
    apart = {name: float(np.sqrt(np.mean((curve / middle - 1) ** 2))) for name, curve in shown.items()}
    limit = max(TOLERANCE, 3 * float(np.median(list(apart.values()))))
    return shown, {name: value for name, value in apart.items() if value > limit}
