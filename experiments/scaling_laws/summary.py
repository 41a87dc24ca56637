"""What came out: outcome beside forecast and baselines, noise, exponents, flags."""

import json
import math
from pathlib import Path

import jax
import numpy as np

from gptjax.data.corpus import pretraining_text
from gptjax.model import architecture
from gptjax.objectives.lm import log_probs
from gptjax.trained import load_model

WINDOWS = 1024  # of the held-out text: those of grid.py's evaluations, 256 batches of 4


def of(workdir: Path, made: dict, ahead: dict) -> dict:
    """The figures. made: law.json. ahead: the sealed forecast. The workdir has results.jsonl, of ladder and target, and
    the runs."""
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    (run,) = [row for row in rows if row["set"] == "target"]
    error = lambda loss: loss / run["loss"] - 1
    return {
        "forecast": {key: ahead[key] for key in ("name", "loss", "low", "high", "time", "beyond", "widening")},
        "outcome": run["loss"], "inside": ahead["low"] <= run["loss"] <= ahead["high"], "error": error(ahead["loss"]),
        "errors_of_baselines": {name: error(loss) for name, loss in ahead["baselines"].items()},
        "epochs_of_target": run["D"] / run["text_tokens"],
        "exponents": {"approach_3": made["exponents"]["a"]} | {k: made[k] for k in ("approach_1", "approach_2")},
        "seeds": seeds(workdir, [row for row in rows if row["set"] == "ladder" and row["status"] == "done"]),
        "flags": made["flags"], "not_done": [row["name"] for row in rows if row["status"] != "done"],
        "seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip


def text(figures: dict) -> str:
    """The figures for people."""
    ahead, percent = figures["forecast"], lambda share: f"{100 * share:+.2f} %"
    lines = [
        f"outcome {figures['outcome']:.4f}, {'inside' if figures['inside'] else 'outside'} of {ahead['low']:.4f} to "
        f"{ahead['high']:.4f}; the forecast, {ahead['loss']:.4f}, is off by {percent(figures['error'])}",
        *(f"  {name.replace('_', ' ')}: {percent(error)}" for name, error in figures["errors_of_baselines"].items()),
        f"the target has seen its text {figures['epochs_of_target']:.2f} times",
    ]
    for cell in figures["seeds"]:
        lines.append(
            f"{cell['budget']:.2g} FLOPs, {cell['N']:,} parameters: sigma over {len(cell['losses'])} seeds "
            f"{percent(cell['sigma'])}; the held-out text's error {percent(cell['text_error'])}, of a difference "
            f"{percent(cell['text_error_of_difference'])}"
        )
    return "\n".join([*lines, *figures["flags"], *(f"not done: {name}" for name in figures["not_done"])])


def seeds(workdir: Path, rows: list[dict]) -> list[dict]:
    """Of each cell with several seeds: their losses, the standard deviation between them, and the standard error of
    the difference of two of them that is due to the held-out text being finite; relative to the loss."""
    cells = {}
    for row in rows:
        cells.setdefault((row["budget"], row["N"]), []).append(row)
    found = []
    for (budget, size), runs in cells.items():
        if len(runs) > 1:
            losses = np.array([row["loss"] for row in runs])
            first, second = (nats_and_bytes(workdir / row["workdir"]) for row in runs[:2])
            found.append({
                "budget": budget, "N": size, "losses": losses.tolist(), "sigma": losses.std(ddof=1) / losses.mean(),
                "text_error": text_error(*first) / losses[0],
                "text_error_of_difference": text_error(first[0] - second[0], first[1]) / losses[0],
            })  # fmt: skip
    return found


def text_error(nats: np.ndarray, sizes: np.ndarray) -> float:
    """The standard error of sum(nats) / sum(bytes), in bits a byte, over the windows of a text, [n] each."""
    residuals = nats - nats.sum() / sizes.sum() * sizes
    return float(residuals.std() * math.sqrt(len(nats)) / sizes.sum() / math.log(2))


def nats_and_bytes(workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Loss and bytes of each window of the held-out text, [n] each, by a run's model."""
    model, text = load_model(workdir), pretraining_text(workdir)

    @jax.jit
    def losses(params, batch):
        x_BTD = architecture.hidden(params, model.config, batch["tokens"][:, :-1])
        x_BTD, w_VD = architecture.readout(params, model.config, x_BTD)
        return -(log_probs(x_BTD, w_VD, batch["tokens"][:, 1:]) * batch["weights"]).sum(1)

    (batches,) = text.validation_batches(model.config.context_length, 64, WINDOWS // 64).values()
    nats, sizes = [], []
    for batch in batches:
        with jax.set_mesh(model.mesh):
            nats.append(losses(model.params, {key: batch[key] for key in ("tokens", "weights")}))
        sizes.append(batch["target_bytes"])
    return np.concatenate(nats), np.concatenate(sizes)
