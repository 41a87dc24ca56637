"""Does a law fitted to small runs forecast one of ten times their compute? The whole protocol, from text to outcome.

    python -m experiments.scaling_laws --workdir=runs/scaling_laws

Three learning rates at one size; a coarse pass, from which the grid of the ladder takes its center; the ladder
(grid.py), a law fitted to it, the forecast of the target, sealed before its run exists; the target's run; the outcome
beside the forecast. The same command continues after any interruption. In the workdir are the sweeps' folders (rates,
coarse, ladder with law.json and forecasts/, target), report/report.html with the pictures, and summary.json. More
workers, on any host that sees the workdir, are python -m gptjax.sweep on the preset that is being run, in its folder,
with --config.data.source=WORKDIR/text.jsonl and --config.data.cache=WORKDIR/tokens.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from experiments.scaling_laws import grid, summary, text
from gptjax import command_line, json_files
from gptjax.errors import InputError
from gptjax.queue.claims import Queue, gather
from gptjax.scaling import law_file, points, predict, report
from gptjax.scaling.bootstrap import SAMPLES
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import CHINCHILLA
from gptjax.sweep import plan
from gptjax.sweep.worker import work

AS_READ = {"columns": {}, "where": {}}  # of law_file: the columns go by their own names


def sweep(workdir: Path, preset: str) -> Path:
    """Runs a preset of grid.py in a folder of its own, as one worker. Returns its results.jsonl. InputError: some runs
    have failed. SystemExit: it was stopped."""
    folder, config = workdir / preset.partition("@")[0], grid.base()
    config.data.update(source=str(text.write(workdir / "text.jsonl")), cache=str(workdir / "tokens"))
    planned, queue = grid.get_sweep(config, preset), Queue(folder)
    plan.claim(queue.folder, planned)
    finished, names = work(planned, queue, folder), [point.name for point in planned.points]
    states, rows = queue.states(names), {row["name"]: row for row in gather(queue.folder)}
    print(plan.table(planned, states, rows), flush=True)
    if not finished:
        raise SystemExit("stopped; the same command continues")
    if failed := [name for name, state in states.items() if state.kind == "failed"]:
        raise InputError(f"{len(failed)} runs have failed: {folder}/runs/{failed[0]}/log.txt says why.")
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


def study(workdir: Path) -> dict:
    """Everything. Returns the figures of summary.json."""
    run = functools.partial(sweep, workdir)
    run("rates")
    ratio = center(points.read(str(run("coarse"))))
    ladder = run(f"ladder@{ratio:g}")
    sealed = forecast(ladder, grid.target(grid.base(), ratio))
    print(predict.text(predict.open_sealed(sealed)), flush=True)
    target, results = run(f"target@{ratio:g}"), workdir / "results.jsonl"
    together(results, ladder, target)
    made, runs = law_file.load(str(ladder.parent / "law.json"))[0], points.read(str(results))
    report.write(runs, made, report.compared(runs, sealed.parent), workdir / "report", "The ladder and its target")
    figures = {"tokens_per_parameter": ratio} | summary.of(workdir, made, predict.open_sealed(sealed))
    json_files.write_json(workdir / "summary.json", figures)
    return figures


def main(_):
    print(summary.text(study(Path(FLAGS.workdir))))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", "runs/scaling_laws", "Where everything goes.")
    command_line.run(main)
