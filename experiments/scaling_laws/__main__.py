"""Does a law fitted to small runs forecast one of ten times their compute? The whole protocol, from text to outcome.

    python -m experiments.scaling_laws --workdir=runs/scaling_laws [--workers=2]

Three learning rates at one size; a coarse pass, from which the grid of the ladder takes its center; the ladder
(grid.py), a law fitted to it, the forecast of the target, sealed before its run exists; the target's run; the outcome
beside the forecast. The same command continues after any interruption. In the workdir are the sweeps' folders (rates,
coarse, ladder with law.json and forecasts/, target), report/report.html with the pictures, and summary.json.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

from experiments.scaling_laws import grid, summary, text
from gptjax import command_line, json_files
from gptjax.errors import InputError
from gptjax.scaling import law_file, points, predict, report
from gptjax.scaling.bootstrap import SAMPLES
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import CHINCHILLA

AS_READ = {"columns": {}, "where": {}}  # of law_file: the columns go by their own names


def sweep(workdir: Path, preset: str, workers: int) -> Path:
    """Runs a preset of grid.py in a folder of its own. Returns its results.jsonl. InputError: some runs have failed."""
    folder = workdir / preset.partition("@")[0]
    command = [sys.executable, "-m", "gptjax.sweep", f"--config={grid.__file__}:{preset}", f"--workdir={folder}",
               f"--workers={workers}", f"--config.data.source={text.write(workdir / 'text.jsonl')}",
               f"--config.data.cache={workdir / 'tokens'}"]  # fmt: skip
    if code := subprocess.run(command).returncode:
        raise InputError(f"The runs of {preset} have not all finished (exit code {code}): the lines above say why.")
    return folder / "results.jsonl"


def center(coarse: points.Points) -> float:
    """Tokens per parameter where the loss of each budget is lowest, by a parabola through its sizes: the geometric mean
    over the budgets, to two digits. An optimum outside of a budget's sizes counts as the nearest of them."""
    found = []
    for which in points.budgets(coarse["C"]):
        n = np.log(coarse["N"][which])
        curve = np.polyfit(n - n.mean(), coarse["loss"][which], 2)
        lowest = n.mean() - curve[1] / (2 * curve[0]) if curve[0] > 0 else n[coarse["loss"][which].argmin()]
        size = math.exp(np.clip(lowest, n.min(), n.max()))
        found.append(coarse["C"][which].mean() / (6 * size**2))
        print(f"{found[-1]:.1f} tokens a parameter are best at {coarse['C'][which].mean():.2e} FLOPs")
    return float(f"{math.exp(np.mean(np.log(found))):.2g}")


def forecast(ladder: Path, target) -> Path:
    """Fits the law to the ladder's results and seals the target's forecast, once. Returns its path."""
    law, sealed = ladder.parent / "law.json", ladder.parent / "forecasts" / f"{target.name}.json"
    if sealed.exists():
        return sealed
    runs = points.read(str(ladder))
    found = fit(CHINCHILLA, runs)
    law_file.write(law, json_files.json_safe(law_file.record(found, SAMPLES, AS_READ, [grid.TARGET])))
    made, digest = law_file.load(str(law))
    run = predict.target(made, target.config.to_dict())
    predict.refuse_known(runs, run, target.name, ladder.parent.parent / "target" / "runs" / target.name)
    sealed.parent.mkdir(exist_ok=True)
    law_file.write(sealed, predict.seal(made, str(law), digest, found, run, target.name))
    return sealed


def together(path: Path, *results: Path):
    """Writes the runs of several results.jsonl into one file, with their folders from there."""
    rows = [json.loads(line) | {"set": file.parent.name} for file in results for line in file.read_text().splitlines()]
    rows = [row | {"workdir": f"{row['set']}/{row['workdir']}"} for row in rows]
    path.write_text("".join(json_files.dumps(row) + "\n" for row in rows))


def main(_):
    workdir = Path(FLAGS.workdir)
    run = lambda preset: sweep(workdir, preset, FLAGS.workers)
    run("rates")
    ratio = center(points.read(str(run("coarse"))))
    ladder = run(f"ladder@{ratio:g}")
    sealed = forecast(ladder, grid.target(grid.base(), ratio))
    print(predict.text(predict.open_sealed(sealed)), flush=True)
    target, results = run(f"target@{ratio:g}"), workdir / "results.jsonl"
    together(results, ladder, target)
    made, runs = law_file.load(str(ladder.parent / "law.json"))[0], points.read(str(results))
    report.write(runs, made, report.compared(runs, sealed.parent), workdir / "report", "The ladder and its target")
    figures = summary.of(workdir, made, predict.open_sealed(sealed))
    json_files.write_json(workdir / "summary.json", figures)
    print(summary.text(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", "runs/scaling_laws", "Where everything goes.")
    flags.DEFINE_integer("workers", 2, "Processes that run the sweeps.", lower_bound=1)
    command_line.run(main)
