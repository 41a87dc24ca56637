"""muP (model/mup.py): its coordinate check, and how the best learning rate moves with the width.

    python -m experiments.mup [--only=coordinates|transfer] [--out=experiments/mup]

Writes results.json, coordinates.png and transfer.png. What is asked and what came out: README.md.
"""

import json
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments.mup import coordinates, pictures, transfer
from gptjax import command_line, json_files

WIDTHS, SEEDS = (64, 128, 256, 512, 1024), (0, 1)
TRANSFER_WIDTHS, RATES, STEPS = (32, 64, 128), tuple(2.0**-k for k in range(11, 3, -1)), 200


def run_coordinates() -> dict:
    """{variant: {"slopes": {activation: slope}, "movement": {activation: [steps][widths]}}}"""
    found = {}
    for name, variant in coordinates.VARIANTS.items():
        moved = coordinates.check(variant, WIDTHS, seeds=SEEDS)
        slopes = coordinates.slopes(moved, WIDTHS)
        found[name] = {"slopes": slopes, "movement": {k: np.array([[f"{x:.3g}" for x in row] for row in v], float)
                                                      for k, v in moved.items()}}  # fmt: skip
        print(f"{name}: slopes " + ", ".join(f"{k} {v:+.2f}" for k, v in slopes.items()), flush=True)
    return {"widths": WIDTHS, "seeds": SEEDS, "variants": found}


def run_transfer() -> dict:
    """{parametrization: [widths][rates] of losses}"""
    found = {}
    for name, mup in (("standard", False), ("muP", True)):
        found[name] = []
        for width in TRANSFER_WIDTHS:
            if mup and width == transfer.BASE:  # the same model
                losses = found["standard"][TRANSFER_WIDTHS.index(width)]
            else:
                losses = np.round(transfer.losses(width, mup, RATES, steps=STEPS), 3).tolist()
            found[name].append(losses)
            print(f"{name}, width {width}: best rate {RATES[int(np.argmin(losses))]:.2g}, {losses}", flush=True)
    return {"widths": TRANSFER_WIDTHS, "rates": RATES, "steps": STEPS, "losses": found}


def main(_):
    out = Path(FLAGS.out)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, run, draw in (("coordinates", run_coordinates, pictures.coordinates),
                            ("transfer", run_transfer, pictures.transfer)):  # fmt: skip
        if FLAGS.only in (None, name):
            began = time.process_time()
            results[name] = json_files.json_safe(run()) | {"cpu_seconds": round(time.process_time() - began)}
            path.write_text(json_files.dumps(results) + "\n")
            draw(results[name], out / f"{name}.png")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("out", str(Path(__file__).parent), "Folder for results.json and the pictures.")
    flags.DEFINE_enum("only", None, ["coordinates", "transfer"], "One of the two; both if not given.")
    command_line.run(main)
